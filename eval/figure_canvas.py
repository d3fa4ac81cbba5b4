"""What all figures of a report share: SVG that takes its text colour from the page, to be read on light and on dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from losa_export.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Stands for the page's text colour until the picture is written.
INK = "#010203"
# Of middling lightness: they stand out from white and from black.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3987cc", "#d9822b", "#4a9a5b", "#a85cc4", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
_WIDTH = 7.0


def check_drawing() -> None:
    """Find out whether figures can be drawn. Raises: MissingDependencyError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingDependencyError.for_extra("matplotlib", "plot", "drawing the figures of a report") from None


def new_figure(height: float, rows: int | None = None) -> tuple[Figure, Any]:
    """A figure without pyplot, so that nothing global changes, and its axes: one, or a list if `rows` is given."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    grid = list(figure.subplots(rows or 1, 1, squeeze=False)[:, 0])
    for axes in grid:
        axes.set_facecolor("none")
        axes.tick_params(colors=INK)
        for part in (axes.xaxis.label, axes.yaxis.label, axes.title):
            part.set_color(INK)
        for name, spine in axes.spines.items():
            spine.set_color(GREY)
            spine.set_visible(name in ("left", "bottom"))
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    return figure, grid[0] if rows is None else grid


def add_legend(figure: Figure, axes: Any, columns: int = 2) -> None:
    """Below everything, where it covers no point."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, labelcolor=INK, ncols=columns)


def shown(text: str, most: int) -> str:
    """A name on its way into a picture: short enough, each line of it, and without what would be set as a formula."""

    def line(part: str) -> str:
        part = "".join(letter if letter.isprintable() else "?" for letter in part)
        half = (most - 1) // 2
        return part if len(part) <= most else f"{part[:half]}…{part[-half:]}"

    return "\n".join(map(line, text.splitlines())).replace("$", "\\$")


def settle(figure: Figure) -> None:
    """Lay the figure out, so that what stands where is known before it is written."""
    with _any_letter():
        figure.draw_without_rendering()


@contextmanager
def _any_letter() -> Iterator[None]:
    """No complaints of letters that matplotlib's own font lacks: they are drawn by the browser's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def as_svg(figure: Figure, salt: str) -> str:
    """The picture, to stand inside a page: its size is the page's business, and its names are its own."""
    import matplotlib

    text = io.StringIO()
    # Text stays text, to be searched and read aloud. The salt keeps the names of two pictures on a page apart.
    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings), _any_letter():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    # What nothing refers to, such as "axes_1", is in every picture of a page.
    used = set(re.findall(r"#([\w.]+)", drawn))
    drawn = re.sub(r' ?\bid="([^"]*)"', lambda match: match[0] if match[1] in used else "", drawn)
    head, _, rest = drawn.partition(">")
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + rest
