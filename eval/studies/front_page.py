"""The page of the study of quality and speed, drawn from its record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from losa_export.eval.report_quality import front
from losa_export.eval.studies.front_models import EXACT
from losa_export.eval.studies.timing import ratio_text

Row = Mapping[str, Any]

# Of mean losses, in nats: two engines with the same model.
_SAME_LOSS = 1e-5
_KINDS = {"nbits": "ONNX Runtime's own", "gguf": "llama.cpp"}


def page(document: Row) -> str:
    """The Markdown page."""
    rows = [row for row in document["variants"] if row["texts"] is not None]
    lines = [
        "# Quality and speed: pruned, or only rounded",
        "",
        "One model, dense and pruned with tuning, in every form that an engine here offers. Quality is that of the "
        "stored file in the engine that was timed; speed is of decoding, against the dense float32 model in ONNX "
        "Runtime, each in a run with it. *None better*: no other row has both at least its speed and its perplexity, "
        "and is better in one.",
        "",
        "Made by `python -m losa_export.eval.studies.front`; do not edit by hand.",
        "",
        "```",
        document["command"],
        "```",
        "",
    ]
    machine = document["machine"]
    if machine is not None:
        lines += [
            f"{document['prompt_tokens']} prompt and {document['new_tokens']} new tokens, {document['threads']} "
            f"threads of {machine['cpu_model']}. Ratios with a 95 % interval.",
            "",
        ]
    if rows:
        for place in range(len(rows[0]["texts"])):
            lines += _section(rows, place)
    lines += _tasks([row for row in document["variants"] if row["tasks"]])
    if document["failed"]:
        lines += ["**Without a result:** " + "; ".join(f"{one}: {why}" for one, why in document["failed"].items()), ""]
    return "\n".join(lines)


def _section(rows: Sequence[Row], place: int) -> list[str]:
    """The table of one text, the best quality first, and what follows from it."""
    text = rows[0]["texts"][place]
    timed = [row for row in rows if _speed(row) is not None]
    best = dict(zip([row["name"] for row in timed], on_front(timed, place), strict=True))
    lines = [
        f"## {text['name']}",
        "",
        f"{text['windows']} windows of {text['window']} tokens; {text['protocol']}. KL is from the dense model, nats a "
        "token.",
        "",
        "| model | values | engine | file | perplexity | KL | same top token | decode | prefill | none better |",
        "|---|---|---|---:|---:|---:|---:|---|---|---|",
    ]
    lines += [
        f"| {' | '.join(_cells(row, place, best.get(row['name'], False)))} |"
        for row in sorted(rows, key=lambda row: float(row["texts"][place]["perplexity"] or math.inf))
    ]
    lines += ["", *_sentences([row for row in timed if best[row["name"]]], timed, place), ""]
    return lines


def on_front(timed: Sequence[Row], place: int) -> list[bool]:
    """Of each timed row: whether no other has at least its speed and its perplexity, and is better in one."""
    losses = [math.log(row["texts"][place]["perplexity"] or math.inf) for row in timed]
    return front([1 / float(_speed(row) or math.nan) for row in timed], losses, _SAME_LOSS)


def _speed(row: Row) -> float | None:
    """Of decoding, as a multiple of the exact dense model's; None if it was not timed."""
    if row["name"] == EXACT:
        return 1.0
    return None if row["speed"] is None else float(row["speed"]["decode"]["ratio"])


def _cells(row: Row, place: int, best: bool) -> Iterator[str]:
    text, speed = row["texts"][place], row["speed"]
    yield row["source"] if row["zeros"] else "dense"
    yield f"{row['values']}, head too" if row["pure"] else row["values"]
    yield _KINDS.get(row["kind"], "ours" if row["name"] != EXACT else "ONNX Runtime")
    yield "–" if speed is None else f"{speed['model_bytes'] / 1e6:.0f} MB"
    yield "∞" if text["perplexity"] is None else f"{text['perplexity']:.2f}"
    yield f"{text['kl_mean']:.4f}" if "kl_mean" in text else ""
    yield f"{text['agreement']:.1%}" if "agreement" in text else ""
    for metric in ("decode", "prefill"):
        yield "1" if row["name"] == EXACT else "–" if speed is None else ratio_text(speed[metric])
    yield "yes" if best else ""


def _sentences(best: Sequence[Row], timed: Sequence[Row], place: int) -> list[str]:
    """What to take for which quality, the best quality first."""
    if len(timed) < 2:
        return []
    steps = sorted(best, key=lambda row: float(row["texts"][place]["perplexity"] or math.inf))
    lines = ["The fastest at each quality:", ""]
    for row in steps:
        kind = "pruned" if row["zeros"] else "dense"
        perplexity = row["texts"][place]["perplexity"]
        lines.append(f"- from perplexity {perplexity:.2f}: {row['name']} ({kind}), {_speed(row):.2f}x")
    pruned = [row for row in steps if row["zeros"]]
    if not pruned:
        verdict = "No pruned model is among them: at every quality one that is only rounded is as fast."
    elif steps[0] in pruned:
        verdict = "A pruned model is the fastest at every quality."
    else:
        first = pruned[0]["texts"][place]["perplexity"]
        verdict = f"Pruned models are the fastest from perplexity {first:.2f} on; for better, plain rounding wins."
    return [*lines, "", f"**{verdict}**"]


def _tasks(rows: Sequence[Row]) -> list[str]:
    """Accuracy beside that of the checkpoint in PyTorch, item by item."""
    if not rows:
        return []
    names = [task["name"] for task in rows[0]["tasks"]]
    lines = [
        "## Zero-shot tasks",
        "",
        f"Accuracy over {rows[0]['tasks'][0]['items']} items of each task by its usual measure, beside that "
        "of the checkpoint it was exported from in PyTorch. In brackets are items that the file alone, and the "
        "checkpoint alone, has right; ▲ or ▼ where McNemar's test tells them apart (p < 0.05).",
        "",
        f"| model | {' | '.join(names)} | median change of a log-likelihood, nats |",
        f"|---{'|---' * len(names)}|---:|",
    ]
    for row in rows:
        cells = [_task(task) for task in row["tasks"]]
        changes = sorted(task["median_difference"] for task in row["tasks"])
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {changes[len(changes) // 2]:.2g} |")
    apart = [(row["name"], task["name"]) for row in rows for task in row["tasks"] if task["p"] < 0.05]
    lines += ["", f"Of {sum(len(row['tasks']) for row in rows)} comparisons, {len(apart)} have p < 0.05."]
    return [*lines, ""]


def _task(task: Row) -> str:
    mark = "" if task["p"] >= 0.05 else " ▲" if task["only_this"] > task["only_source"] else " ▼"
    return (
        f"{task['accuracy']:.1%}, checkpoint {task['source_accuracy']:.1%} "
        f"(+{task['only_this']}, −{task['only_source']}){mark}"
    )
