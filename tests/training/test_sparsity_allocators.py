from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from losa_export.errors import ConfigError
from losa_export.training.allocation import SparsityInputs, allocate_sparsity
from losa_export.training.schedule import sparsity_at
from losa_export.training.sparsity_allocators import (
    atp_targets,
    band,
    band_half_width,
    linear_targets,
    lp_targets,
    owl_targets,
    redundancy,
    rescaled_targets,
    within_bounds,
)

Floats = NDArray[np.float64]
Allocate = Callable[[Floats, float, float, Floats, Floats], Floats]
SCORES = np.array([2.0, 3.5, 3.1, 2.7, 1.0])


def lp(scores: Floats, target: float, half_width: float, previous: Floats, weights: Floats) -> Floats:
    lower, upper = band(target, half_width, previous)
    return lp_targets(scores, target, lower, upper, weights)


def linear(scores: Floats, target: float, half_width: float, previous: Floats, weights: Floats) -> Floats:
    lower, upper = band(target, half_width, previous)
    return linear_targets(scores, target, half_width, lower, upper, weights)


def equal(blocks: int) -> Floats:
    return np.full(blocks, 1.0 / blocks)


def first(allocate: Allocate, scores: Floats, target: float, half_width: float) -> list[float]:
    return allocate(scores, target, half_width, np.zeros(scores.size), equal(scores.size)).tolist()


# 1e-9 throughout: sums of a few float64 terms below 1; the published values have six digits.
@pytest.mark.parametrize(
    ("scores", "target", "half_width", "expected"),
    [
        ([1.840737, 1.840737, 1.603196, 0.456243], 0.5, 0.1, [0.6, 0.6, 0.4, 0.4]),
        ([2, 3.5, 3.1, 2.7, 1], 0.7, 0.03, [0.67, 0.73, 0.73, 0.70, 0.67]),
        ([2, 3.5, 3.1, 2.7, 1, 3.3], 0.6, 0.02, [0.58, 0.62, 0.62, 0.58, 0.58, 0.62]),
        ([1, 1, 1, 1], 0.6, 0.02, [0.62, 0.62, 0.58, 0.58]),
    ],
)
def test_the_linear_program_puts_blocks_at_the_ends_of_the_band(
    scores: list[float], target: float, half_width: float, expected: list[float]
) -> None:
    assert first(lp, np.array(scores, dtype=np.float64), target, half_width) == pytest.approx(expected, abs=1e-9)


def test_the_linear_allocator_spreads_blocks_over_the_band() -> None:
    expected = [0.690548, 0.721370, 0.713151, 0.704932, 0.670000]
    assert first(linear, SCORES, 0.7, 0.03) == pytest.approx(expected, abs=1e-6)
    assert first(linear, np.full(3, 0.1), 0.7, 0.03) == [0.7, 0.7, 0.7]


def test_a_larger_block_counts_for_more() -> None:
    weights = np.array([1, 1, 2, 1, 1]) / 6
    targets = lp(SCORES, 0.7, 0.03, np.zeros(5), weights)
    assert targets.tolist() == pytest.approx([0.67, 0.73, 0.73, 0.67, 0.67], abs=1e-9)
    assert weights @ targets == pytest.approx(0.7, abs=1e-9)


def test_owl_and_atp_have_the_published_values() -> None:
    owl = owl_targets(np.array([2.0, 5.0, 3.0]), 0.7, 0.08, equal(3))
    assert owl.tolist() == pytest.approx([0.771111, 0.611111, 0.717778], abs=1e-6)
    assert owl_targets(np.full(3, 4.0), 0.7, 0.08, equal(3)).tolist() == [0.7, 0.7, 0.7]
    assert atp_targets(0.7, 0.02, equal(5)).tolist() == pytest.approx([0.66, 0.68, 0.70, 0.72, 0.74], abs=1e-9)


