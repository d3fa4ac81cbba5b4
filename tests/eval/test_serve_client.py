"""The client against a server of known latencies and failures."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from losa_export.errors import RuntimeFailureError
from losa_export.eval.serve_client import list_models, open_session, send
from losa_export.eval.serve_metrics import CountedBy, Outcome, RequestRecord, TokenChunk, latencies
from tests.eval.serve_mock import Answer, MockServer

BODY = b'{"max_tokens": 5, "stream": true}'
# A sleeping event loop may wake up this much early, by its clock's resolution.
EARLY_MS = 0.1


def ask(answer: Answer, *, chat: bool = False, timeout_s: float = 30.0, url: str | None = None) -> RequestRecord:
    """The record of one request to a server that answers so."""

    async def run(base: str) -> RequestRecord:
        began = time.perf_counter()
        async with open_session(None) as session:
            return await send(
                session,
                base + ("/v1/chat/completions" if chat else "/v1/completions"),
                BODY,
                index=3,
                intended_s=-1.0,
                clock=lambda: time.perf_counter() - began,
                timeout_s=timeout_s,
            )

    if url is not None:
        return asyncio.run(run(url))
    with MockServer(lambda number, body: answer) as server:
        return asyncio.run(run(server.url))


@pytest.mark.parametrize("chat", [False, True])
def test_known_latencies_are_found(chat: bool) -> None:
    record = ask(Answer(ttft_s=0.2, itl_s=0.05), chat=chat)
    assert record.outcome is Outcome.COMPLETED
    assert (record.index, record.intended_s, record.status, record.detail) == (3, -1.0, 200, "")
    assert (record.output_tokens, record.prompt_tokens, record.finish_reason) == (5, 7, "length")
    assert record.counted_by is CountedBy.EACH_CHUNK
    found = latencies(record)
    assert found is not None
    # What a server waits for cannot come sooner; how much later is up to the machine, so seconds are allowed. The role
    # of a conversation, which comes at once, is no token.
    assert 200 - EARLY_MS <= found.ttft_ms < 5000
    assert 400 - EARLY_MS <= found.e2el_ms < 10_000
    assert found.ttft_intended_ms == pytest.approx(found.ttft_ms + 1000 * (record.started_s + 1))
    assert record.started_s < record.chunks[0].at_s < record.chunks[-1].at_s <= record.ended_s


def test_several_tokens_in_a_chunk() -> None:
    record = ask(Answer(itl_s=0.05, chunks=(1, 4, 2)))
    assert [chunk.tokens for chunk in record.chunks] == [1, 4, 2]
    found = latencies(record)
    assert found is not None
    assert len(found.itl_ms) == 6
    assert found.itl_ms[0] == found.itl_ms[1] == found.itl_ms[2] == found.itl_ms[3]


def test_usage_only_at_the_end_or_never() -> None:
    record = ask(Answer(chunks=(2, 3), usage="final"))
    assert (record.output_tokens, record.counted_by) == (5, CountedBy.FINAL_USAGE)
    record = ask(Answer(chunks=(2, 3), usage="none"))
    assert (record.output_tokens, record.counted_by) == (2, CountedBy.CHUNKS)
    assert {type(chunk) for chunk in record.chunks} == {TokenChunk}


@pytest.mark.parametrize(
    ("answer", "outcome", "detail"),
    [
        (Answer(status=429), Outcome.REFUSED, "429: told to answer 429"),
        (Answer(status=503), Outcome.REFUSED, "503: told to answer 503"),
        (Answer(status=500), Outcome.HTTP_ERROR, "500: told to answer 500"),
        (Answer(status=302), Outcome.HTTP_ERROR, "302: told to answer 302"),
        (Answer(done=False), Outcome.TRUNCATED, "the stream ended without [DONE]"),
        (Answer(finish=False), Outcome.TRUNCATED, "the stream ended without finish_reason"),
        (Answer(error="kernel lost"), Outcome.STREAM_ERROR, "kernel lost"),
        (Answer(raw=b"data: {oops\n\n"), Outcome.MALFORMED, "an event is no JSON object: {oops"),
        (Answer(content_type="application/json"), Outcome.MALFORMED, "the answer is application/json, not a stream"),
        (Answer(chunks=()), Outcome.EMPTY, "no chunk brought a token"),
    ],
)
def test_failures_have_names(answer: Answer, outcome: Outcome, detail: str) -> None:
    record = ask(answer)
    assert record.outcome is outcome
    assert record.detail.startswith(detail)
    assert record.status == answer.status
    assert latencies(record) is None


def test_a_connection_that_breaks_in_mid_answer_is_a_truncation() -> None:
    record = ask(Answer(break_after=2))
    assert record.outcome is Outcome.TRUNCATED
    assert record.output_tokens == 2
    assert record.detail


def test_an_answer_that_takes_too_long() -> None:
    record = ask(Answer(hang_s=60.0), timeout_s=0.3)
    assert record.outcome is Outcome.TIMED_OUT
    assert record.detail == "not finished within 0.3 s"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nobody_listens() -> None:
    record = ask(Answer(), url=f"http://127.0.0.1:{free_port()}")
    assert record.outcome is Outcome.CONNECTION_ERROR
    assert record.status is None
    assert record.detail


def two_in_a_row(plan: Callable[[int, dict[str, Any]], Answer]) -> tuple[list[Outcome], int]:
    """Outcomes of two requests of one session, and how many the server saw."""

    async def run(url: str) -> list[Outcome]:
        async with open_session(None) as session:
            return [
                (
                    await send(
                        session,
                        f"{url}/v1/completions",
                        BODY,
                        index=index,
                        intended_s=0.0,
                        clock=time.perf_counter,
                        timeout_s=30.0,
                    )
                ).outcome
                for index in range(2)
            ]

    with MockServer(plan) as server:
        return asyncio.run(run(server.url)), len(server.bodies)


def test_a_kept_connection_that_was_closed_meanwhile_is_no_failure() -> None:
    outcomes, seen = two_in_a_row(lambda number, body: Answer(drop=number == 1))
    assert outcomes == [Outcome.COMPLETED, Outcome.COMPLETED]
    assert seen == 3


def test_a_new_connection_that_is_dropped_is_a_failure() -> None:
    outcomes, seen = two_in_a_row(lambda number, body: Answer(drop=True))
    assert outcomes == [Outcome.CONNECTION_ERROR, Outcome.CONNECTION_ERROR]
    assert seen == 2


def test_a_server_that_drops_all_from_the_second_on_is_asked_once_more() -> None:
    outcomes, seen = two_in_a_row(lambda number, body: Answer(drop=number > 0))
    assert outcomes == [Outcome.COMPLETED, Outcome.CONNECTION_ERROR]
    assert seen == 3


def test_a_cancelled_request_tells_how_far_it_came() -> None:
    async def run(url: str) -> RequestRecord:
        async with open_session(None) as session:
            task = asyncio.create_task(
                send(
                    session,
                    f"{url}/v1/completions",
                    BODY,
                    index=0,
                    intended_s=0.0,
                    clock=time.perf_counter,
                    timeout_s=60.0,
                )
            )
            while not server.bodies:
                await asyncio.sleep(0.01)
            task.cancel()
            return await task

    with MockServer(lambda number, body: Answer(hang_s=60.0)) as server:
        record = asyncio.run(run(server.url))
    assert record.outcome is Outcome.INTERRUPTED


def models(server: MockServer, key: str | None = None) -> tuple[list[dict[str, Any]], str]:
    async def run() -> tuple[list[dict[str, Any]], str]:
        async with open_session(key) as session:
            return await list_models(session, server.url, 10.0)

    return asyncio.run(run())


def test_the_servers_models() -> None:
    with MockServer() as server:
        listed, name = models(server)
    assert listed[0]["id"] == "mock"
    assert name.startswith("Python/")


def test_a_key_is_sent_and_its_lack_is_said() -> None:
    with MockServer(key="secret-key") as server:
        assert models(server, "secret-key")[0]
        with pytest.raises(RuntimeFailureError, match="answered 401: no valid API key; name the variable"):
            models(server)


@pytest.mark.parametrize("document", [3, {"data": None}, {"data": [3]}, {"data": [{"id": 3}]}])
def test_what_lists_no_models_is_no_such_server(document: Any) -> None:
    with MockServer(models=document) as server, pytest.raises(RuntimeFailureError, match="answered 200 without a list"):
        models(server)


def test_a_server_that_does_not_answer() -> None:
    server = MockServer(url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RuntimeFailureError, match=r"no server answers at .*; start it, or correct --url"):
        models(server)


def test_a_server_that_accepts_and_says_nothing() -> None:
    async def run(url: str) -> None:
        async with open_session(None) as session:
            await list_models(session, url, 0.3)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(RuntimeFailureError, match=r"did not answer within 0.3 s; is the server busy"):
            asyncio.run(run(f"http://127.0.0.1:{port}"))
