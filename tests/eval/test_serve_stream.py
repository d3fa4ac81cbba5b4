"""Bytes of a stream, cut anywhere, into events, and events into tokens."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa_export.eval.serve_metrics import CountedBy, TokenChunk
from losa_export.eval.serve_stream import EventSplitter, StreamFacts, error_message, read_stream

STREAM = (
    b': a comment\n\ndata: {"a": 1}\n\nevent: x\r\nid: 3\r\ndata:{"b":\r\ndata: 2}\r\n\r\n\n\n'
    b'data: {"c": "\xc3\xa4 data: "}\n\ndata: [DONE]\n\n'
)
EVENTS = [b'{"a": 1}', b'{"b":\n2}', b'{"c": "\xc3\xa4 data: "}', b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_events_do_not_depend_on_where_the_bytes_are_cut(places: list[int]) -> None:
    cuts = [0, *sorted(places), len(STREAM)]
    splitter = EventSplitter()
    found = [event for start, end in pairwise(cuts) for event in splitter.feed(STREAM[start:end])]
    assert found == EVENTS
    assert splitter.end() == []


@pytest.mark.parametrize("last", [b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r\n"])
def test_a_last_done_needs_no_empty_line(last: bytes) -> None:
    splitter = EventSplitter()
    assert splitter.feed(last) == []
    assert splitter.end() == [b"[DONE]"]


@pytest.mark.parametrize("last", [b"", b'data: {"a": 1}', b'data: {"a": 1}\n', b"data: [DO"])
def test_an_event_that_is_cut_off_is_none(last: bytes) -> None:
    splitter = EventSplitter()
    assert splitter.feed(last) == splitter.end() == []


def chunk(text: str | None, counted: int | None = None, *, reason: str | None = None, chat: bool = False) -> Any:
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
    choice |= {"delta": {"content": text}} if chat else {"text": text}
    usage = None if counted is None else {"prompt_tokens": 7, "completion_tokens": counted}
    return {"choices": [choice], "usage": usage}


def usage(counted: int) -> Any:
    return {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": counted}}


def read(*documents: Any, done: bool = True) -> StreamFacts:
    """Facts of a stream with an event each second, from 1 on."""
    data = [json.dumps(document).encode() for document in documents] + ([b"[DONE]"] if done else [])
    return read_stream([(float(place), one) for place, one in enumerate(data, start=1)])


def test_tokens_are_counted_by_the_usage_of_each_chunk() -> None:
    # the role, three tokens at once, half of a character without text, text that was held back, the end
    facts = read(
        chunk("", 0, chat=True),
        chunk("abc", 3, chat=True),
        chunk("", 4, chat=True),
        chunk("ä", 5, chat=True),
        chunk("rest", 5, chat=True),
        chunk(None, 5, reason="stop", chat=True),
    )
    assert facts.chunks == (TokenChunk(2.0, 3), TokenChunk(3.0, 1), TokenChunk(4.0, 1))
    assert (facts.output_tokens, facts.prompt_tokens) == (5, 7)
    assert facts.counted_by is CountedBy.EACH_CHUNK
    assert (facts.finished_s, facts.finish_reason, facts.done) == (6.0, "stop", True)
    assert facts.error is facts.malformed is None


def test_usage_at_the_end_counts_tokens_but_tells_no_chunks() -> None:
    facts = read(chunk("", chat=True), chunk("ab"), chunk("c"), chunk("", reason="length"), usage(9))
    assert facts.chunks == (TokenChunk(2.0, None), TokenChunk(3.0, None))
    assert facts.output_tokens == 9
    assert facts.counted_by is CountedBy.FINAL_USAGE
    assert facts.finished_s == 4.0  # the chunk of usage is no part of the answer


def test_usage_in_the_chunk_that_ends_the_answer_is_usage_at_the_end() -> None:
    facts = read(chunk("ab"), chunk("c"), chunk("", 4, reason="length"))
    assert facts.counted_by is CountedBy.FINAL_USAGE
    assert (facts.output_tokens, len(facts.chunks)) == (4, 2)


def test_without_usage_chunks_are_counted() -> None:
    facts = read(chunk("ab"), chunk("c"), chunk("", reason="length"))
    assert facts.counted_by is CountedBy.CHUNKS
    assert facts.output_tokens == 2
    assert facts.prompt_tokens is None


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "refusal", "tool_calls"])
def test_what_a_model_writes_elsewhere_is_tokens_too(name: str) -> None:
    facts = read({"choices": [{"delta": {"content": None, name: "x"}}]})
    assert len(facts.chunks) == 1


def test_an_empty_answer() -> None:
    for facts in (read(), read(chunk("", 0, reason="stop")), read(chunk("", reason="stop"), usage(0))):
        assert facts.chunks == ()
        assert facts.output_tokens == 0
        assert facts.counted_by is None


def test_an_error_in_the_stream_ends_it() -> None:
    facts = read(chunk("a", 1), {"error": {"message": "out of memory", "code": 500}}, chunk("b", 2))
    assert facts.error == "out of memory"
    assert facts.output_tokens == 1
    assert not facts.done


@pytest.mark.parametrize("data", [b"{", b"[1]", b"3", b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_malformed(data: bytes) -> None:
    facts = read_stream([(1.0, data), (2.0, b"[DONE]")])
    assert facts.malformed is not None
    assert facts.malformed.startswith("an event is no JSON object: ")
    assert len(facts.malformed) < 100


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"choices": None, "usage": 3},
        {"choices": [3]},
        {"choices": {"text": "a"}},
        {"choices": [{"delta": 3, "finish_reason": 4}], "usage": {"completion_tokens": "9"}},
        {"choices": [{"delta": {}}], "usage": {"completion_tokens": -1, "prompt_tokens": True}},
    ],
)
def test_odd_fields_bring_no_tokens(document: Any) -> None:
    facts = read(document)
    assert facts.chunks == ()
    assert facts.output_tokens == 0
    assert facts.prompt_tokens is facts.finish_reason is None


def test_messages_of_errors() -> None:
    assert error_message({"error": {"message": "no"}}) == "no"
    assert error_message({"error": "no"}) == error_message({"message": "no"}) == error_message("no") == "no"
    assert error_message({"detail": [1]}) == '{"detail": [1]}'
    assert error_message("x" * 1000) == "x" * 300 + "…"
