"""`losa doctor`: what pays on this CPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from losa_export.commands.arguments import add_threads


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa doctor`."""
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures too")
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="to take for everything (default: %(default)s)"
    )
    parser.add_argument("--shape", default="2048x2048", metavar="NxK", help="of the weight (default: %(default)s)")
    add_threads(parser)
    parser.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from losa_export.eval.doctor import DoctorConfig, run_doctor
    from losa_export.eval.doctor_report import print_doctor
    from losa_export.files import check_output_file

    if arguments.json is not None:
        check_output_file(arguments.json)
    report = run_doctor(DoctorConfig(threads=arguments.threads, seconds=arguments.seconds, shape=arguments.shape))
    if arguments.json is not None:
        report.write(arguments.json)
    print_doctor(report.as_dict())
    if report.missing is not None:
        raise report.missing
    return 0
