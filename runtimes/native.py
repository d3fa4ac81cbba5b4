"""Typed door to the compiled kernels, `liblosa_kernels.so`.

ONNX Runtime loads the same file as an operator library (`library_path`); the functions here call its
C interface directly, with numpy arrays, for tests, tools and checks without an inference engine.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import losa_export.runtimes
from losa_export.errors import ConfigError, FormatError, KernelError, LosaError

LIBRARY_NAME = "liblosa_kernels.so"
LIBRARY_VARIABLE = "LOSA_LIBRARY"
LAYOUT_N16 = 1
BLOCK_ROWS = 16
VALUE_PADDING = 16

_FORMAT_ERROR, _KERNEL_ERROR, _OUT_OF_MEMORY = 1, 2, 3  # as in c_api.cpp
_ERROR_BYTES = 512


@dataclass(frozen=True)
class KernelInfo:
    """What the library is and which kernels it would use.

    Attributes:
        row: the kernel row in use: LOSA_KERNEL if set, else the best that this CPU runs.
        available_rows: rows that this CPU runs, best first.
        compiled_rows: rows in the library, best first.
        version: of the library.
        library: the file.
    """

    row: str
    available_rows: tuple[str, ...]
    compiled_rows: tuple[str, ...]
    version: str
    library: Path


@dataclass(frozen=True)
class SparseFp32:
    """A weight (rows, columns) in the compressed form of `losa.sparse::SparseMatMulFp32`.

    Or two of that shape, a gate and another, in the form of `SparseSwiGLUFp32`: their blocks of 16 rows
    alternate, so that block 2i holds rows 16i to 16i + 15 of the gate and block 2i + 1 those of the other.

    Attributes:
        mask: uint8 (blocks, columns, 2): bit r of the 16 says whether row 16·block + r is kept, and row r of
            the block in the case of two weights.
        values: float32 (kept + 16,): kept values in order block, column, row; then padding.
        block_offsets: int64 (blocks + 1,): index of each block's first value, then `kept`.
        layout: 1.
    """

    rows: int
    columns: int
    mask: NDArray[np.uint8]
    values: NDArray[np.float32]
    block_offsets: NDArray[np.int64]
    layout: int = LAYOUT_N16


def library_path() -> Path:
    """The compiled library: LOSA_LIBRARY if set, else beside this module or where the build put it.

    Raises: KernelError if there is none.
    """
    forced = os.environ.get(LIBRARY_VARIABLE)
    if forced:
        if Path(forced).is_file():
            return Path(forced).resolve()
        raise KernelError(
            f"{LIBRARY_VARIABLE} names '{forced}', which is not a file; unset it to use the installed library",
            path=forced,
        )
    for folder in losa_export.runtimes.__path__:
        candidate = Path(folder) / LIBRARY_NAME
        if candidate.is_file():
            return candidate.resolve()
    raise KernelError(
        f"{LIBRARY_NAME} is not in {', '.join(losa_export.runtimes.__path__)}; "
        f"build it with 'pip install .' (needs a C++ compiler), or name a built one in {LIBRARY_VARIABLE}"
    )


def describe() -> KernelInfo:
    """Library and kernel rows; LOSA_KERNEL is read at each call.

    Raises: KernelError if there is no library, or LOSA_KERNEL names a row that cannot run.
    """
    path = library_path()
    library = _load(path)
    size = library.losa_describe(None, 0)
    text = ctypes.create_string_buffer(size + 1)
    library.losa_describe(text, size + 1)
    facts = json.loads(text.value)
    if facts["row"] is None:
        raise KernelError(facts["error"])
    return KernelInfo(
        row=facts["row"],
        available_rows=tuple(facts["available_rows"]),
        compiled_rows=tuple(facts["compiled_rows"]),
        version=facts["version"],
        library=path,
    )


def validate(weight: SparseFp32, *, gated: bool = False) -> None:
    """Check everything that the kernels rely on; `gated` says that the weight is one of `sparse_swiglu_fp32`.

    Raises: FormatError naming the first contradiction; KernelError if there is no library.
    """
    library = _load(library_path())
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    code = library.losa_validate_fp32(*_weight_arguments(weight, gated), error, _ERROR_BYTES)
    _raise_for(code, error)


def sparse_matmul_fp32(
    x: NDArray[np.float32], weight: SparseFp32, *, row: str | None = None, threads: int = 1
) -> NDArray[np.float32]:
    """Multiply: x W^T by a native kernel.

    A kernel may skip absent weights (0 · ∞ then counts as 0) or multiply by zero (it is NaN), so where x
    is infinite or NaN only those outputs are defined whose weight is kept there: they are not finite.

    Args:
        x: float32 (..., columns).
        weight: validated at each call.
        row: kernel row; None means LOSA_KERNEL, or the best that this CPU runs.
        threads: made for this call; the result does not depend on their number.
    Returns: float32 (..., rows), accumulated in float32.
    Raises: FormatError for a contradictory weight or an x that does not fit; KernelError for an unknown or
        unavailable row; ConfigError for threads < 1.
    """
    return _multiply(x, weight, row, threads, gated=False)


def sparse_swiglu_fp32(
    x: NDArray[np.float32], weight: SparseFp32, *, row: str | None = None, threads: int = 1
) -> NDArray[np.float32]:
    """SwiGLU: silu(x Wgate^T) · (x Wup^T) element by element, silu(z) = z / (1 + exp(-z)), by a native kernel.

    silu(-∞) is NaN, as that formula has it. Arguments, result and errors are those of `sparse_matmul_fp32`,
    with the two weights in one as `SparseFp32` says.
    Source of the formula: Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    return _multiply(x, weight, row, threads, gated=True)


