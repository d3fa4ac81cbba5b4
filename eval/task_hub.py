"""Questions of the zero-shot tasks from the Hugging Face hub, through the package `datasets`.

The data sets and splits are those that lm-evaluation-harness 0.4.13 asks. A data set's rows are turned into rows as
`losa_export.eval.tasks` wants them, and then go the same way as those of a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from losa_export.errors import ConfigError, MissingDependencyError, TextError
from losa_export.eval.tasks import Item, Row, Task, item_of


def _as_it_is(row: Row) -> Row:
    return row


def _lettered(row: Row) -> Row:
    """ARC and OpenBookQA: choices as two lists, texts and labels, and the right one by its label."""
    choices = row["choices"]
    label = choices["label"].index(row["answerKey"].strip())
    return {"question": row.get("question_stem", row.get("question")), "choices": choices["text"], "label": label}


def _labelled(row: Row) -> Row:
    """BoolQ as part of SuperGLUE: 1 for yes."""
    return {"passage": row["passage"], "question": row["question"], "answer": bool(row["label"])}


@dataclass(frozen=True)
class HubSource:
    """Where a task's questions are on the hub.

    Attributes:
        path: of the data set.
        name: of its configuration, if it has several.
        split: that is asked.
        row: turns a row of it into one of the task's.
    """

    path: str
    name: str | None
    split: str
    row: Callable[[Row], Row] = _as_it_is

    def __str__(self) -> str:
        return f"the split '{self.split}' of '{self.path}'" + (f" ({self.name})" if self.name else "")


SOURCES: Mapping[str, HubSource] = {
    "hellaswag": HubSource("Rowan/hellaswag", None, "validation"),
    "winogrande": HubSource("allenai/winogrande", "winogrande_xl", "validation"),
    "piqa": HubSource("baber/piqa", None, "validation"),
    "arc_easy": HubSource("allenai/ai2_arc", "ARC-Easy", "test", _lettered),
    "arc_challenge": HubSource("allenai/ai2_arc", "ARC-Challenge", "test", _lettered),
    "openbookqa": HubSource("allenai/openbookqa", "main", "test", _lettered),
    "boolq": HubSource("aps/super_glue", "boolq", "validation", _labelled),
}


def find_source(name: str) -> HubSource:
    """Where the task of that name is on the hub. Raises: ConfigError if it is not there."""
    if name not in SOURCES:
        raise ConfigError(
            f"the task '{name}' is not on the hub; give --task-folder, which holds {name}.jsonl", field="task_folder"
        )
    return SOURCES[name]


def load_items(task: Task, limit: int | None = None) -> list[Item]:
    """The first `limit` questions of a task's data set, loaded from the hub or from `datasets`' cache; None takes all.

    Raises:
        ConfigError: the task is not on the hub, or `limit` is below 1.
        MissingDependencyError: `datasets` is not installed.
        TextError: the data set cannot be loaded, or a row of it is not as the task wants it.
    """
    source = find_source(task.name)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; give at least 1 item", field="limit")
    rows = itertools.islice(_load(task, source), limit)
    items = [item_of(task, str(source), number, _row(source, number, row)) for number, row in enumerate(rows, start=1)]
    if not items:
        raise TextError(f"{source} holds no row; give --task-folder, which holds {task.name}.jsonl")
    return items


def _load(task: Task, source: HubSource) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"to load {source}, the package 'datasets' is needed, which is not installed; install it with: pip install "
            f"datasets, or give --task-folder, which holds {task.name}.jsonl",
            package="datasets",
        ) from error
    try:
        return datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # of the network, of the hub, of the file system and datasets' own: they share no base
        raise TextError(
            f"'datasets' cannot load {source} ({type(error).__name__}: {error}); check the network, or give "
            f"--task-folder, which holds {task.name}.jsonl"
        ) from error


def _row(source: HubSource, number: int, row: Row) -> Row:
    try:
        return source.row(row)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise TextError(
            f"{source}, row {number} is not laid out as its data set was when this was written "
            f"({type(error).__name__}: {error}); give --task-folder with files instead",
            row=number,
        ) from error
