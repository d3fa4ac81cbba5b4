"""What each part of the method is worth: all methods at one budget, over sparsities and seeds, on real text.

Run as `python -m losa_export.eval.studies.methods MODEL --tune FILE --text FILE -o work/ --page docs/studies`. Each
finished cell of the matrix is a small JSON file in `work/cells/`; the same command goes on where the last one stopped,
in the middle of a cell too. A cell that fails is reported at the end, and costs no other. `--page DIR` writes
`methods-NAME.json` there and draws `methods.md` from all files of that kind; with no MODEL it only draws.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losa_export.errors import ConfigError, InputError, LosaError
from losa_export.eval.machine import git_revision, machine_record
from losa_export.eval.studies.command_line import EXIT_INTERRUPTED, exit_code, file_label, rerun_command
from losa_export.eval.studies.methods_cell import (
    CellTask,
    EvaluationText,
    InterruptedCellError,
    Study,
    identity,
    run_cell,
)
from losa_export.eval.studies.methods_page import ordered_sparsities, page
from losa_export.eval.studies.methods_table import METHODS, Budget, Cell
from losa_export.files import write_text_atomic
from losa_export.progress import duration

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA = "losa-study-methods"
SCHEMA_VERSION = 1
# Fits into the buffer of a pipe, which nobody reads until the process has ended.
_LONGEST_MESSAGE = 2000

# Imported once, by the server that cells are forked from; each would spend seconds on it.
_PRELOADED = (
    "losa_export.eval.studies.methods_cell",
    "losa_export.training.train",
    "losa_export.training.settings",
    "accelerate",
    "transformers.models.llama.modeling_llama",
)


def results(study: Study) -> list[dict[str, Any]]:
    """All results in the work folder that have the study's budget, texts and present methods."""
    found = []
    for path in sorted((study.work / "cells").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            cell = Cell(record["method"], record["sparsity"], record["seed"])
        except (ValueError, KeyError, TypeError, LosaError):
            continue  # damaged, or of a method that is no more: it is made again where it is wanted
        record = study.task(cell).finished()
        if record is not None:
            found.append(record)
    places = {name: place for place, name in enumerate(METHODS)}
    sparsities = ordered_sparsities(found)
    return sorted(found, key=lambda r: (places[r["method"]], sparsities.index(r["sparsity"]), r["seed"]))


def run_study(study: Study, cells: Sequence[Cell]) -> dict[str, str]:
    """Do every cell that has no result yet, each in a process of its own: a crash costs one, and memory is its own.

    Returns: cell → why it failed.
    Raises: KeyboardInterrupt once the cell under way has been saved.
    """
    failed: dict[str, str] = {}
    missing = [cell for cell in cells if study.task(cell).finished() is None]
    _say(f"{len(cells)} cells, {len(cells) - len(missing)} of them done before")
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(list(_PRELOADED))
    for number, cell in enumerate(missing, start=1):
        if study.task(cell).finished() is not None:
            continue  # by another process that works on the same folder from another end
        error = _in_own_process(context, study.task(cell))
        record = study.task(cell).finished()
        if record is None:
            failed[str(cell)] = error or "it left no result"
            _say(f"[{number}/{len(missing)}] {cell}: FAILED: {failed[str(cell)]}")
        else:
            _say(f"[{number}/{len(missing)}] {cell}: {_summary(record)}")
    return failed


def _in_own_process(context: Any, task: CellTask) -> str | None:
    """Run a cell. Returns: why it failed, or None."""
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(task, writer))
    process.start()
    writer.close()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()
        process.join()
        raise
    try:
        return str(reader.recv())
    except EOFError:
        return None if process.exitcode == 0 else f"its process ended with {process.exitcode}"


def _work(task: CellTask, writer: Any) -> None:
    # Out of the terminal's reach: Ctrl-C goes to the parent alone, which asks once; a second signal cuts saving off.
    os.setsid()
    try:
        run_cell(task)
    except InterruptedCellError:
        sys.exit(EXIT_INTERRUPTED)
    except LosaError as error:
        writer.send(str(error)[:_LONGEST_MESSAGE])
    except Exception as error:  # whatever it is, other cells go on
        traceback.print_exc()
        writer.send(f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE])


def _summary(record: Mapping[str, Any]) -> str:
    from math import exp

    figures = [f"{text} {exp(found['nll']):.2f}" for text, found in record["evaluation"].items()]
    return f"perplexity {', '.join(figures)}; {duration(record['prune_seconds'] + record['tune_seconds'])}"


def document(study: Study, failed: Mapping[str, str], command: str) -> dict[str, Any]:
    """All results as one record, to be kept beside the page.

    `settings` has the runs' settings of each method once, without sparsity, pattern and seed; of LoRA that is pruned
    afterwards there are two, the tuning's and the pruning's. `cells` has the fields that `run_cell` writes.
    """
    records = results(study)
    own = ("sparsity_fraction", "pattern", "seed")
    settings = {
        record["method"]: [
            {name: value for name, value in run.items() if name not in own} for run in record["recipe"]["runs"]
        ]
        for record in records
    }
    dropped = ("schema", "schema_version", "recipe", "packages", "threads")
    budget = asdict(replace(study.budget, model=Path(), tuning_text=(), calibration_text=()))
    tuning = study.budget.tuning_text
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "git_revision": git_revision(Path(__file__)),
        "model": study.name,
        "inputs": dict(study.identity),
        "budget": {name: value for name, value in budget.items() if name not in ("model", *_TEXT_FIELDS)},
        "tuning_text": [file_label(path) for path in tuning],
        "calibration_text": [file_label(path) for path in study.budget.calibration_text or tuning],
        "texts": [text.name for text in study.texts],
        "threads": study.threads,
        "machine": machine_record().as_dict(),
        "settings": settings,
        "failed": [{"cell": cell, "error": error} for cell, error in failed.items()],
        "cells": [{name: value for name, value in record.items() if name not in dropped} for record in records],
    }


