"""Values as float32: nothing is rounded, so the sparse model computes what the checkpoint does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from losa_export.graph.formats.base import Bool, EncodedWeight, Float32
from losa_export.graph.formats.value_format import Array, ValueFormat


class Fp32Format(ValueFormat):
    """`SparseMatMulFp32(X, mask, values, block_offsets)`, and SwiGLU likewise, with exact float32 values."""

    name = "fp32"
    level_type = ir.DataType.FLOAT
    element_type = np.dtype(np.float32)
    step_columns = 1
    stores_dense = False

    def to_levels(self, weight: Float32, keep: Bool) -> tuple[Array, Mapping[str, Array]]:
        """See `ValueFormat.to_levels`: the weight itself."""
        del keep
        return weight, {}

    def from_levels(self, levels: Array, keep: Bool, encoded: EncodedWeight) -> Float32:
        """See `ValueFormat.from_levels`."""
        del keep, encoded
        return levels
