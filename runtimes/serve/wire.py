"""The forms of answers on the wire: OpenAI's objects for chat and for plain completion, whole and in pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from losa_export.runtimes.serve.engine import Token

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Endpoint = Literal["chat", "text"]
Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, over all its answers."""

    prompt: int
    completion: int
    cached: int

    def as_dict(self) -> Json:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class TokenTexts:
    """The text of single tokens, as lists of log-probabilities show them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """Behind another token, since some decoders strip the space before a text's first one."""
        before = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(before) :]

    def entry(self, token_id: int, log_probability: float | None) -> Json:
        """OpenAI's object for a token in a chat; `bytes` is null where the token is no whole character."""
        text = self.text(token_id)
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": log_probability, "bytes": whole}

    def chat(self, tokens: Sequence[Token]) -> Json:
        """`logprobs` of a chat choice."""
        content = [
            self.entry(token.token_id, token.log_probability)
            | {"top_logprobs": [self.entry(*likely) for likely in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def plain(self, tokens: Sequence[Token], offset: int) -> Json:
        """`logprobs` of a plain completion; `offset` is where their text begins in the answer."""
        texts = [self.text(token.token_id) for token in tokens]
        offsets = [offset]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": [{self.text(token_id): value for token_id, value in token.top} for token in tokens],
            "text_offset": offsets[:-1],
        }


@dataclass(frozen=True)
class Form:
    """What all objects of one answer share.

    Attributes:
        endpoint: 'chat' or 'text'.
        identifier: of the answer.
        created: seconds since 1970.
        model: its name.
    """

    endpoint: Endpoint
    identifier: str
    created: int
    model: str

    def whole(self, choices: Sequence[Json], usage: Usage) -> Json:
        """The answer in one object."""
        kind = "chat.completion" if self.endpoint == "chat" else "text_completion"
        return self._head(kind) | {"choices": list(choices), "usage": usage.as_dict()}

    def choice(self, index: int, text: str, finish: str, logprobs: Json | None) -> Json:
        """One answer among those of `whole`."""
        said: Json = {"text": text}
        if self.endpoint == "chat":
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def chunk(self, choices: Sequence[Json], usage: Usage | None) -> bytes:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self.endpoint == "chat" else "text_completion"
        told = None if usage is None else usage.as_dict()
        return event(self._head(kind) | {"choices": list(choices), "usage": told})

    def delta(
        self, index: int, text: str, *, opens: bool = False, finish: str | None = None, logprobs: Json | None = None
    ) -> Json:
        """One choice of a chunk; `opens` says whose words follow."""
        said: Json = {"text": text}
        if self.endpoint == "chat":
            delta: Json = {} if finish is not None and not text else {"content": text}
            said = {"delta": {"role": "assistant", **delta} if opens else delta}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def _head(self, kind: str) -> Json:
        return {"id": self.identifier, "object": kind, "created": self.created, "model": self.model}


def event(content: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_object(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> Json:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
