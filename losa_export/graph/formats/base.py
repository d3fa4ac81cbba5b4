"""The bit layout that all value formats share, as numpy arrays.

Layout 1 ("N16") takes the weight's output rows in blocks of 16, and its columns in steps of 1, 2 or 4, as many as
one instruction of the format's kernels multiplies at a time. A step has one mask bit for each of its weights, row
after row and within a row column after column, and the kept values follow each other in that same order: block,
step, row, column. A decoder then needs no horizontal sums, and one mask word feeds one expansion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import FormatError, MaskError

DOMAIN = "losa.sparse"
DOMAIN_VERSION = 1
LAYOUT = 1
BLOCK_ROWS = 16

# Vector loads of the last values may run this far past the end.
PADDING_BYTES = 64

# Row blocks handled at a time: bounds temporaries to a few MB whatever the weight's size.
_BLOCKS_AT_ONCE = 16

# How many bits are set in each byte.
_COUNTS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True)
class EncodedWeight:
    """One stored weight, as a node holds it.

    Attributes:
        tensors: node inputs after the first, in order: short name → array.
        attributes: the node's integer attributes.
    """

    tensors: Mapping[str, NDArray[np.generic]]
    attributes: Mapping[str, int]


def pack(
    levels: NDArray[_Scalar], keep: Bool, *, step_columns: int = 1, even_steps: bool = False
) -> tuple[NDArray[np.uint8], NDArray[_Scalar], NDArray[np.int64]]:
    """Split a weight into mask words and kept values, in layout order.

    Args:
        levels: (N, K), what is to be stored for each weight. What stands at pruned positions does not matter.
        keep: (N, K) bool, True = kept. Kept zeros are stored like any other value.
        step_columns: ks, columns of a step.
        even_steps: store a zero after each step with an odd number of values, so that two fit a byte.

    Returns: mask (ceil(N/16), ceil(K/ks), 2·ks) uint8, values (stored,), block_offsets (ceil(N/16) + 1,) int64.

    Raises: MaskError if the shapes differ.
    """
    if levels.ndim != 2 or keep.shape != levels.shape:
        raise MaskError(f"mask of shape {keep.shape} does not fit a weight of shape {levels.shape}")
    rows, columns = levels.shape
    blocks, steps = -(-rows // BLOCK_ROWS), -(-columns // step_columns)
    mask = np.empty((blocks, steps, 2 * step_columns), dtype=np.uint8)
    room = int(np.count_nonzero(keep)) + (blocks * steps if even_steps else 0)
    values = np.empty(room, dtype=levels.dtype)
    offsets = np.zeros(blocks + 1, dtype=np.int64)
    for part in _parts(blocks):
        kept = _by_step(keep, part, step_columns)
        mask[part] = np.packbits(kept.reshape(-1), bitorder="little").reshape(-1, steps, 2 * step_columns)
        found = _by_step(levels, part, step_columns)
        if even_steps:
            kept = _with_filler(kept)
            found = np.concatenate([found, np.zeros((*found.shape[:2], 1), dtype=found.dtype)], axis=2)
        counts = np.count_nonzero(kept.reshape(len(kept), -1), axis=1)
        offsets[part.start + 1 : part.stop + 1] = offsets[part.start] + np.cumsum(counts)
        values[offsets[part.start] : offsets[part.stop]] = np.compress(kept.reshape(-1), found.reshape(-1))
    return mask, values[: offsets[-1]], offsets


def unpack_mask(mask: NDArray[np.uint8], rows: int, columns: int) -> Bool:
    """Invert the mask part of `pack`.

    Args:
        mask: (ceil(rows/16), ceil(columns/ks), 2·ks) uint8; its last axis tells ks.
        rows: N, the true number of output rows.
        columns: K, the true number of columns.

    Returns: (N, K) bool, True = kept.

    Raises: FormatError if the shape does not fit N and K, or a row or column beyond them is marked kept.
    """
    bits, step_columns = _mask_bits(mask, rows, columns)
    keep = _from_steps(bits, step_columns)
    if keep[rows:].any() or keep[:, columns:].any():
        raise FormatError(f"mask keeps weights outside of {rows} rows and {columns} columns: export the model again")
    return np.ascontiguousarray(keep[:rows, :columns])


def unpack(
    mask: NDArray[np.uint8], values: NDArray[_Scalar], rows: int, columns: int, *, even_steps: bool = False
) -> tuple[NDArray[_Scalar], Bool]:
    """Invert `pack`: (levels (N, K) with zeros where pruned, keep (N, K) bool).

    Raises: FormatError as `unpack_mask`, or if the number of values is not what the mask asks for.
    """
    keep = unpack_mask(mask, rows, columns)
    bits, step_columns = _mask_bits(mask, rows, columns)
    if even_steps:
        bits = _with_filler(bits)
    kept = int(np.count_nonzero(bits))
    if values.shape != (kept,):
        raise FormatError(f"mask keeps {kept} positions, but {values.size} values are stored: export again")
    dense = np.zeros(bits.shape, dtype=values.dtype)
    dense[bits] = values
    levels = _from_steps(dense[:, :, : BLOCK_ROWS * step_columns], step_columns)
    return np.ascontiguousarray(levels[:rows, :columns]), keep


def block_offsets(mask: NDArray[np.uint8], *, even_steps: bool = False) -> NDArray[np.int64]:
    """Where each block of `mask` starts among the stored values, and their number: as `pack` gives it."""
    counts = _COUNTS[mask].sum(axis=2, dtype=np.int64)
    if even_steps:
        counts += counts & 1
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts.sum(axis=1))])


def lay_out(levels: NDArray[_Scalar], step_columns: int) -> NDArray[_Scalar]:
    """Every position in layout order, those beyond N and K as zeros: (ceil(N/16) · ceil(K/ks) · 16·ks,)."""
    blocks, steps = -(-levels.shape[0] // BLOCK_ROWS), -(-levels.shape[1] // step_columns)
    values = np.empty((blocks, steps, BLOCK_ROWS * step_columns), dtype=levels.dtype)
    for part in _parts(blocks):
        values[part] = _by_step(levels, part, step_columns)
    return values.reshape(-1)


def take_back(values: NDArray[_Scalar], rows: int, columns: int, step_columns: int) -> NDArray[_Scalar]:
    """Invert `lay_out`: (N, K). Raises: FormatError if the number of values does not fit."""
    blocks, steps = -(-rows // BLOCK_ROWS), -(-columns // step_columns)
    shape = (blocks, steps, BLOCK_ROWS * step_columns)
    if values.shape != (int(np.prod(shape)),):
        raise FormatError(
            f"a dense weight of {rows} rows and {columns} columns needs {int(np.prod(shape))} values, "
            f"but {values.size} are stored: export again"
        )
    return np.ascontiguousarray(_from_steps(values.reshape(shape), step_columns)[:rows, :columns])


def pad(values: NDArray[_Scalar]) -> NDArray[_Scalar]:
    """`values` (n,) and `PADDING_BYTES` of zeros."""
    padded = np.zeros(values.size + PADDING_BYTES // values.itemsize, dtype=values.dtype)
    padded[: values.size] = values
    return padded


def check_pruned(weight: Float32, keep: Bool) -> None:
    """Check that nothing is lost by leaving out what is not kept.

    Raises: MaskError if the shapes differ, or a pruned position is not exactly zero.
    """
    if weight.ndim != 2 or keep.shape != weight.shape:
        raise MaskError(f"mask of shape {keep.shape} does not fit a weight of shape {weight.shape}")
    for part in _parts(-(-weight.shape[0] // BLOCK_ROWS)):
        rows = slice(part.start * BLOCK_ROWS, part.stop * BLOCK_ROWS)
        if np.any((weight[rows] != 0) & ~keep[rows]):
            raise MaskError("the weight is not zero at every pruned position")


def _parts(blocks: int) -> Iterator[slice]:
    for first in range(0, blocks, _BLOCKS_AT_ONCE):
        yield slice(first, min(first + _BLOCKS_AT_ONCE, blocks))


def _by_step(matrix: NDArray[_Scalar], part: slice, step_columns: int) -> NDArray[_Scalar]:
    """Row blocks `part` as (blocks, steps, 16·ks), positions beyond the matrix filled with zeros."""
    rows = matrix[part.start * BLOCK_ROWS : part.stop * BLOCK_ROWS]
    blocks, steps = part.stop - part.start, -(-matrix.shape[1] // step_columns)
    shape = (blocks * BLOCK_ROWS, steps * step_columns)
    if rows.shape != shape:
        whole = np.zeros(shape, dtype=matrix.dtype)
        whole[: rows.shape[0], : rows.shape[1]] = rows
        rows = whole
    # The columns of a step stay together: moved as one number of up to 4 bytes, they move several times faster.
    together = np.dtype(f"u{step_columns * matrix.itemsize}")
    by_row = np.ascontiguousarray(rows).view(together).reshape(blocks, BLOCK_ROWS, steps)
    by_step = np.ascontiguousarray(by_row.transpose(0, 2, 1))
    return by_step.view(matrix.dtype).reshape(blocks, steps, BLOCK_ROWS * step_columns)


def _from_steps(values: NDArray[_Scalar], step_columns: int) -> NDArray[_Scalar]:
    """Invert `_by_step` for all blocks: (16·blocks, ks·steps)."""
    blocks, steps, _ = values.shape
    by_row = values.reshape(blocks, steps, BLOCK_ROWS, step_columns).transpose(0, 2, 1, 3)
    return by_row.reshape(blocks * BLOCK_ROWS, steps * step_columns)


def _with_filler(kept: Bool) -> Bool:
    """(blocks, steps, n) with one position more in each step, kept where the step keeps an odd number."""
    odd = np.count_nonzero(kept, axis=2) & 1
    return np.concatenate([kept, odd.astype(np.bool_)[:, :, None]], axis=2)


def _mask_bits(mask: NDArray[np.uint8], rows: int, columns: int) -> tuple[Bool, int]:
    """The mask a position each, (blocks, steps, 16·ks) bool, and ks. Raises: FormatError if its shape does not fit."""
    step_columns = mask.shape[-1] // 2 if mask.ndim == 3 else 0
    if step_columns in (1, 2, 4):
        shape = (-(-rows // BLOCK_ROWS), -(-columns // step_columns), 2 * step_columns)
        if mask.dtype == np.uint8 and mask.shape == shape:
            bits = np.unpackbits(mask.reshape(-1), bitorder="little")
            return bits.view(np.bool_).reshape(*shape[:2], BLOCK_ROWS * step_columns), step_columns
    raise FormatError(
        f"mask is {mask.dtype} {mask.shape}, which fits no weight of {rows} rows and {columns} columns: "
        "export the model again"
    )
