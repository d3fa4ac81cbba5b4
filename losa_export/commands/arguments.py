"""Arguments that several verbs share, and the exit codes of all."""

from __future__ import annotations

import argparse
from pathlib import Path

from losa_export.units import seconds_of

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
# As `losa_export.runtimes.RUNTIME_NAMES`, which brings numpy along: too slow for every start of the command line.
RUNTIMES = ("ort", "ort-stock", "genai", "torch", "deepsparse", "openvino", "optimum", "llamacpp")


def fraction(text: str) -> float:
    """A sparsity as 0.7 or 70%; its range is the config's business, which names the field."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no number; write 0.7 or 70%") from None


def duration(text: str) -> float:
    """A duration such as 90, 90s, 10m or 1.5h, in seconds."""
    try:
        return seconds_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' {error}") from None


def add_output(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Where a verb writes its folder; without a default it must be said."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=default is None,
        default=None if default is None else Path(default),
        metavar="DIR",
        help="folder to write" + ("" if default is None else " (default: %(default)s)"),
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it is not empty")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """The number of compute threads."""
    parser.add_argument(
        "--threads",
        type=int,
        default=None,
        metavar="N",
        help="compute threads (default: the physical cores we may use)",
    )


def counts(text: str) -> list[int]:
    """Whole numbers such as 1,2,4; their range is the config's business, which names the field."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' are no whole numbers; write for example 1,2") from None
