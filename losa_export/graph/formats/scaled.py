"""What int8 and int4 have in common: small integers, and a float16 scale for each row and group of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import FormatError
from losa_export.graph.formats.base import BLOCK_ROWS, EncodedWeight
from losa_export.graph.formats.value_format import ValueFormat


@dataclass(frozen=True)
class ScaledFormat(ValueFormat):
    """Base of formats with scales.

    Attributes:
        group: columns that share a scale; the last group of a row may be short.
        activation_bits: to how many our kernels round activations, once a token and group: 16 or 8.
    """

    step_columns = 4
    own_tensors: ClassVar[tuple[str, ...]] = ("scales",)
    own_attributes = ("group", "activation_bits")

    group: int = 128
    activation_bits: int = 16


def scales_to_blocks(scales: NDArray[np.float16]) -> NDArray[np.float16]:
    """(N, groups) as it is stored: (ceil(N/16), groups, 16), zero for rows beyond N."""
    rows, groups = scales.shape
    blocks = -(-rows // BLOCK_ROWS)
    padded = np.zeros((blocks * BLOCK_ROWS, groups), dtype=np.float16)
    padded[:rows] = scales
    return np.ascontiguousarray(padded.reshape(blocks, BLOCK_ROWS, groups).transpose(0, 2, 1))


def scales_of(encoded: EncodedWeight) -> NDArray[np.float16]:
    """Invert `scales_to_blocks`: (N, groups). Raises: FormatError if they do not fit the weight."""
    scales, rows = encoded.tensors["scales"], encoded.attributes["N"]
    groups = -(-encoded.attributes["K"] // encoded.attributes["group"])
    shape = (-(-rows // BLOCK_ROWS), groups, BLOCK_ROWS)
    if scales.dtype != np.float16 or scales.shape != shape:
        raise FormatError(f"scales are {scales.dtype} {scales.shape}, not float16 {shape}: export the model again")
    by_row: NDArray[np.float16] = scales.transpose(0, 2, 1).reshape(-1, groups)[:rows].astype(np.float16, copy=False)
    return by_row
