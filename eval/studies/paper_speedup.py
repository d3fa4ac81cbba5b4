"""The paper's speed-up on a CPU, measured: random models of its shapes, dense and sparse, on its engine and on ours.

Run as `python -m losa_export.eval.studies.paper_speedup -o work/ --page docs`. Each finished measurement is a record of
`losa bench` in `work/cells/`; the same command goes on where it stopped. Models are cut to a few blocks, since whole
ones do not fit; the time of a token in a whole one is read off the straight line through two depths. `--page DIR`
writes `speedup.json` and `speedup.md` there; with `--page` alone it only draws.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from losa_export.errors import ConfigError, InputError, LosaError
from losa_export.eval.bench import BenchConfig, bench
from losa_export.eval.bench_report import read_bench
from losa_export.export import ExportConfig, export_onnx
from losa_export.files import write_text_atomic
from losa_export.runtimes.isolated import ENGINES
from losa_export.synth import SHAPES, SynthConfig, synthesise

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA = "losa-study-speedup"
SCHEMA_VERSION = 1
# What the paper reports for a model of 7 billion weights with 70 % zeros on DeepSparse.
PAPER_RATIO, PAPER_SPARSITY = 2.60, 0.7

Kind = Literal["fp32", "int8", "int4", "deepsparse"]
KINDS: tuple[Kind, ...] = ("fp32", "int8", "int4", "deepsparse")


@dataclass(frozen=True)
class Cell:
    """One measurement: a model with so many blocks and zeros, in one form, beside the dense fp32 one of that depth."""

    kind: Kind
    sparsity: float
    blocks: int

    @property
    def name(self) -> str:
        """A file name of its own."""
        return f"{self.kind}-{round(100 * self.sparsity)}-{self.blocks}"

    def __str__(self) -> str:
        """For people."""
        return f"{self.kind}, {self.sparsity:.0%} zeros, {self.blocks} blocks"


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
    new_tokens: int = 32
    max_seconds: float = 60.0

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

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Make both models, hold them against each other, and clear them away. Raises: any LosaError of these."""
        with _scratch(self.work / "models") as folder:
            dense = self._export(folder, Cell("fp32", 0.0, cell.blocks))
            candidate = self._export(folder, cell)
            config = BenchConfig(
                candidate=candidate,
                baseline=dense,
                candidate_runtime="deepsparse" if cell.kind == "deepsparse" else "ort",
                threads=self.threads,
                prompt_tokens=self.prompt_tokens,
                new_tokens=self.new_tokens,
                answers="own",
                min_seconds=min(10.0, self.max_seconds),
                max_seconds=self.max_seconds,
                load_samples=1,
            )
            document = bench(config).as_dict() | {"study": {"like": self.like}}
        self._file(cell).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self._file(cell), json.dumps(document, indent=1) + "\n")
        return document

    def _export(self, folder: Path, cell: Cell) -> Path:
        """The folder of a cell's exported model, `folder/NAME`."""
        output, model = folder / cell.name, folder / "model"
        if output.exists():
            return output
        synthesise(SynthConfig(self.like, model, cell.blocks, cell.sparsity, overwrite=True))
        deepsparse = cell.kind == "deepsparse"
        config = ExportConfig(
            source=model,
            output=output,
            profile="deepsparse" if deepsparse else "ort",
            weights="auto" if cell.sparsity and not deepsparse else "dense",
            values="fp32" if cell.kind == "deepsparse" else cell.kind,
            # Random weights have no checkpoint to answer to; the benchmark checks the answers of each file.
            gate=False,
        )
        export_onnx(config)
        return output


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder that is empty at first and gone at the end: models are large."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def whole_model_ms(depths: Sequence[tuple[int, float]], blocks: int) -> float:
    """Milliseconds of a token in a model of `blocks` blocks, by the line through the smallest and the largest depth.

    Raises: ConfigError for fewer than two depths.
    """
    if len({depth for depth, _ in depths}) < 2:
        raise ConfigError("a line needs two depths; give --blocks two numbers", field="blocks")
    (low, fast), (high, slow) = min(depths), max(depths)
    return fast + (slow - fast) / (high - low) * (blocks - low)


