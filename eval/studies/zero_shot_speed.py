"""Items a second of zero-shot scoring, beside lm-evaluation-harness on its Hugging Face backend, with the same scores.

Run as `python -m losa_export.eval.studies.zero_shot_speed MODEL --onnx DIR --task-folder DIR`, MODEL being the
checkpoint that DIR was exported from; a table comes out on standard output. Both sides are given the same texts in one
process, at the same threads and in float32, and cut them into tokens themselves. They take turns, block by block in
changing order. lm-eval runs each task at that one of the batch sizes at which it was fastest in a round before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from losa_export.errors import BenchmarkError, ConfigError, LosaError, MissingDependencyError
from losa_export.eval.machine import machine_record
from losa_export.eval.scorer import open_scorer
from losa_export.eval.stats import MIN_BLOCKS, RatioEstimate, median, paired_ratio
from losa_export.eval.tasks import TASKS, Item, find_task, read_items
from losa_export.eval.worker import settle
from losa_export.eval.zero_shot import encode_item
from losa_export.files import check_output_file, input_folder, write_text_atomic
from losa_export.progress import Progress
from losa_export.runtimes.base import Runtime, RuntimeName
from losa_export.runtimes.loader import load_runtime
from losa_export.runtimes.threads import resolve_threads
from losa_export.text import load_tokenizer

SCHEMA, SCHEMA_VERSION = "losa-zero-shot-speed", 1
_ALL = "all of them"
# How far log-likelihoods may lie apart, and how many items may be answered otherwise.
_TOLERANCE, _SAME_CHOICES = 1e-3, 0.99

# Log-likelihoods of the choices of each item.
Found = list[list[float]]
Side = Callable[[str], Found]


@dataclass(frozen=True)
class SpeedConfig:
    """What is compared.

    Attributes:
        model: the checkpoint that lm-eval loads.
        onnx: its export.
        task_folder: holds NAME.jsonl of each task.
        tasks: names of `tasks.TASKS`.
        limit: items of each.
        runtime: that the export runs in.
        threads: of both; None takes what the machine offers.
        batch_sizes: of lm-eval, to choose from.
        blocks: of one turn each.
    Raises: ConfigError naming the field that is out of range.
    """

    model: Path
    onnx: Path
    task_folder: Path
    tasks: tuple[str, ...] = tuple(TASKS)
    limit: int = 16
    runtime: RuntimeName = "ort"
    threads: int | None = None
    batch_sizes: tuple[int, ...] = (1, 8, 16)
    blocks: int = MIN_BLOCKS

    def __post_init__(self) -> None:
        for name in self.tasks:
            find_task(name)
        if not self.tasks:
            raise ConfigError("there is no task to score; name some", field="tasks")
        if self.blocks < MIN_BLOCKS:
            raise ConfigError(f"blocks is {self.blocks}; an interval needs at least {MIN_BLOCKS}", field="blocks")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes is {self.batch_sizes}; give some of at least 1", field="batch_sizes")


@dataclass(frozen=True)
class Row:
    """One task, or all of them.

    Attributes:
        task: its name.
        items: how many.
        batch_size: that lm-eval ran it at; None for all of them.
        theirs_s, ours_s: seconds of each block.
        ratio: their time over ours.
    """

    task: str
    items: int
    batch_size: int | None
    theirs_s: tuple[float, ...]
    ours_s: tuple[float, ...]
    ratio: RatioEstimate


def compare(config: SpeedConfig, *, show_progress: bool = True) -> tuple[list[Row], dict[str, Any]]:
    """Check that both sides find the same, and time them.

    Returns: a row for each task and one for all; and what answered, for the record.
    Raises:
        MissingDependencyError: lm-eval, or what its backend needs, is not installed.
        BenchmarkError: the scores differ, so that their speeds mean nothing.
        InputError, TextError: model, export or a task's file cannot be read.
    """
    for folder, what in ((config.model, "model"), (config.onnx, "export")):
        input_folder(folder, what=what)
    threads = resolve_threads(config.threads)
    items = {
        name: read_items(find_task(name), config.task_folder / f"{name}.jsonl", config.limit) for name in config.tasks
    }
    peer = _Peer(config.model, threads, items)
    with closing(load_runtime(config.runtime, config.onnx, threads=threads)) as runtime:
        ours, method = _ours(runtime, config.onnx, items)
        turns = len(items) * (1 + len(config.batch_sizes) + 2 * config.blocks)
        with Progress("comparing", turns, "turns", enabled=show_progress) as progress:

            def timed(side: Side, name: str) -> tuple[float, Found]:
                settle()  # idle threads of the other side may still be waiting for work
                started = time.perf_counter()
                found = side(name)
                seconds = time.perf_counter() - started
                progress.advance()
                return seconds, found

            sizes = {}
            for name in items:
                tried = {size: timed(peer.at(size), name) for size in config.batch_sizes}
                sizes[name] = min(tried, key=lambda size: tried[size][0])
                _check(name, items[name], timed(ours, name)[1], tried[sizes[name]][1])
            seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in items}
            for block in range(config.blocks):
                for name, (theirs_s, ours_s) in seconds.items():
                    pair = [(peer.at(sizes[name]), theirs_s), (ours, ours_s)]
                    for side, samples in pair if block % 2 else reversed(pair):
                        samples.append(timed(side, name)[0])
        answered = {"runtime": runtime.describe().as_dict(), "scoring": method, "lm_eval": peer.version}
    rows = [_row(name, len(items[name]), sizes[name], theirs_s, ours_s) for name, (theirs_s, ours_s) in seconds.items()]
    sums = (np.sum([both[side] for both in seconds.values()], axis=0).tolist() for side in (0, 1))
    return [*rows, _row(_ALL, sum(map(len, items.values())), None, *sums)], answered


def _row(name: str, items: int, size: int | None, theirs_s: Sequence[float], ours_s: Sequence[float]) -> Row:
    ratio = paired_ratio([[one] for one in theirs_s], [[one] for one in ours_s])
    return Row(name, items, size, tuple(theirs_s), tuple(ours_s), ratio)


def _ours(runtime: Runtime, folder: Path, items: Mapping[str, Sequence[Item]]) -> tuple[Side, str]:
    tokenizer, scorer = load_tokenizer(folder), open_scorer(runtime, folder)

    def score(name: str) -> Found:
        encoded = [encode_item(tokenizer, item, runtime, name) for item in items[name]]
        return [[one.log_likelihood for one in row] for row in scorer.score(encoded)]

    return score, scorer.method


class _Peer:
    """lm-eval's Hugging Face backend, and our items as its requests."""

    def __init__(self, model: Path, threads: int, items: Mapping[str, Sequence[Item]]) -> None:
        try:
            import torch
            from lm_eval import __version__ as version
            from lm_eval.api.instance import Instance
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise MissingDependencyError.for_extra(
                error.name or "lm_eval", "lm-eval,train", "the comparison"
            ) from error
        torch.set_num_threads(threads)
        self.version = str(version)
        self._model: Any = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=1)
        self._counts = {name: [len(item.contexts) for item in asked] for name, asked in items.items()}
        self._requests = {
            name: [
                Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=place)
                for item in asked
                for place, pair in enumerate(zip(item.contexts, item.continuations, strict=True))
            ]
            for name, asked in items.items()
        }

    def at(self, batch_size: int) -> Side:
        """Its scoring, in batches of that many choices."""

        def score(name: str) -> Found:
            self._model.batch_size_per_gpu = batch_size
            answers = iter(self._model.loglikelihood(self._requests[name], disable_tqdm=True))
            return [[next(answers)[0] for _ in range(count)] for count in self._counts[name]]

        return score


