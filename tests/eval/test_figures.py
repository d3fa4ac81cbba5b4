from __future__ import annotations

from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="needs the 'plot' extra")

from losa_export.eval.figure_marks import Mark, Panel, log_ticks, marks_figure, roofline_figure
from losa_export.eval.figures import ratio_figure, rounds_figure, sparsity_figure
from tests.eval.report_records import a_round

HOSTILE = "a$x_{$b \x07 </text> 字 \udc80"


def words(picture: str) -> list[str]:
    """Every text of a picture."""
    return ["".join(one.itertext()) for one in ElementTree.fromstring(picture).iter() if one.tag.endswith("text")]


def mark(number: int, x: float, y: float) -> Mark:
    return Mark(
        number, x, y, 0.9 * x, 1.1 * x, (4, 8, 16, 32, None)[number % 5], number % 2 == 0, number % 3 > 0, number == 1
    )


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (22.0, 90_000.0, [100.0, 1000.0, 10_000.0]),
        (2.4, 41.0, [3.0, 10.0, 30.0]),
        (60.0, 700.0, [100.0, 200.0, 500.0]),
        (1.0, 2.5, [1.0, 1.5, 2.0]),
        (20.0, 21.0, [20.0, 20.25, 20.5, 20.75, 21.0]),
        (1e-6, 1e3, [1e-6, 1e-4, 1e-2, 1.0, 100.0]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_few_and_round(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == expected


def test_figures_with_one_line_or_many_are_drawn() -> None:
    lines = {f"line {number}": [(0.0, 1.0, 0.9, 1.1), (50.0, 0.5, 0.4, 0.6)] for number in range(7)}
    drawn = words(sparsity_figure({"ms": lines}, {"ms": {"baseline": 3.0}}, salt="a"))
    assert {"line 6", "baseline", "ms", "zeros in the linears, %"} <= set(drawn)
    assert {"round 1", "rank", "block"} <= set(words(rounds_figure([a_round(1)], salt="b")))


def test_of_many_rounds_some_are_named_with_the_first_and_the_last() -> None:
    named = [word for word in words(rounds_figure([a_round(n) for n in range(1, 31)], salt="c")) if "round" in word]
    assert named[0] == "round 1"
    assert named[-1] == "round 30"
    assert len(named) <= 8


def test_names_are_set_as_they_are_but_short() -> None:
    long = "x" * 200
    estimates = [{"ratio": 1.0, "low": 0.9, "high": 1.1}] * 2
    drawn = words(ratio_figure([HOSTILE, f"{long}\n8 + 4 tokens"], {"decode": estimates, "prefill": estimates}))
    assert "a$x_{$b ? </text> 字 ?" in drawn
    assert "8 + 4 tokens" in drawn
    assert max(map(len, drawn)) < 70


def test_each_mark_has_its_number_and_the_legend_says_what_marks_mean() -> None:
    marks = tuple(mark(number, 2.0 + number % 4, 30.0 * number) for number in range(1, 21))
    panel = Panel("perplexity", marks, ((2.0, 100.0), (4.0, 50.0)), {HOSTILE: 3.0})
    drawn = words(marks_figure([panel], "ms", salt="d", ringed="a ring", hollow="beaten"))
    assert {str(number) for number in range(1, 21)} <= set(drawn)
    assert {"4 bits", "8 bits", "16 bits", "32 bits", "other values", "zeros not stored", "a ring", "beaten"} <= set(
        drawn
    )
    drawn = words(roofline_figure(marks[:1], 1e6, "files read once", salt="e"))
    assert {"1", "files read once", "files of graph and weights, MiB", "ms a token"} <= set(drawn)
    assert "beaten" not in drawn


def test_equal_marks_are_drawn() -> None:
    panel = Panel("perplexity", (mark(1, 2.0, 30.0), mark(2, 2.0, 30.0)))
    assert {"1", "2"} <= set(words(marks_figure([panel], "ms", salt="f", ringed="a ring")))
