"""How the process's memory allocator treats what a training step frees."""

from __future__ import annotations

import ctypes
import platform

# Of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_RETURNED_BLOCK = 2**20
_NEVER = -1


def keep_freed_memory() -> bool:
    """Have glibc keep blocks of up to 32 MiB for the next request, until the process ends.

    By default it hands them back to the system, which must clear each page before it gives it out again: on a CPU a
    tenth of the time of a training step, whose tensors are of the same sizes every time.

    Returns: whether it took effect; False with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, _NEVER))


def return_freed_memory() -> bool:
    """Have glibc take blocks of 1 MiB and more from the system and hand them back when freed, until the process ends.

    By default it learns to keep them, and where large tensors come and go between others that stay, that takes nearly
    twice the memory of those alive.

    Returns: whether it took effect; False with another C library.
    """
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _RETURNED_BLOCK))
