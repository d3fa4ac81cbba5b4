"""One cell of the study of methods: train, merge, and hold the merged model against the dense one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from losa_export.architecture import DecoderSpec
from losa_export.checkpoint import open_checkpoint
from losa_export.errors import StateError
from losa_export.eval.fidelity import fidelity
from losa_export.eval.machine import git_revision, package_versions
from losa_export.eval.perplexity import cut_windows, read_wikitext
from losa_export.eval.studies.command_line import file_label
from losa_export.eval.studies.methods_table import (
    METHODS,
    Budget,
    Cell,
    comparable,
    plain_lora_config,
    train_config,
)
from losa_export.files import sha256_of, write_text_atomic
from losa_export.merge import merge_run
from losa_export.runtimes.torch_cpu import TorchRuntime
from losa_export.text import encode_documents, load_tokenizer, read_documents

if TYPE_CHECKING:
    from losa_export.training.config import TrainConfig
    from losa_export.training.train import TrainResult

SCHEMA = "losa-study-methods-cell"
SCHEMA_VERSION = 1


class InterruptedCellError(Exception):
    """The cell was asked to stop; what it has done is saved."""


@dataclass(frozen=True)
class EvaluationText:
    """Text that a model is judged on.

    Attributes:
        path: the file.
        wikitext: by the usual protocol for WikiText, one string; otherwise documents with end-of-text between them.
        window: tokens in a window.
        windows: how many of them, from the start; None takes all.
    """

    path: Path
    wikitext: bool
    window: int
    windows: int | None

    @property
    def name(self) -> str:
        """What the study calls it."""
        return file_label(self.path)

    def cut(self, model: Path) -> NDArray[np.int64]:
        """(windows, window) int64 token ids. Raises: TextError, CheckpointError, ConfigError."""
        tokenizer = load_tokenizer(model)
        if self.wikitext:
            stream = encode_documents([read_wikitext(self.path)], tokenizer, None)
        else:
            ends = DecoderSpec.from_config(open_checkpoint(model).config, model).eos_token_ids
            stream = encode_documents(read_documents([self.path]), tokenizer, ends[0] if ends else None)
        return cut_windows(stream, self.window, self.windows)


@dataclass(frozen=True)
class Study:
    """A matrix of cells at one budget.

    Attributes:
        name: of the model, for the page.
        budget: what all methods get alike.
        texts: what cells are judged on.
        work: `cells/` with results, `runs/` with what is under way.
        threads: of PyTorch, in each cell.
        identity: hashes of model and texts.
        show_progress: report on standard error what a cell does.
    """

    name: str
    budget: Budget
    texts: tuple[EvaluationText, ...]
    work: Path
    threads: int
    identity: Mapping[str, str]
    show_progress: bool = True

    def task(self, cell: Cell) -> CellTask:
        """What a cell needs to know."""
        return CellTask(cell, self)


@dataclass(frozen=True)
class CellTask:
    """All that a cell needs to know.

    Attributes:
        cell: which.
        study: what it belongs to.
    """

    cell: Cell
    study: Study

    @property
    def result_file(self) -> Path:
        """Where the result lies once the cell is finished."""
        return self.study.work / "cells" / f"{self.cell.name}.json"

    def recipe(self) -> dict[str, Any]:
        """All that the result depends on; another recipe is another result."""
        method, nowhere = METHODS[self.cell.method], self.study.work
        configs = [train_config(self.cell, self.study.budget, nowhere)]
        if method.procedure == "tune, then prune":
            configs.insert(0, plain_lora_config(self.cell, self.study.budget, nowhere))
        return {
            "procedure": method.procedure,
            "runs": [comparable(config) for config in configs],
            "texts": [{"name": text.name, **asdict(replace(text, path=Path()))} for text in self.study.texts],
            "inputs": dict(self.study.identity),
        }

    def finished(self) -> dict[str, Any] | None:
        """The result, if there is one of this very recipe."""
        try:
            record = json.loads(self.result_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if _same_recipe(_plain(self.recipe()), record.get("recipe")) else None


def run_cell(task: CellTask) -> dict[str, Any]:
    """Do a cell, or what is left of it, and write its result.

    Raises: InterruptedCellError if it was asked to stop; any LosaError of training and merging.
    """
    import torch

    torch.set_num_threads(task.study.threads)
    cell, recipe = task.cell, task.recipe()
    folder = task.study.work / "runs" / cell.name
    budget, results = task.study.budget, []
    if METHODS[cell.method].procedure == "tune, then prune":
        lora, result = _plain_lora(task, recipe["runs"][0])
        budget, results = replace(budget, model=lora), [result]
    results.append(_complete(train_config(cell, budget, folder / "run"), task.study.show_progress))
    merged = folder / "merged"
    merge_run(folder / "run", merged, overwrite=True)
    rounds = [record for result in results for record in result.rounds]
    last, steps = results[-1].rounds[-1], sum(entry.steps for entry in rounds)
    record = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "method": cell.method,
        "sparsity": cell.sparsity,
        "seed": cell.seed,
        "zeros": last.sparsity_fraction,
        "mean_rank": float(np.mean(results[0].rounds[-1].block_ranks)) if steps else None,
        "steps": steps,
        "tokens": sum(entry.tokens for entry in rounds),
        "prune_seconds": sum(entry.prune_seconds for entry in rounds),
        "tune_seconds": sum(entry.tune_seconds for entry in rounds),
        "peak_memory_bytes": max(entry.peak_memory_bytes for entry in rounds),
        "evaluation": _evaluate(task, merged),
        "threads": task.study.threads,
        "git_revision": git_revision(Path(__file__)),
        "packages": package_versions(),
        "recipe": _plain(recipe),
    }
    task.result_file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(task.result_file, json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder)
    return record


def _plain_lora(task: CellTask, settings: Mapping[str, Any]) -> tuple[Path, TrainResult]:
    """The merged model of LoRA without masks, and its run: made once for all sparsities of a seed."""
    key = hashlib.sha256(json.dumps([settings, dict(task.study.identity)], sort_keys=True).encode()).hexdigest()[:12]
    folder = task.study.work / "runs" / f"plain-lora-{task.cell.seed}-{key}"
    result = _complete(plain_lora_config(task.cell, task.study.budget, folder / "run"), task.study.show_progress)
    if not (folder / "merged").is_dir():
        merge_run(folder / "run", folder / "merged")
    return folder / "merged", result


def _complete(config: TrainConfig, show_progress: bool) -> TrainResult:
    """Train to the end, from where an interrupted run stands if one of these very settings lies there."""
    from losa_export.training.state import is_resumable
    from losa_export.training.train import train

    result: TrainResult | None = None
    if is_resumable(config.output):
        try:
            result = train(config, resume=True, show_progress=show_progress)
        except StateError:
            shutil.rmtree(config.output)
    if result is None:
        result = train(replace(config, overwrite=True), show_progress=show_progress)
    if result.status == "interrupted":
        raise InterruptedCellError
    return result


def _evaluate(task: CellTask, merged: Path) -> dict[str, Any]:
    """Text name → figures of the merged model beside the dense one, in float32."""
    with (
        closing(TorchRuntime.load(task.study.budget.model, threads=task.study.threads)) as dense,
        closing(TorchRuntime.load(merged, threads=task.study.threads)) as sparse,
    ):
        found = {}
        for text in task.study.texts:
            windows = text.cut(task.study.budget.model)
            exact, ours = fidelity([dense, sparse], windows, show_progress=task.study.show_progress)
            found[text.name] = {
                "windows": len(windows),
                "window": text.window,
                "dense_nll": _mean(exact.nll),
                "nll": _mean(ours.nll),
                "kl_divergence": _mean(ours.kl_divergence),
                "agreement": _mean(ours.agreement),
            }
    return found


def identity(model: Path, files: Sequence[Path]) -> dict[str, str]:
    """Hashes of the dense model's weights and tokenizer and of all texts. Raises: InputError and its kinds."""
    weights = open_checkpoint(model).weights_sha256()
    tokenizer = sha256_of(model / "tokenizer.json")
    return {"weights": weights, "tokenizer": tokenizer, **{file_label(path): sha256_of(path) for path in files}}


def _same_recipe(now: Mapping[str, Any], then: Any) -> bool:
    """Whether a recorded recipe is the present one; a setting that there was not yet counts as its default."""
    from losa_export.training.config import TrainConfig

    if not isinstance(then, dict) or len(then.get("runs", ())) != len(now["runs"]):
        return False
    defaults = _plain({field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING})
    filled = [
        {name: defaults.get(name) for name in ours if name not in theirs} | theirs
        for ours, theirs in zip(now["runs"], then["runs"], strict=True)
    ]
    return {**then, "runs": filled} == now


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean())


def _plain(value: Any) -> Any:
    """As JSON gives it back: a tuple is a list, a path a string."""
    return json.loads(json.dumps(value, default=str))
