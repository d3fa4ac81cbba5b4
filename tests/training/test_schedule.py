from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa_export.training.schedule import RoundPlan, round_spans, sparsity_at, split_steps, steps_in


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        (0.5, [0.2440, 0.3920, 0.4680, 0.4960, 0.5000]),
        (0.6, [0.2928, 0.4704, 0.5616, 0.5952, 0.6000]),
        (0.7, [0.3416, 0.5488, 0.6552, 0.6944, 0.7000]),
        (0.8, [0.3904, 0.6272, 0.7488, 0.7936, 0.8000]),
    ],
)
def test_the_ramp_has_the_published_values(final: float, expected: list[float]) -> None:
    # 1e-12: a handful of float64 operations on numbers below 1
    assert [sparsity_at(final, t, 5) for t in range(1, 6)] == pytest.approx(expected, abs=1e-12)


@given(final=st.floats(0.01, 0.99), rounds=st.integers(1, 40))
def test_the_ramp_ends_exactly_at_the_target_and_rises_ever_more_slowly(final: float, rounds: int) -> None:
    values = [sparsity_at(final, t, rounds) for t in range(rounds + 1)]
    assert values[0] == 0.0
    assert values[-1] == final
    rises = [after - before for before, after in itertools.pairwise(values)]
    assert all(rise > 0 for rise in rises)
    # 1e-12: the rises are differences of float64 numbers below 1
    assert all(later < earlier + 1e-12 for earlier, later in itertools.pairwise(rises))


@given(rounds=st.integers(1, 20), share=st.floats(0.05, 1.0), total=st.integers(0, 10_000))
def test_spans_cover_the_tuning_and_their_steps_add_up(rounds: int, share: float, total: int) -> None:
    spans = round_spans(rounds, share)
    assert spans[0][0] == 0.0
    assert spans[-1][1] == 1.0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    steps = split_steps(total, spans)
    assert sum(steps) == total
    assert all(count >= 0 for count in steps)


def test_the_last_of_five_rounds_gets_its_share_of_the_steps() -> None:
    assert split_steps(200, round_spans(5, 0.6)) == (20, 20, 20, 20, 120)


def test_one_cosine_spans_all_rounds_with_a_short_warm_up_in_each() -> None:
    spans = round_spans(2, 0.5)
    first, second = (RoundPlan.of_round(span, 100, 0.05) for span in spans)
    assert first.warmup_steps == 5
    assert first.rate_factor(0) == pytest.approx(1 / 6)
    assert first.rate_factor(5) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.025)))
    assert second.rate_factor(0) < first.rate_factor(99)
    assert second.rate_factor(50) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.75)))
    assert 0.0 < second.rate_factor(99) < 0.001


def test_correcting_a_plan_does_not_make_the_rate_jump() -> None:
    plan = RoundPlan.of_round((0.4, 1.0), 100, 0.05)
    corrected = plan.corrected(30, 60)
    assert corrected.progress(30) == pytest.approx(plan.progress(30))
    assert corrected.progress(60) == 1.0
    assert corrected.rate_factor(30) == pytest.approx(plan.rate_factor(30))


def test_a_round_without_steps_is_at_its_end() -> None:
    assert RoundPlan.of_round((0.0, 1.0), 0, 0.05).progress(0) == 1.0


def test_at_least_one_step_fits_into_any_time() -> None:
    assert steps_in(10.0, 3.0) == 3
    assert steps_in(0.0, 3.0) == 1


def test_a_round_of_its_own_rises_to_the_peak_and_falls_to_zero_in_straight_lines() -> None:
    plan = RoundPlan.of_its_own(10, 0.3)
    factors = [plan.rate_factor(step) for step in range(11)]
    # 1e-12: a few float64 operations
    assert factors[:3] == pytest.approx([0.25, 0.5, 0.75], abs=1e-12)
    assert factors[3:] == pytest.approx([1 - step / 7 for step in range(8)], abs=1e-12)
    assert RoundPlan.of_its_own(1, 0.3).rate_factor(0) == pytest.approx(0.5)


def test_a_round_of_its_own_can_be_corrected_without_a_jump() -> None:
    plan = RoundPlan.of_its_own(100, 0.3)
    longer = plan.corrected(50, 150)
    assert longer.rate_factor(50) == plan.rate_factor(50)
    assert longer.rate_factor(150) == 0.0
    assert all(longer.rate_factor(step) >= longer.rate_factor(step + 1) for step in range(50, 150))
