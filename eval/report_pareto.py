"""The section of a report that sets quality beside latency: the models that no other one beats in both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from losa_export.eval.figure_marks import Mark, Panel, marks_figure
from losa_export.eval.report_bench import WHISKERS
from losa_export.eval.report_commands import bench_commands, eval_commands
from losa_export.eval.report_parts import Section, Table
from losa_export.eval.report_quality import Comparison, Point, compare, has_hashes, qualities
from losa_export.eval.report_sources import Source
from losa_export.eval.report_timings import Timed, setting_of

_TITLE = "Quality against latency"


def pareto_sections(timed: Sequence[Timed], benches: Sequence[Source], evals: Sequence[Source]) -> Iterator[Section]:
    """A section for each setting and text in which two or more models have both a time and a quality."""
    found = [quality for source in evals for quality in qualities(source.document)]
    comparisons = compare(timed, found)
    for number, comparison in enumerate(comparisons, start=1):
        used = {point.quality for point in comparison.points}
        yield Section(
            f"{_TITLE}: {comparison.text.name}, {comparison.setting.work}",
            _text(comparison),
            _figure(comparison, salt=f"pareto {number}"),
            (
                *bench_commands([one for one in benches if setting_of(one.document) == comparison.setting]),
                *eval_commands([one for one in evals if used & set(qualities(one.document))]),
            ),
            _table(comparison),
            lines=tuple(_remarks(comparison, [one for one in timed if one.setting == comparison.setting])),
        )
    unknown = [source.file.name for source in evals if not has_hashes(source.document)]
    if evals and timed and (unknown or not comparisons):
        lines = [
            f"{name} does not tell the SHA-256 of what it evaluated, as earlier versions did not; run losa eval again."
            for name in unknown
        ]
        if not comparisons:
            lines.append(
                "No two models here were both timed under one setting and evaluated on one text. Records are joined by "
                "the SHA-256 of the weights, never by a folder's name."
            )
        yield Section(f"{_TITLE}: what could not be joined", lines=tuple(lines))


def _text(comparison: Comparison) -> str:
    text, best = comparison.text, [point.timed.model.name for point in comparison.points if point.on_front]
    kl = (
        f" KL is the mean divergence of a model's next tokens from those of {comparison.reference_name}, nats a token."
        if comparison.reference_name
        else ""
    )
    return (
        f"Perplexity of the first {comparison.windows} windows of {text.window} tokens of {text.name} "
        f"({text.protocol}), beside the median time of a token when decoding, {comparison.setting}.{kl} Times are of "
        f"separate runs; what was taken in turns are the ratios under 'Speed'. {WHISKERS} Evaluations and benchmarks "
        f"are joined by the SHA-256 of the weights. No other model here is both faster and of lower perplexity than: "
        f"{', '.join(best)}."
    )


def _figure(comparison: Comparison, salt: str) -> str | None:
    """Perplexity, and KL below it where it is known; None if nothing can be drawn."""
    points = comparison.points
    finite = [point for point in points if math.isfinite(point.perplexity)]
    apart = [point for point in points if point.kl is not None and not point.is_reference]
    panels = []
    if finite:
        panels.append(_panel("perplexity", [(point, point.perplexity, point.on_front) for point in finite]))
    if apart:
        lines = {f"{point.timed.model.name}: KL 0": point.timed.decode.middle for point in points if point.is_reference}
        marks = [(point, point.kl, point.on_kl_front) for point in apart if point.kl is not None]
        panels.append(_panel("KL, nats a token", marks, lines))
    if not panels:
        return None
    return marks_figure(
        panels,
        "ms a token when decoding",
        salt=salt,
        ringed="baseline of the benchmarks",
        hollow="another is faster and better",
    )


def _panel(label: str, marks: Sequence[tuple[Point, float, bool]], lines: dict[str, float] | None = None) -> Panel:
    best = [(point.timed.decode.middle, height) for point, height, on_front in marks if on_front]
    return Panel(label, tuple(_mark(*mark) for mark in marks), tuple(best), lines or {})


def _mark(point: Point, height: float, on_front: bool) -> Mark:
    return timed_mark(point.timed, point.timed.decode.middle, height, filled=on_front, whisker=True)


def timed_mark(timed: Timed, x: float, y: float, *, filled: bool, whisker: bool) -> Mark:
    """The mark of a timed model."""
    decode = timed.decode
    return Mark(
        number=timed.model.number,
        x=x,
        y=y,
        # A deviation may be as large as the median, which has no place on a logarithmic axis.
        x_low=max(decode.low, decode.middle / 10) if whisker else x,
        x_high=decode.high if whisker else x,
        bits=timed.model.bits,
        sparse=timed.model.weights == "sparse",
        filled=filled,
        ringed=timed.is_baseline,
    )


def _table(comparison: Comparison) -> Table:
    rows = []
    for point in comparison.points:
        model = point.timed.model
        rows.append(
            (
                str(model.number),
                model.name,
                " ".join(filter(None, (model.weights, model.values))),
                point.timed.decode.text,
                f"{point.perplexity:.2f}" if math.isfinite(point.perplexity) else "∞",
                "–" if point.kl is None else f"{point.kl:.2g}" if not point.is_reference else "0",
                "yes" if point.on_front else "",
                point.quality.runtime,
            )
        )
    headings = ("", "model (engine)", "weights", "ms a token", "perplexity", "KL", "none beats it", "evaluated in")
    table = Table(headings, tuple(rows), frozenset({0, 3, 4, 5}))
    return table if comparison.reference_name else table.without_constant(5)[0]


def _remarks(comparison: Comparison, here: Sequence[Timed]) -> Iterator[str]:
    for point in comparison.points:
        if not point.same_files:
            yield (
                f"{point.timed.model.name}: evaluated was the checkpoint of the same weights that lies beside its "
                f"files; before it was timed, the engine's own answers were within KL {point.timed.checked_kl:.1e} of "
                "that one's."
            )
    known = {point.timed.model for point in comparison.points}
    left_out = [one.model.name for one in here if one.model not in known]
    if left_out:
        yield f"Timed, but not evaluated on this text: {', '.join(left_out)}."
