"""Values as bfloat16, rounded to nearest even: half the bytes, and an error of at most one part in 256."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from losa_export.graph.formats.base import Bool, EncodedWeight, Float32
from losa_export.graph.formats.value_format import Array, ValueFormat


class Bf16Format(ValueFormat):
    """`SparseMatMulBf16(X, mask, values, block_offsets)` and its kin; products and sums are float32."""

    name = "bf16"
    level_type = ir.DataType.BFLOAT16
    element_type = np.dtype(ml_dtypes.bfloat16)
    step_columns = 2

    def to_levels(self, weight: Float32, keep: Bool) -> tuple[Array, Mapping[str, Array]]:
        """See `ValueFormat.to_levels`: the weight, rounded."""
        del keep
        return weight.astype(self.element_type), {}

    def from_levels(self, levels: Array, keep: Bool, encoded: EncodedWeight) -> Float32:
        """See `ValueFormat.from_levels`."""
        del keep, encoded
        return levels.astype(np.float32)