def _check(name: str, items: Sequence[Item], ours: Found, theirs: Found) -> None:
    """Raise BenchmarkError unless both sides found the same."""
    apart = max(
        abs(one - other) / max(abs(other), 1e-9)
        for mine, rest in zip(ours, theirs, strict=True)
        for one, other in zip(mine, rest, strict=True)
    )
    same = np.mean([np.argmax(mine) == np.argmax(rest) for mine, rest in zip(ours, theirs, strict=True)])
    if apart > _TOLERANCE or same < _SAME_CHOICES:
        raise BenchmarkError(
            f"on {name} log-likelihoods lie up to {apart:.2g} of their size apart, and {same:.1%} of {len(items)} "
            "items are answered alike, so speeds would not compare; give the export of this very checkpoint"
        )


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| task | items | lm-eval's batch | lm-eval, items/s | ours, items/s | times as fast (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rates = (f"{row.items / median(seconds):.2f}" for seconds in (row.theirs_s, row.ours_s))
        size = "" if row.batch_size is None else row.batch_size
        ratio = f"{row.ratio.ratio:.2f} ({row.ratio.low:.2f} … {row.ratio.high:.2f})"
        lines.append(f"| {row.task} | {row.items} | {size} | {' | '.join(rates)} | {ratio} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the speed of zero-shot scoring with that of lm-eval; 0 when done."""
    parser = argparse.ArgumentParser(
        prog="python -m losa_export.eval.studies.zero_shot_speed", description=main.__doc__
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint, for lm-eval")
    parser.add_argument("--onnx", type=Path, required=True, metavar="DIR", help="its export")
    parser.add_argument("--task-folder", type=Path, required=True, metavar="DIR", help="holds NAME.jsonl of each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="NAME", help="default: all")
    parser.add_argument("--limit", type=int, default=16, metavar="N", help="items of each (default: %(default)s)")
    parser.add_argument("--runtime", choices=("ort", "ort-stock"), default="ort", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="default: what the machine offers")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 8, 16], metavar="N", help="of lm-eval (default: 1 8 16)"
    )
    parser.add_argument("--blocks", type=int, default=MIN_BLOCKS, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="all figures")
    options = parser.parse_args(argv)
    try:
        config = SpeedConfig(
            options.model,
            options.onnx,
            options.task_folder,
            tuple(options.tasks),
            options.limit,
            options.runtime,
            options.threads,
            tuple(options.batch_sizes),
            options.blocks,
        )
        if options.json is not None:
            check_output_file(options.json)
        rows, answered = compare(config)
        if options.json is not None:
            write_text_atomic(options.json, json.dumps(_record(config, rows, answered), indent=1) + "\n")
    except LosaError as error:
        sys.stderr.write(f"losa: error: {error}\n")
        return error.exit_code
    sys.stdout.write(table(rows))
    return 0


def _record(config: SpeedConfig, rows: Sequence[Row], answered: Mapping[str, Any]) -> dict[str, Any]:
    folders = {"model": config.model.name, "onnx": config.onnx.name, "task_folder": config.task_folder.name}
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "config": {**asdict(config), **folders},
        **answered,
        "rows": [asdict(row) for row in rows],
        "machine": machine_record().as_dict(),
    }


if __name__ == "__main__":
    sys.exit(main())
