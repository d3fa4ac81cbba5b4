"""`losa verify`: an exported folder against the records of how it was made."""

from __future__ import annotations

import argparse
from pathlib import Path

from losa_export.commands.arguments import EXIT_FAILED


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa verify`."""
    parser.add_argument("folder", type=Path, metavar="MODEL", help="exported folder")
    parser.add_argument("--merged", type=Path, default=None, metavar="DIR", help="checkpoint that it was made of")
    parser.add_argument("--run", type=Path, default=None, metavar="DIR", help="run that the checkpoint was made of")
    parser.add_argument(
        "--eval", dest="evaluation", type=Path, default=None, metavar="FILE", help="eval.json of 'losa eval' on it"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="every check and difference")
    parser.set_defaults(command=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    import json

    from losa_export.files import check_output_file, write_text_atomic
    from losa_export.verify import verify

    if arguments.json is not None:
        check_output_file(arguments.json)
    found = verify(arguments.folder, merged=arguments.merged, run=arguments.run, evaluation=arguments.evaluation)
    if arguments.json is not None:
        write_text_atomic(arguments.json, json.dumps(found.as_dict(), indent=1) + "\n")
    print(found)
    return 0 if found.confirmed else EXIT_FAILED