def typed_error(engine_message: str) -> LosaError | None:
    """The error that our operator meant, from the text an inference engine wrapped it in; None if not ours."""
    for kind in (FormatError, KernelError):
        _, found, message = engine_message.partition(f"losa.{kind.__name__}: ")
        if found:
            return kind(message.strip())
    return None


def _multiply(
    x: NDArray[np.float32], weight: SparseFp32, row: str | None, threads: int, *, gated: bool
) -> NDArray[np.float32]:
    if threads < 1:
        raise ConfigError(f"threads is {threads}, it must be at least 1", threads=threads)
    if x.ndim == 0 or x.shape[-1] != weight.columns or x.dtype != np.float32:
        raise FormatError(f"x is {x.dtype} {x.shape}, the weight needs float32 with last dimension {weight.columns}")
    x = np.require(x, requirements=["C", "A"])
    y = np.empty((*x.shape[:-1], max(weight.rows, 0)), np.float32)
    tokens = int(np.prod(x.shape[:-1], dtype=np.int64))
    library = _load(library_path())
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    code = library.losa_matmul_fp32(
        None if row is None else row.encode(),
        *_weight_arguments(weight, gated),
        x.ctypes.data,
        tokens,
        y.ctypes.data,
        threads,
        error,
        _ERROR_BYTES,
    )
    _raise_for(code, error)
    return y


def _weight_arguments(weight: SparseFp32, gated: bool) -> Iterator[int]:
    """The ten arguments that describe a weight in c_api.cpp."""
    yield from (weight.rows, weight.columns, weight.layout, gated)
    parts: tuple[tuple[str, NDArray[Any], type[np.generic]], ...] = (
        ("mask", weight.mask, np.uint8),
        ("values", weight.values, np.float32),
        ("block_offsets", weight.block_offsets, np.int64),
    )
    for name, array, dtype in parts:
        if array.dtype != dtype or not array.flags.c_contiguous:
            raise FormatError(
                f"{name} must be contiguous {np.dtype(dtype)}, it is {array.dtype} of strides {array.strides}",
                name=name,
            )
        yield array.ctypes.data
        yield array.size


def _raise_for(code: int, error: ctypes.Array[ctypes.c_char]) -> None:
    if code == 0:
        return
    message = error.value.decode(errors="replace")
    if code == _FORMAT_ERROR:
        raise FormatError(message)
    if code == _KERNEL_ERROR:
        raise KernelError(message)
    raise MemoryError(message)


@cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"{path} cannot be loaded ({error}); build it again with 'pip install .'") from error
    weight: list[Any] = [ctypes.c_int64] * 3 + [ctypes.c_int] + [ctypes.c_void_p, ctypes.c_size_t] * 3
    text: list[Any] = [ctypes.c_char_p, ctypes.c_size_t]
    library.losa_describe.argtypes = text
    library.losa_describe.restype = ctypes.c_size_t
    library.losa_validate_fp32.argtypes = [*weight, *text]
    product: list[Any] = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t]
    library.losa_matmul_fp32.argtypes = [ctypes.c_char_p, *weight, *product, *text]
    return library
