"""The command line: one verb per step of the data path.

Each command parses, builds a config, calls one function and prints (`losa_export.commands`). Results go to stdout,
progress and errors to stderr.
Exit codes: 0 done, 1 the run failed, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from losa_export.commands.arguments import EXIT_FAILED, EXIT_INTERRUPTED
from losa_export.commands.bench import add_bench, compare_parser, kernels_parser
from losa_export.commands.bench_serve import serve_parser
from losa_export.commands.demo import add_demo
from losa_export.commands.doctor import add_doctor
from losa_export.commands.eval import add_eval
from losa_export.commands.export import EXPORT_TEXT, add_export
from losa_export.commands.generate import add_generate
from losa_export.commands.merge import add_merge
from losa_export.commands.report import add_report
from losa_export.commands.runtimes import add_runtimes
from losa_export.commands.serve import add_serve
from losa_export.commands.synth import add_synth
from losa_export.commands.train import add_train
from losa_export.commands.verify import add_verify
from losa_export.errors import LosaError

_Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `losa VERB …`. Returns: the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:2] == ["bench", "kernels"]:
        return _run(kernels_parser().parse_args(words[2:]))
    if words[:2] == ["bench", "compare"]:
        return _run(compare_parser().parse_args(words[2:]))
    if words[:2] == ["bench", "serve"]:
        return _run(serve_parser().parse_args(words[2:]))
    return _run(_parser().parse_args(words))


def main_export(argv: Sequence[str] | None = None) -> int:
    """Run `losa-export …`, which is `losa export …`. Returns: the exit code."""
    parser = argparse.ArgumentParser(prog="losa-export", description=EXPORT_TEXT)
    add_export(parser)
    return _run(parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    command: _Command = arguments.command
    try:
        return command(arguments)
    except LosaError as error:
        print(f"losa: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("losa: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, for example `| head`
        sys.stderr.close()
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="losa",
        description="Prune a language model, tune it under its mask, export it, and run it fast on a CPU.",
        epilog="Start with 'losa demo': the whole path on a real model that is already in the installed packages.",
    )
    parser.add_argument("--version", action="version", version=f"losa-export {version('losa-export')}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, text, add in (
        ("demo", "the whole path on an embedded model, in one command", add_demo),
        ("train", "prune in rounds while tuning masked adapters: checkpoint → run/", add_train),
        ("merge", "fold the adapters into the weights, with proof: run/ → merged/", add_merge),
        ("export", "write one ONNX model: merged/ → onnx/", add_export),
        (
            "bench",
            "measure an exported model against a dense one; 'losa bench kernels': single products; 'serve': a server under load; 'compare': two records",
            add_bench,
        ),
        ("eval", "perplexity, distance from a reference, zero-shot accuracy", add_eval),
        ("verify", "check an export against the records of how it was made: hashes, zeros, figures", add_verify),
        ("report", "one page of benchmarks, evaluations and training runs: DIR… → report.html", add_report),
        ("doctor", "examine this CPU: which sparsity pays, with which values", add_doctor),
        ("synth", "write a random checkpoint of a published shape, for benchmarks", add_synth),
        ("runtimes", "list, install or remove engines that need an environment of their own", add_runtimes),
        ("generate", "continue a text with an exported model", add_generate),
        ("serve", "answer OpenAI's HTTP interface with an exported model", add_serve),
    ):
        add(verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))
    return parser
