"""Ctrl-C that waits for a good place to stop."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

# A launcher of several processes passes on what the terminal has already sent to each of them.
_SAME_REQUEST_S = 1.0


class StoppedError(Exception):
    """Training was asked to stop, and has reached a place from which it can be resumed."""


class StopRequest:
    """While it is open, the first SIGINT or SIGTERM is only noted; a second one acts at once.

    Outside the main thread signals cannot be caught, and it does nothing.

    Args:
        echoed: whether a launcher may repeat a signal: what comes within a second of the first is then the same one.
    """

    def __init__(self, *, echoed: bool = False) -> None:
        self.requested = False
        self._echoed = echoed
        self._noted_at = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._noted_at = True, now
            if not self._echoed:
                self._restore()
        elif now - self._noted_at > _SAME_REQUEST_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def check(self) -> None:
        """Raises: StoppedError if a stop was asked for."""
        if self.requested:
            raise StoppedError
