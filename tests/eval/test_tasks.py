"""Task files: prompts as in lm-evaluation-harness, and errors that name the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from losa_export.errors import ConfigError, TextError
from losa_export.eval.tasks import TASKS, find_task, read_items

ROWS: dict[str, dict[str, Any]] = {
    "hellaswag": {
        "activity_label": "Baking",
        "ctx": "A man mixes.",
        "endings": ["He eats.", "It flies off."],
        "label": 0,
    },
    "winogrande": {"sentence": "Ann hit Eve, so _ cried.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    "piqa": {"goal": "Open a jar", "sol1": "Twist.", "sol2": "Blow.", "label": 0},
    "arc_easy": {"question": "What is hot?", "choices": ["ice", "fire", "snow"], "label": 1},
    "arc_challenge": {"question": "What is hot?", "choices": ["ice", "fire", "snow"], "label": "1"},
    "openbookqa": {"question": "The sun is", "choices": ["cold", "a star"], "label": 1},
    "boolq": {"passage": "Cats purr.", "question": "do cats purr", "answer": True},
    "wiki_continuation": {"ctx": "Rome: It is old.", "endings": ["It has hills.", "He sang."], "label": 0},
}
# (contexts, continuations, gold) by lm-evaluation-harness' task files
ASKED: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "hellaswag": (("Baking: A man mixes.",) * 2, (" He eats.", " It flies off."), 0),
    "winogrande": (("Ann hit Eve, so Ann", "Ann hit Eve, so Eve"), (" cried.",) * 2, 1),
    "piqa": (("Question: Open a jar\nAnswer:",) * 2, (" Twist.", " Blow."), 0),
    "arc_easy": (("Question: What is hot?\nAnswer:",) * 3, (" ice", " fire", " snow"), 1),
    "arc_challenge": (("Question: What is hot?\nAnswer:",) * 3, (" ice", " fire", " snow"), 1),
    "openbookqa": (("The sun is",) * 2, (" cold", " a star"), 1),
    "boolq": (("Cats purr.\nQuestion: do cats purr?\nAnswer:",) * 2, (" no", " yes"), 1),
    "wiki_continuation": (("Rome: It is old.",) * 2, (" It has hills.", " He sang."), 0),
}


def write(folder: Path, *rows: object) -> Path:
    path = folder / "task.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", TASKS)
def test_a_row_is_asked_as_the_harness_asks_it(tmp_path: Path, name: str) -> None:
    (item,) = read_items(find_task(name), write(tmp_path, ROWS[name]))
    assert (item.contexts, item.continuations, item.gold) == ASKED[name]
    if TASKS[name].normalised:
        # by the length of the choice, without the space before it
        assert item.characters == tuple(len(text) - 1 for text in item.continuations)


def test_rows_are_counted_from_one_and_empty_lines_are_none(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    line = json.dumps(ROWS["piqa"])
    path.write_text(f"{line}\n\n{line}\n{line}\n", encoding="utf-8")
    assert [item.row for item in read_items(find_task("piqa"), path)] == [1, 3, 4]
    assert [item.row for item in read_items(find_task("piqa"), path, 2)] == [1, 3]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"label": 2}, "row 2: its right answer is number 2 of 2 choices"),
        ("piqa", {"label": "x"}, "row 2: field 'label' is no int: 'x'"),
        ("piqa", {"label": True}, "row 2: field 'label' is no int: True"),
        ("piqa", {"goal": None}, "row 2: field 'goal' is no str: None"),
        ("piqa", {"sol2": "  "}, "row 2: it has an empty choice"),
        ("arc_easy", {"choices": ["one"]}, "row 2: it has an empty choice, or fewer than two"),
        ("arc_easy", {"choices": ["one", 2]}, "row 2: it has an empty choice"),
        ("openbookqa", {"question": ""}, "row 2: its context is empty"),
        ("winogrande", {"answer": "3"}, "row 2: field 'answer' is '3'"),
        ("winogrande", {"sentence": "No blank."}, "row 2: its sentence has no blank"),
        ("winogrande", {"sentence": "Ends with _"}, "row 2: its sentence has no blank '_' with words behind it"),
        ("boolq", {"answer": "yes"}, "row 2: field 'answer' is no bool"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TextError, match=message):
        read_items(find_task(name), write(tmp_path, ROWS[name], ROWS[name] | change))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    task = find_task("piqa")
    with pytest.raises(TextError, match="cannot be read"):
        read_items(task, tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"{\xff")
    with pytest.raises(TextError, match="UTF-8"):
        read_items(task, tmp_path / "latin.jsonl")
    for text, message in (("", "holds no row"), ("{", "row 1: it is not JSON"), ("[1]", "row 1: it is no JSON object")):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(TextError, match=message):
            read_items(task, tmp_path / "bad.jsonl")
    missing = {key: value for key, value in ROWS["piqa"].items() if key != "goal"}
    with pytest.raises(TextError, match="field 'goal' is missing; piqa wants goal, sol1, sol2, label"):
        read_items(task, write(tmp_path, missing))
    with pytest.raises(ConfigError, match="limit is 0"):
        read_items(task, write(tmp_path, ROWS["piqa"]), 0)
    with pytest.raises(ConfigError, match="task 'mmlu' is not known"):
        find_task("mmlu")


@pytest.mark.parametrize("name", TASKS)
def test_the_shared_files_are_read_whole(shared_data: Path, name: str) -> None:
    path = shared_data / "tasks" / f"{name}.jsonl"
    assert len(read_items(find_task(name), path)) == len(path.read_text(encoding="utf-8").splitlines())
