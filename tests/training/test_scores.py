from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_export.errors import MaskError
from losa_export.training.scores import pruned_per_row, select_kept, wanda_scores

WEIGHT = torch.tensor([[0.5, -1.0, 0.2, 0.8], [-0.3, 0.4, 2.0, -0.1]], dtype=torch.float64)
INPUT = torch.tensor([[1.0, 2, 0, 1], [1, 0, 3, 1], [1, 2, 0, -1]], dtype=torch.float64)
ALL = torch.ones(2, 4, dtype=torch.bool)


def test_wanda_scores_have_the_worked_values() -> None:
    scores = wanda_scores(WEIGHT, INPUT.square().sum(0))
    expected = torch.tensor([[0.866025, 2.828427, 0.6, 1.385641], [0.519615, 1.131371, 6.0, 0.173205]])
    # 1e-6: the worked values are given to six decimals
    torch.testing.assert_close(scores, expected.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("sparsity", "kept"),
    [
        (0.5, [[0, 1, 0, 1], [0, 1, 1, 0]]),
        (0.6, [[0, 1, 0, 1], [0, 1, 1, 0]]),
        (0.75, [[0, 1, 0, 0], [0, 0, 1, 0]]),
    ],
)
def test_wanda_keeps_the_worked_positions(sparsity: float, kept: list[list[int]]) -> None:
    scores = wanda_scores(WEIGHT, INPUT.square().sum(0))
    assert select_kept(scores, pruned_per_row(4, sparsity), ALL).int().tolist() == kept


def test_bfloat16_weights_are_scored_in_float32() -> None:
    assert wanda_scores(WEIGHT.bfloat16(), torch.ones(4)).dtype == torch.float32


def test_statistics_of_another_width_are_an_error() -> None:
    with pytest.raises(MaskError, match=r"statistics of \(3,\) input features do not fit .* \(2, 4\)"):
        wanda_scores(WEIGHT, torch.ones(3))


def test_the_count_per_row_survives_rounding_of_the_product() -> None:
    assert 0.29 * 100 < 29
    assert pruned_per_row(100, 0.29) == 29
    assert pruned_per_row(576, 0.7) == 403


@st.composite
def rows_with_ties(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    # Few distinct values, zero among them: weights dequantised from a 4-bit grid tie a lot.
    scores = generator.integers(0, draw(st.sampled_from([1, 2, 5, 1000])), size=(rows, columns)).astype(np.float32)
    kept_before = generator.random((rows, columns)) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    return scores, kept_before, draw(st.integers(0, columns))


@settings(deadline=None)
@given(rows_with_ties())
def test_selection_equals_a_stable_sort_that_puts_pruned_positions_first(
    case: tuple[np.ndarray, np.ndarray, int],
) -> None:
    scores, kept_before, count = case
    order = np.argsort(np.where(kept_before, scores, -1.0), axis=1, kind="stable")
    expected = kept_before.copy()
    np.put_along_axis(expected, order[:, :count], False, axis=1)
    kept = select_kept(torch.from_numpy(scores), count, torch.from_numpy(kept_before)).numpy()
    np.testing.assert_array_equal(kept, expected)


@settings(deadline=None)
@given(rows_with_ties())
def test_each_row_loses_exactly_the_count_and_nothing_is_unpruned(
    case: tuple[np.ndarray, np.ndarray, int],
) -> None:
    scores, kept_before, count = case
    kept = select_kept(torch.from_numpy(scores), count, torch.from_numpy(kept_before)).numpy()
    pruned, pruned_before = (~kept).sum(1), (~kept_before).sum(1)
    np.testing.assert_array_equal(pruned, np.maximum(pruned_before, count))
    assert not (kept & ~kept_before).any()
