"""What a stream of server-sent events, as OpenAI's interface sends them, says of tokens. Pure functions of bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from losa_export.eval.serve_metrics import CountedBy, TokenChunk

_DONE = b"[DONE]"
# Fields of a chat's delta that hold what the model wrote, besides its content.
_WRITTEN = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")
_LONGEST_MESSAGE = 300


class EventSplitter:
    """Cuts bytes, in whatever pieces they arrive, into the data of events. Comments and other fields are left out."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Data of the events that `piece` completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            bare = line.rstrip(b"\r")
            if bare.startswith(b"data:"):
                self._data.append(bare[5:].removeprefix(b" "))
            elif not bare and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events

    def end(self) -> list[bytes]:
        """At the stream's end: a last [DONE] that no empty line follows. Anything else is cut off, and no event."""
        data = self._data or [self._rest.rstrip(b"\r").removeprefix(b"data:").removeprefix(b" ")]
        return [_DONE] if data == [_DONE] else []


@dataclass(frozen=True)
class StreamFacts:
    """What the events of an answer say.

    Attributes:
        chunks: those that brought tokens.
        finished_s: arrival of the last chunk with a choice; None if there was none.
        done: whether [DONE] came.
        finish_reason: None if none came.
        error: message of an error sent in the stream; None if none was.
        malformed: what is not as the interface says; None if all is.
        prompt_tokens, output_tokens, counted_by: as in `RequestRecord`.
    """

    chunks: tuple[TokenChunk, ...]
    finished_s: float | None
    done: bool
    finish_reason: str | None
    error: str | None
    malformed: str | None
    prompt_tokens: int | None
    output_tokens: int
    counted_by: CountedBy | None


@dataclass(frozen=True)
class _Piece:
    """A chunk with a choice: when it came, whether it brought text, and the output tokens that usage counts by then."""

    at_s: float
    has_text: bool
    counted: int | None


def read_stream(events: Sequence[tuple[float, bytes]]) -> StreamFacts:
    """Interpret the events of one answer, each with the time of its arrival."""
    pieces: list[_Piece] = []
    done, finish_reason, error, malformed = False, None, None, None
    prompt_tokens = final = None
    for at_s, data in events:
        if data.strip() == _DONE:
            done = True
            break
        chunk = _parsed(data)
        if chunk is None:
            malformed = f"an event is no JSON object: {data[:60].decode(errors='replace')}"
            break
        if chunk.get("error"):
            error = error_message(chunk)
            break
        usage = chunk.get("usage")
        counted = None
        if isinstance(usage, dict):
            prompt_tokens = _whole(usage.get("prompt_tokens"), prompt_tokens)
            counted = _whole(usage.get("completion_tokens"), None)
            final = final if counted is None else counted
        choices = chunk.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            pieces.append(_Piece(at_s, _has_text(choices[0]), counted))
            reason = choices[0].get("finish_reason")
            finish_reason = reason if isinstance(reason, str) else finish_reason
    chunks, output_tokens, counted_by = _count(pieces, final)
    return StreamFacts(
        chunks=chunks,
        finished_s=pieces[-1].at_s if pieces else None,
        done=done,
        finish_reason=finish_reason,
        error=error,
        malformed=malformed,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        counted_by=counted_by,
    )


def error_message(document: object) -> str:
    """The message of an error in the interface's form, or of what resembles it; shortened."""
    found = document
    for name in ("error", "message"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "…"


def _count(pieces: Sequence[_Piece], final: int | None) -> tuple[tuple[TokenChunk, ...], int, CountedBy | None]:
    """Chunks that brought tokens, all output tokens, and how they were counted.

    Where each chunk with text also carries usage, tokens are the growth of its count: a chunk without text may then
    bring some (half of a character), and one with text none (the rest of a word that was held back).
    """
    written = [piece for piece in pieces if piece.has_text]
    if pieces and any(piece.counted for piece in pieces) and all(piece.counted is not None for piece in written):
        chunks, before = [], 0
        for piece in pieces:
            if piece.counted is not None and piece.counted > before:
                chunks.append(TokenChunk(piece.at_s, piece.counted - before))
                before = piece.counted
        # A usage event after the last chunk may know of more: tokens that ended the answer without a chunk.
        return tuple(chunks), max(before, final or 0), CountedBy.EACH_CHUNK
    chunks = [TokenChunk(piece.at_s, None) for piece in written]
    if final is not None:
        return tuple(chunks), final, CountedBy.FINAL_USAGE if final else None
    return tuple(chunks), len(chunks), CountedBy.CHUNKS if chunks else None


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta")
    return bool(choice.get("text")) or (isinstance(delta, dict) and any(delta.get(name) for name in _WRITTEN))


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _whole(value: object, otherwise: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise
