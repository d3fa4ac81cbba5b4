from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from losa_export.errors import BenchmarkError
from losa_export.eval.stats import (
    Verdict,
    agree_within,
    mean_interval,
    median,
    median_absolute_deviation,
    paired_ratio,
    percentiles,
    student_t_quantile,
    verdict,
)

times = st.floats(1e-3, 1e3)
blocks_of_two = st.integers(6, 11).flatmap(lambda count: arrays(np.float64, (count, 2), elements=times))


def generator():
    return np.random.default_rng(0)


def test_median_and_deviation_of_known_values():
    assert median([3.0, 1.0, 100.0]) == 3.0
    assert median_absolute_deviation([3.0, 1.0, 100.0]) == 2.0


def test_percentiles_interpolate_between_samples():
    assert percentiles(np.arange(101.0)) == {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([1.0, 2.0], (50,)) == {"p50": 1.5}


@given(st.lists(times, min_size=1, max_size=30))
def test_percentiles_never_fall_as_the_level_rises(values):
    found = list(percentiles(values).values())
    assert found == sorted(found)
    assert min(values) <= found[0]
    assert found[-1] <= max(values)


def test_medians_agree_only_when_enough_of_them_are_close():
    assert agree_within([9.0, 1.00, 1.02], 0.03)
    assert not agree_within([1.0, 1.04], 0.03)
    assert not agree_within([1.0], 0.03)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.01, 1.2, Verdict.FASTER),
        (0.8, 0.99, Verdict.SLOWER),
        (0.99, 1.2, Verdict.NO_DIFFERENCE_SHOWN),
        (1.0, 1.2, Verdict.NO_DIFFERENCE_SHOWN),
        (0.9, 1.0, Verdict.NO_DIFFERENCE_SHOWN),
    ],
)
def test_verdict_needs_the_whole_interval_on_one_side_of_one(low, high, expected):
    assert verdict(low, high) is expected


def test_a_candidate_of_half_the_time_is_twice_as_fast():
    noise = np.random.default_rng(1).normal(1, 0.01, size=(2, 10, 2))
    estimate = paired_ratio(2 * noise[0], noise[1])
    assert estimate.low < 2 < estimate.high
    assert estimate.verdict is Verdict.FASTER
    assert estimate.half_width < 0.02
    assert estimate.blocks == 10


def test_a_slow_block_slows_both_sides_and_leaves_the_ratio_alone():
    slow = np.array([1, 1, 1, 1, 1, 1, 4, 4])[:, None]
    estimate = paired_ratio(1.5 * np.ones((8, 2)) * slow, np.ones((8, 2)) * slow)
    assert estimate.low == estimate.ratio == estimate.high == 1.5


def test_smallest_ratio_that_could_be_shown_is_the_wider_side_of_the_interval():
    samples = np.random.default_rng(3).normal(1, 0.05, size=(8, 2))
    estimate = paired_ratio(samples, samples[::-1])
    assert estimate.ratio == 1
    assert estimate.verdict is Verdict.NO_DIFFERENCE_SHOWN
    assert estimate.smallest_shown == max(estimate.ratio / estimate.low, estimate.high / estimate.ratio)


@settings(max_examples=40, deadline=None)
@given(blocks_of_two, st.randoms(use_true_random=False))
def test_the_interval_holds_the_ratio_and_turns_over_with_the_sides(base, random):
    cand = np.array([[random.uniform(1, 2) for _ in range(2)] for _ in base])
    forward = paired_ratio(base, cand)
    backward = paired_ratio(cand, base)
    assert forward.low <= forward.ratio <= forward.high
    # The same draws, turned over: equal but for the interpolation between two neighbouring quantiles.
    assert backward.ratio == pytest.approx(1 / forward.ratio, rel=1e-12)
    assert backward.low <= backward.ratio <= backward.high


@settings(max_examples=40, deadline=None)
@given(blocks_of_two, st.floats(1e-3, 1e3))
def test_the_unit_of_time_does_not_matter(base, factor):
    one = paired_ratio(base, base[::-1])
    other = paired_ratio(base * factor, base[::-1] * factor)
    assert other.ratio == pytest.approx(one.ratio, rel=1e-9)  # rounding of the products
    assert other.low == pytest.approx(one.low, rel=1e-9)
    assert other.high == pytest.approx(one.high, rel=1e-9)


@pytest.mark.parametrize("drift", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("blocks", [6, 8, 13, 40, 70])
@pytest.mark.parametrize("disturbed", [0.0, 0.1])
def test_intervals_cover_the_true_ratio_as_often_as_they_claim(drift, blocks, disturbed):
    """What slows both sides, how many blocks there are, and how often a sample is disturbed: none of it matters."""
    random = np.random.default_rng(5)
    trials, covered, faster = 2000, 0, 0
    for _ in range(trials):
        slow = random.normal(0, drift, size=(blocks, 1))
        a, b = np.exp(slow + random.normal(0, 0.03, (2, blocks, 2)) + 0.1 * (random.random((2, blocks, 2)) < disturbed))
        covered += (estimate := paired_ratio(1.2 * a, b)).low <= 1.2 <= estimate.high
        faster += estimate.low > 1.2
    # Proportions over 2,000 trials have standard errors of 0.5 and 0.35 %; six blocks have an interval of 97 %, and the
    # next is one of 94 %.
    assert 0.93 <= covered / trials <= 0.975
    assert faster / trials <= 0.025 + 3 * 0.0035


@pytest.mark.parametrize(
    ("freedom", "table"), [(1, 12.7062), (2, 4.3027), (3, 3.18245), (5, 2.57058), (10, 2.22814), (29, 2.04523)]
)
def test_student_quantiles_equal_the_tables(freedom, table):
    assert student_t_quantile(0.975, freedom) == pytest.approx(table, rel=3e-3)  # the expansion's stated error


def test_the_interval_of_a_mean_is_students():
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    assert mean_interval([4.0]) == (4.0, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: median([]), r"no samples to summarise"),
        (lambda: percentiles([1.0, np.nan]), r"NaN or infinite"),
        (lambda: paired_ratio(np.ones((3, 2)), np.ones((3, 2))), r"3 blocks are too few"),
        (lambda: paired_ratio(np.ones((7, 2)), np.ones((6, 2))), r"has 7 blocks and the candidate 6"),
        (lambda: paired_ratio(np.ones(5), np.ones((5, 1))), r"baseline have shape \(5,\)"),
        (lambda: paired_ratio(np.ones((5, 1)), np.zeros((5, 1))), r"time of the candidate is not"),
    ],
)
def test_samples_that_mean_nothing_are_refused(call, message):
    with pytest.raises(BenchmarkError, match=message):
        call()
