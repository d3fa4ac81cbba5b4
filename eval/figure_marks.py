"""Figures of numbered points: quality against latency, and the memory roofline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from losa_export.eval.figure_canvas import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, as_svg, new_figure, settle, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BITS = {32: GREEN, 16: PURPLE, 8: BLUE, 4: ORANGE}


@dataclass(frozen=True)
class Mark:
    """A numbered point.

    Attributes:
        number: beside it.
        x, y: where, both above 0.
        x_low, x_high: ends of its whisker.
        bits: of the model's values: its colour; None for other ones.
        sparse: a square; else a circle.
        filled: hollow if not.
        ringed: with a ring around, to be told from all others.
    """

    number: int
    x: float
    y: float
    x_low: float
    x_high: float
    bits: int | None
    sparse: bool
    filled: bool
    ringed: bool


@dataclass(frozen=True)
class Panel:
    """Marks above a shared x axis.

    Attributes:
        label: of the y axis.
        marks: at least one.
        front: (x, y) corners of a line of steps through the best marks.
        lines: name → x of a vertical line.
    """

    label: str
    marks: tuple[Mark, ...]
    front: tuple[tuple[float, float], ...] = ()
    lines: Mapping[str, float] | None = None


def marks_figure(panels: Sequence[Panel], x_label: str, *, salt: str, ringed: str, hollow: str = "") -> str:
    """Numbered points on logarithmic axes: what is fast stands left, what is good stands low.

    Args:
        panels: at least one, below each other.
        x_label: of the axis they share.
        salt: tells the picture from others on the page.
        ringed: what a ring means.
        hollow: what a hollow mark means; '' if there is none.
    """
    figure, grid = new_figure(3.3 * len(panels) + 0.7, rows=len(panels))
    all_marks = [mark for panel in panels for mark in panel.marks]
    for axes, panel in zip(grid, panels, strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = min(mark.x_low for mark in all_marks), max(mark.x_high for mark in all_marks)
        others = [x for one in panels for x in (one.lines or {}).values()]
        _log_axis(axes.xaxis, min([low, *others]), max([high, *others]))
        _log_axis(axes.yaxis, min(mark.y for mark in panel.marks), max(mark.y for mark in panel.marks))
        if panel.front:
            axes.step(
                *zip(*panel.front, strict=True), where="post", color=GREY, linewidth=1.2, linestyle="--", zorder=1
            )
        for mark in panel.marks:
            _draw_mark(axes, mark)
        for (name, x), style in zip((panel.lines or {}).items(), itertools.cycle((":", "-.")), strict=False):
            axes.axvline(x, color=GREY, linewidth=1.4, linestyle=style, label=shown(name, 60))
        axes.set_ylabel(panel.label)
    grid[-1].set_xlabel(x_label)
    _explain_marks(figure, grid, all_marks, ringed, hollow)
    for axes, panel in zip(grid, panels, strict=True):
        _number(figure, axes, panel.marks)
    return as_svg(figure, salt)


def roofline_figure(marks: Sequence[Mark], bytes_per_ms: float, label: str, *, salt: str) -> str:
    """Time of a token against the size of the model, and the time that reading it once takes.

    Args:
        marks: x in MiB, y in milliseconds.
        bytes_per_ms: memory bandwidth.
        label: of the line that it makes.
        salt: tells the picture from others on the page.
    """
    figure, axes = new_figure(3.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes, limits = [mark.x for mark in marks], [mark.x * 2**20 / bytes_per_ms for mark in marks]
    left, right = _log_axis(axes.xaxis, min(sizes), max(sizes))
    _log_axis(axes.yaxis, min([*limits, *(mark.y for mark in marks)]), max([*limits, *(mark.y for mark in marks)]))
    edge = [left * 2**20 / bytes_per_ms, right * 2**20 / bytes_per_ms]
    axes.plot([left, right], edge, color=GREY, linewidth=1.4, label=label)
    for mark in marks:
        _draw_mark(axes, mark)
    axes.set_xlabel("files of graph and weights, MiB")
    axes.set_ylabel("ms a token")
    _explain_marks(figure, [axes], marks, "baseline", "")
    _number(figure, axes, marks)
    return as_svg(figure, f"roofline {salt}")


def _draw_mark(axes: Any, mark: Mark) -> None:
    colour = _BITS.get(mark.bits or 0, GREY)
    if mark.x_high > mark.x_low:
        axes.plot([mark.x_low, mark.x_high], [mark.y, mark.y], color=colour, linewidth=1.4, zorder=2)
    if mark.ringed:
        axes.plot([mark.x], [mark.y], "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, zorder=2)
    axes.plot(
        [mark.x],
        [mark.y],
        "s" if mark.sparse else "o",
        color=colour,
        markersize=7,
        markerfacecolor=colour if mark.filled else "none",
        markeredgewidth=1.6,
        zorder=3,
    )


def _explain_marks(figure: Figure, grid: Sequence[Any], marks: Sequence[Mark], ringed: str, hollow: str) -> None:
    """A legend of what colour, shape, filling and ring mean, as far as they occur."""
    from matplotlib.lines import Line2D

    def sample(label: str, colour: str = GREY, shape: str = "o", size: int = 7, fill: bool = True) -> Line2D:
        face = colour if fill else "none"
        return Line2D(
            [], [], linestyle="none", marker=shape, color=colour, markerfacecolor=face, markersize=size, label=label
        )

    widths = {mark.bits if mark.bits in _BITS else None for mark in marks}
    handles = [sample(f"{bits} bits", colour) for bits, colour in _BITS.items() if bits in widths]
    handles += [sample("other values")] if None in widths else []
    if any(mark.sparse for mark in marks):
        handles.append(sample("zeros not stored", INK, "s", fill=False))
    if hollow and not all(mark.filled for mark in marks):
        handles.append(sample(hollow, INK, fill=False))
    if any(mark.ringed for mark in marks):
        handles.append(sample(ringed, INK, size=12, fill=False))
    named = [handle for axes in grid for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(
        handles=[*handles, *named],
        loc="outside lower center",
        frameon=False,
        labelcolor=INK,
        ncols=3,
        fontsize="small",
    )


def _number(figure: Figure, axes: Any, marks: Sequence[Mark]) -> None:
    """Write each mark's number beside it, inside the axes, where it covers neither another number nor a mark."""
    # Only now is it settled how large the axes are.
    settle(figure)
    scale = 72.0 / figure.dpi
    middles = [tuple(scale * value for value in axes.transData.transform((mark.x, mark.y))) for mark in marks]
    left, bottom, right, top = (scale * edge for edge in axes.get_window_extent().extents)
    taken = [(x - 6.0, y - 6.0, x + 6.0, y + 6.0) for x, y in middles]
    for mark, (x, y) in zip(marks, middles, strict=True):
        half = 3.2 * len(str(mark.number))
        places = [
            (math.cos(math.radians(angle)) * (reach + half), math.sin(math.radians(angle)) * (reach + 2.0))
            for reach in (9.0, 16.0, 24.0, 34.0)
            for angle in (45, 135, -45, -135, 0, 180, 90, -90)
        ]
        boxes = [(x + across - half, y + up - 5.0, x + across + half, y + up + 5.0) for across, up in places]
        inside = [
            number
            for number, box in enumerate(boxes)
            if box[0] >= left and box[1] >= bottom and box[2] <= right and box[3] <= top
        ]
        free = (number for number in inside if not any(_overlap(boxes[number], other) for other in taken))
        choice = next(free, 0)
        taken.append(boxes[choice])
        far = choice >= 8
        axes.annotate(
            str(mark.number),
            (mark.x, mark.y),
            places[choice],
            textcoords="offset points",
            ha="center",
            va="center",
            color=INK,
            fontsize="small",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkB": 4.0} if far else None,
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _log_axis(axis: Any, low: float, high: float) -> tuple[float, float]:
    """Limits with some room, and ticks at round numbers that are written out. Returns: the limits."""
    from matplotlib.ticker import NullLocator

    room = max((high / low) ** 0.08, 1.05)
    ends = low / room, high * room
    ticks = log_ticks(*ends)
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(*ends)
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(ticks, [f"{tick:.10g}" for tick in ticks])
    return ends


def log_ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers between two positive ones; fewer only where nothing round lies between."""
    from matplotlib.ticker import MaxNLocator

    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = range(first, last + 1)
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)):
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return [float(f"{tick:.10g}") for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
