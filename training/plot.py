"""rounds.png: how sparsity, rank and error of each block went over the rounds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from losa_export.errors import InputError, MissingDependencyError
from losa_export.files import write_bytes_atomic
from losa_export.training.journal import JOURNAL_FILE, RoundRecord, read_journal

PLOT_FILE = "rounds.png"


def check_plotting() -> None:
    """Find out before a long run whether its plot can be drawn. Raises: MissingDependencyError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError.for_extra("matplotlib", "plot", "drawing the rounds of a run") from error


def plot_rounds(run: Path) -> Path:
    """Draw the finished rounds of a run into its rounds.png, one line a round. Returns: the file.

    Raises: InputError if no round is finished; MissingDependencyError without matplotlib.
    """
    records = read_journal(run)
    if not records:
        raise InputError(
            f"'{run}' has no finished round in {JOURNAL_FILE} to draw; run or resume 'losa train' first", path=run
        )
    check_plotting()
    path = run / PLOT_FILE
    write_bytes_atomic(path, _drawn(records))
    return path


def _drawn(records: Sequence[RoundRecord]) -> bytes:
    """The picture, as PNG. Drawn without pyplot, so that nothing global changes and no display is needed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels: list[tuple[str, list[tuple[float, ...]]]] = [
        ("sparsity", [record.block_targets for record in records]),
        ("rank", [record.block_ranks for record in records]),
        ("reconstruction error", [record.block_errors for record in records]),
    ]
    drawn = [(title, rounds) for title, rounds in panels if any(rounds)]
    figure = Figure(figsize=(4.5 * len(drawn), 3.6), layout="constrained")
    colours = colormaps["viridis"]
    for axes, (title, rounds) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for record, values in zip(records, rounds, strict=True):
            if values:
                # Not up to the map's pale end, which hardly shows on white.
                colour = colours(0.9 * record.round_number / len(records))
                axes.plot(range(len(values)), values, marker="o", markersize=3, color=colour)
                axes.lines[-1].set_label(f"round {record.round_number}")
        axes.set_title(title)
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0.0)
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
