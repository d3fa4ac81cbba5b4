from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from losa_export.training import heap

# Frees and takes a block of 16 MiB again and again, and counts the pages that the system had to give anew.
_FAULTS = """
import ctypes, resource, sys
from losa_export.training.heap import keep_freed_memory, return_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
if sys.argv[1] == "returned":
    assert return_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(20):
    blocks = [libc.malloc(16 * 2**20) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 16 * 2**20)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has mallopt")
def test_freed_blocks_are_used_again_without_the_system() -> None:
    faults = {
        case: int(subprocess.check_output([sys.executable, "-P", "-c", _FAULTS, case], text=True))
        for case in ("kept", "default", "returned")
    }
    # The first round of four blocks needs 16,384 pages of 4 KiB, and the other nineteen none.
    assert faults["kept"] < 20_000 < faults["default"]
    assert faults["returned"] > 19 * 16_384


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not heap.keep_freed_memory()
    assert not heap.return_freed_memory()
