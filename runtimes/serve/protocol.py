"""HTTP/1.1 from uvicorn and h11, closed to those who only hold connections open."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# A head of more than this is refused; real ones have a few hundred bytes.
MAX_HEAD_BYTES = 32 * 2**10

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
)
_FULL_BODY = (
    b'{"error":{"message":"too many connections are open; ask again later","type":"server_error","param":null,'
    b'"code":"too_many_connections"}}'
)


def guarded_protocol(header_timeout: float, max_connections: int) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn's `http` option.

    Args:
        header_timeout: seconds in which a connection must bring the whole head of a request: uvicorn itself waits
            for ever on a connection that has never completed one.
        max_connections: more are told to come back later, and closed.
    """

    class GuardedProtocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.write(_FULL % (len(_FULL_BODY), _FULL_BODY))
                transport.close()
                return
            self._await_head()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            # Behind a whole answer the keep-alive time runs; with the first byte of a head, the head's.
            if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
                self._await_head()
            super().data_received(data)

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:
                self._drop_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._drop_timer()
            super().connection_lost(exc)

        def _await_head(self) -> None:
            self._head_timer = self.loop.call_later(header_timeout, self._close_late)

        def _drop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _close_late(self) -> None:
            self._head_timer = None
            if not self.transport.is_closing():
                self.send_400_response("The head of the request did not arrive in time.")

    found: type[Any] = GuardedProtocol
    return found
