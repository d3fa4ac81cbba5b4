"""The paper's speed-up on a CPU, measured: random models of its shapes, on its engine, on ours and on dense peers.

Run as `python -m losa_export.eval.studies.paper_speedup -o work/ --page docs`. Each finished measurement is a record of
`losa bench` in `work/cells/`; the same command goes on where it stopped. Models are cut to a few blocks, since whole
ones do not fit; the time of a token in a whole one is read off the straight line through two depths. `--page DIR`
writes `speedup.json` and `speedup.md` there; with `--page` alone it only draws.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losa_export.errors import ConfigError, InputError, LosaError
from losa_export.eval.answer_check import PassedChecks
from losa_export.eval.bench import bench
from losa_export.eval.bench_report import read_bench
from losa_export.eval.studies.command_line import exit_code, rerun_command
from losa_export.eval.studies.speedup_models import DENSE, FORMS, Model, Models
from losa_export.eval.studies.speedup_page import PAPER_SPARSITY, page
from losa_export.eval.studies.timing import judged, timing_config
from losa_export.files import write_text_atomic
from losa_export.runtimes.isolated import ENGINES
from losa_export.synth import SHAPES, SynthConfig

SCHEMA = "losa-study-speedup"
SCHEMA_VERSION = 2

# Held against each other in one run, at the paper's sparsity and the largest depth: a form with zeros, another form,
# and whether that one is dense.
DUELS: tuple[tuple[str, str, bool], ...] = (
    ("deepsparse", "deepsparse", True),
    ("deepsparse-int8", "deepsparse-int8", True),
    ("fp32", "deepsparse", False),
    ("int8-a8", "deepsparse-int8", False),
    ("int4-a8", "deepsparse-int8", False),
    ("int8-a8", "ort-int4-32", True),
    ("int8-a8", "ort-int4-128", True),
    ("int8-a8", "llamacpp-q4", True),
    ("int4-a8", "ort-int4-128", True),
    ("int4-a8", "llamacpp-q4", True),
)


@dataclass(frozen=True)
class Cell:
    """One measurement: a model, and what it is held against."""

    candidate: Model
    baseline: Model

    @property
    def name(self) -> str:
        """A file name of its own."""
        return f"{self.candidate.name}-against-{self.baseline.name}"

    @property
    def models(self) -> tuple[Model, Model]:
        """Both."""
        return self.candidate, self.baseline

    @property
    def is_duel(self) -> bool:
        """Against something else than the dense float32 model."""
        return self.baseline.form != DENSE

    def __str__(self) -> str:
        """For people."""
        return f"{self.candidate}, against {self.baseline}" if self.is_duel else str(self.candidate)


@dataclass(frozen=True)
class Study:
    """What is measured alike in all cells.

    Attributes:
        like: a name of `losa_export.synth.SHAPES`.
        work: `cells/` with records, and the models under way.
        threads: of every engine.
        prompt_tokens, new_tokens: of a generation.
        max_seconds: of the timed part of a cell.
    """

    like: str
    work: Path
    threads: int | None = None
    prompt_tokens: int = 128
    new_tokens: int = 16
    max_seconds: float = 30.0

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's record, if it has been measured at these settings."""
        try:
            document = read_bench(self._file(cell))
        except LosaError:
            return None
        config = document["config"]
        same = (config["prompt_tokens"], config["new_tokens"]) == (self.prompt_tokens, self.new_tokens)
        same = same and document["study"] == {"like": self.like}
        return document if same and self.threads in (None, document["threads"]) else None

    def _file(self, cell: Cell) -> Path:
        return self.work / "cells" / f"{cell.name}.json"

    def measure(self, cell: Cell, models: Models, passed: PassedChecks) -> None:
        """Hold both models against each other, and keep the record. `passed` as for `bench`. Raises: any LosaError."""
        candidate, baseline = cell.models
        config = timing_config(
            (FORMS[candidate.form].runtime, models.export(candidate)),
            (FORMS[baseline.form].runtime, models.export(baseline)),
            threads=self.threads,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            max_seconds=self.max_seconds,
        )
        document = bench(config, passed=passed).as_dict() | {"study": {"like": self.like}}
        self._file(cell).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self._file(cell), json.dumps(document, indent=1) + "\n")


def cells_of(
    forms: Sequence[str], sparsities: Sequence[float], depths: Sequence[int], shallow: Sequence[float] = ()
) -> list[Cell]:
    """All measurements, the dense forms first, then a sparsity after the other in the order given.

    Args:
        forms: names of FORMS.
        sparsities: measured at every depth.
        depths: blocks.
        shallow: sparsities that are measured at the first depth alone.
    """
    cells = []
    for sparsity in (0.0, *sparsities, *shallow):
        for blocks in depths[:1] if sparsity in shallow else depths:
            cells += [
                Cell(Model(form, sparsity, blocks), Model(DENSE, 0.0, blocks))
                for form in forms
                if _is_measured(form, sparsity)
            ]
        if sparsity == PAPER_SPARSITY:
            cells += [
                Cell(Model(form, sparsity, max(depths)), Model(other, 0.0 if dense else sparsity, max(depths)))
                for form, other, dense in DUELS
                if form in forms and other in forms
            ]
    return cells


def _is_measured(form: str, sparsity: float) -> bool:
    """Whether a form is held against the dense float32 model at a sparsity."""
    if sparsity:
        return FORMS[form].pays_for_zeros
    # Dense weights in our own kernels are what ONNX Runtime's do, or better: not what this study asks.
    return form != DENSE and FORMS[form].runtime != "ort"


