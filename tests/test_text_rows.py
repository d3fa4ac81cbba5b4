"""Rows of data files as text, and documents as unpacked examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_export.errors import TextError
from losa_export.text import read_documents, token_examples, token_windows
from losa_export.text_rows import text_of_row

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nAdd.\n\n### Response:\n3"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
CHAT_TEXT = "### System:\nBe brief.\n\n### Instruction:\nHi"


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "as it is", "instruction": "Add.", "output": "3"}, "as it is"),
        ({"instruction": "Add.", "input": "", "output": "3"}, ALPACA),
        ({"instruction": "Add.", "output": "3"}, ALPACA),
        ({"instruction": "Add.", "input": None, "output": "3"}, ALPACA),
        ({"messages": CHAT}, CHAT_TEXT),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "### Instruction:\nHi"),
    ],
)
def test_a_row_of_each_shape_becomes_text(row: object, text: str) -> None:
    assert text_of_row(row) == text


def test_further_input_gets_its_own_heading() -> None:
    text = text_of_row({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert text is not None
    assert text.startswith("Below is an instruction that describes a task, paired with an input that provides")
    assert text.endswith("request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3")


@pytest.mark.parametrize(
    "row",
    [
        [],
        "text",
        {"instruction": "Add."},
        {"instruction": "Add.", "input": 3, "output": "3"},
        {"messages": []},
        {"messages": ["Hi"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "oracle", "content": "Hi"}]},
    ],
)
def test_a_row_of_another_shape_has_no_text(row: object) -> None:
    assert text_of_row(row) is None


def test_a_conversation_takes_the_form_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    rendered = read_documents([tmp_path / "a.jsonl"], lambda messages: "|".join(m["content"] for m in messages))
    assert rendered == ["Be brief.|Hi"]


def test_a_json_file_is_a_list_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, {"messages": CHAT}]))
    assert read_documents([path]) == ["one", CHAT_TEXT]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "one"}', r"'.*a\.json' is not a list of rows; each row must look like"),
        ('{"text": "one"}\n{"text": "two"}', r"'.*a\.json' is not JSON .*name it \.jsonl if it holds one row a line"),
        ('[{"text": "one"}, {}]', r"row 2 of '.*a\.json' has no string field 'text', nor an instruction or messages"),
    ],
)
def test_a_json_file_of_another_shape_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(TextError, match=message):
        read_documents([tmp_path / "a.json"])


def listed(examples: list[Any]) -> list[list[int]]:
    assert all(example.dtype == np.int64 for example in examples)
    return [example.tolist() for example in examples]


def test_unpacked_examples_begin_and_end_where_their_document_does() -> None:
    examples = token_examples(["AB", "A", "ABCD"], letters, 4, bos=1, eos=2)
    assert listed(examples) == [[1, 65, 66, 2], [1, 65, 2], [1, 65, 66, 67]]
    assert listed(token_examples(["AB", "A"], letters, 4, bos=None, eos=None)) == [[65, 66]]


def test_documents_without_two_tokens_are_an_error() -> None:
    with pytest.raises(TextError, match=r"none of the 2 documents has two tokens, .*give more text"):
        token_examples(["A", "B"], letters, 4, bos=None, eos=None)


def test_packed_documents_may_begin_with_a_token_of_their_own() -> None:
    windows = token_windows(["A", "BC"], letters, 3, None, None, separator=2, bos=1)
    assert windows.tolist() == [[1, 65, 2], [1, 66, 67]]
