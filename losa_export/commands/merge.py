"""`losa merge`: run/ → merged/."""

from __future__ import annotations

import argparse
from pathlib import Path

from losa_export.commands.arguments import add_output


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa merge`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run folder of 'losa train'")
    source.add_argument(
        "--adapter", type=Path, metavar="DIR", help="a LoRA trained elsewhere (PEFT layout); needs --base"
    )
    parser.add_argument(
        "--base", default=None, metavar="DIR_OR_HUB_ID", help="checkpoint (default: the one the run was made from)"
    )
    add_output(parser, None)
    parser.set_defaults(command=_merge)


def _merge(arguments: argparse.Namespace) -> int:
    from losa_export.errors import ConfigError
    from losa_export.merge import merge_adapter, merge_run
    from losa_export.sources import resolve_model

    base = resolve_model(arguments.base) if arguments.base is not None else None
    if arguments.adapter is None:
        report = merge_run(arguments.run, arguments.output, base=base, overwrite=arguments.overwrite)
    elif base is None:
        raise ConfigError("--adapter needs --base: the sparse checkpoint that the LoRA was trained on", field="base")
    else:
        report = merge_adapter(base, arguments.adapter, arguments.output, overwrite=arguments.overwrite)
    print(report)
    return 0