def document_of(study: Study, cells: Sequence[Cell], failed: Mapping[str, str], command: str) -> dict[str, Any]:
    """All that was measured, without raw samples, as one record to keep beside the page."""
    rows = []
    for cell in cells:
        found = study.record(cell)
        if found is None:
            continue
        rows.append(
            {
                "kind": cell.kind,
                "sparsity": cell.sparsity,
                "blocks": cell.blocks,
                **{
                    metric: {
                        "ms": found["candidate"][metric]["median_ms"],
                        "dense_ms": found["baseline"][metric]["median_ms"],
                        **{name: found[metric]["all_blocks"][name] for name in ("ratio", "low", "high", "verdict")},
                    }
                    for metric in ("decode", "prefill")
                },
                "engine": found["candidate"]["engine"],
                "model_bytes": found["candidate"]["model_bytes"],
                "disturbed": sum(sample["disturbed"] for sample in found["samples"]) / len(found["samples"]),
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


def page(document: Mapping[str, Any]) -> str:
    """The Markdown page."""
    cells = document["cells"]
    machine, threads = cells[0]["machine"], cells[0]["threads"]
    lines = [
        "# The paper's speed-up, measured",
        "",
        f"The paper reports {PAPER_RATIO:.2f}x for a model of 7 billion weights with {PAPER_SPARSITY:.0%} zeros on a "
        f"CPU, with DeepSparse. Here: random weights in the shape of {document['like']}, a prompt of "
        f"{document['prompt_tokens']} and {document['new_tokens']} new tokens, {threads} threads of "
        f"{machine['cpu_model']}. Each ratio is of one run, against the dense float32 model of the same depth in ONNX "
        "Runtime, with a 95 % interval.",
        "",
        "Made by `python -m losa_export.eval.studies.paper_speedup`; do not edit by hand.",
        "",
        "```",
        document["command"],
        "```",
        "",
    ]
    for metric in ("decode", "prefill"):
        lines += [f"## {metric.capitalize()}", "", *_table(document, metric), ""]
    lines += [*_against_the_paper(cells), ""]
    if document["failed"]:
        lines += [
            "**Without a result:** " + "; ".join(f"{cell}: {why}" for cell, why in document["failed"].items()),
            "",
        ]
    return "\n".join(lines)


def _table(document: Mapping[str, Any], metric: str) -> list[str]:
    cells = document["cells"]
    depths = sorted({cell["blocks"] for cell in cells})
    whole = document["whole_blocks"]
    headings = ["form", "zeros", *(f"{depth} blocks" for depth in depths)]
    extrapolates = len(depths) > 1
    if extrapolates:
        headings += [f"{whole} blocks, ms, by the line", "against dense, by the lines"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for kind, sparsity in dict.fromkeys((cell["kind"], cell["sparsity"]) for cell in cells):
        mine = {cell["blocks"]: cell[metric] for cell in cells if (cell["kind"], cell["sparsity"]) == (kind, sparsity)}
        row = [kind if kind == "deepsparse" else f"ours, {kind}", f"{sparsity:.0%}"]
        row += [_ratio(mine[depth]) if depth in mine else "–" for depth in depths]
        if extrapolates and len(mine) > 1:
            ours = whole_model_ms([(depth, one["ms"]) for depth, one in mine.items()], whole)
            dense = whole_model_ms([(depth, one["dense_ms"]) for depth, one in mine.items()], whole)
            row += [f"{ours:.0f}", f"{dense / ours:.2f}x"]
        elif extrapolates:
            row += ["–", "–"]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _ratio(one: Mapping[str, Any]) -> str:
    verdict = "" if one["verdict"] == "FASTER" else f" {one['verdict']}"
    return f"{one['ratio']:.2f}x ({one['low']:.2f} – {one['high']:.2f}){verdict}"


def _against_the_paper(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The claim beside each form's own dense-to-sparse ratio, at the deepest model."""
    deepest = max(cell["blocks"] for cell in cells)
    dense = {cell["kind"]: cell["decode"] for cell in cells if (cell["sparsity"], cell["blocks"]) == (0.0, deepest)}
    lines = ["## Beside the paper", ""]
    for cell in cells:
        if (cell["sparsity"], cell["blocks"]) != (PAPER_SPARSITY, deepest):
            continue
        name = cell["kind"] if cell["kind"] == "deepsparse" else f"ours, {cell['kind']}"
        one = cell["decode"]
        holds = (
            "reaches" if one["low"] >= PAPER_RATIO else "falls short of" if one["high"] < PAPER_RATIO else "may reach"
        )
        line = f"- {name}: {_ratio(one)} of dense float32 in ONNX Runtime, which {holds} {PAPER_RATIO:.2f}x"
        if cell["kind"] == "deepsparse" and "deepsparse" in dense:
            own = dense["deepsparse"]
            line += f"; of the engine's own dense model {own['ms'] / one['ms']:.2f}x, two runs against one baseline"
        lines.append(f"{line}.")
    return lines if len(lines) > 2 else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the paper's claim, and ours, or only draw the page. Returns: the exit code."""
    parser = argparse.ArgumentParser(prog="python -m losa_export.eval.studies.paper_speedup", description=main.__doc__)
    parser.add_argument("--like", default="llama-2-7b", metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4], metavar="N", help="default: 2 4")
    parser.add_argument(
        "--sparsities", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8], metavar="S", help="default: 0.5 … 0.8"
    )
    parser.add_argument("--forms", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--prompt", type=int, default=Study.prompt_tokens, metavar="N", help="default: %(default)s")
    parser.add_argument("--gen", type=int, default=Study.new_tokens, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=Study.max_seconds, metavar="S", help="timed, of each cell")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="default: the physical cores")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="work folder; without it only draw")
    parser.add_argument("--page", type=Path, metavar="DIR", help="write results and page there as well")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    failed: dict[str, str] = {}
    try:
        if options.output is not None:
            study = Study(
                options.like, options.output.resolve(), options.threads, options.prompt, options.gen, options.seconds
            )
            cells = _cells(options)
            failed = _run(study, cells)
            if options.page is not None:
                options.page.mkdir(parents=True, exist_ok=True)
                record = document_of(study, cells, failed, _command(words))
                write_text_atomic(options.page / "speedup.json", json.dumps(record, indent=1) + "\n")
        elif options.page is None:
            raise ConfigError("there is nothing to do; give -o to measure, or --page to draw", field="output")
        if options.page is not None:
            _draw(options.page)
    except LosaError as error:
        sys.stderr.write(f"study: error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("study: interrupted; the same command goes on from here\n")
        return 130
    return 1 if failed else 0


def _cells(options: argparse.Namespace) -> list[Cell]:
    """Raises: ConfigError for a shape that is none, or fewer blocks than one."""
    for blocks in options.blocks:
        SynthConfig(options.like, Path(), blocks)
    forms: list[Kind] = options.forms
    dense = [0.0] if "deepsparse" in forms else []
    return [
        Cell(kind, sparsity, blocks)
        for sparsity in (*dense, *options.sparsities)
        for kind in forms
        # Dense models of our own are the baseline of every cell.
        if sparsity or kind == "deepsparse"
        for blocks in options.blocks
    ]


def _run(study: Study, cells: Sequence[Cell]) -> dict[str, str]:
    """Measure what is missing. Returns: cell → why it failed."""
    failed: dict[str, str] = {}
    for number, cell in enumerate(cells, start=1):
        if study.record(cell) is not None:
            continue
        sys.stderr.write(f"study: [{number}/{len(cells)}] {cell}\n")
        if cell.kind == "deepsparse" and not ENGINES["deepsparse"].installed:
            failed[str(cell)] = "the engine is not installed: losa runtimes install deepsparse"
            continue
        try:
            study.measure(cell)
        except LosaError as error:
            failed[str(cell)] = str(error).splitlines()[0]
            sys.stderr.write(f"study: {cell}: {error}\n")
    return failed


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


def _command(words: Sequence[str]) -> str:
    """The command without the folders that only this machine has."""
    shown = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return shlex.join(["python", "-m", "losa_export.eval.studies.paper_speedup", *shown])


if __name__ == "__main__":
    sys.exit(main())
