"""What int8 and int4 have in common: small integers, and a float16 scale for each row and group of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
