"""Value formats of sparse weights. A new one is a module here and a line in `FORMATS`."""

from __future__ import annotations

from losa_export.errors import ConfigError
from losa_export.graph.formats.base import DOMAIN, DOMAIN_VERSION, EncodedWeight, ValueFormat
from losa_export.graph.formats.fp32 import Fp32Format

FORMATS: dict[str, ValueFormat] = {"fp32": Fp32Format()}

__all__ = ["DOMAIN", "DOMAIN_VERSION", "FORMATS", "EncodedWeight", "ValueFormat", "value_format"]


def value_format(name: str) -> ValueFormat:
    """Look up a format by name. Raises: ConfigError listing the known ones."""
    try:
        return FORMATS[name]
    except KeyError:
        raise ConfigError(
            f"values: '{name}' is not a value format; choose one of {', '.join(FORMATS)}", field="values"
        ) from None
