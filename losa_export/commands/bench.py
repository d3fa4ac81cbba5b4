"""`losa bench`, `losa bench compare` and `losa bench kernels`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from losa_export.commands.arguments import EXIT_FAILED, RUNTIMES, add_threads, counts, duration, fraction


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa bench`."""
    parser.add_argument("candidate", type=Path, metavar="ONNX", help="exported folder to measure")
    parser.add_argument("--against", type=Path, required=True, metavar="DIR", help="exported folder to compare with")
    parser.add_argument(
        "--runtime",
        type=_engines,
        default=[("ort", None)],
        metavar="NAME[:DIR][,NAME…]",
        help=f"of the candidate: {', '.join(RUNTIMES)}; with DIR another folder for that engine (default: ort)",
    )
    parser.add_argument(
        "--against-runtime", choices=RUNTIMES, default="ort-stock", help="of the other (default: %(default)s)"
    )
    for flag, default, text in (
        ("--prompt", 128, "tokens prefilled"),
        ("--gen", 64, "tokens then decoded"),
        ("--batch", 1, "rows decoded together"),
    ):
        parser.add_argument(flag, type=counts, default=[default], metavar="N[,N…]", help=f"{text} (default: {default})")
    parser.add_argument(
        "--max-time", type=duration, default=180.0, metavar="TIME", help="of the timed part, at most (default: 3m)"
    )
    parser.add_argument(
        "--answers",
        choices=("auto", "same", "own"),
        default="auto",
        help="'same': both must answer alike; 'own': different weights on purpose, each checked by a second engine"
        " (default: by the hashes in export.json)",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("bench.json"), metavar="FILE", help="raw samples (default: %(default)s)"
    )
    parser.add_argument("--csv", type=Path, default=None, metavar="FILE", help="a line for each combination")
    parser.add_argument("--markdown", type=Path, default=None, metavar="FILE", help="the table")
    parser.add_argument(
        "--threads",
        type=counts,
        default=[None],
        metavar="N[,N…]",
        help="compute threads (default: the physical cores we may use)",
    )
    parser.set_defaults(command=_bench)


def _engines(text: str) -> list[tuple[Any, Path | None]]:
    """Runtimes such as ort,deepsparse:ds/ with their folders; an unknown name is the config's business."""
    pairs = [word.partition(":") for word in text.split(",")]
    return [(name, Path(folder) if folder else None) for name, _, folder in pairs]


def _bench(arguments: argparse.Namespace) -> int:
    from losa_export.eval.bench import BenchConfig, bench
    from losa_export.eval.bench_sweep import SweepReport, combinations, sweep
    from losa_export.eval.report import bench_markdown, print_bench
    from losa_export.files import check_output_file, write_text_atomic

    outputs = [path for path in (arguments.json, arguments.csv, arguments.markdown) if path is not None]
    for path in outputs:
        check_output_file(path)
    common = BenchConfig(
        candidate=arguments.candidate,
        baseline=arguments.against,
        baseline_runtime=arguments.against_runtime,
        answers=arguments.answers,
        min_seconds=min(10.0, arguments.max_time),
        max_seconds=arguments.max_time,
    )
    configs = combinations(
        common,
        engines=arguments.runtime,
        threads=arguments.threads,
        batches=arguments.batch,
        prompts=arguments.prompt,
        news=arguments.gen,
    )
    if len(configs) == 1:
        single = bench(configs[0])
        single.write(arguments.json)
        print_bench(single.as_dict())
        found, table = SweepReport([single.as_dict()]), bench_markdown(single.as_dict())
    else:
        found = sweep(configs, keep=lambda report: report.write(arguments.json))
        table = found.markdown()
        print(table, end="")
    if arguments.csv is not None:
        write_text_atomic(arguments.csv, found.csv())
    if arguments.markdown is not None:
        write_text_atomic(arguments.markdown, table)
    return EXIT_FAILED if found.failed else 0


