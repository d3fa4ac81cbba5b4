"""What a verification found: a line for each check, and one word for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA, SCHEMA_VERSION = "losa-verify", 1

Status = Literal["ok", "differs", "not checked"]

# More differences than this are counted in the text; the record keeps them all.
_MOST_SHOWN = 10


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was recorded.

    Attributes:
        what: a file, a tensor or a figure.
        detail: what was found, and what was expected.
    """

    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}"


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was looked at.
        status: how it went.
        detail: what was compared, or why it was not.
        differences: all that were found, none unless `status` is 'differs'.
    """

    name: str
    status: Status
    detail: str
    differences: tuple[Difference, ...] = ()

    @classmethod
    def judged(cls, name: str, compared: str, differences: Sequence[Difference]) -> Check:
        """'ok' without differences; `compared` says what would have shown some."""
        return cls(name, "differs" if differences else "ok", compared, tuple(differences))

    @classmethod
    def skipped(cls, name: str, reason: str) -> Check:
        """'not checked', with the reason."""
        return cls(name, "not checked", reason)


@dataclass(frozen=True)
class Verification:
    """All checks of one exported folder.

    Attributes:
        folder: its name.
        checks: in the order they are shown.
    """

    folder: str
    checks: tuple[Check, ...]

    @property
    def confirmed(self) -> bool:
        """Whether nothing differs. What could not be checked is said by `checks`."""
        return all(check.status != "differs" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The record, ready for `json.dumps`; the same for the same files."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "folder": self.folder,
            "confirmed": self.confirmed,
            "checks": [asdict(check) for check in self.checks],
        }

    def __str__(self) -> str:
        """A line for each check, its differences below it, and the verdict last."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{check.name:<{width}}  {check.status:<11}  {check.detail}")
            lines += [f"{'':<{width}}  {line}" for line in _shown([str(found) for found in check.differences])]
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        if self.confirmed:
            skipped = [check.name for check in self.checks if check.status == "not checked"]
            return "CONFIRMED" + (f", but for what was not checked: {', '.join(skipped)}" if skipped else "")
        found = [
            f"{check.name} ({', '.join(_shown(list(dict.fromkeys(one.what for one in check.differences))))})"
            for check in self.checks
            if check.differences
        ]
        return f"DIFFERS: {'; '.join(found)}"


def _shown(lines: list[str]) -> list[str]:
    """The first few, and how many there are beyond."""
    if len(lines) <= _MOST_SHOWN:
        return lines
    return [*lines[:_MOST_SHOWN], f"and {len(lines) - _MOST_SHOWN} more"]
