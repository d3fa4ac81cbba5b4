"""Zero-shot tasks: how a row of a task's file becomes contexts, continuations and the right answer.

Prompts and the rule for length-normalised accuracy are those of lm-evaluation-harness, so that figures compare with
the literature: the score of a choice is the log-likelihood of its continuation after its context, and normalised
accuracy divides it by the choice's length in characters. Rows are as `datasets` and the files of the original authors
name their fields; which fields a task wants is in `TASKS`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losa_export.errors import ConfigError, TextError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        row: line of its file, counted from 1.
        contexts: one for each choice; the same one, but in Winogrande.
        continuations: what is scored behind it; each begins with a space.
        characters: length of each choice, for normalised accuracy.
        gold: place of the right choice.
    """

    row: int
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    characters: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: of its file, too: NAME.jsonl.
        fields: that a row must have, with their types.
        ask: context, choices and place of the right one.
        normalised: whether normalised accuracy is the usual figure.
    """

    name: str
    fields: Mapping[str, type]
    ask: Callable[[Row], tuple[str, Sequence[str], int]]
    normalised: bool = True


def _hellaswag(row: Row) -> tuple[str, Sequence[str], int]:
    # The authors' file has the context in two parts as well; there the second part begins a sentence in lower case.
    first, second = row.get("ctx_a"), row.get("ctx_b")
    context = f"{first} {second.capitalize()}" if isinstance(first, str) and isinstance(second, str) else row["ctx"]
    endings = [_plain(ending) if isinstance(ending, str) else ending for ending in row["endings"]]
    return _plain(f"{row['activity_label']}: {context}"), endings, int(row["label"])


def _plain(text: str) -> str:
    """Text without the marks that WikiHow's pages left in HellaSwag, such as '[header]', as the harness drops them."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _piqa(row: Row) -> tuple[str, Sequence[str], int]:
    return f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), int(row["label"])


def _arc(row: Row) -> tuple[str, Sequence[str], int]:
    return f"Question: {row['question']}\nAnswer:", row["choices"], int(row["label"])


def _openbookqa(row: Row) -> tuple[str, Sequence[str], int]:
    return row["question"], row["choices"], int(row["label"])


def _boolq(row: Row) -> tuple[str, Sequence[str], int]:
    return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), int(row["answer"])


def _continuation(row: Row) -> tuple[str, Sequence[str], int]:
    return row["ctx"], row["endings"], int(row["label"])


def _winogrande(row: Row) -> tuple[str, Sequence[str], int]:
    """The choices fill the blank of the context; see `_filled`."""
    return row["sentence"], (row["option1"], row["option2"]), int(row["answer"]) - 1


_CHOICES = {"question": str, "choices": list, "label": int}
_ENDINGS = {"ctx": str, "endings": list, "label": int}

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("hellaswag", {"activity_label": str, **_ENDINGS}, _hellaswag),
        Task(
            "winogrande",
            {"sentence": str, "option1": str, "option2": str, "answer": str},
            _winogrande,
            normalised=False,
        ),
        Task("piqa", {"goal": str, "sol1": str, "sol2": str, "label": int}, _piqa),
        Task("arc_easy", _CHOICES, _arc),
        Task("arc_challenge", _CHOICES, _arc),
        Task("openbookqa", _CHOICES, _openbookqa),
        Task("boolq", {"passage": str, "question": str, "answer": bool}, _boolq, normalised=False),
        Task("wiki_continuation", _ENDINGS, _continuation),
    )
}


def find_task(name: str) -> Task:
    """The task of that name. Raises: ConfigError for any other."""
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is not known; choose of {', '.join(TASKS)}", field="tasks")
    return TASKS[name]


def read_items(task: Task, path: Path, limit: int | None = None) -> list[Item]:
    """The first `limit` questions of a JSON Lines file; None takes all.

    Raises: TextError naming file, row and what is wrong with it; also for a file without a row.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; give at least 1 item", field="limit")
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"'{path}' cannot be read as UTF-8 text ({error}); check the path", path=path) from error
    rows = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    items = [item_of(task, f"'{path}'", number, line) for number, line in itertools.islice(rows, limit)]
    if not items:
        raise TextError(f"'{path}' holds no row; {task.name} needs one JSON object a line", path=path)
    return items


def item_of(task: Task, source: str, number: int, row: object) -> Item:
    """The question that a row asks.

    Args:
        task: what kind it is.
        source: where the row comes from, for messages.
        number: of the row there, from 1.
        row: a mapping, or a line of JSON that holds one.
    Raises: TextError naming source, row and what is wrong with it.
    """

    def wrong(why: str) -> TextError:
        return TextError(f"{source}, row {number}: {why}; {task.name} wants {', '.join(task.fields)}", row=number)

    if isinstance(row, str):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise wrong(f"it is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise wrong("it is no JSON object")
    for name, kind in task.fields.items():
        value = row.get(name)
        # A label may be written as text, as some of the original files do; True is no number.
        if kind is int and isinstance(value, str) and value.isdigit():
            continue
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise wrong(f"field '{name}' is {'missing' if name not in row else f'no {kind.__name__}: {value!r:.60}'}")
    if task.name == "winogrande" and row["answer"] not in ("1", "2"):
        raise wrong(f"field 'answer' is {row['answer']!r:.60}, not '1' or '2'")
    context, choices, gold = task.ask(row)
    if not all(isinstance(choice, str) and choice.strip() for choice in choices) or len(choices) < 2:
        raise wrong("it has an empty choice, or fewer than two")
    if not 0 <= gold < len(choices):
        raise wrong(f"its right answer is number {gold} of {len(choices)} choices, counted from 0")
    if not context.strip():
        raise wrong("its context is empty")
    if task.name == "winogrande":
        return _filled(wrong, number, context, choices, gold)
    return Item(
        row=number,
        contexts=(context,) * len(choices),
        continuations=tuple(f" {choice}" for choice in choices),
        characters=tuple(len(choice) for choice in choices),
        gold=gold,
    )


def _filled(wrong: Callable[[str], TextError], number: int, sentence: str, choices: Sequence[str], gold: int) -> Item:
    """Winogrande: the sentence up to its blank, filled either way, and what follows the blank is scored.

    Source: Trinh and Le 2018, "A Simple Method for Commonsense Reasoning", partial scoring.
    """
    before, blank, after = sentence.partition("_")
    if not blank or not after.strip():
        raise wrong("its sentence has no blank '_' with words behind it")
    continuation = f" {after.strip()}"
    return Item(
        row=number,
        contexts=tuple(before + choice for choice in choices),
        continuations=(continuation,) * len(choices),
        characters=(len(continuation),) * len(choices),
        gold=gold,
    )
