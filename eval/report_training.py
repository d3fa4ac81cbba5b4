"""The section of a report that a training run makes: its rounds, and what each block came to."""

from __future__ import annotations

from losa_export.eval.figures import rounds_figure
from losa_export.eval.report_commands import train_command
from losa_export.eval.report_parts import Section, Table
from losa_export.eval.report_sources import RunSource

_MIB = 2**20


def run_sections(run: RunSource, number: int) -> tuple[Section, Section]:
    """Rounds with their figure, and the blocks after the last one; `number` tells runs of one name apart."""
    name = run.folder.resolve().name
    return (
        Section(
            f"Training: {name}",
            figure=rounds_figure(run.rounds, salt=f"{number} {name}"),
            reruns=(train_command(run),),
            table=_rounds_table(run),
        ),
        Section(f"Blocks after the last round: {name}", table=_blocks_table(run), folded="Show them"),
    )


def _rounds_table(run: RunSource) -> Table:
    rows = []
    for record in run.rounds:
        first, last = record.loss_first, record.loss_last
        rows.append(
            (
                str(record.round_number),
                f"{record.target_sparsity:.1%}",
                f"{record.sparsity_fraction:.2%}",
                f"{record.tokens:,}",
                "–" if first is None else f"{first:.3f}",
                "–" if last is None else f"{last:.3f}",
                f"{record.prune_seconds:.0f}",
                f"{record.tune_seconds:.0f}",
                f"{record.peak_memory_bytes / _MIB:.0f}",
            )
        )
    headings = (
        *("round", "zeros asked", "zeros", "tokens", "loss, first", "last"),
        *("pruning, s", "tuning, s", "MiB, peak"),
    )
    return Table(headings, tuple(rows), frozenset(range(len(headings))))


def _blocks_table(run: RunSource) -> Table:
    """Sparsity, rank and errors of each block in the last round, as far as they were measured."""
    last = run.rounds[-1]
    columns = [("block", [str(block) for block in range(len(last.block_targets))])]
    columns.append(("sparsity", [f"{value:.2%}" for value in last.block_targets]))
    columns.append(("rank", [str(value) for value in last.block_ranks]))
    columns.append(("reconstruction error", [f"{value:.4g}" for value in last.block_errors]))
    columns.append(("error before fitting", [f"{before:.4g}" for before, _ in last.block_fits]))
    columns.append(("after", [f"{after:.4g}" for _, after in last.block_fits]))
    known = [(heading, cells) for heading, cells in columns if cells]
    rows = tuple(zip(*(cells for _, cells in known), strict=True))
    return Table(tuple(heading for heading, _ in known), rows, frozenset(range(len(known))))
