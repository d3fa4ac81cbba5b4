"""Progress of long work on standard error: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

_PLAIN_INTERVAL_S = 10.0


class Progress:
    """Shows how far a step is, how fast it goes, and how long it will still take.

    Args:
        description: what is being done, in a few words.
        total: number of units of work.
        unit: name of a unit, for example "tokens".
        enabled: False silences it.
    """

    def __init__(self, description: str, total: float, unit: str = "steps", *, enabled: bool = True) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0.0
        self._enabled = enabled
        self._fields: dict[str, str] = {}
        self._start = self._last_line = time.monotonic()
        self._live = _LiveBar(description, total) if enabled and sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._enabled and kind is None:
            self._print_line(finished=True)

    def advance(self, amount: float = 1.0, **fields: str) -> None:
        """Count `amount` units done; `fields` (name → short text, for example loss="3.21") replace those shown."""
        self.done += amount
        self._fields.update(fields)
        if not self._enabled:
            return
        if self._live is not None:
            self._live.update(self.done, "  ".join(f"{name} {value}" for name, value in self._fields.items()))
        elif time.monotonic() - self._last_line >= _PLAIN_INTERVAL_S:
            self._print_line(finished=False)

    def seconds_left(self) -> float | None:
        """Estimate from the mean speed so far; None before the first unit is done."""
        elapsed = time.monotonic() - self._start
        return elapsed * (self.total - self.done) / self.done if self.done > 0 else None

    def _print_line(self, *, finished: bool) -> None:
        self._last_line = time.monotonic()
        left = self.seconds_left()
        parts = [f"{self.description}: {_amount(self.done)}/{_amount(self.total)} {self.unit}"]
        parts += [f"{name} {value}" for name, value in self._fields.items()]
        if finished:
            parts.append(f"done in {duration(time.monotonic() - self._start)}")
        elif left is not None:
            parts.append(f"{duration(left)} left")
        print(", ".join(parts), file=sys.stderr, flush=True)  # noqa: T201


class _LiveBar:
    """The terminal form, drawn by rich."""

    def __init__(self, description: str, total: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(description, total=total, facts="")

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def update(self, done: float, facts: str) -> None:
        self._progress.update(self._task, completed=done, facts=facts)


def _amount(number: float) -> str:
    """A count in three digits at least: "2", "12.5", "1284"."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """`seconds` as a person says it: "8 s", "3 min 20 s", "1 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