def test_the_band_widens_with_the_target() -> None:
    targets = (0.3, 0.5, 0.501, 0.6, 0.601, 0.7, 0.8)
    assert [band_half_width(target) for target in targets] == [0.01, 0.01, 0.02, 0.02, 0.03, 0.03, 0.03]


def test_redundancy_leaves_a_block_itself_out() -> None:
    assert redundancy(np.array([[1.0, 0.5, 0.2], [0.5, 1.0, 0.1], [0.2, 0.1, 1.0]])).tolist() == pytest.approx(
        [0.7, 0.6, 0.3]
    )


blocks = st.integers(2, 12)
seeds = st.integers(0, 10_000)


@pytest.mark.parametrize("allocate", [lp, linear])
@given(count=blocks, seed=seeds, target=st.floats(0.05, 0.9), half_width=st.floats(0.0, 0.1), weighted=st.booleans())
def test_the_mean_is_exact_the_band_holds_and_the_order_of_blocks_does_not_matter(
    allocate: Allocate, count: int, seed: int, target: float, half_width: float, weighted: bool
) -> None:
    random = np.random.default_rng(seed)
    scores, order = random.random(count), random.permutation(count)
    weights = random.uniform(0.5, 2.0, count) if weighted else np.ones(count)
    weights /= weights.sum()
    targets = allocate(scores, target, half_width, np.zeros(count), weights)
    assert weights @ targets == pytest.approx(target, abs=1e-9)
    assert np.all(np.abs(targets - target) <= half_width + 1e-9)
    assert np.all(targets >= 0.0)
    assert np.all(targets < 1.0)
    permuted = allocate(scores[order], target, half_width, np.zeros(count), weights[order])
    np.testing.assert_allclose(permuted, targets[order], atol=1e-9)


@given(count=blocks, seed=seeds, beta=st.floats(0.1, 100.0))
def test_the_linear_program_is_solved_whatever_beta_and_sees_only_the_order(count: int, seed: int, beta: float) -> None:
    random = np.random.default_rng(seed)
    scores = random.permutation(np.linspace(1.0, 3.0, count))
    weights = random.uniform(0.5, 2.0, count)
    weights /= weights.sum()
    targets = lp(scores, 0.6, 0.02, np.zeros(count), weights)
    for increasing in (np.exp(scores), scores**3, 5 * scores - 2):
        np.testing.assert_array_equal(lp(increasing, 0.6, 0.02, np.zeros(count), weights), targets)
    # No exchange between two blocks within the band lowers Σ n·I·x. 1e-9: as above.
    importance = np.exp(-beta * scores / scores.sum())
    for more in range(count):
        for less in range(count):
            room = targets[more] < 0.62 - 1e-9 and targets[less] > 0.58 + 1e-9
            assert not (room and importance[more] < importance[less] - 1e-9)


def test_importance_of_the_worked_example() -> None:
    shares = np.array([1.840737, 1.840737, 1.603196, 0.456243])
    shares /= shares.sum()
    assert shares.tolist() == pytest.approx([0.320635, 0.320635, 0.279258, 0.079472], abs=1e-6)
    assert np.exp(-shares).tolist() == pytest.approx([0.725688, 0.725688, 0.756345, 0.923604], abs=1e-6)


@pytest.mark.parametrize("name", ["lp", "linear", "owl", "atp"])
@given(count=blocks, seed=seeds, final=st.floats(0.3, 0.9), rounds=st.integers(1, 6))
def test_over_a_whole_ramp_no_block_falls_back_and_every_mean_is_met(
    name: str, count: int, seed: int, final: float, rounds: int
) -> None:
    random = np.random.default_rng(seed)
    counts = random.integers(1, 4, count) * 100.0
    previous = np.zeros(count)
    for number in range(1, rounds + 1):
        target = sparsity_at(final, number, rounds)
        half = random.random((count, count))
        inputs = SparsityInputs(
            number, rounds, counts, previous, rmi=half + half.T, outliers=random.random(count), atp_difference=0.02
        )
        # allocate_sparsity itself refuses a missed mean, a fall and a target out of range
        targets = allocate_sparsity(name, target, inputs)
        if name in ("lp", "linear"):
            assert np.all(targets <= target + band_half_width(target) + 1e-9)
        previous = targets
    assert counts @ previous / counts.sum() == pytest.approx(final, abs=1e-9)


