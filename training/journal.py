"""rounds.jsonl: what each round did, one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from losa_export.files import write_text_atomic

JOURNAL_FILE = "rounds.jsonl"


@dataclass(frozen=True)
class RoundRecord:
    """One finished round.

    Attributes:
        round_number: from 1.
        target_sparsity: of all block linears together.
        sparsity_fraction: what was reached, by exact count.
        block_targets: target of each block.
        block_ranks: active adapter rank of each block.
        block_fits: relative squared error of each block's output before and after reconstruction; empty without.
        sparsity: weight name to the realised fraction of zeros.
        steps: optimizer steps.
        tokens: tokens trained on.
        losses: training loss of every step, in order.
        loss_terms: "cross_entropy", "kl" and "squarehead" of every step, as far as the loss adds them up, without
            their weights; empty where it is the cross-entropy alone.
        learning_rate_last: rate of the last step; None without steps.
        prune_seconds: calibration and pruning, wall time.
        tune_seconds: optimizer steps, wall time.
        peak_memory_bytes: largest resident size of the process so far, or on a GPU its largest allocation.
        mean_rank: rank asked for, on average over blocks.
        block_ranks_asked: share of rank of each block before bounds and rounding.
        block_errors: reconstruction error of each block after pruning; empty if it was not measured.
        block_outliers: share of each block's scores that are outliers; empty if it was not measured.
        rmi_row_sums: mutual information of each block with all others; empty if it was not measured.
        measure_seconds: the part of `prune_seconds` that measuring for the sparsity allocator took.
    """

    round_number: int
    target_sparsity: float
    sparsity_fraction: float
    block_targets: tuple[float, ...]
    block_ranks: tuple[int, ...]
    sparsity: Mapping[str, float]
    steps: int
    tokens: int
    losses: tuple[float, ...]
    learning_rate_last: float | None
    prune_seconds: float
    tune_seconds: float
    peak_memory_bytes: int
    block_fits: tuple[tuple[float, float], ...] = ()
    mean_rank: float = 0.0
    block_ranks_asked: tuple[float, ...] = ()
    block_errors: tuple[float, ...] = ()
    block_outliers: tuple[float, ...] = ()
    rmi_row_sums: tuple[float, ...] = ()
    measure_seconds: float = 0.0
    loss_terms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def loss_first(self) -> float | None:
        """Loss of the first step, before this round's tuning has changed anything."""
        return self.losses[0] if self.losses else None

    @property
    def loss_last(self) -> float | None:
        """Mean loss of the last tenth of the steps; single batches differ too much to be compared."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail) if tail else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, with `loss_first` and `loss_last` spelled out for readers of the file."""
        return {**dataclasses.asdict(self), "loss_first": self.loss_first, "loss_last": self.loss_last}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RoundRecord:
        """The inverse of `to_json`. What a journal of an earlier release lacks takes its default."""
        fields: dict[str, Any] = {
            entry.name: values[entry.name] for entry in dataclasses.fields(cls) if entry.name in values
        }
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        fields["block_fits"] = tuple((before, after) for before, after in fields.get("block_fits", ()))
        fields["loss_terms"] = {name: tuple(term) for name, term in fields.get("loss_terms", {}).items()}
        return cls(**fields)


def write_journal(run: Path, records: Sequence[RoundRecord]) -> None:
    """Write all rounds so far, atomically. Rewriting rather than appending leaves no round twice after a crash."""
    lines = [json.dumps(record.to_json(), ensure_ascii=False) + "\n" for record in records]
    write_text_atomic(run / JOURNAL_FILE, "".join(lines))


def read_journal(run: Path) -> list[RoundRecord]:
    """The rounds of a run folder, in order; empty before the first round is finished."""
    path = run / JOURNAL_FILE
    if not path.is_file():
        return []
    return [RoundRecord.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
