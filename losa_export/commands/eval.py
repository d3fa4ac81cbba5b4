"""`losa eval`: perplexity, distance from a reference, zero-shot accuracy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from losa_export.commands.arguments import RUNTIMES, add_threads


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa eval`."""
    parser.add_argument("target", type=Path, metavar="MODEL", help="exported folder, merged/ or any checkpoint")
    parser.add_argument("--against", type=Path, default=None, metavar="DIR", help="reference to hold it against")
    parser.add_argument(
        "--runtime", choices=RUNTIMES, default=None, help="of the target (default: ort, or torch for a checkpoint)"
    )
    parser.add_argument(
        "--against-runtime", choices=RUNTIMES, default=None, help="of the reference (default: ort-stock, or torch)"
    )
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help=".txt, .jsonl or .json")
    parser.add_argument(
        "--wikitext", type=Path, nargs="+", default=[], metavar="FILE", help="read by the usual protocol for WikiText"
    )
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument(
        "--windows", type=int, default=16, metavar="N", help="of each text; 0 takes all (default: %(default)s)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=None,
        metavar="N",
        help="tokens from one window to the next, each of which scores its last N (default: --window)",
    )
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="hellaswag, piqa, arc_easy, …, or all")
    parser.add_argument(
        "--task-folder",
        type=Path,
        default=None,
        metavar="DIR",
        help="holds NAME.jsonl of each task (default: from the Hugging Face hub, by the package 'datasets')",
    )
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="items of each task (default: all)")
    parser.add_argument(
        "--json", type=Path, default=Path("eval.json"), metavar="FILE", help="all figures (default: %(default)s)"
    )
    add_threads(parser)
    parser.set_defaults(command=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from losa_export.eval.eval_report import eval_markdown
    from losa_export.eval.evaluation import EvalConfig, EvalText, evaluate
    from losa_export.eval.task_hub import SOURCES
    from losa_export.eval.tasks import TASKS

    texts = tuple(
        EvalText(path, wikitext, arguments.window, arguments.windows or None, arguments.stride)
        for paths, wikitext in ((arguments.wikitext, True), (arguments.text, False))
        for path in paths
    )
    tasks = tuple(arguments.tasks)
    if tasks == ("all",):
        tasks = tuple(SOURCES if arguments.task_folder is None else TASKS)
    config = EvalConfig(
        target=arguments.target,
        output=arguments.json,
        runtime=arguments.runtime,
        reference=arguments.against,
        reference_runtime=arguments.against_runtime,
        texts=texts,
        tasks=tasks,
        task_folder=arguments.task_folder,
        limit=arguments.limit,
        threads=arguments.threads,
    )
    record = evaluate(config)
    print(eval_markdown(record), end="")
    for task in record["tasks"]:
        if task["items_cut"]:
            print(
                f"{task['name']}: {task['items_cut']} items were too long for the model and lost their beginning",
                file=sys.stderr,
            )
    return 0
