"""Quality beside speed on a real model: pruned and tuned, or only rounded, on our engine and on others.

Run as `python -m losa_export.eval.studies.front dense/ --pruned losa-50/ losa-70/ --wikitext FILE -o work/ --page
docs/studies`. Its steps fill the work folder, each going on where it stopped: `models/`, `eval/` and `tasks/` (records
of `losa eval`) and `bench/` (records of `losa bench`, which want a quiet machine: `--steps bench` runs them alone).
`losa report work/eval work/bench` draws them; `--page DIR` writes front.md and front.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from losa_export.errors import ConfigError, InputError, LosaError
from losa_export.eval.answer_check import PassedChecks
from losa_export.eval.bench import bench
from losa_export.eval.evaluation import EvalConfig, EvalText, evaluate
from losa_export.eval.studies.command_line import exit_code, rerun_command
from losa_export.eval.studies.front_models import EXACT, Variant, make, variants_of
from losa_export.eval.studies.front_page import page
from losa_export.eval.studies.timing import judged, timing_config
from losa_export.eval.zero_shot import mcnemar
from losa_export.files import write_text_atomic
from losa_export.runtimes.base import RuntimeName

SCHEMA, SCHEMA_VERSION = "losa-study-front", 1
STEPS = ("models", "eval", "tasks", "bench")


@dataclass(frozen=True)
class Study:
    """What is measured alike of all variants.

    Attributes:
        work: folder with `models/`, `eval/` and `bench/`.
        texts: perplexity and divergence.
        tasks, task_folder, limit: zero-shot tasks, of the dense model and of the pruned ones alone.
        threads: of every engine.
        prompt_tokens, new_tokens, max_seconds: of each benchmark.
    """

    work: Path
    texts: tuple[EvalText, ...]
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    limit: int | None = None
    threads: int | None = None
    prompt_tokens: int = 64
    new_tokens: int = 64
    max_seconds: float = 20.0

    def record(self, step: str, name: str) -> dict[str, Any] | None:
        """What a step found of a variant; None if it has not run."""
        path = self.work / step / f"{name}.json"
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"'{path}' cannot be read as JSON ({error}); delete it", path=path) from error
        return found

    def evaluate(self, variant: Variant) -> None:
        """Write its record of `losa eval`: texts against the exact dense model, in the engine that serves it."""
        target, exact = make(variant, self.work / "models"), self.work / "models" / EXACT
        config = EvalConfig(
            target=target,
            output=self._file("eval", variant.name),
            runtime=variant.runtime,
            reference=None if variant.name == EXACT else exact,
            texts=self.texts,
            threads=self.threads,
        )
        evaluate(config)

    def answer(self, name: str, target: Path, runtime: RuntimeName) -> None:
        """Write the record of the tasks."""
        config = EvalConfig(
            target=target,
            output=self._file("tasks", name),
            runtime=runtime,
            tasks=self.tasks,
            task_folder=self.task_folder,
            limit=self.limit,
            threads=self.threads,
        )
        evaluate(config)

    def tasks_of(self, variant: Variant) -> list[dict[str, Any]] | None:
        """Each task beside the checkpoint's own answers in PyTorch; None where one of both is missing."""
        found, source = (self.record("tasks", name) for name in (variant.name, variant.source.resolve().name))
        if found is None or source is None:
            return None
        return [paired(*both) for both in zip(found["tasks"], source["tasks"], strict=True)]

    def bench(self, variant: Variant, passed: PassedChecks) -> None:
        """Write its record of `losa bench`, against the exact dense model. `passed` as for `bench`."""
        config = timing_config(
            (variant.runtime, make(variant, self.work / "models")),
            ("ort-stock", self.work / "models" / EXACT),
            threads=self.threads,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            max_seconds=self.max_seconds,
        )
        bench(config, passed=passed).write(self._file("bench", variant.name))

    def _file(self, step: str, name: str) -> Path:
        path = self.work / step / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def run(study: Study, variants: Sequence[Variant], steps: Sequence[str]) -> dict[str, str]:
    """Do what is missing. Returns: step and variant → why it failed."""
    failed = {}
    for step, name, action in _actions(study, variants):
        if step not in steps or (step != "models" and study.record(step, name) is not None):
            continue
        sys.stderr.write(f"study: {step} of {name}\n")
        try:
            action()
        except LosaError as error:
            failed[f"{step} of {name}"] = str(error).splitlines()[0]
            sys.stderr.write(f"study: {error}\n")
    return failed


