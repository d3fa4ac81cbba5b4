"""Which tokens begin and end a text, by the files that come with a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from losa_export.checkpoint import read_json

_FILES = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that begin and end a text; None where no file names one."""

    bos: int | None
    eos: int | None


def load_special_ids(folder: Path, tokenizer: Tokenizer) -> SpecialIds:
    """Those of a model folder, as transformers finds them.

    Raises: CheckpointError if a file that is there is no JSON object.
    """
    named: dict[str, Any] = {}
    for name in _FILES:
        if (folder / name).is_file():
            named = {**read_json(folder / name, what="model", mend="copy the tokenizer's files again"), **named}
    return SpecialIds(_id(tokenizer, named.get("bos_token")), _id(tokenizer, named.get("eos_token")))


def _id(tokenizer: Tokenizer, token: object) -> int | None:
    """A token is named by its text, or by an object that has it under 'content'."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None