@given(seed=seeds)
def test_small_changes_of_the_scores_move_the_linear_allocator_little(seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.random(6)
    assume(np.ptp(scores) > 0.1)
    before, after = (first(linear, value, 0.6, 0.02) for value in (scores, scores + 1e-6 * random.random(6)))
    # the slope is at most a few times δ over the spread of the scores
    assert np.abs(np.subtract(before, after)).max() < 1e-5


def test_a_shift_is_found_that_keeps_the_mean_within_bounds() -> None:
    wanted, weights = np.array([0.1, 0.5, 0.9]), equal(3)
    lower, upper = np.array([0.3, 0.0, 0.0]), np.full(3, 0.8)
    targets = within_bounds(wanted, 0.5, lower, upper, weights)
    assert targets.tolist() == pytest.approx([0.3, 0.4, 0.8], abs=1e-9)
    assert within_bounds(wanted, 0.5, np.zeros(3), np.ones(3), weights) is wanted


@pytest.mark.parametrize("allocate", [lp, linear])
def test_bounds_without_room_for_the_mean_are_refused(allocate: Allocate) -> None:
    with pytest.raises(ConfigError, match=r"mean sparsity of 0\.500000 does not fit bounds whose means are 0\.700000"):
        allocate(SCORES, 0.5, 0.01, np.full(5, 0.7), equal(5))


def inputs(**changes: object) -> SparsityInputs:
    return SparsityInputs(1, 1, np.array([100.0, 100.0, 200.0]), np.zeros(3), **changes)  # type: ignore[arg-type]


def test_fixed_sparsities_are_scaled_to_the_target() -> None:
    given_values = np.array([0.5, 0.6, 0.7])
    targets = allocate_sparsity("fixed", 0.5, inputs(block_sparsities=given_values))
    assert targets.tolist() == pytest.approx([0.4, 0.48, 0.56], abs=1e-9)
    assert rescaled_targets(np.array([1.0, 3.0]), 0.4, equal(2)).tolist() == pytest.approx([0.2, 0.6], abs=1e-9)


def test_fixed_sparsities_that_empty_a_block_or_miss_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'fixed' gives block 0 the target 1\.600000"):
        allocate_sparsity("fixed", 0.8, inputs(block_sparsities=np.array([0.6, 0.2, 0.2])))
    with pytest.raises(ConfigError, match="block_sparsities has 2 values, but the model has 3 blocks"):
        allocate_sparsity("fixed", 0.5, inputs(block_sparsities=np.array([0.5, 0.5])))


@pytest.mark.parametrize("name", ["lp", "linear"])
def test_a_single_block_has_nothing_to_be_compared_with(name: str) -> None:
    alone = SparsityInputs(1, 1, np.array([10.0]), np.zeros(1))
    assert allocate_sparsity(name, 0.55, alone).tolist() == [0.55]


@pytest.mark.parametrize(
    ("name", "what"), [("lp", "mutual information"), ("linear", "mutual information"), ("owl", "outliers")]
)
def test_an_allocator_without_its_measurement_says_so(name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' needs {what}, which it was not given"):
        allocate_sparsity(name, 0.5, inputs())


def test_measurements_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'owl' cannot use values that are not finite \(outliers\)"):
        allocate_sparsity("owl", 0.5, inputs(outliers=np.array([1.0, np.nan, 2.0])))


def test_a_band_can_be_given() -> None:
    rmi = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    targets = allocate_sparsity("lp", 0.5, inputs(rmi=rmi, half_width=0.1))
    assert targets.tolist() == pytest.approx([0.6, 0.6, 0.4], abs=1e-9)