_TEXT_FIELDS = ("tuning_text", "calibration_text")


def write_page(folder: Path) -> Path:
    """Draw `methods.md` from all `methods-*.json` in a folder. Raises: InputError for a file that is none of ours."""
    documents = []
    for path in sorted(folder.glob("methods-*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"'{path}' cannot be read as JSON ({error}); make it again or take it away") from error
        if not isinstance(record, dict) or (record.get("schema"), record.get("schema_version")) != (
            SCHEMA,
            SCHEMA_VERSION,
        ):
            raise InputError(f"'{path}' holds no results of this study; take it away, or make it again", path=path)
        if record["cells"]:
            documents.append(record)
    if not documents:
        raise InputError(f"there are no results in '{folder}' (methods-*.json); run the study with a MODEL first")
    write_text_atomic(folder / "methods.md", page(documents))
    return folder / "methods.md"


def _say(line: str) -> None:
    sys.stderr.write(f"study: {line}\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m losa_export.eval.studies.methods", description=main.__doc__)
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL", help="dense checkpoint; without it only draw")
    parser.add_argument("--name", metavar="NAME", help="what the page calls the model (default: its folder's name)")
    parser.add_argument("--tune", type=Path, nargs="+", default=[], metavar="FILE", help="text to tune on")
    parser.add_argument(
        "--calibration", type=Path, nargs="+", default=[], metavar="FILE", help="default: the tuning text"
    )
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="documents to judge by")
    parser.add_argument(
        "--wikitext", type=Path, nargs="+", default=[], metavar="FILE", help="WikiText files to judge by, its protocol"
    )
    parser.add_argument("--text-window", type=int, default=512, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--text-windows", type=int, default=40, metavar="N", help="of each (default: %(default)s)")
    for field, text in (
        ("steps", "optimizer steps"),
        ("batch_size", "windows in a step"),
        ("window", "tokens in one"),
        ("calibration_windows", "how many"),
        ("calibration_window", "tokens in one"),
        ("rank", "mean rank at the end"),
    ):
        flag, default = f"--{field.replace('_', '-')}", getattr(Budget, field)
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--minutes", type=float, metavar="N", help="wall time of each run, pruning included, in place of --steps"
    )
    parser.add_argument(
        "--spaced-fraction",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the text to tune and calibrate on, with punctuation set off by spaces, for all (default: %(default)s)",
    )
    parser.add_argument("--compute", metavar="TYPE", help="fp32, bf16 or auto for all (default: as each method says)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where to train (default: cpu)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME", help="default: all")
    parser.add_argument(
        "--sparsities", nargs="+", default=["50%", "60%", "70%", "2:4"], metavar="S", help="default: 50%% 60%% 70%% 2:4"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--quiet", action="store_true", help="a line for each cell, no more")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="work folder: results and runs")
    parser.add_argument("--page", type=Path, metavar="DIR", help="write results and page there as well")
    return parser


def _study(options: argparse.Namespace) -> Study:
    for field in ("tune", "output"):
        if not getattr(options, field):
            raise ConfigError(f"--{field} is not given; a study needs it", field=field)
    texts = tuple(
        EvaluationText(path, wikitext, options.text_window, options.text_windows)
        for paths, wikitext in ((options.wikitext, True), (options.text, False))
        for path in paths
    )
    if not texts:
        raise ConfigError("there is no text to judge by; give --text or --wikitext", field="text")
    for text in texts:
        text.cut(options.model)  # too short a text shows before the first hour, not after it
    fields = ("batch_size", "window", "calibration_windows", "calibration_window", "rank", "compute", "spaced_fraction")
    timed = options.minutes is not None
    budget = Budget(
        model=options.model.resolve(),
        tuning_text=tuple(path.resolve() for path in options.tune),
        calibration_text=tuple(path.resolve() for path in options.calibration),
        steps=None if timed else options.steps,
        time_budget_seconds=60.0 * options.minutes if timed else None,
        device=options.device,
        **{field: getattr(options, field) for field in fields},
    )
    files = [*options.tune, *options.calibration, *(text.path for text in texts)]
    return Study(
        name=options.name or options.model.resolve().name,
        budget=budget,
        texts=texts,
        work=options.output.resolve(),
        threads=options.threads,
        identity=identity(options.model, files),
        show_progress=not options.quiet,
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is like Ctrl-C."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and judge the methods that LoSA is made of, or only draw the page. Returns: the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    return exit_code(lambda: _run(options, words))


def _run(options: argparse.Namespace, words: Sequence[str]) -> bool:
    """Measure what the options ask for, and draw. Returns: whether no cell failed."""
    failed: dict[str, str] = {}
    if options.model is not None:
        study = _study(options)
        # Seeds outermost: what is there early is one whole matrix.
        cells = [
            Cell(method, sparsity, seed)
            for seed in options.seeds
            for sparsity in options.sparsities
            for method in options.methods
        ]
        with _terminable():
            failed = run_study(study, cells)
        if options.page is not None:
            options.page.mkdir(parents=True, exist_ok=True)
            record = document(study, failed, rerun_command("methods", words))
            path = options.page / f"methods-{study.name}.json"
            write_text_atomic(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    elif options.page is None:
        raise ConfigError("there is nothing to do; give a MODEL, or --page to draw what is there", field="model")
    if options.page is not None:
        _say(f"drew {write_page(options.page)}")
    return not failed


if __name__ == "__main__":
    sys.exit(main())
