"""Kept values as float32: nothing is rounded, so the sparse model computes what the checkpoint does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from losa_export.errors import FormatError
from losa_export.graph.formats.base import (
    BLOCK_ROWS,
    DOMAIN,
    LAYOUT,
    Bool,
    EncodedWeight,
    Float32,
    pack,
    unpack,
)
from losa_export.graph.nodes import NodeList

# Vector loads of the last values may run this far past the end.
_PADDING_VALUES = 16

# For each mask byte: its eight bits, how many are set before each, and how many in all.
_BITS: Bool = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.bool_)
_RANKS: NDArray[np.int32] = np.cumsum(_BITS, axis=1, dtype=np.int32) - _BITS.astype(np.int32)
_COUNTS: NDArray[np.int32] = np.sum(_BITS, axis=1, dtype=np.int32)


class Fp32Format:
    """`SparseMatMulFp32(X, mask, values, block_offsets)`, and SwiGLU likewise, with exact float32 values."""

    name = "fp32"
    op_type = "SparseMatMulFp32"
    swiglu_op_type = "SparseSwiGLUFp32"
    tensor_names: tuple[str, ...] = ("mask", "values", "block_offsets")

    def encode(self, weight: Float32, keep: Bool) -> EncodedWeight:
        """Compress; see `ValueFormat.encode`. Raises: MaskError as `pack`."""
        mask, values, offsets = pack(weight, keep)
        padded = np.zeros(values.size + _PADDING_VALUES, dtype=np.float32)
        padded[: values.size] = values
        rows, columns = weight.shape
        return EncodedWeight(
            {"mask": mask, "values": padded, "block_offsets": offsets},
            {"N": rows, "K": columns, "layout": LAYOUT},
        )

    def decode(self, encoded: EncodedWeight) -> tuple[Float32, Bool]:
        """Invert `encode`, bit for bit. Raises: FormatError if the tensors contradict each other."""
        mask, offsets = encoded.tensors["mask"], encoded.tensors["block_offsets"]
        values = encoded.tensors["values"]
        if values.dtype != np.float32 or values.ndim != 1 or values.size < _PADDING_VALUES:
            raise FormatError(f"values are {values.dtype} {values.shape}; float32 (nnz + 16,) is needed")
        weight, keep = unpack(mask.astype(np.uint8, copy=False), _trimmed(values), encoded.attributes["N"])
        blocks = [
            int(np.count_nonzero(keep[first : first + BLOCK_ROWS])) for first in range(0, keep.shape[0], BLOCK_ROWS)
        ]
        if not np.array_equal(offsets, np.concatenate([[0], np.cumsum(blocks)])):
            raise FormatError("block_offsets do not count the kept positions of the mask: export again")
        return weight, keep

    def function(self, op_type: str, opset_version: int) -> ir.Function:
        """Decode to a dense (K, N) matrix and multiply.

        The weight's inputs are constants, so ONNX Runtime folds all but the products into one matrix at load. It holds
        every step of every weight until the folding is over, which is why positions are looked up a mask byte at a
        time and turned while they are still bytes: 28 bytes a weight pass, where the plain CumSum over all bits
        takes 48. NonZero and ScatterND would not be folded, and decode anew at each call.
        """
        x, mask, values, offsets = (ir.val(name) for name in ("X", *self.tensor_names))
        nodes = NodeList()
        by_row_block = _decoded(nodes, mask, values)
        if op_type == self.op_type:
            output = nodes.add("MatMul", [x, _first_rows(nodes, by_row_block)], output="Y")
        else:
            # (K, row blocks of both, 2, 8) → (K, row blocks of each, 2, 16)
            pairs = nodes.add("Reshape", [by_row_block, nodes.integers(0, -1, 2, BLOCK_ROWS)])
            gate_rows, up_rows = nodes.add_many("Split", [pairs], [None, None], {"axis": 2, "num_outputs": 2})
            gate = nodes.add("MatMul", [x, _first_rows(nodes, gate_rows)])
            up = nodes.add("MatMul", [x, _first_rows(nodes, up_rows)])
            silu = nodes.add("Mul", [gate, nodes.add("Sigmoid", [gate])])
            output = nodes.add("Mul", [silu, up], output="Y")
        graph = ir.Graph([x, mask, values, offsets], [output], nodes=nodes.nodes, opset_imports={"": opset_version})
        attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("N", "K", "layout")]
        return ir.Function(DOMAIN, op_type, graph=graph, attributes=attributes)


def _decoded(nodes: NodeList, mask: ir.Value, values: ir.Value) -> ir.Value:
    """The dense weight, (K, row blocks, 2, 8) float32: two bytes' rows in each block."""
    by_column = nodes.add("Transpose", [mask], {"perm": [1, 0, 2]})
    keys = nodes.add("Cast", [by_column], {"to": ir.DataType.INT32})
    bits = nodes.add("Gather", [nodes.constant(_BITS), keys])
    ranks = nodes.add("Gather", [nodes.constant(_RANKS), keys])
    # After the last value ranks point at the padding, which is there, and hidden by Where.
    index = nodes.add("Add", [ranks, _values_before(nodes, mask)])
    zero = nodes.constant(np.zeros((), dtype=np.float32))
    return nodes.add("Where", [bits, nodes.add("Gather", [values, index]), zero])


def _first_rows(nodes: NodeList, blocks: ir.Value) -> ir.Value:
    """(K, row blocks, …) to (K, N), N being the node's attribute."""
    padded = nodes.add("Reshape", [blocks, nodes.integers(0, -1)])
    return nodes.add("Slice", [padded, nodes.integers(0), nodes.reference("N"), nodes.integers(1)])


def _values_before(nodes: NodeList, mask: ir.Value) -> ir.Value:
    """For each mask byte the number of values stored before its first: (K, row blocks, 2, 1) int32."""
    counts = nodes.add("Gather", [nodes.constant(_COUNTS), nodes.add("Cast", [mask], {"to": ir.DataType.INT32})])
    flat = nodes.add("Reshape", [counts, nodes.integers(-1)])
    before = nodes.add("CumSum", [flat, nodes.integer(0)], {"exclusive": 1})
    by_block = nodes.add("Reshape", [before, nodes.add("Shape", [mask])])
    by_column = nodes.add("Transpose", [by_block], {"perm": [1, 0, 2]})
    return nodes.add("Unsqueeze", [by_column, nodes.integers(-1)])


def _trimmed(values: NDArray[np.generic]) -> Float32:
    trimmed: Float32 = values[: values.size - _PADDING_VALUES].astype(np.float32, copy=False)
    return trimmed
