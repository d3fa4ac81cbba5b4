"""Random weights for timing kernels, in the form each engine stores them, with the matrix they stand for.

A timed run must stream its weights from memory, so it goes through many copies of one weight. The copies must
differ: ONNX Runtime keeps one of equal initializers, and a stack of equal copies then runs from the cache. A copy
is therefore the first one with its rows rotated, which costs no more than copying and keeps every statistic.

Our own weights are drawn in their stored form rather than encoded from a dense matrix: it takes a second where
fitting a codebook takes many, and the time of a kernel depends on where the zeros are, not on the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import ConfigError
from losa_export.runtimes.native import BLOCK_ROWS, LAYOUT_N16, VALUE_PADDING, VALUE_TYPES, ValueType

Float32 = NDArray[np.float32]
Array = NDArray[Any]

DOMAIN = "losa.sparse"
STEP_COLUMNS: Mapping[ValueType, int] = {"fp32": 1, "bf16": 2, "int8": 4, "int4": 4}
GROUP, NARROW_GROUP = 128, 64
_SEVEN_BITS = 63
_SUFFIX: Mapping[ValueType, str] = {"fp32": "Fp32", "bf16": "Bf16", "int8": "Int8", "int4": "Int4"}
# Levels of real codebooks: dense near zero, none at zero, which pruning has emptied.
_CODEBOOK = np.array([-127, -98, -76, -59, -45, -34, -25, -17, 17, 25, 34, 45, 59, 76, 98, 127], dtype=np.int8)


@dataclass(frozen=True)
class ValueKind:
    """One of our ways to store values: the type, how activations are rounded, and whether a mask is left out.

    Attributes:
        type: of the stored values.
        activation_bits: 16 or 8 for the integer types; 0 where activations stay float32.
        dense: no mask: every position is stored, as for a language model's head.
    """

    type: ValueType
    activation_bits: int = 0
    dense: bool = False

    @property
    def name(self) -> str:
        """As options and results spell it: 'int8', 'int8-a8', 'dense-int4'."""
        return f"{'dense-' if self.dense else ''}{self.type}{'-a8' if self.activation_bits == 8 else ''}"

    @property
    def operator(self) -> str:
        """Operator type in the domain losa.sparse."""
        return ("DenseMatMul" if self.dense else "SparseMatMul") + _SUFFIX[self.type]


def value_kind(name: str) -> ValueKind:
    """Read a name such as 'int8', 'int8-a8' or 'dense-int4'.

    Raises: ConfigError listing the known ones.
    """
    dense = name.startswith("dense-")
    rest = name.removeprefix("dense-")
    bits = 8 if rest.endswith("-a8") else 16
    for known in VALUE_TYPES:
        integer = known in ("int8", "int4")
        if rest == known or (integer and rest == f"{known}-a8"):
            if dense and known == "fp32":
                break  # the dense operators have no exact form: that is an ordinary MatMul
            return ValueKind(known, bits if integer else 0, dense)
    raise ConfigError(
        f"values: '{name}' is not a kind of value; choose fp32, bf16, int8 or int4, the last two also as int8-a8 "
        "(8-bit activations), all but fp32 also as dense-int8 (no mask)",
        field="values",
    )


@dataclass(frozen=True)
class StoredWeight:
    """A weight as an engine's operator stores it.

    Attributes:
        operator, domain, attributes: of the node.
        tensors: node inputs after X, in order: short name → array; bfloat16 is held as its bits, uint16.
        dense: (N, K) float32: the matrix that the tensors stand for.
        unit_rows: rows by which a rotation of 1 moves the weight.
        rotations: distinct rotations, counting none.
        axes: tensor → the axis that rotates; of others `rotated` knows how to.
    """

    operator: str
    domain: str
    attributes: Mapping[str, int]
    tensors: Mapping[str, Array]
    dense: Float32 = field(repr=False)
    unit_rows: int
    rotations: int
    axes: Mapping[str, int]

    @property
    def stored_bytes(self) -> int:
        """Bytes that a product must read."""
        return sum(array.nbytes for array in self.tensors.values())

    def rotated(self, shift: int) -> dict[str, Array]:
        """The tensors after rotating the rows by `shift` units."""
        if shift == 0:
            return dict(self.tensors)
        found = {
            name: _rolled(array, shift, self.axes[name], self.rotations) if name in self.axes else array
            for name, array in self.tensors.items()
        }
        if "block_offsets" in self.tensors:
            found |= _rotated_blocks(self.tensors["values"], self.tensors["block_offsets"], shift, self.rotations)
        elif self.domain == DOMAIN:
            found["values"] = _rotated_stripes(self.tensors["values"], self.attributes, shift, self.rotations)
        return found

    def rotated_rows(self, outputs: Array, shift: int) -> Array:
        """What rotating the weight does to its outputs (M, N)."""
        turned = self.rotations * self.unit_rows
        return np.concatenate(
            [np.roll(outputs[:, :turned], shift * self.unit_rows, axis=1), outputs[:, turned:]], axis=1
        )


def bytes_per_weight(kind: ValueKind, sparsity: float, *, group: int = GROUP) -> float:
    """Bytes that our form of a weight takes for each of its N · K positions, on average.

    One mask bit, the kept values, and float16 scales of each group. A step of int4 codes begins at a byte, which
    costs half a byte in every other one.
    """
    kept = 1.0 if kind.dense else 1.0 - sparsity
    mask = 0.0 if kind.dense else 1 / 8
    size = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}[kind.type]
    scales = 2 / group if kind.type in ("int8", "int4") else 0.0
    step = 0.25 / (BLOCK_ROWS * STEP_COLUMNS["int4"]) if kind.type == "int4" and 0 < kept < 1 else 0.0
    return mask + kept * size + scales + step


def random_weight(
    kind: ValueKind, rows: int, columns: int, sparsity: float, generator: np.random.Generator
) -> StoredWeight:
    """Draw one of our weights with the same number of zeros in each row.

    A mask that kept everything would be the same in all copies, so at 0 % one position is pruned after all.

    Args:
        kind: how its values are stored.
        rows: N.
        columns: K.
        sparsity: fraction of zeros, 0 to below 1; at least one weight of a row is kept.
        generator: source of the draws.
    """
    if kind.dense:
        keep = np.ones((rows, columns), dtype=np.bool_)
    else:
        keep = random_mask(rows, columns, sparsity, generator)
        if keep.all():
            keep[generator.integers(rows), generator.integers(columns)] = False
    step = STEP_COLUMNS[kind.type]
    blocks, steps = -(-rows // BLOCK_ROWS), -(-columns // step)
    bits = _in_layout_order(keep, blocks, steps, step)
    attributes = {"N": rows, "K": columns, "layout": LAYOUT_N16}
    tensors: dict[str, Array] = {}
    levels, codes = _draw_levels(kind.type, int(np.count_nonzero(bits)), generator)
    counts = np.count_nonzero(bits.reshape(blocks * steps, -1), axis=1)
    if not kind.dense:
        tensors["mask"] = np.packbits(bits, bitorder="little").reshape(blocks, steps, 2 * step)
    flat = np.zeros(bits.size, dtype=np.float32)
    flat[bits] = levels
    if kind.dense:
        stored = np.zeros(bits.size, dtype=codes.dtype)
        stored[bits] = codes
        counts = np.full(blocks * steps, BLOCK_ROWS * step)
        tensors["values"] = _packed(kind.type, stored, counts)[0]
    else:
        tensors["values"], sizes = _packed(kind.type, codes, counts)
        offsets = np.zeros(blocks + 1, dtype=np.int64)
        np.cumsum(sizes.reshape(blocks, steps).sum(axis=1), out=offsets[1:])
        tensors["block_offsets"] = offsets
    dense = flat.reshape(blocks, steps, BLOCK_ROWS, step).transpose(0, 2, 1, 3)
    dense = np.ascontiguousarray(dense.reshape(blocks * BLOCK_ROWS, steps * step)[:rows, :columns])
    axes = {} if kind.dense else {"mask": 0}
    if kind.type in ("int8", "int4"):
        group = group_size(columns)
        scales = _draw_scales(rows, columns, group, generator)
        tensors["scales"] = scales
        by_row = scales.transpose(0, 2, 1).reshape(blocks * BLOCK_ROWS, -1)[:rows].astype(np.float32)
        dense *= np.repeat(by_row, group, axis=1)[:, :columns]
        attributes |= {"group": group, "activation_bits": kind.activation_bits}
        axes["scales"] = 0
        if kind.type == "int4":
            tensors["codebook"] = _CODEBOOK
    return StoredWeight(kind.operator, DOMAIN, attributes, tensors, dense, BLOCK_ROWS, max(1, rows // BLOCK_ROWS), axes)


def random_mask(rows: int, columns: int, sparsity: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """(rows, columns) bool with the same number kept in every row, at least one."""
    kept = max(1, columns - round(sparsity * columns))
    if kept == columns:
        return np.ones((rows, columns), dtype=np.bool_)
    # The column in the low bits makes the draws of a row distinct, so that the count comes out exactly.
    bits = max(1, (columns - 1).bit_length())
    draws = generator.integers(0, 2**32, size=(rows, columns), dtype=np.uint32)
    draws >>= np.uint32(bits)
    draws <<= np.uint32(bits)
    draws |= np.arange(columns, dtype=np.uint32)
    return draws < np.partition(draws, kept, axis=1)[:, kept : kept + 1]


def group_size(columns: int) -> int:
    """Columns that share a scale: 128, or 64 where that would leave a short group."""
    return GROUP if columns % GROUP == 0 else NARROW_GROUP


def dense_float_weight(dense: Float32) -> StoredWeight:
    """The operand of a standard MatMul: (K, N) float32."""
    return StoredWeight("MatMul", "", {}, {"B": np.ascontiguousarray(dense.T)}, dense, 1, dense.shape[0], {"B": 1})


def dynamic_int8_weight(dense: Float32) -> StoredWeight:
    """The operands of DynamicQuantizeMatMul: int8 (K, N) and one scale a column, as onnxruntime.quantization has it.

    Levels stay within seven bits (its `reduce_range`): where a CPU has no VNNI, ONNX Runtime adds pairs of products
    in 16 bits, which eight bits overflow. The time is the same.
    """
    scale = (np.abs(dense).max(axis=1) / _SEVEN_BITS).astype(np.float32)
    scale[scale == 0] = 1
    levels = np.rint(dense / scale[:, None]).astype(np.int8)
    tensors: dict[str, Array] = {"B": np.ascontiguousarray(levels.T), "b_scale": scale}
    restored = levels.astype(np.float32) * scale[:, None]
    return StoredWeight(
        "DynamicQuantizeMatMul", "com.microsoft", {}, tensors, restored, 1, len(dense), {"B": 1, "b_scale": 0}
    )


def nbits_weight(dense: Float32, bits: int, block: int) -> StoredWeight:
    """The operands of MatMulNBits: symmetric levels of 4 or 8 bits, a float32 scale for each block of columns.

    accuracy_level 4 lets ONNX Runtime round activations to int8, which is its fastest way.
    """
    rows, columns = dense.shape
    blocks = -(-columns // block)
    middle = 1 << (bits - 1)
    padded = np.zeros((rows, blocks * block), dtype=np.float32)
    padded[:, :columns] = dense
    grouped = padded.reshape(rows, blocks, block)
    scale = np.abs(grouped).max(axis=2) / np.float32(middle - 1)
    scale[scale == 0] = 1
    levels = np.rint(grouped / scale[:, :, None])
    restored = (levels * scale[:, :, None]).reshape(rows, -1)[:, :columns].astype(np.float32)
    codes = (levels + middle).astype(np.uint8)
    if bits == 4:
        codes = codes[:, :, 0::2] | (codes[:, :, 1::2] << 4)
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 4}
    tensors: dict[str, Array] = {"B": codes, "scales": scale.astype(np.float32)}
    return StoredWeight("MatMulNBits", "com.microsoft", attributes, tensors, restored, 1, rows, {"B": 0, "scales": 0})


def _in_layout_order(keep: NDArray[np.bool_], blocks: int, steps: int, step: int) -> NDArray[np.bool_]:
    """Flat, in the order block, step, row of the block, column of the step."""
    rows, columns = keep.shape
    if (rows, columns) != (blocks * BLOCK_ROWS, steps * step):
        padded = np.zeros((blocks * BLOCK_ROWS, steps * step), dtype=np.bool_)
        padded[:rows, :columns] = keep
        keep = padded
    return np.ascontiguousarray(keep.reshape(blocks, BLOCK_ROWS, steps, step).transpose(0, 2, 1, 3)).reshape(-1)


def _draw_levels(type_: ValueType, count: int, generator: np.random.Generator) -> tuple[Float32, Array]:
    """Values before their scale, and how they are stored; int4 codes one to a byte."""
    if type_ == "fp32":
        values = generator.standard_normal(count, dtype=np.float32)
        return values, values
    if type_ == "bf16":
        bits = generator.standard_normal(count, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32), (bits >> np.uint32(16)).astype(np.uint16)
    if type_ == "int8":
        levels = generator.integers(-127, 128, size=count, dtype=np.int8)
        return levels.astype(np.float32), levels
    codes = generator.integers(0, len(_CODEBOOK), size=count, dtype=np.uint8)
    return _CODEBOOK.astype(np.float32)[codes], codes


def _draw_scales(rows: int, columns: int, group: int, generator: np.random.Generator) -> NDArray[np.float16]:
    """(blocks, groups, 16) float16 above zero; 0 for rows beyond the last."""
    blocks, groups = -(-rows // BLOCK_ROWS), -(-columns // group)
    by_row = np.zeros((blocks * BLOCK_ROWS, groups), dtype=np.float16)
    by_row[:rows] = generator.uniform(0.005, 0.02, size=(rows, groups))
    return np.ascontiguousarray(by_row.reshape(blocks, BLOCK_ROWS, groups).transpose(0, 2, 1))


def _packed(type_: ValueType, stored: Array, counts: NDArray[np.int64]) -> tuple[Array, NDArray[np.int64]]:
    """`values` with its padding, and how many of its elements each step has."""
    if type_ != "int4":
        padding = np.zeros(VALUE_PADDING // stored.itemsize, dtype=stored.dtype)
        return np.concatenate([stored, padding]), counts
    sizes = (counts + 1) // 2
    nibbles = np.zeros(2 * int(sizes.sum()), dtype=np.uint8)
    # A step with an odd count leaves its last high nibble empty: skip one place there.
    gaps = np.cumsum(counts & 1) - (counts & 1)
    nibbles[np.arange(stored.size) + np.repeat(gaps, counts)] = stored
    values = nibbles[0::2] | (nibbles[1::2] << 4)
    return np.concatenate([values, np.zeros(VALUE_PADDING, dtype=np.uint8)]), sizes


def _rolled(array: Array, shift: int, axis: int, rotations: int) -> Array:
    """`array` with the first `rotations` places of `axis` rotated; a last block cut short stays where it is."""
    if array.shape[axis] == rotations:
        return np.roll(array, shift, axis=axis)
    head, rest = np.split(array, [rotations], axis=axis)
    return np.concatenate([np.roll(head, shift, axis=axis), rest], axis=axis)


def _rotated_blocks(values: Array, offsets: NDArray[np.int64], shift: int, rotations: int) -> dict[str, Array]:
    cut, end = int(offsets[rotations - shift % rotations]), int(offsets[rotations])
    sizes = np.diff(offsets)
    sizes = np.concatenate([np.roll(sizes[:rotations], shift), sizes[rotations:]])
    return {
        "values": np.concatenate([values[cut:end], values[:cut], values[end:]]),
        "block_offsets": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    }


def _rotated_stripes(values: Array, attributes: Mapping[str, int], shift: int, rotations: int) -> Array:
    """Without a mask all blocks are of one size."""
    size = (values.nbytes - VALUE_PADDING) // values.itemsize // -(-attributes["N"] // BLOCK_ROWS)
    turned = rotations * size
    return np.concatenate([np.roll(values[:turned], shift * size), values[turned:]])
