"""Criteria and patterns on tensors: worked values, exact counts, what stays pruned, and whose error is least."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from losa_export.errors import ConfigError
from losa_export.training.alps import alps, refine
from losa_export.training.criteria import CRITERIA, InputStatistics, Problem, Solution
from losa_export.training.gram import Gram
from losa_export.training.pattern import Pattern
from losa_export.training.scores import Amount, magnitude_scores
from losa_export.training.sparsegpt import sparsegpt

AMOUNTS = [Amount(0.5), Amount(0.7), Amount(0.5, 2, 4), Amount(0.5, 4, 8), Amount(0.75, 2, 8)]


def correlated(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random weight, and inputs whose features share a few strong directions, as those of language models do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    strength = torch.logspace(0, -1.5, columns)
    tokens = torch.randn(4 * columns, columns, generator=generator)
    noise = torch.randn(4 * columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), (tokens * strength) @ mix + 0.1 * noise


def gram_of(inputs: Tensor) -> Gram:
    return Gram(inputs.double().T @ inputs.double())


def solve(criterion: str, weight: Tensor, inputs: Tensor, amount: Amount, kept: Tensor | None = None) -> Solution:
    statistics = InputStatistics(inputs.square().sum(0), gram_of(inputs))
    kept = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept
    return CRITERIA[criterion].solve(Problem(weight, statistics, amount, kept, 0.01))


def effective(solution: Solution, weight: Tensor) -> Tensor:
    return weight * solution.kept if solution.weight is None else solution.weight


def output_error(inputs: Tensor, weight: Tensor, pruned: Tensor) -> float:
    return float((inputs @ (weight - pruned).T).square().sum())


# ---- worked values ------------------------------------------------------------------------------------------------


def test_sparsegpt_gives_the_worked_example() -> None:
    gram = Gram(torch.tensor([[2.0, 1], [1, 2]], dtype=torch.float64))
    factor = gram.inverse_factor(0.0)
    # 1e-6: the worked values are given to six decimals
    torch.testing.assert_close(
        factor, torch.tensor([[0.816497, -0.408248], [0, 0.707107]], dtype=torch.float64), atol=1e-6, rtol=0
    )
    weight = torch.ones(1, 2, dtype=torch.float64)
    scores = weight.square() / factor.diagonal().square()
    torch.testing.assert_close(scores, torch.tensor([[1.5, 2.0]], dtype=torch.float64))
    kept, left = sparsegpt(weight, gram, Amount(0.5), torch.ones(1, 2, dtype=torch.bool), 0.0)
    assert kept.tolist() == [[False, True]]
    torch.testing.assert_close(left, torch.tensor([[0.0, 1.5]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("kept", "width", "expected"),
    [
        (2, 4, [1, 0, 1, 0, 0, 1, 1, 0]),
        (4, 8, [1, 0, 1, 0, 0, 1, 1, 0]),
        (2, 8, [1, 0, 0, 0, 0, 0, 1, 0]),
    ],
)
def test_patterns_keep_the_worked_positions(kept: int, width: int, expected: list[int]) -> None:
    weight = torch.tensor([[0.9, -0.1, 0.3, 0.2, 0.05, -0.6, 0.7, 0.01]])
    solution = solve("magnitude", weight, torch.ones(1, 8), Amount(1 - kept / width, kept, width))
    assert solution.kept.int().tolist() == [expected]
    assert solution.weight is None


def test_magnitude_is_scored_in_float32_and_needs_no_inputs() -> None:
    assert magnitude_scores(torch.tensor([[-2.0]], dtype=torch.bfloat16)).dtype == torch.float32
    assert CRITERIA["magnitude"].statistic == "none"


# ---- counts and monotone masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("amount", AMOUNTS[2:])
def test_every_group_keeps_exactly_its_number(criterion: str, amount: Amount) -> None:
    weight, inputs = correlated(12, 200, 0)
    solution = solve(criterion, weight, inputs, amount)
    assert set(solution.kept.reshape(-1, amount.width).sum(1).tolist()) == {amount.kept}
    assert not effective(solution, weight)[~solution.kept].any()


@pytest.mark.parametrize("columns", [128, 300, 17])
def test_sparsegpt_prunes_exactly_its_count_in_each_block_of_columns(columns: int) -> None:
    weight, inputs = correlated(7, columns, 1)
    kept = torch.ones(7, columns, dtype=torch.bool)
    for target in (0.3, 0.55, 0.55, 0.7):
        solution = solve("sparsegpt", weight, inputs, Amount(target), kept)
        for part in torch.split(solution.kept, 128, dim=1):
            assert int((~part).sum()) == int(part.numel() * target + 1e-6)
        assert not (solution.kept & ~kept).any()
        weight, kept = effective(solution, weight), solution.kept


@pytest.mark.parametrize("criterion", ["sparsegpt", "alps"])
@given(seed=st.integers(0, 2**16), targets=st.lists(st.floats(0.05, 0.9), min_size=2, max_size=3))
def test_what_a_compensating_criterion_pruned_stays_pruned(criterion: str, seed: int, targets: list[float]) -> None:
    weight, inputs = correlated(5, 24, seed)
    kept = torch.ones(5, 24, dtype=torch.bool)
    for target in sorted(targets):
        solution = solve(criterion, weight, inputs, Amount(target), kept)
        assert not (solution.kept & ~kept).any()
        assert int((~solution.kept).sum()) == int(5 * 24 * target + 1e-6)
        weight, kept = effective(solution, weight), solution.kept
        assert torch.isfinite(weight).all()
        assert not weight[~kept].any()


@pytest.mark.parametrize("criterion", ["sparsegpt", "alps"])
def test_where_nothing_goes_the_weights_stay_bit_for_bit(criterion: str) -> None:
    weight, inputs = correlated(6, 32, 0)
    first = solve(criterion, weight, inputs, Amount(0.5))
    assert first.weight is not None
    assert solve(criterion, first.weight, inputs, Amount(0.5), first.kept).weight is None
    assert solve(criterion, weight, inputs, Amount(0.0)).weight is None


@pytest.mark.parametrize("criterion", ["sparsegpt", "alps"])
def test_dead_inputs_go_first_and_touch_no_other_weight(criterion: str) -> None:
    weight, inputs = correlated(6, 40, 3)
    inputs[:, [3, 17]] = 0.0
    few = solve(criterion, weight, inputs, Amount(12 / 240))
    assert not few.kept[:, [3, 17]].any()
    # 1e-4: in float32, eigenvectors and factors mix columns by rounding alone
    torch.testing.assert_close(effective(few, weight), weight * few.kept, atol=1e-4, rtol=0)
    fewer = solve(criterion, weight, inputs, Amount(5 / 240))
    spared = fewer.kept[:, [3, 17]]
    assert int(spared.sum()) == 7
    assert torch.equal(effective(fewer, weight)[:, [3, 17]], weight[:, [3, 17]] * spared)
    assert torch.isfinite(effective(solve(criterion, weight, torch.zeros_like(inputs), Amount(0.5)), weight)).all()


# ---- quality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("amount", AMOUNTS)
def test_alps_errs_less_than_sparsegpt_and_that_less_than_wanda(amount: Amount, seed: int) -> None:
    weight, inputs = correlated(48, 160, seed)
    errors = {
        criterion: output_error(inputs, weight, effective(solve(criterion, weight, inputs, amount), weight))
        for criterion in ("wanda", "sparsegpt", "alps")
    }
    assert errors["alps"] <= errors["sparsegpt"] <= errors["wanda"]


def test_refinement_reaches_the_least_squares_solution_of_each_row() -> None:
    weight, inputs = correlated(5, 12, 0)
    weight, moments = weight.double(), inputs.double().T @ inputs.double()
    kept = torch.rand(5, 12, generator=torch.Generator().manual_seed(1)) < 0.6
    kept[4] = False
    found = refine(weight * kept, weight, moments, kept, iterations=60)
    for row in range(5):
        support = kept[row]
        exact = torch.linalg.solve(moments[support][:, support], (moments @ weight[row])[support])
        torch.testing.assert_close(found[row, support], exact, atol=1e-8, rtol=1e-8)
    assert not found[~kept].any()


def test_refinement_never_raises_the_error() -> None:
    weight, inputs = correlated(16, 48, 2)
    moments = inputs.T @ inputs
    kept = torch.rand(16, 48, generator=torch.Generator().manual_seed(1)) < 0.3
    errors = [
        output_error(inputs, weight, refine(weight * kept, weight, moments, kept, iterations=count))
        for count in range(12)
    ]
    assert errors[-1] < 0.9 * errors[0]
    # 1e-5: float32 sums of some thousand terms
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))


def test_scale_of_the_moments_changes_nothing() -> None:
    weight, inputs = correlated(8, 32, 0)
    kept = torch.ones(8, 32, dtype=torch.bool)
    for method in (sparsegpt, alps):
        one = method(weight.double(), gram_of(inputs), Amount(0.6), kept, 0.01)
        other = method(weight.double(), gram_of(64 * inputs), Amount(0.6), kept, 0.01)
        assert torch.equal(one[0], other[0])
        torch.testing.assert_close(one[1], other[1])


def test_factorisations_are_made_once_for_all_linears_that_share_inputs() -> None:
    gram = gram_of(correlated(1, 16, 0)[1])
    assert gram.inverse_factor(0.01) is gram.inverse_factor(0.01)
    assert gram.normalised(0.01)[2] is gram.normalised(0.01)[2]
    scale, values, vectors = gram.normalised(0.01)
    rebuilt = (vectors * values) @ vectors.T * scale * scale.unsqueeze(1)
    torch.testing.assert_close(rebuilt, gram.damped(0.01))
    factor = gram.inverse_factor(0.01)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(gram.damped(0.01)))
    assert not factor.tril(-1).any()


def test_singular_moments_without_damping_are_an_error() -> None:
    gram = Gram(torch.ones(4, 4, dtype=torch.float64))
    with pytest.raises(ConfigError, match="not positive definite at this damping; raise damping, or calibrate on more"):
        sparsegpt(torch.ones(2, 4), gram, Amount(0.5), torch.ones(2, 4, dtype=torch.bool), 0.0)


# ---- patterns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2", "0:4", "4:4", "5:4", "2:4:8", "mixed", "mixed:1", "a:b", ""])
def test_a_pattern_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"pattern is '.*'; write N:M with 0 < N < M for N weights kept of M"):
        Pattern.parse(text)


def test_a_sparsity_that_contradicts_the_pattern_is_refused_with_the_one_to_use() -> None:
    with pytest.raises(ConfigError, match=r"is 0\.5, but pattern 2:8 keeps 2 of 8; set sparsity_fraction to 0\.75, or"):
        Pattern.parse("2:8").check_sparsity(0.5)
    Pattern.parse("1:3").check_sparsity(0.667)
    Pattern.parse("mixed:8").check_sparsity(0.61)


def test_mixed_patterns_round_each_block_and_keep_the_mean() -> None:
    mixed = Pattern.parse("mixed:8")
    everything, equal = np.full(4, 8), np.ones(4)
    # 3.2, 3.04, 3.36, 3.2 of 8: 12.8 in all, so one block of four keeps a fourth weight, that with the most over
    assert mixed.kept_per_group(np.array([0.6, 0.62, 0.58, 0.6]), equal, everything).tolist() == [3, 3, 4, 3]
    assert mixed.kept_per_group(np.full(4, 0.5), equal, everything).tolist() == [4, 4, 4, 4]
    # the second block counts three times, and what the others lost to rounding is not enough for it
    assert mixed.kept_per_group(np.array([0.6, 0.6]), np.array([1.0, 3.0]), np.full(2, 8)).tolist() == [4, 3]


@given(
    width=st.sampled_from([4, 8]),
    rounds=st.lists(st.lists(st.floats(0.0, 0.95), min_size=5, max_size=5), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 5), min_size=5, max_size=5),
)
def test_mixed_numbers_never_grow_and_meet_the_mean_to_half_a_weight(
    width: int, rounds: list[list[float]], weights: list[int]
) -> None:
    sizes, before = np.array(weights, dtype=np.float64), np.full(5, width)
    for targets in np.maximum.accumulate(np.array(rounds), axis=0):
        kept = Pattern(None, width).kept_per_group(targets, sizes, before)
        assert (kept >= 0).all()
        assert (kept <= before).all()
        missed = sizes @ (width * (1 - targets) - kept)
        if (kept < before).all() and (kept > 0).all():
            assert abs(missed) <= sizes.max() / 2 + 1e-6
        before = kept


@given(targets=st.lists(st.floats(0.3, 0.7), min_size=4, max_size=4))
def test_a_fixed_pattern_ends_with_the_same_number_everywhere(targets: list[float]) -> None:
    centred = np.clip(np.array(targets) - np.mean(targets) + 0.5, 0.0, 0.99)
    centred += 0.5 - centred.mean()
    pattern = Pattern.parse("2:4")
    assert pattern.kept_per_group(centred, np.ones(4), np.array([3, 3, 4, 3])).tolist() == [2, 2, 2, 2]
    assert pattern.kept_per_group(np.full(4, 0.244), np.ones(4), np.full(4, 4)).tolist() == [3, 3, 3, 3]
