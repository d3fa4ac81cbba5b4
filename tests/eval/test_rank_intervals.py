from __future__ import annotations

import numpy as np
import pytest

from losa_export.eval import rank_intervals
from losa_export.eval.rank_intervals import rank_sum_interval, signed_rank_interval


def cut_of(interval, statistics):
    """Place of the lower end among the sorted statistics that it is one of."""
    return int(np.searchsorted(np.sort(statistics), interval[1]))


@pytest.mark.parametrize(
    ("count", "critical"), [(6, 0), (7, 2), (8, 3), (10, 8), (15, 25), (20, 52), (25, 89), (50, 434)]
)
def test_signed_ranks_are_cut_where_the_tables_say(count, critical):
    """Largest T with P ≤ 0.025, as printed in tables of Wilcoxon's test."""
    values = np.random.default_rng(count).normal(size=count)
    pairs = [(a + b) / 2 for i, a in enumerate(values) for b in values[i:]]
    assert cut_of(signed_rank_interval(values), pairs) == critical


@pytest.mark.parametrize(
    ("first", "second", "critical"), [(4, 4, 0), (5, 5, 2), (6, 8, 8), (8, 8, 13), (10, 10, 23), (20, 20, 127)]
)
def test_rank_sums_are_cut_where_the_tables_say(first, second, critical):
    """Largest U with P ≤ 0.025, as printed in tables of Mann and Whitney's test."""
    random = np.random.default_rng(first)
    before, after = random.normal(size=first), random.normal(size=second)
    assert cut_of(rank_sum_interval(before, after), [b - a for a in before for b in after]) == critical


@pytest.mark.parametrize("count", [30, 60])
def test_the_normal_law_takes_over_where_it_is_as_good(monkeypatch, count):
    values = np.random.default_rng(1).normal(size=count)
    before, after = values[: count // 2] + 1.0, values[: count // 2]
    counted = signed_rank_interval(values), rank_sum_interval(before, after)
    monkeypatch.setattr(rank_intervals, "_COUNTED", 0)
    approximate = signed_rank_interval(values), rank_sum_interval(before, after)
    for exact, normal in zip(counted, approximate, strict=True):
        # One place among some hundred sorted means or differences.
        assert normal == pytest.approx(exact, abs=0.05)


def test_too_few_values_have_no_interval():
    assert signed_rank_interval(np.arange(5.0)) is None
    assert rank_sum_interval(np.arange(3.0), np.arange(3.0)) is None


def test_a_wild_value_moves_the_centre_by_one_rank_at_most():
    values = np.linspace(-1.0, 1.0, 9)
    calm = signed_rank_interval(values)
    values[-1] = 1e6
    wild = signed_rank_interval(values)
    assert abs(wild[0] - calm[0]) <= 0.25
    assert abs(wild[1] - calm[1]) <= 0.25


def test_the_centre_of_symmetric_values_is_their_middle():
    assert signed_rank_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])) == (3.5, 1.0, 6.0)