def compare_parser() -> argparse.ArgumentParser:
    """`losa bench compare`: apart, as `losa bench kernels` is."""
    parser = argparse.ArgumentParser(
        prog="losa bench compare",
        description="Compare two records of 'losa bench' with the same baseline: has the candidate become slower?",
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.json", help="record to compare with")
    parser.add_argument("after", type=Path, metavar="AFTER.json", help="record in question")
    parser.add_argument(
        "--fail-if-slower",
        type=fraction,
        default=None,
        metavar="S",
        help="exit with 1 if prefill or decode is shown to be slower, and by more than this, such as 3%%",
    )
    parser.set_defaults(command=_compare)
    return parser


def _compare(arguments: argparse.Namespace) -> int:
    from losa_export.eval.bench_compare import compare_records

    changes = compare_records(arguments.before, arguments.after)
    for change in changes:
        print(change)
    limit = arguments.fail_if_slower
    slower = [change.metric for change in changes if limit is not None and change.slower_than(limit)]
    if slower:
        print(f"losa: slower by more than {limit:.1%}: {', '.join(slower)}", file=sys.stderr)
    return EXIT_FAILED if slower else 0


def kernels_parser() -> argparse.ArgumentParser:
    """`losa bench kernels`: apart from `losa bench`, whose first argument is a folder."""
    parser = argparse.ArgumentParser(
        prog="losa bench kernels", description="Time single products against ONNX Runtime's and torch's, cold weights."
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=("llama2-7b",),
        metavar="SHAPE",
        help="smollm2, tinyllama, llama2-7b or ROWSxCOLUMNS (default: llama2-7b)",
    )
    parser.add_argument("--sparsity", type=fraction, nargs="+", default=None, metavar="S", help="such as 50%% 70%%")
    parser.add_argument("--tokens", type=int, nargs="+", default=None, metavar="M", help="rows of the activations")
    parser.add_argument(
        "--values",
        nargs="+",
        default=("fp32", "bf16", "int8-a8", "int4-a8"),
        metavar="TYPE",
        help="fp32, bf16, int8, int4; with -a8 for 8-bit activations, dense-… without a mask "
        "(default: fp32 bf16 int8-a8 int4-a8)",
    )
    parser.add_argument(
        "--rows", nargs="+", default=(), metavar="ROW", help="kernel rows, or 'all' (default: the one in use)"
    )
    parser.add_argument("--peers", nargs="*", default=None, metavar="NAME", help="default: all that are installed")
    parser.add_argument("--seconds", type=float, default=None, metavar="S", help="timed part of a case")
    parser.add_argument("--ring", type=int, default=None, metavar="MIB", help="what a weight's copies exceed together")
    parser.add_argument("--quick", action="store_true", help="fewer cases, peers and copies")
    parser.add_argument(
        "--json", type=Path, default=Path("kernels.json"), metavar="FILE", help="raw samples (default: %(default)s)"
    )
    add_threads(parser)
    parser.set_defaults(command=_bench_kernels)
    return parser


def _bench_kernels(arguments: argparse.Namespace) -> int:
    from losa_export.eval.kernel_bench import KernelBenchConfig, bench_kernels
    from losa_export.eval.kernel_bench_report import print_kernel_bench
    from losa_export.files import check_output_file

    check_output_file(arguments.json)
    report = bench_kernels(
        KernelBenchConfig(
            shapes=tuple(arguments.shapes),
            sparsities=None if arguments.sparsity is None else tuple(arguments.sparsity),
            tokens=None if arguments.tokens is None else tuple(arguments.tokens),
            values=tuple(arguments.values),
            rows=tuple(arguments.rows),
            peers=None if arguments.peers is None else tuple(arguments.peers),
            threads=arguments.threads,
            seconds=arguments.seconds,
            ring_mebibytes=arguments.ring,
            quick=arguments.quick,
        )
    )
    report.write(arguments.json)
    print_kernel_bench(report.as_dict())
    return 0
