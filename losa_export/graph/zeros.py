"""Where the ordinary matrices of a written model are zero: the pattern of a pruned weight that was stored densely.

Such a file knows no masks. A kept weight that happens to be zero looks pruned, so the pattern is that of the values,
and holds every pruned position among its zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from losa_export.errors import FormatError
from losa_export.graph.external import ModelFolder
from losa_export.masks import BoolArray, digest, zeros_count

# How `losa_export.graph.weights.WeightStore` names a matrix that it writes as (in, out).
_ENDING = ".weight.transposed"


def nonzero_patterns(model: ModelFolder, shapes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, BoolArray]]:
    """Where the linears that are stored as ordinary matrices are not zero, one matrix at a time.

    Args:
        model: the written model.
        shapes: weight name → (out, in) of the linears that are looked for. Others, such as the head, are left out.

    Yields: weight name and (out, in) bool, True = not zero.

    Raises: FormatError if a matrix has not the shape of the linears that it holds side by side.
    """
    for stored in model.tensors:
        names = _linears_of(stored)
        if not names or not shapes.keys() >= set(names):
            continue
        matrix = model.read(stored)
        parts = [shapes[name] for name in names]
        columns, rows = {part[1] for part in parts}, [part[0] for part in parts]
        if matrix.ndim != 2 or min(rows) < 0 or columns != {matrix.shape[0]} or sum(rows) != matrix.shape[1]:
            raise FormatError(
                f"'{stored}' is {matrix.shape}, which does not hold {' and '.join(map(str, parts))}, each transposed: "
                "export the model again",
                tensor=stored,
            )
        for name, part in zip(names, np.split(matrix, np.cumsum(rows)[:-1], axis=1), strict=True):
            yield name, (part != 0).T


def zeros_record(model: ModelFolder, shapes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """The table `zero_patterns` of export.json: what `nonzero_patterns` finds, as facts and a digest.

    Raises: FormatError as `nonzero_patterns`.
    """
    return {
        name: {
            "shape": list(nonzero.shape),
            "zeros": zeros_count(nonzero),
            "sparsity_fraction": zeros_count(nonzero) / nonzero.size,
            "nonzero_sha256": digest(nonzero),
        }
        for name, nonzero in nonzero_patterns(model, shapes)
    }


def _linears_of(stored: str) -> list[str]:
    """Names of the weights in an initializer such as "…self_attn.q_proj+k_proj+v_proj.weight.transposed"."""
    if not stored.endswith(_ENDING):
        return []
    first, *others = stored.removesuffix(_ENDING).split("+")
    parent = first.rpartition(".")[0]
    return [f"{first}.weight", *(f"{parent}.{other}.weight" for other in others)]
