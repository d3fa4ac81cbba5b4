"""Values as 4-bit codes into a codebook of 16 int8 levels, under a scale for each row and group of columns.

Two codes share a byte, the first in its low half. Each step starts at a byte of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from losa_export.errors import FormatError
from losa_export.graph.formats.base import Bool, EncodedWeight, Float32
from losa_export.graph.formats.scaled import ScaledFormat
from losa_export.graph.formats.scales import scales_of, stored_levels
from losa_export.graph.formats.value_format import Array
from losa_export.graph.nodes import NodeList
from losa_export.quantise import CODEBOOK_SIZE, Int4Weight, quantise_int4

# The two codes of each byte.
_CODES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.int32)


@dataclass(frozen=True)
class Int4Format(ScaledFormat):
    """`SparseMatMulInt4(X, mask, values, block_offsets, scales, codebook)` and its kin: codebook[code] · scale."""

    name = "int4"
    level_type = ir.DataType.INT8
    element_type = np.dtype(np.uint8)
    levels_per_element = 2
    own_tensors = ("scales", "codebook")

    def to_levels(self, weight: Float32, keep: Bool) -> tuple[Array, Mapping[str, Array]]:
        """See `ValueFormat.to_levels`: the codes."""
        return stored_levels(quantise_int4(weight, keep, self.group))

    def from_levels(self, levels: Array, keep: Bool, encoded: EncodedWeight) -> Float32:
        """See `ValueFormat.from_levels`."""
        codebook = encoded.tensors["codebook"].astype(np.int8, copy=False)
        if codebook.shape != (CODEBOOK_SIZE,):
            raise FormatError(f"codebook has shape {codebook.shape}, not ({CODEBOOK_SIZE},): export the model again")
        return Int4Weight(levels, scales_of(encoded), codebook, encoded.attributes["group"]).dequantise(keep)

    def to_elements(self, levels: Array) -> Array:
        """See `ValueFormat.to_elements`: an even number of codes, two to a byte."""
        joined: Array = levels[1::2] << 4
        joined |= levels[0::2]
        return joined

    def from_elements(self, values: Array) -> Array:
        """See `ValueFormat.from_elements`."""
        codes: Array = np.stack([values & 15, values >> 4], axis=1).reshape(-1)
        return codes

    def element_levels(self, nodes: NodeList, values: ir.Value, tensors: Mapping[str, ir.Value]) -> ir.Value:
        """See `ValueFormat.element_levels`: a byte looked up becomes two levels."""
        levels_of_byte = nodes.add("Gather", [tensors["codebook"], nodes.constant(_CODES)])
        return nodes.add("Gather", [levels_of_byte, nodes.add("Cast", [values], {"to": ir.DataType.INT32})])
