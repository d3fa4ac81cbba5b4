"""Work of PyTorch's in a child process, so that this one's memory holds no model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from losa_export.errors import LosaError, RuntimeFailureError


def run_apart(module: str, arguments: Sequence[Path], *, what: str, timeout_s: float = 1800.0) -> None:
    """Run `python -m MODULE ARGUMENTS`.

    Args:
        module: to run; its exit code is `exit_code_of` its work.
        arguments: for it.
        what: is computed, for messages.
        timeout_s: seconds until the child is stopped.
    Raises: RuntimeFailureError if it fails or takes too long; its own message is quoted.
    """
    command = [sys.executable, "-P", "-m", module, *map(str, arguments)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeFailureError(
            f"{what} took more than {timeout_s:g} s; give it more time, or fewer rivals", command=command
        ) from error
    if child.returncode != 0:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise RuntimeFailureError(f"{what} could not be computed by torch: {last[0]}", command=command)


def exit_code_of(work: Callable[[], None]) -> int:
    """The child's side: do the work; an error becomes one line on standard error, and its exit code."""
    try:
        work()
    except LosaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0
