"""Typed reads from a JSON object, with errors that name the file and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from losa_export.errors import CheckpointError


class ConfigFields:
    """One JSON object.

    Args:
        values: the parsed object.
        where: its file, for messages.
        prefix: put before field names in messages, for nested objects.

    Each method takes a field's name and what a missing or null field stands for; without that it must be there.
    Each raises CheckpointError for a value of the wrong type or range.
    """

    def __init__(self, values: Mapping[str, object], where: Path, prefix: str = "") -> None:
        self._values, self.where, self._prefix = values, where, prefix

    def absent(self, name: str) -> bool:
        """Whether the field is missing or null."""
        return self._values.get(name) is None

    def _wrong(self, name: str, wanted: str) -> CheckpointError:
        value = self._values.get(name)
        found = "is missing" if value is None else f"is {value!r}"
        return CheckpointError(f"{self.where}: {self._prefix}{name} {found}; it must be {wanted}", field=name)

    def positive(self, name: str, default: int | None = None) -> int:
        """Read an integer above 0."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self._wrong(name, "a positive integer")
        return value

    def natural(self, name: str, default: int) -> int:
        """Read an integer of at least 0."""
        return 0 if self._values.get(name) == 0 else self.positive(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        """Read a finite number above 0."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self._wrong(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Read true or false."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """Read a string."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Read a list of strings; () if there is none."""
        value = self._values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, "a list of strings")
        return tuple(value)

    def tokens(self, name: str) -> tuple[int, ...]:
        """Read a token id, or a list of them; () if there is none."""
        value = self._values.get(name)
        found: list[int] = []
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(item, bool) or not isinstance(item, int):
                raise self._wrong(name, "a token id or a list of token ids")
            if item >= 0:  # early Llama configs write -1 for "none"
                found.append(item)
        return tuple(found)

    def token(self, name: str) -> int | None:
        """Read the first of `tokens`, or None."""
        found = self.tokens(name)
        return found[0] if found else None
