"""Typed door to the compiled kernels, `liblosa_kernels.so`.

ONNX Runtime loads the same file as an operator library (`library_path`); the functions here call its
C interface directly, with numpy arrays, for tests, tools and checks without an inference engine.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import losa_export.runtimes
from losa_export.errors import ConfigError, FormatError, KernelError, LosaError

LIBRARY_NAME = "liblosa_kernels.so"
LIBRARY_VARIABLE = "LOSA_LIBRARY"
LAYOUT_N16 = 1
BLOCK_ROWS = 16
VALUE_PADDING = 64  # bytes
_LARGEST_SIDE = 1 << 30  # of a weight, as in validate.cpp
_EVERY_TOKEN = (1 << 63) - 1

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
        large_pages: whether sessions copy weights into pages of 2 MiB; not where the system has none, or
            LOSA_LARGE_PAGES is 0.
    """

    row: str
    available_rows: tuple[str, ...]
    compiled_rows: tuple[str, ...]
    version: str
    library: Path
    large_pages: bool = False


ValueType = Literal["fp32", "bf16", "int8", "int4"]
VALUE_TYPES: tuple[ValueType, ...] = ("fp32", "bf16", "int8", "int4")  # numbered as in weight.h


@dataclass(frozen=True)
class Weight:
    """A weight (rows, columns) as the operators of domain `losa.sparse` store it, layout 1.

    Or two of that shape, a gate and another, as `SparseSwiGLU…` stores them: their blocks of 16 rows
    alternate, so that block 2i holds rows 16i to 16i + 15 of the gate and block 2i + 1 those of the other.
    Steps are of 1 column for fp32, 2 for bf16, 4 for int8 and int4; see docs/format.md.

    Attributes:
        value_type: of the kept values.
        mask: uint8 (blocks, steps, 2 · columns of a step); None: a dense weight.
        values: float32, uint16 (the bits of bfloat16), int8, or uint8 (two codes each), in one dimension, with 64
            bytes of padding.
        block_offsets: int64 (blocks + 1,): index of each block's first value, then their number; None if dense.
        scales: float16 (blocks, groups, 16), of int8 and int4.
        codebook: int8 (16,), of int4.
        group: columns that share a scale.
        activation_bits: 16 or 8, what activations are rounded to for int8 and int4.
        layout: 1.
    """

    value_type: ValueType
    rows: int
    columns: int
    mask: NDArray[np.uint8] | None
    values: NDArray[Any]
    block_offsets: NDArray[np.int64] | None
    scales: NDArray[np.float16] | None = None
    codebook: NDArray[np.int8] | None = None
    group: int = 128
    activation_bits: int = 16
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
        large_pages=facts["large_pages"],
        compiled_rows=tuple(facts["compiled_rows"]),
        version=facts["version"],
        library=path,
    )


def validate(weight: Weight, *, gated: bool = False) -> None:
    """Check everything that the kernels rely on; `gated` says that the weight is one of `swiglu`.

    Raises: FormatError naming the first contradiction; KernelError if there is no library.
    """
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    parts = _parts(weight, gated)
    _raise_for(_load(library_path()).losa_validate(ctypes.byref(parts), error, _ERROR_BYTES), error)


def matmul(x: NDArray[np.float32], weight: Weight, *, row: str | None = None, threads: int = 1) -> NDArray[np.float32]:
    """Multiply: x W^T by a native kernel.

    For int8 and int4 the activations are rounded first, by token and group of columns (activations.h); all rows
    then agree bit for bit. For fp32 and bf16 they agree but for the order of sums.
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


def swiglu(x: NDArray[np.float32], weight: Weight, *, row: str | None = None, threads: int = 1) -> NDArray[np.float32]:
    """SwiGLU: silu(x Wgate^T) · (x Wup^T) element by element, silu(z) = z / (1 + exp(-z)), by a native kernel.

    silu(-∞) is NaN, as that formula has it. Arguments, result and errors are those of `matmul`, with the two
    weights in one as `Weight` says.
    Source of the formula: Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    return _multiply(x, weight, row, threads, gated=True)


