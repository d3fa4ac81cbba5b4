"""Which library multiplies float32 matrices on a CPU: where PyTorch's choice is the slower one, the other."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

Library = Literal["default", "onednn"]


@functools.cache
def product_library() -> Library:
    """The library that `fast_products` takes on this machine.

    PyTorch hands float32 products to Intel's MKL. On an AMD EPYC with AVX-512 that reaches half the speed of oneDNN,
    which PyTorch brings along too. PyTorch takes it if it may round to bfloat16, which it does with AMX alone; so a
    processor that has AMX keeps the default.
    """
    present = hasattr(torch.backends.mkldnn, "matmul") and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)())
    wide = bool(getattr(torch.cpu, "_is_avx512_supported", lambda: False)())
    return "onednn" if present and wide and not amx and _maker() == "AuthenticAMD" else "default"


def _maker(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's maker as Linux spells it; empty elsewhere."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


@contextlib.contextmanager
def fast_products(library: Library) -> Iterator[None]:
    """Within the block, float32 matrix products on the CPU are `library`'s, to the same accuracy."""
    if library == "default":
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
