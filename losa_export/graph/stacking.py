"""Several linears that read the same input as one node: fewer nodes a token, and the input is read once.

Query, key and value become one product whose rows follow each other. Gate and up become one SwiGLU node; their
rows alternate in blocks of 16, so that a kernel has both factors of an output at hand. Masks stay masks of the
checkpoint's own tensors: each node names its parts, and `parts_of` takes the stored rows apart again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import FormatError
from losa_export.graph.formats.base import BLOCK_ROWS
from losa_export.quantise import Int4Weight, Rounded

# Key of the node's metadata: a JSON list of [tensor name, rows], in stored order.
METADATA_KEY = "losa.weights"

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True)
class Part:
    """One checkpoint tensor inside a node: its name and its number of output rows."""

    name: str
    rows: int


def describe(parts: Sequence[Part]) -> str:
    """The metadata value that `parse` reads."""
    return json.dumps([[part.name, part.rows] for part in parts])


def parse(text: str | None, node: str) -> tuple[Part, ...]:
    """Parts of a node. Raises: FormatError if the metadata is missing or not understood."""
    try:
        return tuple(Part(str(name), int(rows)) for name, rows in json.loads(text or ""))
    except (ValueError, TypeError) as error:
        raise FormatError(f"node '{node}' does not say which weights it holds: export the model again") from error


def interleave(gate: NDArray[_Scalar], up: NDArray[_Scalar]) -> NDArray[_Scalar]:
    """Rows of both in alternating blocks of 16, gate first; the last block of each is filled with zeros.

    Args:
        gate: (N, K).
        up: (N, K), of the same dtype.

    Returns: (32·ceil(N/16), K).
    """
    rows, columns = gate.shape
    blocks = -(-rows // BLOCK_ROWS)
    both = np.zeros((2, blocks * BLOCK_ROWS, columns), dtype=gate.dtype)
    both[0, :rows], both[1, :rows] = gate, up
    by_block = both.reshape(2, blocks, BLOCK_ROWS, columns).transpose(1, 0, 2, 3)
    return by_block.reshape(2 * blocks * BLOCK_ROWS, columns)


def interleave_rounded(rounded: Rounded) -> Rounded:
    """As `interleave`, for a gate and an up of equal size that were rounded as one, gate above up."""
    scales = interleave(*np.split(rounded.scales, 2))
    if isinstance(rounded, Int4Weight):
        return replace(rounded, codes=interleave(*np.split(rounded.codes, 2)), scales=scales)
    return replace(rounded, levels=interleave(*np.split(rounded.levels, 2)), scales=scales)


def parts_of(stored: NDArray[_Scalar], rows: Sequence[int], *, interleaved: bool) -> list[NDArray[_Scalar]]:
    """Take stored rows apart: the inverse of stacking, or of `interleave`.

    Args:
        stored: (rows, K) as a node holds them.
        rows: of each part.
        interleaved: whether the two parts alternate.

    Raises: FormatError if the rows do not add up, or a row between the parts is not zero.
    """
    if not interleaved:
        if sum(rows) != stored.shape[0]:
            raise FormatError(f"a node of {stored.shape[0]} rows says that it holds {list(rows)}: export again")
        bounds = np.cumsum(rows)[:-1]
        return list(np.split(stored, bounds))
    blocks = -(-max(rows) // BLOCK_ROWS)
    if len(rows) != 2 or rows[0] != rows[1] or stored.shape[0] != 2 * blocks * BLOCK_ROWS:
        raise FormatError(f"a SwiGLU node of {stored.shape[0]} rows says that it holds {list(rows)}: export again")
    both = stored.reshape(blocks, 2, BLOCK_ROWS, -1).transpose(1, 0, 2, 3).reshape(2, blocks * BLOCK_ROWS, -1)
    if both[:, rows[0] :].any():
        raise FormatError("a SwiGLU node keeps rows that neither of its weights has: export again")
    return [both[0, : rows[0]], both[1, : rows[1]]]
