"""The sections of a report that evaluations make: perplexity and divergence on texts, and zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from losa_export.eval.report_parts import Section, Table
from losa_export.eval.report_quality import side_name
from losa_export.eval.report_sources import Source

# At most this chance of a difference at least as large, were there none.
_SIGNIFICANT = 0.05
_BETTER, _WORSE, _NONE = "BETTER", "WORSE", "NO DIFFERENCE SHOWN"


def eval_sections(sources: Sequence[Source]) -> Iterator[Section]:
    """Texts, then tasks."""
    texts = [(source.document, text) for source in sources for text in source.document["texts"]]
    if texts:
        yield Section(
            "Quality on texts",
            "The change is the mean difference of the loss from that of the reference, window by window, with its 95 % "
            "interval; the verdict is WORSE or BETTER only if the whole interval lies on one side of 0. KL is "
            "KL(reference ‖ model) of the next token, its mean and its 99th percentile.",
            table=_texts(texts),
        )
    tasks = [(source.document, task) for source in sources for task in source.document["tasks"]]
    if tasks:
        yield Section(
            "Zero-shot tasks",
            "Accuracy with its standard error; where it is the usual figure, also that by log-likelihood over the "
            "length of a choice. The verdict is McNemar's on the items that one of the two alone has right, at 5 %: of "
            "twenty such verdicts on equal models one is wrong.",
            table=_tasks(tasks),
        )


def _texts(texts: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Table:
    rows = []
    for document, text in texts:
        row = [side_name(document["target"]), text["name"], f"{text['windows']} of {text['window']}"]
        row.append(_perplexity(text["target"]))
        if "reference" in document:
            change = text["nll_difference"]
            row += [
                f"{side_name(document['reference'])}: {_perplexity(text['reference'])}",
                f"{_signed(change['mean'])} ({_signed(change['low'])} … {_signed(change['high'])})",
                _interval_verdict(change["low"], change["high"]),
                # Rounding can leave that of equal models below 0.
                f"{max(text['kl_mean'], 0):.4f}, {max(text['kl_p99'], 0):.3f}",
                f"{text['agreement']:.1%}",
            ]
        rows.append((*row, *["–"] * (9 - len(row))))
    headings = (
        *("model (engine)", "text", "windows", "perplexity", "reference", "change, nats a token", "verdict"),
        *("KL, 99 %", "same most likely token"),
    )
    return Table(headings, tuple(rows), frozenset({2, 3, 5, 7, 8}))


def _perplexity(loss: Mapping[str, Any]) -> str:
    return "∞" if loss["perplexity"] is None else f"{loss['perplexity']:.2f}"


def _signed(value: float | None) -> str:
    return "?" if value is None else f"{round(value, 4) + 0.0:+.4f}"


def _interval_verdict(low: float | None, high: float | None) -> str:
    if low is not None and low > 0:
        return _WORSE
    return _BETTER if high is not None and high < 0 else _NONE


def _tasks(tasks: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Table:
    rows = []
    for document, task in tasks:
        row = [side_name(document["target"]), task["name"], str(task["items"]), *_shares(task, "target")]
        if "reference" in document:
            test = task["mcnemar"]
            row += [side_name(document["reference"]), *_shares(task, "reference")]
            row += [f"{test['only_target']}, {test['only_reference']}", f"{test['p']:.3f}", _mcnemar_verdict(test)]
        rows.append((*row, *["–"] * (11 - len(row))))
    headings = (
        *("model (engine)", "task", "items", "accuracy", "by length", "reference", "accuracy", "by length"),
        *("right alone: model, reference", "p", "verdict"),
    )
    return Table(headings, tuple(rows), frozenset({2, 3, 4, 6, 7, 8, 9}))


def _shares(task: Mapping[str, Any], side: str) -> tuple[str, str]:
    """Accuracy, and the one by length where that is the task's usual figure."""
    found = task[side]
    return _share(found["accuracy"]), _share(found[task["usual"]]) if task["usual"] != "accuracy" else "–"


def _share(found: Mapping[str, Any]) -> str:
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.1%}"
    return f"{found['share']:.1%}{error}"


def _mcnemar_verdict(test: Mapping[str, Any]) -> str:
    if test["p"] >= _SIGNIFICANT:
        return _NONE
    return _BETTER if test["only_target"] > test["only_reference"] else _WORSE
