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


class Fp32Format:
    """`SparseMatMulFp32(X, mask, values, block_offsets)`: Y = X Wᵀ with exact float32 values."""

    name = "fp32"
    op_type = "SparseMatMulFp32"
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

    def function(self, opset_version: int) -> ir.Function:
        """Decode to a dense matrix and multiply.

        The weight's inputs are constants, and CumSum, Gather and Where are all folded by ONNX Runtime, so there the
        decoding happens once, at load. NonZero or ScatterND would be decoded anew at each call.
        """
        x, mask, values, offsets = (ir.val(name) for name in ("X", *self.tensor_names))
        nodes = NodeList()
        bits = _mask_bits(nodes, mask)
        ranks = nodes.add("CumSum", [nodes.add("Cast", [bits], {"to": ir.DataType.INT32}), nodes.integer(0)])
        # The first kept value has rank 1. Before it the index is -1, which is valid and then hidden by Where.
        index = nodes.add("Sub", [ranks, nodes.integer(1, np.int32)])
        zero = nodes.constant(np.zeros((), dtype=np.float32))
        dense = nodes.add("Where", [bits, nodes.add("Gather", [values, index]), zero])
        by_block = nodes.add("Reshape", [dense, _block_shape(nodes, mask)])
        by_column = nodes.add("Transpose", [by_block], {"perm": [1, 0, 2]})
        padded = nodes.add("Reshape", [by_column, nodes.integers(0, -1)])
        rows = nodes.reference("N")
        transposed = nodes.add("Slice", [padded, nodes.integers(0), rows, nodes.integers(1)])
        output = nodes.add("MatMul", [x, transposed], output="Y")
        graph = ir.Graph([x, mask, values, offsets], [output], nodes=nodes.nodes, opset_imports={"": opset_version})
        attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("N", "K", "layout")]
        return ir.Function(DOMAIN, self.op_type, graph=graph, attributes=attributes)


def _mask_bits(nodes: NodeList, mask: ir.Value) -> ir.Value:
    """The mask as one flat bool vector, in layout order."""
    shifts = nodes.constant(np.arange(8, dtype=np.uint8))
    spread = nodes.add("Unsqueeze", [mask, nodes.integers(-1)])
    shifted = nodes.add("BitShift", [spread, shifts], {"direction": "RIGHT"})
    bits = nodes.add("BitwiseAnd", [shifted, nodes.constant(np.ones((), dtype=np.uint8))])
    return nodes.add("Reshape", [nodes.add("Cast", [bits], {"to": ir.DataType.BOOL}), nodes.integers(-1)])


def _block_shape(nodes: NodeList, mask: ir.Value) -> ir.Value:
    """[row blocks, K, 16] as a shape vector."""
    leading = nodes.add("Shape", [mask], {"start": 0, "end": 2})
    return nodes.add("Concat", [leading, nodes.integers(BLOCK_ROWS)], {"axis": 0})


def _trimmed(values: NDArray[np.generic]) -> Float32:
    trimmed: Float32 = values[: values.size - _PADDING_VALUES].astype(np.float32, copy=False)
    return trimmed
