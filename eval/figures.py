"""Figures of a report, as SVG that takes its text colour from the page, so that it is readable on light and on dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from losa_export.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from losa_export.training.journal import RoundRecord

# Stands for the page's text colour until the picture is written.
_INK = "#010203"
# Of middling lightness: they stand out from white and from black.
BLUE, ORANGE, GREY = "#3987cc", "#d9822b", "#8a8f98"
_COLOURS = (BLUE, ORANGE, "#4a9a5b", "#a85cc4", GREY)
_WIDTH = 7.0


def check_drawing() -> None:
    """Find out whether figures can be drawn. Raises: MissingDependencyError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingDependencyError.for_extra("matplotlib", "plot", "drawing the figures of a report") from None


def ratio_figure(labels: Sequence[str], ratios: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """How many times as fast each candidate is, with whiskers; a line stands at 1.

    Args:
        labels: one for each candidate.
        ratios: 'decode' and 'prefill' → for each candidate `ratio`, `low` and `high`.
    """
    figure, axes = _figure(0.9 + 0.62 * len(labels))
    for place, (metric, colour) in enumerate((("decode", BLUE), ("prefill", ORANGE))):
        rows = ratios[metric]
        heights = [row - 0.16 + 0.32 * place for row in range(len(rows))]
        middles = [one["ratio"] for one in rows]
        whiskers = [[one["ratio"] - one["low"] for one in rows], [one["high"] - one["ratio"] for one in rows]]
        axes.errorbar(middles, heights, xerr=whiskers, fmt="o", color=colour, capsize=3, markersize=5, label=metric)
    axes.axvline(1.0, color=GREY, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("times as fast as the baseline (95 % interval); above 1 is faster")
    axes.legend(frameon=False, labelcolor=_INK, loc="best")
    return _svg(figure, "ratios")


def sparsity_figure(points: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """Decode time against sparsity.

    Args:
        points: a line's name → (zeros in percent, median milliseconds, median deviation), by rising zeros.
    """
    figure, axes = _figure(3.4)
    for (name, line), colour in zip(points.items(), itertools.cycle(_COLOURS), strict=False):
        zeros, middles, spreads = ([point[place] for point in line] for place in range(3))
        axes.errorbar(zeros, middles, yerr=spreads, marker="o", color=colour, capsize=3, label=name)
    axes.set_xlabel("zeros, %")
    axes.set_ylabel("ms a token (± median deviation)")
    axes.set_ylim(bottom=0.0)
    axes.legend(frameon=False, labelcolor=_INK)
    return _svg(figure, "sparsity")


def rounds_figure(rounds: Sequence[RoundRecord], name: str) -> str:
    """Sparsity, rank and reconstruction error of each block, a line for each round."""
    from matplotlib import colormaps

    panels: list[tuple[str, list[tuple[float, ...]]]] = [
        ("sparsity", [record.block_targets for record in rounds]),
        ("rank", [record.block_ranks for record in rounds]),
        ("reconstruction error", [record.block_errors for record in rounds]),
        ("error after fitting", [tuple(after for _, after in record.block_fits) for record in rounds]),
    ]
    drawn = [(title, lines) for title, lines in panels if any(lines)]
    figure, axes = _figure(2.3 * len(drawn), rows=len(drawn))
    colours = colormaps["viridis"]
    for panel, (title, lines) in zip(axes, drawn, strict=True):
        for record, values in zip(rounds, lines, strict=True):
            if values:
                # Neither the dark nor the pale end of the map, which vanish on a page of that colour.
                colour = colours(0.25 + 0.55 * record.round_number / len(rounds))
                panel.plot(range(len(values)), values, marker="o", markersize=3, color=colour)
                panel.lines[-1].set_label(f"round {record.round_number}")
        panel.set_ylabel(title)
        panel.set_ylim(bottom=0.0)
    axes[-1].set_xlabel("block")
    axes[0].legend(frameon=False, labelcolor=_INK, ncols=min(5, len(rounds)), fontsize="small")
    return _svg(figure, f"rounds {name}")


def _figure(height: float, rows: int = 1) -> tuple[Figure, Any]:
    """A figure without pyplot, so that nothing global changes, and its axes: one, or one for each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    grid = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for axes in grid:
        axes.set_facecolor("none")
        axes.tick_params(colors=_INK)
        for part in (axes.xaxis.label, axes.yaxis.label, axes.title):
            part.set_color(_INK)
        for name, spine in axes.spines.items():
            spine.set_color(GREY)
            spine.set_visible(name in ("left", "bottom"))
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    return figure, grid if rows > 1 else grid[0]


def _svg(figure: Figure, salt: str) -> str:
    """The picture, to stand inside a page: its size is the page's business, and its names are its own."""
    import matplotlib

    text = io.StringIO()
    # Text stays text, to be searched and read aloud. The salt keeps the names of two pictures on a page apart.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    # What nothing refers to, such as "axes_1", is in every picture of a page.
    used = set(re.findall(r"#([\w.]+)", drawn))
    drawn = re.sub(r' ?\bid="([^"]*)"', lambda match: match[0] if match[1] in used else "", drawn)
    head, _, rest = drawn.partition(">")
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + rest