def skip_norm(
    x: NDArray[np.float32], skip: NDArray[np.float32], gamma: NDArray[np.float32], epsilon: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """RMS norm of x + skip over the last axis, as operators of the name `SkipNorm…` do it before their product.

    Its sums are defined to the bit, and float32 (runtimes/native/include/losa/norm.h).

    Args:
        x: float32 (..., columns).
        skip: of x's shape.
        gamma: float32 (columns,).
        epsilon: added to the mean of squares.
    Returns: the norm, and x + skip; float32 (..., columns) each.
    Raises: FormatError for arrays that do not fit each other; KernelError if there is no library.
    """
    if x.ndim == 0 or skip.shape != x.shape or gamma.shape != x.shape[-1:] or x.shape[-1] == 0:
        raise FormatError(
            f"x is {x.shape}, skip {skip.shape} and gamma {gamma.shape}; x (..., columns) is needed twice"
        )
    for name, array in {"x": x, "skip": skip, "gamma": gamma}.items():
        if array.dtype != np.float32:
            raise FormatError(f"{name} is {array.dtype}, a norm needs float32", name=name)
    x, skip, gamma = (np.require(array, requirements=["C", "A"]) for array in (x, skip, gamma))
    normed, sums = np.empty_like(x), np.empty_like(x)
    columns = x.shape[-1]
    _load(library_path()).losa_skip_norm(
        x.ctypes.data,
        x.size // columns,
        columns,
        skip.ctypes.data,
        gamma.ctypes.data,
        epsilon,
        sums.ctypes.data,
        normed.ctypes.data,
    )
    return normed, sums


def attention(
    query: NDArray[np.float32],
    key: NDArray[np.float32],
    value: NDArray[np.float32],
    past: tuple[NDArray[np.float32], NDArray[np.float32]],
    last: NDArray[np.int32],
    *,
    total: int,
    rotary: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    positions: NDArray[np.int64] | None = None,
    scale: float | None = None,
    window: int | None = None,
    row: str | None = None,
    threads: int = 1,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Grouped-query attention of new tokens over a cache, by a native kernel (attention.h).

    Row b gets the places last[b] + 1 - S to last[b]; if S = total, places 0 to S - 1, and it has no past.

    Args:
        query: float32 (B, S, heads, D).
        key: float32 (B, S, kv_heads, D); kv_heads divides heads.
        value: of key's shape.
        past: keys and values, float32 (B, kv_heads, P, D) each.
        last: int32 (B,), the place of each row's last token.
        total: tokens of the longest row, new ones included; the present has room for max(P, total).
        rotary: cosines and sines, float32 (rows, R) each with 2R ≤ D; None rotates nothing.
        positions: int64 (B, S), rows of `rotary` for tokens behind a past; None takes their places.
        scale: of products of query and key; None is D^-1/2.
        window: keys that a token sees at most, its own included; None is all.
        row: kernel row; None means LOSA_KERNEL, or the best that this CPU runs.
        threads: made for this call; the result does not depend on their number.
    Returns: output (B, S, heads, D), present keys and values (B, kv_heads, max(P, total), D); of which only places up
        to a row's last are defined.
    Raises: FormatError for arrays that do not fit each other; KernelError for an unknown or unavailable row;
        ConfigError for threads < 1.
    """
    if threads < 1:
        raise ConfigError(f"threads is {threads}, it must be at least 1", threads=threads)
    shapes = {"query": query.shape, "key": key.shape, "past keys": past[0].shape, "last": last.shape}
    if query.ndim != 4 or past[0].ndim != 4:
        raise FormatError(f"query and past of attention have four dimensions each, not {shapes}")
    batch, tokens, heads, width = query.shape
    kv_heads, capacity = past[0].shape[1:3]
    if (
        past[0].shape != (batch, kv_heads, capacity, width)
        or past[1].shape != past[0].shape
        or key.shape != (batch, tokens, kv_heads, width)
        or value.shape != key.shape
        or last.shape != (batch,)
        or (positions is not None and positions.shape != (batch, tokens))
        or (rotary is not None and (rotary[0].ndim != 2 or rotary[0].shape != rotary[1].shape))
    ):
        raise FormatError(f"arrays of attention do not fit each other: {shapes}")
    present = np.empty((2, batch, kv_heads, max(capacity, total), width), np.float32)
    output = np.empty_like(query, order="C")
    cosines, sines = rotary or (None, None)
    # Named, so that copies outlive the call.
    arrays = {
        name: None if array is None else np.require(array, dtype, ["C", "A"])
        for name, array, dtype in (
            ("query", query, np.float32),
            ("key", key, np.float32),
            ("value", value, np.float32),
            ("past_key", past[0], np.float32),
            ("past_value", past[1], np.float32),
            ("last", last, np.int32),
            ("cosines", cosines, np.float32),
            ("sines", sines, np.float32),
            ("positions", positions, np.int64),
        )
    }
    call = _Attention(
        batch=batch,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        past_capacity=capacity,
        capacity=max(capacity, total),
        window=_EVERY_TOKEN if window is None else window,
        scale=width**-0.5 if scale is None else scale,
        first_prompt=tokens == total,
        query_stride=heads * width,
        key_stride=kv_heads * width,
        present_key=present[0].ctypes.data,
        present_value=present[1].ctypes.data,
        output=output.ctypes.data,
        rotary_rows=0 if cosines is None else cosines.shape[0],
        rotary_half=0 if cosines is None else cosines.shape[1],
        **{name: None if array is None else array.ctypes.data for name, array in arrays.items()},
    )
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    chosen = None if row is None else row.encode()
    library = _load(library_path())
    _raise_for(library.losa_attention(chosen, ctypes.byref(call), threads, error, _ERROR_BYTES), error)
    return output, present[0], present[1]


def embedding(ids: NDArray[np.int64], weight: Weight) -> NDArray[np.float32]:
    """Rows of a dense weight by number.

    Args:
        ids: int64, any shape.
        weight: dense; validated at each call.
    Returns: float32 (*ids.shape, columns).
    Raises: FormatError for a contradictory or sparse weight, ids of another type, or an id that is no row.
    """
    if ids.dtype != np.int64:
        raise FormatError(f"ids is {ids.dtype} {ids.shape}, an embedding needs int64")
    ids = np.require(ids, requirements=["C", "A"])
    if weight.columns > _LARGEST_SIDE:
        validate(weight)  # refuses it, before the result is given memory
    y = np.empty((*ids.shape, max(weight.columns, 0)), np.float32)
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    parts = _parts(weight, gated=False)
    library = _load(library_path())
    code = library.losa_embedding(ctypes.byref(parts), ids.ctypes.data, ids.size, y.ctypes.data, error, _ERROR_BYTES)
    _raise_for(code, error)
    return y


def read_bandwidth(threads: int, mebibytes: int, repeats: int = 5) -> float:
    """Bytes a second that `threads` threads together read from memory, `mebibytes` each; the best of `repeats`.

    Raises: ConfigError for threads or mebibytes < 1; KernelError without a library; MemoryError.
    """
    if threads < 1 or mebibytes < 1:
        raise ConfigError(f"threads is {threads} and mebibytes {mebibytes}, both must be at least 1")
    rate: float = _load(library_path()).losa_read_bandwidth(threads, mebibytes << 20, repeats)
    if rate <= 0:
        raise MemoryError(f"no memory for {threads} x {mebibytes} MiB")
    return rate


def typed_error(engine_message: str) -> LosaError | None:
    """The error that our operator meant, from the text an inference engine wrapped it in; None if not ours."""
    for kind in (FormatError, KernelError):
        _, found, message = engine_message.partition(f"losa.{kind.__name__}: ")
        if found:
            return kind(message.strip())
    return None


def _multiply(
    x: NDArray[np.float32], weight: Weight, row: str | None, threads: int, *, gated: bool
) -> NDArray[np.float32]:
    if threads < 1:
        raise ConfigError(f"threads is {threads}, it must be at least 1", threads=threads)
    if x.ndim == 0 or x.shape[-1] != weight.columns or x.dtype != np.float32:
        raise FormatError(f"x is {x.dtype} {x.shape}, the weight needs float32 with last dimension {weight.columns}")
    if weight.rows > _LARGEST_SIDE:
        validate(weight, gated=gated)  # refuses it, before the result is given memory
    x = np.require(x, requirements=["C", "A"])
    y = np.empty((*x.shape[:-1], max(weight.rows, 0)), np.float32)
    tokens = int(np.prod(x.shape[:-1], dtype=np.int64))
    parts = _parts(weight, gated)
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    code = _load(library_path()).losa_matmul(
        None if row is None else row.encode(),
        ctypes.byref(parts),
        x.ctypes.data,
        tokens,
        y.ctypes.data,
        threads,
        error,
        _ERROR_BYTES,
    )
    _raise_for(code, error)
    return y


class _Bytes(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _WeightParts(ctypes.Structure):
    """As in validate.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type", "gated", "dense", "reserved")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "layout", "group", "activation_bits")),
        *((name, _Bytes) for name in ("masks", "values", "block_offsets", "scales", "codebook")),
    )


class _Attention(ctypes.Structure):
    """As in attention.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "tokens", "heads", "kv_heads", "head_dim", "past_capacity", "capacity", "window")
        ),
        ("scale", ctypes.c_float),
        ("first_prompt", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("query_stride", "key_stride")),
        *(
            (name, ctypes.c_void_p)
            for name in ("past_key", "past_value", "present_key", "present_value", "last", "cosines", "sines")
        ),
        *((name, ctypes.c_int64) for name in ("rotary_rows", "rotary_half")),
        *((name, ctypes.c_void_p) for name in ("positions", "output")),
    )


_VALUE_DTYPES: Mapping[ValueType, type[np.generic]] = {
    "fp32": np.float32,
    "bf16": np.uint16,
    "int8": np.int8,
    "int4": np.uint8,
}


def _parts(weight: Weight, gated: bool) -> _WeightParts:
    """Pointers into the weight's arrays, which must outlive the result.

    Raises: FormatError for an array of another type, or one that is not contiguous.
    """
    if weight.value_type not in VALUE_TYPES:
        raise FormatError(f"value_type is '{weight.value_type}'; choose one of {', '.join(VALUE_TYPES)}")
    dtype = _VALUE_DTYPES[weight.value_type]
    values = weight.values.view(np.uint16) if weight.values.dtype.name == "bfloat16" else weight.values
    dense = weight.mask is None and weight.block_offsets is None
    return _WeightParts(
        VALUE_TYPES.index(weight.value_type),
        gated,
        dense,
        0,
        weight.rows,
        weight.columns,
        weight.layout,
        weight.group,
        weight.activation_bits,
        _bytes("mask", weight.mask, np.uint8),
        _bytes("values", values, dtype),
        _bytes("block_offsets", weight.block_offsets, np.int64),
        _bytes("scales", weight.scales, np.float16),
        _bytes("codebook", weight.codebook, np.int8),
    )


def _bytes(name: str, array: NDArray[Any] | None, dtype: type[np.generic]) -> _Bytes:
    if array is None:
        return _Bytes(None, 0)
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise FormatError(
            f"{name} must be contiguous {np.dtype(dtype)}, it is {array.dtype} of strides {array.strides}", name=name
        )
    return _Bytes(array.ctypes.data, array.nbytes)


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
    text: list[Any] = [ctypes.c_char_p, ctypes.c_size_t]
    parts = ctypes.POINTER(_WeightParts)
    library.losa_describe.argtypes = text
    library.losa_describe.restype = ctypes.c_size_t
    library.losa_validate.argtypes = [parts, *text]
    data: list[Any] = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.losa_matmul.argtypes = [ctypes.c_char_p, parts, *data, ctypes.c_size_t, *text]
    library.losa_attention.argtypes = [ctypes.c_char_p, ctypes.POINTER(_Attention), ctypes.c_size_t, *text]
    library.losa_embedding.argtypes = [parts, *data, *text]
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.losa_skip_norm.argtypes = [pointer, size, size, pointer, pointer, ctypes.c_float, pointer, pointer]
    library.losa_skip_norm.restype = None
    library.losa_read_bandwidth.argtypes = [ctypes.c_size_t] * 3
    library.losa_read_bandwidth.restype = ctypes.c_double
    return library
