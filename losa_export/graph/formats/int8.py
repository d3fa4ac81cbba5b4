"""Values as int8 levels under a scale for each row and group of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from losa_export.graph.formats.base import Bool, EncodedWeight, Float32
from losa_export.graph.formats.scaled import ScaledFormat
from losa_export.graph.formats.scales import scales_of, stored_levels
from losa_export.graph.formats.value_format import Array
from losa_export.quantise import Int8Weight, quantise_int8


@dataclass(frozen=True)
class Int8Format(ScaledFormat):
    """`SparseMatMulInt8(X, mask, values, block_offsets, scales)` and its kin: a weight is level · scale."""

    name = "int8"
    level_type = ir.DataType.INT8
    element_type = np.dtype(np.int8)

    def to_levels(self, weight: Float32, keep: Bool) -> tuple[Array, Mapping[str, Array]]:
        """See `ValueFormat.to_levels`."""
        return stored_levels(quantise_int8(weight, keep, self.group))

    def from_levels(self, levels: Array, keep: Bool, encoded: EncodedWeight) -> Float32:
        """See `ValueFormat.from_levels`."""
        del keep
        return Int8Weight(levels, scales_of(encoded), encoded.attributes["group"]).dequantise()
