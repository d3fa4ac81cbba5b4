"""Rounded weights as they are stored: levels beside scales in blocks of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import FormatError
from losa_export.graph.formats.base import BLOCK_ROWS, EncodedWeight
from losa_export.quantise import Int4Weight, Rounded


def stored_levels(rounded: Rounded) -> tuple[NDArray[Any], Mapping[str, NDArray[Any]]]:
    """Levels (N, K) of a rounded weight, and its format's own tensors; see `ValueFormat.to_levels`."""
    scales = scales_to_blocks(rounded.scales)
    if isinstance(rounded, Int4Weight):
        return rounded.codes, {"scales": scales, "codebook": rounded.codebook}
    return rounded.levels, {"scales": scales}


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
