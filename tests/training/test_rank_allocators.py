from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa_export.errors import ConfigError
from losa_export.training.allocation import RankInputs, allocate_ranks, ask_ranks
from losa_export.training.rank_allocators import (
    proportional_ranks,
    rank_budget,
    requested_ranks,
    uniform_ranks,
    water_filling_ranks,
)

EXAMPLES = [
    ([1, 2, 3, 4], 6, [2, 5, 7, 10], [2, 5, 7, 10]),
    ([0.2, 0.3, 0.5, 0.9, 1.6, 2.5], 6, [1, 2, 3, 5, 10, 15], [1, 2, 3, 5, 10, 15]),
    ([1, 1, 1, 1, 6], 6, [4, 4, 3, 3, 16], [4, 4, 3, 3, 16]),
    ([1, 1, 1, 1, 36], 6, [2, 2, 2, 2, 16], [4, 4, 3, 3, 16]),
    ([0.01] * 6 + [1, 1], 2, [1, 1, 1, 1, 1, 1, 7, 7], [1, 1, 1, 1, 1, 1, 5, 5]),
]


@pytest.mark.parametrize(("errors", "mean", "released", "filled"), EXAMPLES)
def test_the_worked_examples(errors: list[float], mean: float, released: list[int], filled: list[int]) -> None:
    inputs = RankInputs(1, 1, 1, 16, np.full(len(errors), 6), np.array(errors, dtype=np.float64))
    assert allocate_ranks("proportional", mean, inputs).tolist() == released
    assert allocate_ranks("water_filling", mean, inputs).tolist() == filled


@given(
    errors=st.lists(st.floats(0.0, 1e6, allow_subnormal=False), min_size=1, max_size=40),
    mean=st.floats(1.0, 16.0),
    factor=st.sampled_from([0.125, 2.0, 1024.0]),
)
def test_water_filling_keeps_its_promises(errors: list[float], mean: float, factor: float) -> None:
    values = np.array(errors)
    budget = rank_budget(mean, values.size, 1, 16)
    ranks = water_filling_ranks(values, budget, 1, 16)
    assert ranks.dtype == np.int64
    assert ranks.sum() == budget
    assert ranks.min() >= 1
    assert ranks.max() <= 16
    order = np.argsort(values, kind="stable")
    # within a tie the order of blocks decides, and by 1 at most
    for before, after in itertools.pairwise(order):
        assert ranks[before] <= ranks[after] + (values[before] == values[after])
    np.testing.assert_array_equal(water_filling_ranks(values * factor, budget, 1, 16), ranks)


@given(errors=st.lists(st.floats(0.0, 1e6, allow_subnormal=False), min_size=1, max_size=40), mean=st.floats(1, 16))
def test_the_released_allocator_stays_within_its_bounds(errors: list[float], mean: float) -> None:
    values = np.array(errors)
    ranks = proportional_ranks(values, rank_budget(mean, values.size, 1, 16), 1, 16)
    assert ranks.min() >= 1
    assert ranks.max() <= 16


def test_equal_errors_get_equal_ranks_and_none_at_all_uniform_ones() -> None:
    assert water_filling_ranks(np.full(4, 0.3), 26, 1, 16).tolist() == [7, 7, 6, 6]
    assert water_filling_ranks(np.zeros(4), 26, 1, 16).tolist() == uniform_ranks(26, 4).tolist() == [7, 7, 6, 6]
    assert proportional_ranks(np.zeros(4), 24, 1, 16).tolist() == [6, 6, 6, 6]


def test_a_block_without_error_gets_rank_only_when_the_others_are_full() -> None:
    errors = np.array([0.0, 2.0, 0.0])
    assert water_filling_ranks(errors, 10, 1, 16).tolist() == [1, 8, 1]
    assert water_filling_ranks(errors, 30, 1, 16).tolist() == [7, 16, 7]


@pytest.mark.parametrize(("mean", "expected"), [(0.2, 3), (5.5, 16), (99.0, 48)])
def test_a_budget_beyond_the_bounds_is_clipped(mean: float, expected: int) -> None:
    assert rank_budget(mean, 3, 1, 16) == expected
    errors = np.array([1.0, 2.0, 3.0])
    assert water_filling_ranks(errors, expected, 1, 16).sum() == expected


def test_requested_ranks_show_where_bounds_bit() -> None:
    inputs = RankInputs(1, 1, 1, 16, np.full(5, 6), np.array([1.0, 1, 1, 1, 36]))
    assert ask_ranks(6.0, inputs).tolist() == pytest.approx([0.75, 0.75, 0.75, 0.75, 27.0])
    assert ask_ranks(6.0, RankInputs(1, 1, 1, 16, np.full(5, 6))).tolist() == [6.0] * 5
    assert requested_ranks(np.zeros(2), 5).tolist() == [2.5, 2.5]


def test_rank_allocators_without_errors_or_with_damaged_ones_say_so() -> None:
    with pytest.raises(ConfigError, match="'water_filling' needs reconstruction errors, which it was not given"):
        allocate_ranks("water_filling", 6.0, RankInputs(1, 1, 1, 16, np.full(2, 6)))
    with pytest.raises(ConfigError, match="'proportional' cannot use values that are not finite"):
        allocate_ranks("proportional", 6.0, RankInputs(1, 1, 1, 16, np.full(2, 6), np.array([1.0, np.inf])))
