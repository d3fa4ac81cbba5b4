"""Text from a stream of tokens without broken characters, and the tokens that end it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from losa_export.checkpoint import read_json_if_any

_REPLACEMENT = "\ufffd"
# Longest run of tokens held back in the hope of a whole character: no character needs this many, so
# a model that babbles invalid bytes still streams.
_MAX_HELD = 32
# Tokens of the prompt that the first new token is decoded behind: decoders strip a leading space only there.
_CONTEXT = 4


def load_stop_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a text: from generation_config.json, else genai_config.json, else config.json; () if none.

    Raises: CheckpointError when the first of these files that exists is not JSON.
    """
    for name in ("generation_config.json", "genai_config.json", "config.json"):
        content: Any = read_json_if_any(folder / name, mend="copy it again")
        if name == "genai_config.json":
            content = content.get("model")
        found = content.get("eos_token_id") if isinstance(content, dict) else None
        ids = found if isinstance(found, list) else [found]
        stop = tuple(token for token in ids if isinstance(token, int) and not isinstance(token, bool) and token >= 0)
        if stop:
            return stop
    return ()


class StreamDecoder:
    """Turns tokens into text as they come; the pieces joined equal decoding all tokens at once.

    (Except for bytes that are no text: some decoders then take back a character that was already whole.)
    A byte-level token may end inside a character, and decoders treat the first token of a text specially. So each new
    token is decoded behind the tokens of the last piece of text, and a piece is held back while it ends in an
    unfinished character.

    Args:
        tokenizer: of the model.
        prompt_ids: what the new tokens continue; its text is not repeated.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = [int(token) for token in prompt_ids[-_CONTEXT:]]
        self._shown = len(self._ids)  # tokens before this one are already shown, and only give context

    def push(self, token_id: int) -> str:
        """The text that this token completes; '' while a character is unfinished."""
        self._ids.append(int(token_id))
        return self._emit(final=len(self._ids) - self._shown >= _MAX_HELD)

    def finish(self) -> str:
        """What was held back, with U+FFFD for bytes that never became a character."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        before = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids)
        if not final and (text.endswith(_REPLACEMENT) or not text.startswith(before)):
            return ""
        if len(text) <= len(before):
            # A special token shows nothing: keep the context that the next visible token needs.
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
