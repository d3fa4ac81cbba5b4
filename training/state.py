"""Everything a run needs to go on after a crash, in one file that is replaced in one instant."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from losa_export.errors import StateError
from losa_export.files import disk_errors
from losa_export.training.journal import RoundRecord
from losa_export.training.schedule import RoundPlan
from losa_export.training.tensors import flush, write_tensors

STATE_FOLDER = "state"
_CURRENT = "current.safetensors"
_PREVIOUS = "previous.safetensors"
_PARTIAL = "partial.safetensors"
_FORMAT = "losa-train-state-1"

Phase = Literal["prune", "tune", "complete"]
Fingerprint = Mapping[str, Any]


@dataclass
class RunState:
    """How far a run has come. Changed by the training loop alone.

    Attributes:
        phase: what comes next: pruning of the round, its tuning (or the rest of it), or nothing.
        round_number: current round, from 1.
        step: optimizer steps done in this round.
        total_steps: optimizer steps done in all rounds; also the place in the tuning data.
        plan: steps and learning rates of this round, once its tuning has begun.
        block_targets: sparsity targets of the last pruning; empty before the first.
        block_ranks: active ranks; empty before the first round's allocation.
        block_fits: this round's errors of each block before and after reconstruction; empty without.
        block_ranks_asked: this round's shares of rank before bounds and rounding.
        block_errors: this round's reconstruction error of each block; empty if it was not measured.
        block_outliers: this round's share of outliers of each block; empty if it was not measured.
        rmi: this round's mutual information between blocks, a list for each; empty if it was not measured.
        losses: losses of this round's steps.
        loss_terms: their terms by name, where they have more than one.
        elapsed_seconds: working time of the whole run, over all its sessions.
        measure_seconds: this round's time for measuring what the sparsity allocator asks; part of `prune_seconds`.
        prune_seconds: this round's pruning time.
        tune_seconds: this round's tuning time so far.
        allotted_seconds: this round's share of the time budget; None without one.
        seconds_per_step: measured over the last round with steps; None before.
        records: finished rounds.
    """

    phase: Phase = "prune"
    round_number: int = 1
    step: int = 0
    total_steps: int = 0
    plan: RoundPlan | None = None
    block_targets: list[float] = field(default_factory=list)
    block_ranks: list[int] = field(default_factory=list)
    block_fits: list[tuple[float, float]] = field(default_factory=list)
    block_ranks_asked: list[float] = field(default_factory=list)
    block_errors: list[float] = field(default_factory=list)
    block_outliers: list[float] = field(default_factory=list)
    rmi: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loss_terms: dict[str, list[float]] = field(default_factory=dict)
    elapsed_seconds: float = 0.0
    measure_seconds: float = 0.0
    prune_seconds: float = 0.0
    tune_seconds: float = 0.0
    allotted_seconds: float | None = None
    seconds_per_step: float | None = None
    records: list[RoundRecord] = field(default_factory=list)

    def to_json(self) -> str:
        """One JSON object; floats keep every bit."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunState:
        """The inverse of `to_json`."""
        values = json.loads(text)
        if values["plan"] is not None:
            values["plan"] = RoundPlan(**values["plan"])
        values["block_fits"] = [(before, after) for before, after in values["block_fits"]]
        values["records"] = [RoundRecord.from_json(record) for record in values["records"]]
        return cls(**values)


@dataclass(frozen=True)
class SavedState:
    """A state read back: progress, tensors by name, and what the run was started with."""

    state: RunState
    tensors: Mapping[str, Tensor]
    fingerprint: Fingerprint


def is_resumable(run: Path) -> bool:
    """Whether `run` holds a training state, finished or not."""
    return any((run / STATE_FOLDER / name).is_file() for name in (_CURRENT, _PREVIOUS))


def save_state(run: Path, state: RunState, tensors: Mapping[str, Tensor], fingerprint: Fingerprint) -> None:
    """Replace the saved state; the one before stays as a spare.

    The new file is written and flushed under another name first, so at every instant at least one whole
    state lies on the disk.
    Raises: OutputError if the disk is full or the folder cannot be written.
    """
    folder = run / STATE_FOLDER
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": _FORMAT,
        "state": state.to_json(),
        "fingerprint": json.dumps(fingerprint, sort_keys=True),
    }
    metadata["digest"] = _digest(ready, metadata)
    partial = folder / _PARTIAL
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(partial, ready, metadata)
        if (folder / _CURRENT).exists():
            (folder / _CURRENT).replace(folder / _PREVIOUS)
        partial.replace(folder / _CURRENT)
        flush(folder)


def drop_spare(run: Path) -> None:
    """Remove the state before the current one: a finished run needs none."""
    (run / STATE_FOLDER / _PREVIOUS).unlink(missing_ok=True)


def load_state(run: Path) -> SavedState:
    """Read the newest whole state.

    Raises: StateError if there is none, or none that can be read.
    """
    folder = run / STATE_FOLDER
    if not is_resumable(run):
        raise StateError(f"'{run}' holds no training state to resume; start it without --resume", run=run)
    faults = []
    for name in (_CURRENT, _PREVIOUS):
        try:
            return _read(folder / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            faults.append(f"{name}: {error}")
    raise StateError(
        f"the training state in '{folder}' is damaged ({'; '.join(faults)}); start again with --overwrite", run=run
    )


def _read(path: Path) -> SavedState:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"format {metadata.get('format')!r}, expected {_FORMAT!r}")
    if metadata.pop("digest") != _digest(tensors, metadata):
        raise ValueError("its contents do not match their digest")
    return SavedState(RunState.from_json(metadata["state"]), tensors, json.loads(metadata["fingerprint"]))


def _digest(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps(texts, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name].dtype}:{tuple(tensors[name].shape)}:".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_fingerprint(run: Path, saved: Fingerprint, now: Fingerprint) -> None:
    """Refuse to go on with other settings, another model or other texts.

    Raises: StateError that names what differs, with both values.
    """
    differing = [
        f"{name} was {saved.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    if differing:
        raise StateError(
            f"run '{run}' was started differently: {'; '.join(differing)}; resume it with the settings, model and "
            "texts it was started with, or start again with --overwrite",
            run=run,
            differing=differing,
        )