def document_of(study: Study, cells: Sequence[Cell], failed: Mapping[str, str], command: str) -> dict[str, Any]:
    """All that was measured, without raw samples, as one record to keep beside the page."""
    rows = []
    for cell in cells:
        found = study.record(cell)
        if found is None:
            continue
        rows.append(
            {
                "form": cell.candidate.form,
                "sparsity": cell.candidate.sparsity,
                "blocks": cell.candidate.blocks,
                "against": cell.baseline.form,
                "against_sparsity": cell.baseline.sparsity,
                **{
                    metric: {
                        "ms": found["candidate"][metric]["median_ms"],
                        "against_ms": found["baseline"][metric]["median_ms"],
                        **judged(found, metric),
                    }
                    for metric in ("decode", "prefill")
                },
                "engine": found["candidate"]["engine"],
                "model_bytes": found["candidate"]["model_bytes"],
                "disturbed": sum(sample["disturbed"] for sample in found["samples"]) / len(found["samples"]),
                "created_utc": found["created_utc"],
                "machine": found["machine"],
                "threads": found["threads"],
            }
        )
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "like": study.like,
        "whole_blocks": SHAPES[study.like].blocks,
        "prompt_tokens": study.prompt_tokens,
        "new_tokens": study.new_tokens,
        "failed": dict(failed),
        "cells": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the paper's claim, and ours, or only draw the page. Returns: the exit code."""
    parser = argparse.ArgumentParser(prog="python -m losa_export.eval.studies.paper_speedup", description=main.__doc__)
    forms = [form for form in FORMS if form != DENSE]
    parser.add_argument("--like", default="llama-2-7b", metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument(
        "--sparsities", type=float, nargs="+", default=[0.7, 0.5, 0.8, 0.6], metavar="S", help="default: 0.5 … 0.8"
    )
    parser.add_argument(
        "--shallow", type=float, nargs="+", default=[], metavar="S", help="sparsities at the first of --blocks alone"
    )
    parser.add_argument("--forms", nargs="+", choices=forms, default=forms, help="default: all")
    parser.add_argument("--prompt", type=int, default=Study.prompt_tokens, metavar="N", help="default: %(default)s")
    parser.add_argument("--gen", type=int, default=Study.new_tokens, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=Study.max_seconds, metavar="S", help="timed, of each cell")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="default: the physical cores")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="work folder; without it only draw")
    parser.add_argument("--page", type=Path, metavar="DIR", help="write results and page there as well")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    return exit_code(lambda: _measure(options, words))


def _measure(options: argparse.Namespace, words: Sequence[str]) -> bool:
    """Measure what the options ask for, and draw. Returns: whether no cell failed."""
    failed: dict[str, str] = {}
    if options.output is not None:
        study = Study(
            options.like, options.output.resolve(), options.threads, options.prompt, options.gen, options.seconds
        )
        _check_shape(options)
        cells = cells_of(options.forms, options.sparsities, options.blocks, options.shallow)
        failed = _run(study, cells)
        if options.page is not None:
            options.page.mkdir(parents=True, exist_ok=True)
            record = document_of(study, cells, failed, rerun_command("paper_speedup", words))
            write_text_atomic(options.page / "speedup.json", json.dumps(record, indent=1) + "\n")
    elif options.page is None:
        raise ConfigError("there is nothing to do; give -o to measure, or --page to draw", field="output")
    if options.page is not None:
        _draw(options.page)
    return not failed


def _check_shape(options: argparse.Namespace) -> None:
    """Raises: ConfigError for a shape that is none, fewer blocks than one, or a sparsity outside [0, 1)."""
    for blocks in options.blocks:
        for sparsity in (*options.sparsities, *options.shallow):
            SynthConfig(options.like, Path(), blocks, sparsity)


def _run(study: Study, cells: Sequence[Cell]) -> dict[str, str]:
    """Measure what is missing. Returns: cell → why it failed."""
    failed: dict[str, str] = {}
    missing = [cell for cell in cells if study.record(cell) is None]
    models = Models(study.work / "models", study.like)
    passed: PassedChecks = {}
    try:
        for number, cell in enumerate(missing, start=1):
            sys.stderr.write(f"study: [{number}/{len(missing)}] {cell}\n")
            absent = [name for name in _engines(cell) if not ENGINES[name].installed]
            if absent:
                failed[str(cell)] = f"the engine is not installed: losa runtimes install {absent[0]}"
                continue
            try:
                study.measure(cell, models, passed)
            except LosaError as error:
                failed[str(cell)] = str(error).splitlines()[0]
                sys.stderr.write(f"study: {cell}: {error}\n")
            models.keep({model for later in missing[number:] for model in later.models})
    finally:
        models.clear()
    return failed


def _engines(cell: Cell) -> list[str]:
    """Engines with environments of their own that a cell needs."""
    return [name for name in dict.fromkeys(FORMS[model.form].runtime for model in cell.models) if name in ENGINES]


def _draw(folder: Path) -> None:
    """Write speedup.md of speedup.json. Raises: InputError if there is nothing to draw."""
    path = folder / "speedup.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{path}' cannot be read as JSON ({error}); run the study with -o first", path=path
        ) from error
    if (record.get("schema"), record.get("schema_version")) != (SCHEMA, SCHEMA_VERSION) or not record["cells"]:
        raise InputError(f"'{path}' holds no results of this study; run it with -o first", path=path)
    write_text_atomic(folder / "speedup.md", page(record))


if __name__ == "__main__":
    sys.exit(main())
