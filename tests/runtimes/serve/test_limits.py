from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")

from losa_export.runtimes.serve.limits import Guard, Keys

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/x",
    "headers": [],
    "client": ("127.0.0.1", 1),
    "query_string": b"",
}


def call(app: Any, *, longest: float = 30.0) -> tuple[list[Any], list[tuple[str, int]]]:
    """Messages sent, and what was observed."""
    sent: list[Any] = []
    seen: list[tuple[str, int]] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(app, Keys(()), longest, lambda path, status: seen.append((path, status)))
    asyncio.run(guard(dict(SCOPE), receive, send))
    return sent, seen


def test_a_reader_that_takes_nothing_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    async def stuck(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(30)

    with caplog.at_level(logging.INFO, "losa.serve"):
        sent, seen = call(stuck, longest=0.05)
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert seen == [("/v1/x", 200)]
    assert caplog.records[-1].facts["finish"] == ["not read in time"]  # type: ignore[attr-defined]


def test_a_fault_behind_an_answer_that_has_begun_sends_no_second_one() -> None:
    async def broken(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("secret")

    sent, seen = call(broken)
    assert len(sent) == 1
    assert seen == [("/v1/x", 200)]


@pytest.mark.parametrize(
    ("keys", "header", "allowed"),
    [
        ((), None, True),
        (("first-key", "second-key"), "Bearer second-key", True),
        (("first-key",), "bearer  first-key ", True),
        (("first-key",), "Bearer first-ke", False),
        (("first-key",), "Token first-key", False),
        (("first-key",), "Bearer \udcff", False),
        (("first-key",), "", False),
    ],
)
def test_keys(keys: tuple[str, ...], header: str | None, allowed: bool) -> None:
    assert Keys(keys).allow(header) is allowed
