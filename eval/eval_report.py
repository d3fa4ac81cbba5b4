"""The tables of `losa eval`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


def eval_markdown(record: Record) -> str:
    """What an evaluation found, as Markdown tables: texts, then tasks."""
    compared = "reference" in record
    lines = [f"# {record['target']['folder']}" + (f" against {record['reference']['folder']}" if compared else ""), ""]
    if record["texts"]:
        lines += [*_texts(record, compared), ""]
    if record["tasks"]:
        lines += [*_tasks(record, compared), ""]
    return "\n".join(lines)


def _texts(record: Record, compared: bool) -> list[str]:
    header = ["text", "windows", "perplexity"]
    if compared:
        header += ["of the reference", "change", "KL, nats a token", "KL, 99th percentile", "same most likely token"]
    rows = []
    for text in record["texts"]:
        row = [text["name"], f"{text['windows']} of {text['window']}", _perplexity(text["target"])]
        if compared:
            difference = text["nll_difference"]
            row += [
                _perplexity(text["reference"]),
                f"{_signed(difference['mean'])} ({_signed(difference['low'])} … {_signed(difference['high'])}) nats",
                f"{text['kl_mean']:.4f}",
                f"{text['kl_p99']:.3f}",
                f"{text['agreement']:.1%}",
            ]
        rows.append(row)
    return _table(header, rows)


def _tasks(record: Record, compared: bool) -> list[str]:
    header = ["task", "items", "accuracy", "by character"]
    if compared:
        header += ["accuracy of the reference", "by character", "right alone: this, the reference", "p (McNemar)"]
    rows = []
    for task in record["tasks"]:
        sides = ("target", "reference") if compared else ("target",)
        row = [task["name"], str(task["items"])]
        for side in sides:
            by_character = task[side]["accuracy_normalised"] if task["usual"] == "accuracy_normalised" else None
            row += [_share(task[side]["accuracy"]), "–" if by_character is None else _share(by_character)]
        if compared:
            test = task["mcnemar"]
            row += [f"{test['only_target']}, {test['only_reference']}", f"{test['p']:.3f}"]
        rows.append(row)
    return _table(header, rows)


def _perplexity(loss: Record) -> str:
    return "∞" if loss["perplexity"] is None else f"{loss['perplexity']:.2f}"


def _share(found: Record) -> str:
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.1%}"
    return f"{found['share']:.1%}{error}"


def _signed(value: float | None) -> str:
    return "?" if value is None else f"{value:+.4f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
