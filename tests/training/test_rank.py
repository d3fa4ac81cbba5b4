from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from losa_export.errors import ConfigError
from losa_export.training.adapter import MaskedLoRALinear
from losa_export.training.rank import best_factors, resize


def make_layer(rank: int, *, trained: bool = True) -> MaskedLoRALinear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(10, 6)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(6, 10, generator=generator))
    layer = MaskedLoRALinear(linear, max_rank=6, rank=rank, scaling=2.0, generator=generator)
    layer.set_mask(torch.rand(6, 10, generator=generator) < 0.5)
    if trained:
        with torch.no_grad():
            layer.lora_B[:, :rank] = torch.randn(6, rank, generator=generator)
    return layer


def make_states(layer: MaskedLoRALinear) -> dict[Tensor, dict[str, Any]]:
    """As after eleven steps: the moments of sleeping slices are zero."""
    generator = torch.Generator().manual_seed(1)
    states: dict[Tensor, dict[str, Any]] = {}
    for parameter in (layer.lora_A, layer.lora_B):
        moments = {name: torch.rand(parameter.shape, generator=generator) for name in ("exp_avg", "exp_avg_sq")}
        states[parameter] = {"step": torch.tensor(11.0), **moments}
    for moment in ("exp_avg", "exp_avg_sq"):
        states[layer.lora_A][moment][layer.rank :] = 0.0
        states[layer.lora_B][moment][:, layer.rank :] = 0.0
    return states


def test_the_worked_example_of_a_shrink() -> None:
    random = np.random.default_rng(0)
    b, a = (torch.from_numpy(random.standard_normal(shape)) for shape in ((5, 4), (4, 6)))
    new_a, new_b = best_factors(a, b, 2)
    # 1e-6: the published digits
    assert float((b @ a - new_b @ new_a).norm()) == pytest.approx(1.760706, abs=1e-6)
    assert float((b @ a - b[:, :2] @ a[:2]).norm()) == pytest.approx(5.190696, abs=1e-6)


@given(seed=st.integers(0, 10_000), before=st.integers(1, 6), after=st.integers(1, 6))
def test_what_a_shrink_loses_are_the_discarded_singular_values(seed: int, before: int, after: int) -> None:
    after = min(before, after)
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(before, 10, generator=generator), torch.randn(8, before, generator=generator)
    new_a, new_b = best_factors(a, b, after)
    exact = b.double() @ a.double()
    lost = float((exact - new_b.double() @ new_a.double()).norm())
    tail = float(torch.linalg.svdvals(exact)[after:].norm())
    # 1e-5 of the whole: the factors are rounded to float32
    assert lost == pytest.approx(tail, rel=1e-5, abs=1e-5 * float(exact.norm()))
    assert new_a.dtype == new_b.dtype == torch.float32
    # singular values split evenly: both factors have the same Gram matrix. 1e-4: float32 sums of a few products
    torch.testing.assert_close(new_a @ new_a.T, new_b.T @ new_b, atol=1e-4, rtol=1e-4)


def test_directions_that_ba_lacks_stay_able_to_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 10, generator=generator), torch.zeros(6, 4)
    new_a, new_b = best_factors(a, b, 2)
    assert torch.equal(new_a, a[:2])
    assert not new_b.any()
    b[:, 1] = torch.randn(6, generator=generator)
    new_a, new_b = best_factors(a, b, 3)
    # 1e-5: float32 factors of a product of order one
    torch.testing.assert_close(new_b @ new_a, b @ a, atol=1e-5, rtol=0)
    assert not new_b[:, 1:].any()
    assert (new_a.norm(dim=1) > 0.5).all()


@pytest.mark.parametrize("trained", [False, True])
def test_growth_changes_no_output(trained: bool) -> None:
    layer = make_layer(2, trained=trained)
    # left behind by an earlier life of these slices
    with torch.no_grad():
        layer.lora_B[:, 2:] = 1.0
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(2))
    before = layer(x)
    resize(layer, 5, make_states(layer))
    # 1e-6: sums of float32 products with zeros among them
    torch.testing.assert_close(layer(x), before, atol=1e-6, rtol=1e-6)
    assert layer.rank == 5


def test_growth_keeps_moments_and_starts_new_ones_at_the_size_of_the_others() -> None:
    layer = make_layer(2)
    states = make_states(layer)
    old = {parameter: {name: value.clone() for name, value in kept.items()} for parameter, kept in states.items()}
    resize(layer, 4, states)
    for parameter, rows in ((layer.lora_A, lambda moment: moment), (layer.lora_B, lambda moment: moment.T)):
        assert states[parameter]["step"] == 11.0
        for name in ("exp_avg", "exp_avg_sq"):
            now, was = rows(states[parameter][name]), rows(old[parameter][name])
            assert torch.equal(now[:2], was[:2])
            expected = was[:2].mean(dim=0) if name == "exp_avg_sq" else torch.zeros(was.shape[1])
            assert torch.equal(now[2], expected)
            assert torch.equal(now[3], expected)
            assert not now[4:].any()


def test_the_first_steps_of_a_slice_that_joined_are_not_longer_than_those_of_the_others() -> None:
    layer = make_layer(2)
    adam = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-3, weight_decay=0.0)
    x = torch.randn(64, 10, generator=torch.Generator().manual_seed(3))

    def step() -> float:
        before = layer.lora_B.detach().clone()
        adam.zero_grad()
        layer(x).square().mean().backward()
        adam.step()
        return float((layer.lora_B.detach() - before)[:, 2:].abs().max())

    for _ in range(100):
        step()
    resize(layer, 4, adam.state)
    assert all(step() < 2.5e-3 for _ in range(20))


def test_a_shrink_refactors_and_forgets_what_the_optimizer_knew() -> None:
    layer = make_layer(5)
    states = make_states(layer)
    a, b = (factor.detach().clone() for factor in layer.active())
    expected = best_factors(a, b, 2)
    resize(layer, 2, states)
    assert layer.rank == 2
    assert all(torch.equal(now, wanted) for now, wanted in zip(layer.active(), expected, strict=True))
    assert torch.equal(layer.lora_A[2:5], a[2:])
    assert not layer.lora_B[:, 2:].any()
    assert all(not value.any() for kept in states.values() for value in kept.values())
    x = torch.randn(5, 10)
    before = layer(x)
    resize(layer, 4, states)
    torch.testing.assert_close(layer(x), before, atol=1e-6, rtol=1e-6)


def test_the_same_rank_changes_nothing_and_no_optimizer_is_needed() -> None:
    layer = make_layer(3)
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    resize(layer, 3, {})
    assert torch.equal(layer.lora_A, a)
    assert torch.equal(layer.lora_B, b)
    resize(layer, 4, {})
    resize(layer, 2, {})
    assert layer.rank == 2


def test_a_rank_that_was_not_allocated_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 7 of an adapter must lie between 1 and max_rank 6"):
        resize(make_layer(3), 7, {})
