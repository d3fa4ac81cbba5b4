"""What the command lines of the studies share."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from losa_export.errors import LosaError

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def file_label(path: Path) -> str:
    """A file and its folder, without what lies above them."""
    return f"{path.resolve().parent.name}/{path.name}"


def rerun_command(study: str, words: Sequence[str]) -> str:
    """The command of a study, without the folders that only this machine has."""
    shown = [file_label(Path(word)) if "/" in word and Path(word).is_file() else word for word in words]
    shown = [Path(word).name if "/" in word and Path(word).is_absolute() else word for word in shown]
    return shlex.join(["python", "-m", f"losa_export.eval.studies.{study}", *shown])


def exit_code(run: Callable[[], bool]) -> int:
    """Run a study, which tells whether all of it came to an end. Returns: the exit code; errors go to stderr."""
    try:
        return 0 if run() else EXIT_FAILED
    except LosaError as error:
        sys.stderr.write(f"study: error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("study: interrupted; the same command goes on from here\n")
        return EXIT_INTERRUPTED
