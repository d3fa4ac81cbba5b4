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
    expanded_tail,
    mean_interval,
    median,
    median_absolute_deviation,
    percentiles,
    ratio_of_medians,
    student_t_quantile,
    verdict,
)

times = st.floats(1e-3, 1e3)
blocks_of_two = st.integers(4, 9).flatmap(lambda count: arrays(np.float64, (count, 2), elements=times))


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
    estimate = ratio_of_medians(2 * noise[0], noise[1], generator())
    assert estimate.low < 2 < estimate.high
    assert estimate.verdict is Verdict.FASTER
    assert estimate.half_width < 0.02
    assert estimate.blocks == 10


def test_the_same_generator_state_gives_the_same_interval():
    samples = np.random.default_rng(1).uniform(1, 2, size=(2, 6, 2))
    first = ratio_of_medians(samples[0], samples[1], generator())
    assert first == ratio_of_medians(samples[0], samples[1], generator())


def test_a_slow_block_slows_both_sides_and_leaves_the_ratio_alone():
    slow = np.array([1, 1, 1, 1, 1, 1, 4, 4])[:, None]
    estimate = ratio_of_medians(1.5 * np.ones((8, 2)) * slow, np.ones((8, 2)) * slow, generator())
    assert estimate.low == estimate.ratio == estimate.high == 1.5


def test_smallest_ratio_that_could_be_shown_is_the_wider_side_of_the_interval():
    samples = np.random.default_rng(3).normal(1, 0.05, size=(8, 2))
    estimate = ratio_of_medians(samples, samples[::-1], generator())
    assert estimate.ratio == 1
    assert estimate.verdict is Verdict.NO_DIFFERENCE_SHOWN
    assert estimate.smallest_shown == max(estimate.ratio / estimate.low, estimate.high / estimate.ratio)


@settings(max_examples=40, deadline=None)
@given(blocks_of_two, st.randoms(use_true_random=False))
def test_the_interval_holds_the_ratio_and_turns_over_with_the_sides(base, random):
    cand = np.array([[random.uniform(1, 2) for _ in range(2)] for _ in base])
    forward = ratio_of_medians(base, cand, generator(), resamples=200)
    backward = ratio_of_medians(cand, base, generator(), resamples=200)
    assert forward.low <= forward.ratio <= forward.high
    # The same draws, turned over: equal but for the interpolation between two neighbouring quantiles.
    assert backward.ratio == pytest.approx(1 / forward.ratio, rel=1e-12)
    assert backward.low <= backward.ratio <= backward.high


@settings(max_examples=40, deadline=None)
@given(blocks_of_two, st.floats(1e-3, 1e3))
def test_the_unit_of_time_does_not_matter(base, factor):
    one = ratio_of_medians(base, base[::-1], generator(), resamples=100)
    other = ratio_of_medians(base * factor, base[::-1] * factor, generator(), resamples=100)
    assert other.ratio == pytest.approx(one.ratio, rel=1e-9)  # rounding of the products
    assert other.low == pytest.approx(one.low, rel=1e-9)
    assert other.high == pytest.approx(one.high, rel=1e-9)


def test_intervals_cover_the_true_ratio_about_as_often_as_they_claim():
    random = np.random.default_rng(5)
    trials, covered = 300, 0
    for _ in range(trials):
        drift = random.normal(0, 0.02, size=(8, 1))
        # Skewed like timings: log-normal, now and then a tenth slower.
        a, b = np.exp(drift + random.normal(0, 0.03, (2, 8, 2)) + 0.1 * (random.random((2, 8, 2)) < 0.1))
        estimate = ratio_of_medians(1.2 * a, b, random, resamples=400)
        covered += estimate.low <= 1.2 <= estimate.high
    # 0.95 less three standard errors (0.0126 each) of a proportion over 300 trials.
    assert covered / trials >= 0.91


@pytest.mark.parametrize(
    ("freedom", "table"), [(1, 12.7062), (2, 4.3027), (3, 3.18245), (5, 2.57058), (10, 2.22814), (29, 2.04523)]
)
def test_student_quantiles_equal_the_tables(freedom, table):
    assert student_t_quantile(0.975, freedom) == pytest.approx(table, rel=3e-3)  # the expansion's stated error


def test_the_interval_of_a_mean_is_students():
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    assert mean_interval([4.0]) == (4.0, -math.inf, math.inf)


def test_fewer_blocks_cut_off_less_of_the_tail():
    tails = [expanded_tail(0.95, count) for count in (4, 8, 30, 1000)]
    assert tails == sorted(tails)
    assert tails[-1] == pytest.approx(0.025, rel=0.02)  # towards the plain percentile interval


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: median([]), r"no samples to summarise"),
        (lambda: percentiles([1.0, np.nan]), r"NaN or infinite"),
        (lambda: ratio_of_medians(np.ones((3, 2)), np.ones((3, 2)), generator()), r"3 blocks are too few"),
        (lambda: ratio_of_medians(np.ones((5, 2)), np.ones((4, 2)), generator()), r"has 5 blocks and the candidate 4"),
        (lambda: ratio_of_medians(np.ones(5), np.ones((5, 1)), generator()), r"baseline have shape \(5,\)"),
        (lambda: ratio_of_medians(np.ones((5, 1)), np.zeros((5, 1)), generator()), r"time of the candidate is not"),
    ],
)
def test_samples_that_mean_nothing_are_refused(call, message):
    with pytest.raises(BenchmarkError, match=message):
        call()
