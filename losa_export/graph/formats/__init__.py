"""Value formats of stored weights. A new one is a module here and a line in `FORMATS`."""

from __future__ import annotations

from dataclasses import replace

from losa_export.errors import ConfigError
from losa_export.graph.formats.base import DOMAIN, DOMAIN_VERSION, EncodedWeight
from losa_export.graph.formats.bf16 import Bf16Format
from losa_export.graph.formats.fp32 import Fp32Format
from losa_export.graph.formats.int4 import Int4Format
from losa_export.graph.formats.int8 import Int8Format
from losa_export.graph.formats.scaled import ScaledFormat
from losa_export.graph.formats.value_format import ValueFormat

FORMATS: dict[str, ValueFormat] = {one.name: one for one in (Fp32Format(), Bf16Format(), Int8Format(), Int4Format())}

__all__ = ["DOMAIN", "DOMAIN_VERSION", "FORMATS", "EncodedWeight", "ValueFormat", "format_of", "value_format"]


def value_format(name: str, *, group: int = 128, activation_bits: int = 16) -> ValueFormat:
    """A format by name.

    Args:
        name: one of `FORMATS`.
        group: columns that share a scale, where the format has scales.
        activation_bits: 16 or 8, where the format's kernels round activations.

    Raises: ConfigError listing the known ones.
    """
    found = FORMATS.get(name)
    if found is None:
        raise ConfigError(f"values: '{name}' is not a value format; choose one of {', '.join(FORMATS)}", field="values")
    return replace(found, group=group, activation_bits=activation_bits) if isinstance(found, ScaledFormat) else found


def format_of(op_type: str) -> ValueFormat | None:
    """The format that an operator of our domain belongs to; None if it is of none."""
    return next((one for one in FORMATS.values() if op_type in one.op_types), None)
