"""`losa report`: records → one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_report(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa report`."""
    parser.add_argument("places", nargs="+", type=Path, metavar="DIR", help="folders or files with records")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="page to write (default: %(default)s)",
    )
    parser.add_argument("--markdown", type=Path, default=None, metavar="FILE", help="the tables as Markdown too")
    parser.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from losa_export.eval.html_report import write_report

    found = write_report(arguments.places, arguments.output, arguments.markdown)
    for path, reason in found.skipped:
        print(f"losa: left out '{path}': {reason}", file=sys.stderr)
    print(
        f"{arguments.output}: {len(found.benches)} benchmarks, {len(found.evals)} evaluations, "
        f"{len(found.runs)} training runs"
    )
    return 0
