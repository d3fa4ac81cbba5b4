"""Figures of a report: ratios, times against sparsity, rounds of training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from losa_export.eval.figure_canvas import BLUE, COLOURS, GREY, ORANGE, add_legend, as_svg, new_figure, shown

if TYPE_CHECKING:
    from losa_export.training.journal import RoundRecord

# Rounds that are named beside their lines, of a run of many.
_MOST_NAMED = 8


def ratio_figure(labels: Sequence[str], ratios: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """How many times as fast each candidate is, with whiskers; a line stands at 1.

    Args:
        labels: one for each candidate.
        ratios: 'decode' and 'prefill' → for each candidate `ratio`, `low` and `high`.
    """
    figure, axes = new_figure(1.0 + 0.45 * len(labels))
    for place, (metric, colour) in enumerate((("decode", BLUE), ("prefill", ORANGE))):
        rows = ratios[metric]
        heights = [row - 0.16 + 0.32 * place for row in range(len(rows))]
        middles = [one["ratio"] for one in rows]
        whiskers = [[one["ratio"] - one["low"] for one in rows], [one["high"] - one["ratio"] for one in rows]]
        axes.errorbar(middles, heights, xerr=whiskers, fmt="o", color=colour, capsize=3, markersize=5, label=metric)
    axes.axvline(1.0, color=GREY, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(labels)), [shown(label, 30) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("times as fast as the baseline (95 % interval); above 1 is faster")
    add_legend(figure, axes)
    return as_svg(figure, "ratios")


def sparsity_figure(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]],
    levels: Mapping[str, Mapping[str, float]],
    *,
    salt: str,
) -> str:
    """Times against sparsity, a panel for each kind of time.

    Args:
        panels: kind of time → a line's name → (zeros in percent, milliseconds, low, high) by rising zeros.
        levels: kind of time → name → milliseconds of what has no place on the x axis: a horizontal line.
        salt: tells the picture from others on the page.
    """
    figure, grid = new_figure(2.6 * len(panels) + 0.8, rows=len(panels))
    for axes, (kind, lines) in zip(grid, panels.items(), strict=True):
        for (name, points), colour in zip(lines.items(), itertools.cycle(COLOURS), strict=False):
            zeros, middles, lows, highs = zip(*points, strict=True)
            whiskers = [
                [middle - low for middle, low in zip(middles, lows, strict=True)],
                [high - middle for middle, high in zip(middles, highs, strict=True)],
            ]
            axes.errorbar(zeros, middles, yerr=whiskers, marker="o", color=colour, capsize=3, label=shown(name, 60))
        for (name, level), style in zip(levels[kind].items(), itertools.cycle(("--", ":", "-.")), strict=False):
            axes.axhline(level, color=GREY, linewidth=1.2, linestyle=style, label=shown(name, 60))
        axes.set_ylabel(kind)
        axes.set_ylim(bottom=0.0)
    grid[-1].set_xlabel("zeros in the linears, %")
    add_legend(figure, grid[0], columns=1)
    return as_svg(figure, f"sparsity {salt}")


def rounds_figure(rounds: Sequence[RoundRecord], *, salt: str) -> str:
    """Sparsity, rank and reconstruction error of each block, a line for each round; `salt` as above."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    panels: list[tuple[str, list[tuple[float, ...]]]] = [
        ("sparsity", [record.block_targets for record in rounds]),
        ("rank", [record.block_ranks for record in rounds]),
        ("reconstruction error", [record.block_errors for record in rounds]),
        ("error after fitting", [tuple(after for _, after in record.block_fits) for record in rounds]),
    ]
    drawn = [(title, lines) for title, lines in panels if any(lines)]
    figure, grid = new_figure(2.3 * len(drawn) + 0.6, rows=len(drawn))
    colours = colormaps["viridis"]
    step = max(1, math.ceil((len(rounds) - 1) / (_MOST_NAMED - 1)))
    for panel, (title, lines) in zip(grid, drawn, strict=True):
        for place, (record, values) in enumerate(zip(rounds, lines, strict=True)):
            if values:
                # Neither the dark nor the pale end of the map, which vanish on a page of that colour.
                colour = colours(0.25 + 0.55 * record.round_number / len(rounds))
                panel.plot(range(len(values)), values, marker="o", markersize=3, color=colour)
                if place % step == 0 or place == len(rounds) - 1:
                    panel.lines[-1].set_label(f"round {record.round_number}")
        panel.set_ylabel(title)
        panel.set_ylim(bottom=0.0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1].set_xlabel("block")
    add_legend(figure, grid[0], columns=4)
    return as_svg(figure, f"rounds {salt}")