def _actions(study: Study, variants: Sequence[Variant]) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Step, name of the record, and what makes it."""
    models = study.work / "models"
    passed: PassedChecks = {}
    for one in variants:
        yield "models", one.name, partial(make, one, models)
    for one in variants:
        yield "eval", one.name, partial(study.evaluate, one)
    if study.tasks:
        # What rounding costs on tasks is asked of pruned models; the dense one is there to compare with.
        for one in variants:
            if one.zeros or one.name == EXACT:
                yield "tasks", one.name, partial(study.answer, one.name, models / one.name, one.runtime)
        for source in dict.fromkeys(one.source.resolve() for one in variants):
            yield "tasks", source.name, partial(study.answer, source.name, source, "torch")
    for one in variants:
        if one.name != EXACT:  # the baseline of all
            yield "bench", one.name, partial(study.bench, one, passed)


def paired(task: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """A task's accuracy, and how its answers differ from those of the model it was made from, item by item.

    Args:
        task: its record of `losa eval` on the file.
        source: likewise on the checkpoint.
    Returns: name, items, accuracy of both by the task's usual measure, items that one alone has right, McNemar's p,
        and the median difference of a choice's log-likelihood, in nats.
    """
    usual = task["usual"]
    both = [side["target"]["log_likelihoods"] for side in (task, source)]
    differences = [
        abs(ours - theirs) for row in both[0] for ours, theirs in zip(both[0][row], both[1][row], strict=True)
    ]
    rows = [int(row) for row in both[0]]
    right = [set(side["target"]["right"]) for side in (task, source)]
    only_ours, only_theirs, p = mcnemar(*([row in mine for row in rows] for mine in right))
    return {
        "name": task["name"],
        "items": task["items"],
        "accuracy": task["target"][usual]["share"],
        "source_accuracy": source["target"][usual]["share"],
        "only_this": only_ours,
        "only_source": only_theirs,
        "p": p,
        "median_difference": float(np.median(differences)),
    }


def _text(text: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("name", "protocol", "window", "windows", "kl_mean", "kl_p99", "agreement")
    return {name: text[name] for name in kept if name in text} | {"perplexity": text["target"]["perplexity"]}


def _speed(bench: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "engine": bench["candidate"]["engine"]["engine"],
        "model_bytes": bench["candidate"]["model_bytes"],
        "baseline_bytes": bench["baseline"]["model_bytes"],
        **{
            metric: {
                "ms": bench["candidate"][metric]["median_ms"],
                "baseline_ms": bench["baseline"][metric]["median_ms"],
                **judged(bench, metric),
            }
            for metric in ("decode", "prefill")
        },
    }


def document_of(study: Study, variants: Sequence[Variant], failed: dict[str, str], command: str) -> dict[str, Any]:
    """What the page is drawn from: the records, without samples and scores of single items."""
    rows = []
    for variant in variants:
        quality, speed = study.record("eval", variant.name), study.record("bench", variant.name)
        rows.append(
            {
                "name": variant.name,
                "kind": variant.kind,
                "values": variant.values,
                "pure": variant.pure,
                "source": variant.source.resolve().name,
                "zeros": variant.zeros,
                "texts": None if quality is None else [_text(text) for text in quality["texts"]],
                "tasks": study.tasks_of(variant),
                "speed": None if speed is None else _speed(speed),
            }
        )
    timed = next((found for one in variants if (found := study.record("bench", one.name)) is not None), None)
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "prompt_tokens": study.prompt_tokens,
        "new_tokens": study.new_tokens,
        "machine": None if timed is None else timed["machine"],
        "threads": None if timed is None else timed["threads"],
        "failed": failed,
        "variants": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Hold pruned models against rounded ones, in quality and speed. Returns: the exit code."""
    parser = argparse.ArgumentParser(prog="python -m losa_export.eval.studies.front", description=main.__doc__)
    parser.add_argument("dense", type=Path, metavar="DENSE", help="checkpoint of a plain Llama")
    parser.add_argument("--pruned", type=Path, nargs="+", default=[], metavar="MERGED", help="made from it")
    parser.add_argument("--wikitext", type=Path, metavar="FILE", help="read by the usual protocol for WikiText")
    parser.add_argument("--text", type=Path, metavar="FILE", help="documents")
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="as of losa eval")
    parser.add_argument("--task-folder", type=Path, metavar="DIR", help="holds NAME.jsonl of each task")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="items of each task (default: all)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="default: the physical cores")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="work folder")
    parser.add_argument("--page", type=Path, metavar="DIR", help="write front.json and front.md there")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    return exit_code(lambda: _measure(options, words))


def _measure(options: argparse.Namespace, words: Sequence[str]) -> bool:
    """Do the steps that are asked for, and draw. Returns: whether none failed."""
    study = _study(options)
    variants = variants_of(options.dense, options.pruned)
    failed = run(study, variants, options.steps)
    if options.page is not None:
        record = document_of(study, variants, failed, rerun_command("front", words))
        options.page.mkdir(parents=True, exist_ok=True)
        write_text_atomic(options.page / "front.json", json.dumps(record, indent=1) + "\n")
        write_text_atomic(options.page / "front.md", page(record))
    return not failed


def _study(options: argparse.Namespace) -> Study:
    """Raises: ConfigError without a text."""
    texts = tuple(
        EvalText(path, wikitext, options.window, options.windows)
        for path, wikitext in ((options.wikitext, True), (options.text, False))
        if path is not None
    )
    if not texts:
        raise ConfigError("there is no quality without a text; give --wikitext or --text", field="texts")
    return Study(
        options.output.resolve(), texts, tuple(options.tasks), options.task_folder, options.limit, options.threads
    )


if __name__ == "__main__":
    sys.exit(main())
