from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from losa_export.errors import ConfigError
from losa_export.training import rmi as rmi_module
from losa_export.training.rmi import gram_matrix, mutual_information
from losa_export.training.sparsity_allocators import redundancy

X1 = [[1, 0], [0, 1], [-1, 0], [0, -1]]
X3 = [[1, 0], [1, 0], [-1, 0], [-1, 0]]
X4 = [[1, 1], [-1, 0], [1, 2], [-1, 1]]
FEATURES = [np.array(X1, float), 3 * np.array(X1, float) + [5, 7], np.array(X3, float), np.array(X4, float)]


def gram(features: NDArray[np.float64], dtype: torch.dtype = torch.float64) -> NDArray[np.float64]:
    """Of one token a window."""
    return gram_matrix([torch.from_numpy(features).to(dtype).unsqueeze(1)])


def between(*features: NDArray[np.float64], debiased: bool = False) -> NDArray[np.float64]:
    return mutual_information([gram(each) for each in features], debiased=debiased)


def hsic_u(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Song et al.'s unbiased estimator as it is written, from zero-diagonal Gram matrices."""
    k, m = (each - np.diag(np.diagonal(each)) for each in (first, second))
    n, one = k.shape[0], np.ones(k.shape[0])
    sums = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((np.trace(k @ m) + sums - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


def test_the_worked_example() -> None:
    rmi = between(*FEATURES)
    # 1e-6: the published digits
    assert rmi[0, 1] == pytest.approx(1.0, abs=1e-12)
    assert rmi[[0, 1], 2].tolist() == pytest.approx([0.707107] * 2, abs=1e-6)
    assert rmi[[0, 1], 3].tolist() == pytest.approx([0.133631] * 2, abs=1e-6)
    assert rmi[2, 3] == pytest.approx(0.188982, abs=1e-6)
    assert redundancy(rmi).tolist() == pytest.approx([1.840737, 1.840737, 1.603196, 0.456243], abs=1e-6)


def test_biased_and_debiased_values_of_one_feature() -> None:
    a = np.arange(1.0, 7.0)[:, None]
    b, c = a**2, np.array([1.0, -1, 1, -1, 1, -1])[:, None]
    biased, debiased = between(a, b, c), between(a, b, c, debiased=True)
    assert biased[0].tolist() == pytest.approx([1.0, 0.958279, 0.085714], abs=1e-6)
    assert debiased[0].tolist() == pytest.approx([1.0, 0.975341, 0.0], abs=1e-6)
    grams = [each @ each.T for each in (a, c)]
    raw = hsic_u(*grams) / np.sqrt(hsic_u(grams[0], grams[0]) * hsic_u(grams[1], grams[1]))
    assert raw == pytest.approx(-0.162650, abs=1e-6)


@given(seed=st.integers(0, 10_000), windows=st.integers(4, 12), debiased=st.booleans())
def test_values_are_symmetric_and_unmoved_by_offset_scale_and_rotation(seed: int, windows: int, debiased: bool) -> None:
    random = np.random.default_rng(seed)
    first, second = random.standard_normal((2, windows, 5))
    rotation = np.linalg.qr(random.standard_normal((5, 5)))[0]
    changed = 7.5 * (first @ rotation) + random.standard_normal(5)
    rmi = between(first, second, changed, debiased=debiased)
    np.testing.assert_array_equal(rmi, rmi.T)
    assert np.diagonal(rmi).tolist() == [1.0, 1.0, 1.0]
    assert rmi.min() >= 0.0
    assert rmi.max() <= 1.0
    # 1e-6: float64 products
    assert rmi[0, 2] == pytest.approx(1.0, abs=1e-6)
    assert rmi[1, 2] == pytest.approx(rmi[0, 1], abs=1e-6)


def test_the_debiased_form_is_the_estimator_as_written() -> None:
    first, second = np.random.default_rng(0).standard_normal((2, 9, 3))
    second[:, 0] = first[:, 0]
    grams = [each @ each.T for each in (first, second)]
    expected = hsic_u(*grams) / np.sqrt(hsic_u(grams[0], grams[0]) * hsic_u(grams[1], grams[1]))
    assert expected > 0.0
    assert between(first, second, debiased=True)[0, 1] == pytest.approx(expected, abs=1e-12)


def test_only_the_debiased_form_sees_that_many_random_features_are_independent() -> None:
    first, second = np.random.default_rng(0).standard_normal((2, 64, 4096))
    assert between(first, second)[0, 1] == pytest.approx(0.984, abs=0.002)
    assert between(first, second, debiased=True)[0, 1] < 0.04


def test_a_large_common_offset_does_not_use_up_float32() -> None:
    random = np.random.default_rng(1)
    first, second = random.standard_normal((2, 8, 64))
    exact = between(first, second)
    moved = mutual_information([gram(each + 1000.0, torch.float32) for each in (first, second)])
    # 1e-4: what float32 features keep beside an offset of a thousand
    np.testing.assert_allclose(moved, exact, atol=1e-4)


def test_batches_and_chunks_of_tokens_give_one_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
    whole = gram_matrix([hidden])
    flat = hidden.double().reshape(5, -1)
    flat = flat - flat.mean(dim=0)
    # 1e-5: float32 sums of 21 products
    np.testing.assert_allclose(whole, (flat @ flat.T).numpy(), atol=1e-5)
    monkeypatch.setattr(rmi_module, "_CHUNK_ELEMENTS", 2 * 5 * 3)
    np.testing.assert_allclose(gram_matrix([hidden[:2], hidden[2:4], hidden[4:]]), whole, atol=1e-5)


def test_bfloat16_features_are_multiplied_in_float32() -> None:
    hidden = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    np.testing.assert_array_equal(gram_matrix([hidden]), gram_matrix([hidden.float()]))


def test_normalised_tokens_have_lost_their_size_and_zeros_stay() -> None:
    hidden = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    sizes = 10 ** torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(1))
    # 1e-4: float32 sums of 40 products of order one
    np.testing.assert_allclose(
        gram_matrix([hidden * sizes], normalise=True), gram_matrix([hidden], normalise=True), atol=1e-4
    )
    assert not gram_matrix([torch.zeros(2, 3, 4)], normalise=True).any()


@pytest.mark.parametrize("debiased", [False, True])
def test_an_input_that_never_changes_depends_on_nothing(debiased: bool) -> None:
    features = np.random.default_rng(0).standard_normal((5, 3))
    constant = np.full((5, 3), 0.1)
    expected = [[1.0, 0.0], [0.0, 1.0]]
    assert between(features, constant, debiased=debiased).tolist() == expected
    uncentred = [features @ features.T, constant @ constant.T]
    assert mutual_information(uncentred, debiased=debiased).tolist() == expected


@pytest.mark.parametrize(
    ("windows", "debiased", "message"),
    [(1, False, "mutual information of 1 window is undefined; measure it on at least 2"), (3, True, "at least 4")],
)
def test_too_few_windows_are_refused(windows: int, debiased: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mutual_information([np.eye(windows)] * 2, debiased=debiased)


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ConfigError, match="the input of block 1 is not finite"):
        mutual_information([np.eye(3), np.full((3, 3), np.inf)])
