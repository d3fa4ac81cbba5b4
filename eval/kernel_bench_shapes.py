"""Shapes of weights to measure: those of known models by name, or any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from losa_export.errors import ConfigError

_MAX_DIMENSION = 1 << 18


@dataclass(frozen=True)
class Shape:
    """A weight of N rows and K columns; `names` say which layers have it."""

    rows: int
    columns: int
    names: tuple[str, ...] = ()


SHAPE_GROUPS: dict[str, tuple[Shape, ...]] = {
    group: tuple(Shape(rows, columns, (f"{group} {name}",)) for name, rows, columns in layers)
    for group, layers in {
        "smollm2": (
            ("q+k+v", 960, 576),
            ("o", 576, 576),
            ("gate+up", 3072, 576),
            ("down", 576, 1536),
            ("head", 49152, 576),
        ),
        "tinyllama": (
            ("q+k+v", 2560, 2048),
            ("o", 2048, 2048),
            ("gate, up", 5632, 2048),
            ("down", 2048, 5632),
            ("head", 32000, 2048),
        ),
        "llama2-7b": (("q, k, v, o", 4096, 4096), ("gate, up", 11008, 4096), ("down", 4096, 11008)),
    }.items()
}


def parse_shapes(names: Sequence[str]) -> tuple[Shape, ...]:
    """Shapes by group name ('smollm2') or size ('4096x11008', rows first); each size once.

    Raises: ConfigError for what is neither.
    """
    found: dict[tuple[int, int], Shape] = {}
    for name in names:
        group = SHAPE_GROUPS.get(name)
        if group is None:
            rows, _, columns = name.lower().partition("x")
            if not (rows.isdecimal() and columns.isdecimal()):
                raise ConfigError(
                    f"shapes: '{name}' is neither a model ({', '.join(SHAPE_GROUPS)}) nor rows x columns such as "
                    "4096x11008",
                    field="shapes",
                )
            group = (Shape(int(rows), int(columns)),)
        for shape in group:
            size = (shape.rows, shape.columns)
            if not all(1 <= length <= _MAX_DIMENSION for length in size):
                raise ConfigError(
                    f"shapes: '{name}' must have from 1 to {_MAX_DIMENSION} rows and columns", field="shapes"
                )
            before = found.get(size, Shape(*size))
            found[size] = Shape(*size, (*before.names, *(one for one in shape.names if one not in before.names)))
    return tuple(found.values())
