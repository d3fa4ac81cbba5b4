"""The page of the speed-up study, drawn from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from losa_export.errors import ConfigError
from losa_export.eval.stats import median
from losa_export.eval.studies.speedup_models import DENSE, FORMS, blocks_text
from losa_export.eval.studies.timing import ratio_text

# What the paper reports for a model of 7 billion weights with 70 % zeros on DeepSparse.
PAPER_RATIO, PAPER_SPARSITY = 2.60, 0.7


def line_through(depths: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Milliseconds of no block and of each block, by the line through the smallest and the largest depth.

    Args:
        depths: blocks and milliseconds of a token.
    Raises: ConfigError for fewer than two depths.
    """
    if len({depth for depth, _ in depths}) < 2:
        raise ConfigError("a line needs two depths; give --blocks two numbers", field="blocks")
    (low, fast), (high, slow) = min(depths), max(depths)
    each = (slow - fast) / (high - low)
    return fast - each * low, each


def page(document: Mapping[str, Any]) -> str:
    """The Markdown page."""
    cells = document["cells"]
    machine, threads = cells[0]["machine"], cells[0]["threads"]
    plain = [cell for cell in cells if cell["against"] == DENSE]
    lines = [
        "# The paper's speed-up, measured",
        "",
        f"The paper reports {PAPER_RATIO:.2f}x for a model of 7 billion weights with {PAPER_SPARSITY:.0%} zeros on a "
        f"CPU, with DeepSparse. Here: random weights in the shape of {document['like']}, a prompt of "
        f"{document['prompt_tokens']} and {document['new_tokens']} new tokens, {threads} threads of "
        f"{machine['cpu_model']}. Ratios are of speed, within one run, with a 95 % interval. Random weights say "
        "nothing of quality, which differs: [runtimes.md](runtimes.md) has what rounding costs on a real model. The "
        "head, a large part of so few blocks, has 4 bits where ours is int8 or int4, as in the dense models of 4 bits; "
        "that of the others is stored as their other weights are.",
        "",
        "Made by `python -m losa_export.eval.studies.paper_speedup`; do not edit by hand.",
        "",
        "```",
        document["command"],
        "```",
        "",
        *_against_the_paper(cells),
    ]
    for metric in ("decode", "prefill"):
        lines += [
            f"## {metric.capitalize()}, against dense float32 in ONNX Runtime",
            "",
            *_table(document, plain, metric),
        ]
    lines += _duels([cell for cell in cells if cell["against"] != DENSE])
    if document["failed"]:
        lines += [
            "**Without a result:** " + "; ".join(f"{cell}: {why}" for cell, why in document["failed"].items()),
            "",
        ]
    return "\n".join(lines)


def _table(document: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    depths = sorted({cell["blocks"] for cell in cells})
    whole = document["whole_blocks"]
    headings = ["form", "zeros", *(blocks_text(depth) for depth in depths)]
    dense = {at: median([cell[metric]["against_ms"] for cell in cells if cell["blocks"] == at]) for at in depths}
    if len(depths) > 1:
        headings += ["ms a block", "against dense", f"ms of {whole} blocks", "against dense"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for form, sparsity in sorted({(cell["form"], cell["sparsity"]) for cell in cells}, key=_place):
        mine = {cell["blocks"]: cell[metric] for cell in cells if (cell["form"], cell["sparsity"]) == (form, sparsity)}
        row = [FORMS[form].title, f"{sparsity:.0%}"]
        row += [ratio_text(mine[depth]) if depth in mine else "–" for depth in depths]
        if len(depths) > 1:
            row += _by_the_lines({depth: one["ratio"] for depth, one in mine.items()}, dense, whole)
        lines.append(f"| {' | '.join(row)} |")
    if len(depths) > 1:
        lines += [
            "",
            f"What stands right of {blocks_text(depths[-1])} is read off straight lines through the depths: for the "
            "dense model through its median times over all runs, for a form through these divided by its ratios, since "
            "two runs may find the memory at different speeds.",
        ]
    return [*lines, ""]


def _by_the_lines(ratios: Mapping[int, float], dense: Mapping[int, float], whole: int) -> list[str]:
    """Time of a block and of the whole model, each with its ratio to the dense one's.

    Args:
        ratios: of speed to the dense model's, by depth.
        dense: milliseconds of the dense model, by depth.
        whole: blocks of the whole model.
    """
    if len(ratios) < 2:
        return ["–"] * 4
    start, each = line_through([(depth, dense[depth] / ratio) for depth, ratio in ratios.items()])
    dense_start, dense_each = line_through([(depth, dense[depth]) for depth in ratios])
    total, dense_total = start + whole * each, dense_start + whole * dense_each
    return [f"{each:.2f}", f"{dense_each / each:.2f}x", f"{total:.0f}", f"{dense_total / total:.2f}x"]


def _place(row: tuple[str, float]) -> tuple[float, int]:
    """Order of rows: by zeros, then as forms are listed."""
    form, sparsity = row
    return sparsity, list(FORMS).index(form)


def _duels(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those against something else, both in one run."""
    if not cells:
        return []
    lines = [
        "## Head to head",
        "",
        f"{PAPER_SPARSITY:.0%} zeros against each other form, {blocks_text(cells[0]['blocks'])}, both in one run.",
        "",
        "| form | against | decode | prefill |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {FORMS[cell['form']].title} | {_opponent(cell)} | "
        f"{ratio_text(cell['decode'])} | {ratio_text(cell['prefill'])} |"
        for cell in cells
    ]
    return [*lines, ""]


def _opponent(cell: Mapping[str, Any]) -> str:
    form = FORMS[cell["against"]]
    if not form.pays_for_zeros:
        return form.title
    sparsity = cell["against_sparsity"]
    return f"{form.title}, {sparsity:.0%} zeros" if sparsity else f"{form.title}, dense"


def _against_the_paper(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The claim beside each form's own ratio, at the deepest model: of its own dense model where that was run."""
    deepest = max(cell["blocks"] for cell in cells)
    rows = [cell for cell in cells if (cell["sparsity"], cell["blocks"]) == (PAPER_SPARSITY, deepest)]
    lines = []
    for cell in rows:
        one = cell["decode"]
        if cell["against"] not in (DENSE, cell["form"]):
            continue
        base = "dense float32 in ONNX Runtime" if cell["against"] == DENSE else "its own dense model"
        holds = (
            "reaches" if one["low"] >= PAPER_RATIO else "falls short of" if one["high"] < PAPER_RATIO else "may reach"
        )
        lines.append(f"- {FORMS[cell['form']].title}: {ratio_text(one)} of {base}, which {holds} {PAPER_RATIO:.2f}x.")
    if not lines:
        return []
    return [f"## Beside the paper: decode, {PAPER_SPARSITY:.0%} zeros, {blocks_text(deepest)}", "", *lines, ""]
