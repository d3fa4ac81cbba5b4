"""The whole path in one command."""

from __future__ import annotations

import argparse
from pathlib import Path

from losa_export.commands.arguments import add_output, add_threads, fraction


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa demo`."""
    parser.add_argument("--model", default=None, metavar="DIR_OR_HUB_ID", help="instead of the embedded SmolLM2-135M")
    parser.add_argument("--text", type=Path, nargs="+", default=(), metavar="FILE", help="instead of the embedded text")
    parser.add_argument("--sparsity", type=fraction, default=0.5, metavar="S", help="zeros, e.g. 70%% (default: 0.5)")
    parser.add_argument(
        "--quick", action="store_true", help="about 5 minutes instead of 20: less tuning, fewer samples"
    )
    add_output(parser, "demo-out")
    add_threads(parser)
    parser.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from losa_export.demo import DemoConfig, run_demo

    config = DemoConfig(
        output=arguments.output,
        model=arguments.model,
        texts=tuple(arguments.text),
        sparsity_fraction=arguments.sparsity,
        quick=arguments.quick,
        threads=arguments.threads,
        overwrite=arguments.overwrite,
    )
    print(run_demo(config))
    return 0
