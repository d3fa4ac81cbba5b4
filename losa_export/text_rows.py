"""How a row of a data file becomes text: plain text, an instruction with its answer, or a conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Message = Mapping[str, str]
RenderChat = Callable[[Sequence[Message]], str]

ROW_SHAPES = (
    '{"text": "…"}, {"instruction": "…", "input": "…", "output": "…"} (the input may be missing), '
    'or {"messages": [{"role": "user", "content": "…"}, …]}'
)

# Stanford Alpaca's own words, which the column "text" of its descendants holds as well.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_HEADINGS = {"system": "System", "user": "Instruction", "assistant": "Response"}
# ShareGPT's names for who speaks.
_SPEAKERS = {"human": "user", "gpt": "assistant"}


def text_of_row(row: object, render_chat: RenderChat | None = None) -> str | None:
    """The text of a row, or None if it has no known shape.

    The first that fits is taken: a string "text" as it is; a conversation under "messages" ("role" and "content") or
    "conversations" ("from" and "value"); an "instruction" with its "output" and perhaps an "input".

    Args:
        row: a parsed JSON value.
        render_chat: turns a conversation into text, such as a model's chat template; `plain_chat` if not given.
    """
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("text"), str):
        return str(row["text"])
    messages = _messages(row)
    if messages is not None:
        return (render_chat or plain_chat)(messages)
    instruction, extra, output = row.get("instruction"), row.get("input") or "", row.get("output")
    if isinstance(instruction, str) and isinstance(extra, str) and isinstance(output, str):
        return instruction_text(instruction, extra, output)
    return None


def instruction_text(instruction: str, extra: str, output: str) -> str:
    """An instruction, further input (may be empty) and its answer, in the form of Stanford Alpaca.

    Source: Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca, "Data Release".
    """
    parts = [_WITH_INPUT if extra else _WITHOUT_INPUT, f"### Instruction:\n{instruction}"]
    if extra:
        parts.append(f"### Input:\n{extra}")
    return "\n\n".join([*parts, f"### Response:\n{output}"])


def plain_chat(messages: Sequence[Message]) -> str:
    """A conversation under the headings of `instruction_text`, for models that bring no chat template."""
    return "\n\n".join(f"### {_HEADINGS[message['role']]}:\n{message['content']}" for message in messages)


def _messages(row: Mapping[str, object]) -> list[Message] | None:
    """The messages of a row as role and content; None unless it has some, all of them strings of known roles."""
    for field, role_name, content_name in (("messages", "role", "content"), ("conversations", "from", "value")):
        listed = row.get(field)
        if isinstance(listed, list) and listed:
            messages: list[Message] = []
            for item in listed:
                role, content = (
                    (item.get(role_name), item.get(content_name)) if isinstance(item, dict) else (None, None)
                )
                if not isinstance(role, str) or not isinstance(content, str):
                    return None
                role = _SPEAKERS.get(role, role)
                if role not in _HEADINGS:
                    return None
                messages.append({"role": role, "content": content})
            return messages
    return None
