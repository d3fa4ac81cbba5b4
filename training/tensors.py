"""Tensor files that are flushed to the disk, with the operating system's errors brought back."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

# The writer keeps the system's error number as text only.
_NUMBERS = {f"os error {number}": number for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file and flush it; not atomic, so give a temporary name or folder.

    Raises: OSError, also where the safetensors library would raise its own error.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        text = str(error)
        number = next((value for key, value in _NUMBERS.items() if key in text), errno.EIO)
        raise OSError(number, text, str(path)) from error
    path.chmod(0o644)
    flush(path)


def flush(path: Path) -> None:
    """Have a file's bytes, or a folder's entries, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
