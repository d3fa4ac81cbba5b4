"""What a value format must offer, and the bit layout that all of them share.

Layout 1 ("N16") takes the weight's output rows in blocks of 16. Within a block, column after column, 16 mask
bits say which rows are kept, and the kept values follow each other in that same order: block, column, row.
A decoder then needs no horizontal sums, and one mask word feeds one 16-lane expansion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from losa_export.errors import FormatError, MaskError

DOMAIN = "losa.sparse"
DOMAIN_VERSION = 1
LAYOUT = 1
BLOCK_ROWS = 16

# Row blocks handled at a time: bounds temporaries to a few MB whatever the weight's size.
_BLOCKS_AT_ONCE = 16

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True)
class EncodedWeight:
    """One compressed weight, as the node stores it.

    Attributes:
        tensors: node inputs after X, in order: short name → array.
        attributes: the node's integer attributes.
    """

    tensors: Mapping[str, NDArray[np.generic]]
    attributes: Mapping[str, int]


class ValueFormat(Protocol):
    """A way to store the kept values: a lossless or rounding code, and two operators with their portable meaning.

    `op_type` is X Wᵀ. `swiglu_op_type` is silu(X Gᵀ) ⊙ X Uᵀ, for the rows of gate G and up U interleaved
    (`losa_export.graph.stacking`); its attribute N counts the rows of one of them.
    """

    name: str
    op_type: str
    swiglu_op_type: str
    tensor_names: tuple[str, ...]

    def encode(self, weight: Float32, keep: Bool) -> EncodedWeight:
        """Compress `weight` (out, in) float32 under `keep` (out, in) bool; both are left as they are."""
        ...

    def decode(self, encoded: EncodedWeight) -> tuple[Float32, Bool]:
        """Invert `encode`: (weight with exact zeros where pruned, keep)."""
        ...

    def function(self, op_type: str, opset_version: int) -> ir.Function:
        """Define one of the two operators in standard ones, so that an engine without our library runs it."""
        ...


def pack(weight: Float32, keep: Bool) -> tuple[NDArray[np.uint8], Float32, NDArray[np.int64]]:
    """Split a weight into mask words and kept values, in layout order.

    Args:
        weight: (N, K) float32.
        keep: (N, K) bool, True = kept. Kept zeros are stored like any other value.

    Returns: mask (ceil(N/16), K, 2) uint8, values (nnz,) float32, block_offsets (ceil(N/16) + 1,) int64.

    Raises: MaskError if the shapes differ, or a pruned position is not exactly zero.
    """
    if weight.ndim != 2 or keep.shape != weight.shape:
        raise MaskError(f"mask of shape {keep.shape} does not fit a weight of shape {weight.shape}")
    rows, columns = weight.shape
    blocks = -(-rows // BLOCK_ROWS)
    mask = np.empty((blocks, columns, 2), dtype=np.uint8)
    values = np.empty(int(np.count_nonzero(keep)), dtype=np.float32)
    offsets = np.zeros(blocks + 1, dtype=np.int64)
    for first in range(0, blocks, _BLOCKS_AT_ONCE):
        last = min(first + _BLOCKS_AT_ONCE, blocks)
        kept = _by_column(keep, first, last)
        flat = _by_column(weight, first, last).reshape(-1)
        mask[first:last] = np.packbits(kept.reshape(-1), bitorder="little").reshape(last - first, columns, 2)
        counts = np.count_nonzero(kept.reshape(last - first, -1), axis=1)
        offsets[first + 1 : last + 1] = offsets[first] + np.cumsum(counts)
        chosen = np.compress(kept.reshape(-1), flat)
        if np.count_nonzero(chosen) != np.count_nonzero(flat):
            raise MaskError("the weight is not zero at every pruned position")
        values[offsets[first] : offsets[last]] = chosen
    return mask, values, offsets


def unpack_mask(mask: NDArray[np.uint8], rows: int) -> Bool:
    """Invert the mask part of `pack`.

    Args:
        mask: (ceil(rows/16), K, 2) uint8.
        rows: N, the true number of output rows.

    Returns: (N, K) bool, True = kept.

    Raises: FormatError if the shape does not fit N, or a row beyond N is marked kept.
    """
    blocks = -(-rows // BLOCK_ROWS)
    if mask.dtype != np.uint8 or mask.ndim != 3 or mask.shape[0] != blocks or mask.shape[2] != 2:
        raise FormatError(
            f"mask is {mask.dtype} {mask.shape}; {rows} rows need uint8 ({blocks}, K, 2): export the model again"
        )
    columns = mask.shape[1]
    bits = np.unpackbits(mask.reshape(-1), bitorder="little").reshape(blocks, columns, BLOCK_ROWS)
    keep = bits.transpose(0, 2, 1).reshape(blocks * BLOCK_ROWS, columns)
    if keep[rows:].any():
        raise FormatError(f"mask keeps rows beyond the last of {rows}: export the model again")
    return keep[:rows].astype(np.bool_)


def unpack(mask: NDArray[np.uint8], values: Float32, rows: int) -> tuple[Float32, Bool]:
    """Invert `pack`: (weight (N, K) float32, keep (N, K) bool).

    Raises: FormatError if the number of values is not the number of kept positions.
    """
    keep = unpack_mask(mask, rows)
    kept = int(np.count_nonzero(keep))
    if values.shape != (kept,):
        raise FormatError(f"mask keeps {kept} positions, but {values.size} values are stored: export again")
    columns = keep.shape[1]
    blocks = mask.shape[0]
    bits = np.unpackbits(mask.reshape(-1), bitorder="little").astype(np.bool_)
    dense = np.zeros(bits.size, dtype=np.float32)
    dense[bits] = values
    weight = dense.reshape(blocks, columns, BLOCK_ROWS).transpose(0, 2, 1)
    return np.ascontiguousarray(weight.reshape(blocks * BLOCK_ROWS, columns)[:rows]), keep


def _by_column(matrix: NDArray[_Scalar], first: int, last: int) -> NDArray[_Scalar]:
    """Row blocks `first`:`last` as (blocks, K, 16), rows beyond the last filled with zeros."""
    rows = matrix[first * BLOCK_ROWS : last * BLOCK_ROWS]
    missing = (last - first) * BLOCK_ROWS - rows.shape[0]
    if missing:
        rows = np.concatenate([rows, np.zeros((missing, matrix.shape[1]), dtype=matrix.dtype)])
    blocks = rows.reshape(last - first, BLOCK_ROWS, matrix.shape[1])
    return np.ascontiguousarray(blocks.transpose(0, 2, 1))
