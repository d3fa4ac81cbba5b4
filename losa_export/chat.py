"""Chat templates: Jinja that comes with a model, rendered in a sandbox.

A template is a program written by whoever made the checkpoint, so it runs in Jinja's immutable sandbox: no
attribute of a Python object that starts with an underscore, no changing of what it is given. The helpers it may call
are those that Hugging Face tokenizers offer.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from losa_export.checkpoint import read_json_if_any
from losa_export.errors import CheckpointError, InputError

Message = Mapping[str, Any]
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class ChatTemplate:
    """The template of one model, with the special tokens it may name.

    Attributes:
        source: the Jinja text.
        tokens: 'bos_token', 'eos_token', … → their text.
        origin: the file it was read from, for messages.
    """

    source: str
    tokens: Mapping[str, str]
    origin: Path

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as one string, which already holds its special tokens.

        Raises:
            InputError: when the template refuses the messages or reaches for what the sandbox forbids.
            CheckpointError: when the template itself cannot be parsed.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            template = environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template in '{self.origin}' is not valid Jinja (line {error.lineno}: {error.message}); "
                "mend it, or do without it (--raw when generating)",
                path=self.origin,
            ) from error
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise InputError(
                f"the chat template in '{self.origin}' refused these messages: {error}; "
                "change the messages, or do without it (--raw when generating)",
                path=self.origin,
            ) from error


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a model folder, or None if it brings none.

    Read from `chat_template.jinja`, else from `chat_template` in `tokenizer_config.json` (a string, or a list of
    named templates of which 'default' is taken).

    Raises: CheckpointError when a file is there but cannot be read.
    """
    config = read_json_if_any(folder / "tokenizer_config.json", mend="copy it again")
    special = {**read_json_if_any(folder / "special_tokens_map.json", mend="copy it again"), **config}
    tokens = {name: text for name in _SPECIAL_TOKENS if (text := _token_text(special.get(name))) is not None}
    separate = folder / "chat_template.jinja"
    if separate.is_file():
        try:
            return ChatTemplate(separate.read_text(encoding="utf-8"), tokens, separate)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"'{separate}' cannot be read as UTF-8 text: {error}", path=separate) from error
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return ChatTemplate(source, tokens, folder / "tokenizer_config.json") if isinstance(source, str) else None


def _token_text(value: object) -> str | None:
    """A special token is written as a string, or as an object with its text under 'content'."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML (< becomes \\u003c), which a model was never trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
