"""Questions from the hub, through a package `datasets` of our own making: which data set is asked for, and errors."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from losa_export.cli import main
from losa_export.errors import ConfigError, MissingDependencyError, TextError
from losa_export.eval.task_hub import SOURCES, load_items
from losa_export.eval.tasks import TASKS, find_task

ARC = {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"}
# (data set, configuration, split) by lm-evaluation-harness' task files, and a row as that data set has it
HUB: dict[str, tuple[tuple[str, str | None, str], dict[str, Any]]] = {
    "hellaswag": (
        ("Rowan/hellaswag", None, "validation"),
        {
            "activity_label": "Baking",
            "ctx": "[header] A man [title] mixes. he  eats",
            "ctx_a": "[header] A man [title] mixes.",
            "ctx_b": "he  Eats",
            "endings": [" a [step] cake. ", "it."],
            "label": "0",
        },
    ),
    "winogrande": (
        ("allenai/winogrande", "winogrande_xl", "validation"),
        {"sentence": "Ann hit Eve, so _ cried.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ),
    "piqa": (("baber/piqa", None, "validation"), {"goal": "Open", "sol1": "Twist.", "sol2": "Blow.", "label": 0}),
    "arc_easy": (("allenai/ai2_arc", "ARC-Easy", "test"), ARC),
    "arc_challenge": (("allenai/ai2_arc", "ARC-Challenge", "test"), ARC),
    "openbookqa": (
        ("allenai/openbookqa", "main", "test"),
        {
            "question_stem": "The sun is",
            "choices": {"text": ["cold", "a star"], "label": ["A", "B"]},
            "answerKey": " B",
        },
    ),
    "boolq": (
        ("aps/super_glue", "boolq", "validation"),
        {"passage": "Cats purr.", "question": "do cats purr", "label": 1, "idx": 0},
    ),
}
# (context, continuations, gold) of those rows
ASKED: dict[str, tuple[str, tuple[str, ...], int]] = {
    "hellaswag": ("Baking: A man. mixes. He eats", (" a cake.", " it."), 0),
    "piqa": ("Question: Open\nAnswer:", (" Twist.", " Blow."), 0),
    "arc_easy": ("Question: What is hot?\nAnswer:", (" ice", " fire"), 1),
    "arc_challenge": ("Question: What is hot?\nAnswer:", (" ice", " fire"), 1),
    "openbookqa": ("The sun is", (" cold", " a star"), 1),
    "boolq": ("Cats purr.\nQuestion: do cats purr?\nAnswer:", (" no", " yes"), 1),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Rows that the data set asked for has; `asked` of the module says which one that was."""
    rows: list[dict[str, Any]] = []
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(path: str, name: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, asked=asked))
    return rows


@pytest.mark.parametrize("name", SOURCES)
def test_rows_of_the_hub_are_asked_as_those_of_files(hub: list[dict[str, Any]], name: str) -> None:
    place, row = HUB[name]
    hub += [row] * 3
    items = load_items(find_task(name), 2)
    assert [item.row for item in items] == [1, 2]
    assert sys.modules["datasets"].asked == [place]
    if name == "winogrande":
        assert items[0].contexts == ("Ann hit Eve, so Ann", "Ann hit Eve, so Eve")
        assert (items[0].continuations, items[0].gold) == ((" cried.",) * 2, 1)
    else:
        assert (items[0].contexts[0], items[0].continuations, items[0].gold) == ASKED[name]
    assert len(load_items(find_task(name))) == 3


def test_every_task_but_our_own_is_on_the_hub() -> None:
    assert set(TASKS) - set(SOURCES) == {"wiki_continuation"}


def test_what_cannot_be_loaded_is_refused(hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    task = find_task("arc_easy")
    with pytest.raises(ConfigError, match="'wiki_continuation' is not on the hub; give --task-folder"):
        load_items(find_task("wiki_continuation"))
    with pytest.raises(ConfigError, match="limit is 0"):
        load_items(task, 0)
    with pytest.raises(TextError, match=r"the split 'test' of 'allenai/ai2_arc' \(ARC-Easy\) holds no row"):
        load_items(task)
    hub += [ARC, ARC | {"answerKey": "E"}]
    with pytest.raises(TextError, match=r"\(ARC-Easy\), row 2 is not laid out .* \(ValueError: "):
        load_items(task)
    hub[1] = ARC | {"choices": {"text": ["ice", " "], "label": ["1", "2"]}}
    with pytest.raises(TextError, match=r"\(ARC-Easy\), row 2: it has an empty choice"):
        load_items(task)

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", offline)
    with pytest.raises(TextError, match=r"\(ConnectionError: no route\); check the network, or give --task-folder"):
        load_items(task)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install datasets, or give --task-folder, which holds arc_e"):
        load_items(task)


def test_the_command_asks_the_hub_where_no_folder_is_given(
    hub: list[dict[str, Any]], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'train'")
    hub += [
        {"goal": "the old man", "sol1": "ran to sea", "sol2": f"sat on {word}", "label": 0} for word in ("a", "dog")
    ]
    words = ["eval", str(tiny_checkpoint), "--tasks", "piqa", "--threads", "1", "--json", str(tmp_path / "eval.json")]
    assert main(words) == 0
    assert "| piqa | 2 |" in capsys.readouterr().out
    assert "the split 'validation' of 'baber/piqa'" in (tmp_path / "eval.json").read_text(encoding="utf-8")
    assert sys.modules["datasets"].asked == [("baber/piqa", None, "validation")]


def test_the_command_says_which_items_lost_their_beginning(
    hub: list[dict[str, Any]], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'train'")
    hub += [{"goal": "old man " * 200, "sol1": "ran", "sol2": "sat", "label": 0}]
    words = ["eval", str(tiny_checkpoint), "--tasks", "piqa", "--threads", "1", "--json", str(tmp_path / "eval.json")]
    assert main(words) == 0
    assert "piqa: 1 items were too long for the model" in capsys.readouterr().err
