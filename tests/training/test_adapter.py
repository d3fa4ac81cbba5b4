from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from losa_export.errors import ConfigError, MaskError
from losa_export.training.adapter import MaskedLoRALinear, effective_weight

WEIGHT = torch.tensor([[0.5, -1.0, 0.2, 0.8], [-0.3, 0.4, 2.0, -0.1]])
MASK = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 0]], dtype=torch.uint8)
A = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]])
B = torch.tensor([[0.1, 0.2], [0.3, -0.1]])
X = torch.tensor([1.0, 2, 3, 4])


def make_layer(
    out: int = 6,
    features: int = 10,
    *,
    rank: int = 3,
    max_rank: int = 5,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
) -> MaskedLoRALinear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(features, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer = MaskedLoRALinear(linear, max_rank=max_rank, rank=rank, scaling=2.0, generator=generator)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    layer.set_mask(torch.rand(out, features, generator=generator) < 0.6)
    return layer


def plain(layer: MaskedLoRALinear, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The definition, left to autograd."""
    weight = (layer.weight + layer.scaling * b @ a) * layer.mask
    return x @ weight.T + (0 if layer.bias is None else layer.bias)


def worked_layer(rank: int) -> MaskedLoRALinear:
    linear = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(WEIGHT)
    layer = MaskedLoRALinear(linear, max_rank=2, rank=rank, scaling=2.0, generator=torch.Generator())
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    layer.set_mask(MASK.bool())
    return layer


def test_the_effective_weight_has_the_worked_values() -> None:
    # 1e-6: float32 sums of a few terms near 1
    expected = torch.tensor([[0, -0.6, 0, 1.2], [0, 0.2, 2.6, 0]])
    torch.testing.assert_close(worked_layer(2).merged(), expected, atol=1e-6, rtol=0)
    expected = torch.tensor([[0, -1.0, 0, 0.8], [0, 0.4, 2.6, 0]])
    torch.testing.assert_close(worked_layer(1).merged(), expected, atol=1e-6, rtol=0)


def test_the_layer_answers_the_worked_input_folded_and_unfolded() -> None:
    layer = worked_layer(2)
    # 1e-6 relative: float32 sums of four terms
    torch.testing.assert_close(layer(X), torch.tensor([3.6, 8.2]), rtol=1e-6, atol=0)
    with layer.folded():
        torch.testing.assert_close(layer(X), torch.tensor([3.6, 8.2]), rtol=1e-6, atol=0)


def test_pruned_positions_are_exactly_zero() -> None:
    layer = make_layer()
    assert torch.equal(layer.merged()[~layer.kept], torch.zeros(int((~layer.kept).sum())))


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_equal_those_of_plain_autograd_in_float64(bias: bool) -> None:
    layer = make_layer(dtype=torch.float64, bias=bias)
    x = torch.randn(2, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    signal = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((layer(x) * signal).sum(), [x, layer.lora_A, layer.lora_B])
    output = plain(layer, x, *layer.active())
    reference = torch.autograd.grad((output * signal).sum(), [x, layer.lora_A, layer.lora_B])
    for mine, wanted in zip(ours, reference, strict=True):
        # 1e-10: float64, some hundred terms of order 1
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)


def test_gradients_equal_finite_differences() -> None:
    layer = make_layer(4, 5, rank=2, max_rank=3, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    # 1e-6: what gradcheck's differences over 1e-6 resolve in float64
    assert torch.autograd.gradcheck(lambda x, a, b: layer(x), (x, layer.lora_A, layer.lora_B), atol=1e-6)


def test_only_adapters_get_gradients_and_sleeping_slices_get_zeros() -> None:
    layer = make_layer(rank=3, max_rank=5)
    layer(torch.randn(4, 10)).square().sum().backward()
    assert layer.weight.grad is None
    assert layer.bias is not None
    assert layer.bias.grad is None
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    assert bool((layer.lora_A.grad[3:] == 0).all())
    assert bool((layer.lora_B.grad[:, 3:] == 0).all())
    assert bool((layer.lora_A.grad[:3] != 0).any())
    assert bool((layer.lora_B.grad[:, :3] != 0).any())


def test_growing_into_untouched_components_changes_no_output() -> None:
    layer = make_layer(rank=3, max_rank=5)
    with torch.no_grad():
        layer.lora_B[:, 3:] = 0
    x = torch.randn(4, 10)
    before = layer(x)
    layer.set_rank(5)
    # 1e-6: the longer inner product may be summed in another order
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)


def test_a_bfloat16_base_is_widened_and_its_adapters_stay_float32() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.merged().dtype == torch.float32
    a, b = layer.active()
    expected = (layer.weight.float() + 2.0 * b @ a) * layer.mask
    # 1e-5: float32, three terms; fused multiply-add may round once less
    torch.testing.assert_close(layer.merged(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_activations_give_bfloat16_output_near_the_float32_one(dtype: torch.dtype) -> None:
    layer = make_layer(32, 64, rank=3, dtype=dtype, bias=False)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    exact = x @ layer.merged().T
    output = layer(x.bfloat16()).detach()
    assert output.dtype == torch.bfloat16
    # 3e-2 of the largest: bfloat16 keeps 8 bits of input, weight and output
    assert float((output.float() - exact).abs().max()) < 3e-2 * float(exact.abs().max())


def test_autocast_computes_in_its_dtype_and_gives_float32_gradients() -> None:
    layer = make_layer(32, 64, rank=3)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    a, b = layer.lora_A.grad.clone(), x.grad.clone()
    layer.lora_A.grad = x.grad = None
    layer(x).square().sum().backward()
    for low, exact in ((a, layer.lora_A.grad), (b, x.grad)):
        # 5e-2 in norm: bfloat16 in two products in a row
        assert float((low - exact).norm()) < 5e-2 * float(exact.norm())


def test_the_base_weight_is_never_written() -> None:
    layer = make_layer()
    before = layer.weight.clone()
    layer(torch.randn(4, 10)).sum().backward()
    with layer.folded():
        layer(torch.randn(4, 10))
    layer.set_mask(torch.zeros(6, 10, dtype=torch.bool))
    assert torch.equal(layer.weight, before)


def test_a_function_outside_the_layer_leaves_its_inputs_alone() -> None:
    weight, mask = WEIGHT.clone(), MASK.clone()
    effective_weight(weight, mask, A, B, 2.0)
    assert torch.equal(weight, WEIGHT)
    assert torch.equal(mask, MASK)


def test_the_start_depends_on_the_generator_and_leaves_the_output_dense() -> None:
    linear = nn.Linear(10, 6)
    first, second, other = (
        MaskedLoRALinear(linear, max_rank=4, rank=2, scaling=2.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.lora_A, second.lora_A)
    assert not torch.equal(first.lora_A, other.lora_A)
    assert float(first.lora_A.detach().abs().max()) <= 10**-0.5
    x = torch.randn(3, 10)
    # 1e-6: one bias addition, fused or not
    torch.testing.assert_close(first(x), linear(x), rtol=1e-6, atol=1e-6)


def test_a_rank_outside_the_allocation_is_an_error() -> None:
    layer = make_layer(max_rank=5)
    for rank in (0, 6):
        with pytest.raises(ConfigError, match=f"rank {rank} of an adapter must lie between 1 and max_rank 5"):
            layer.set_rank(rank)


def test_a_mask_of_another_shape_is_an_error() -> None:
    with pytest.raises(MaskError, match=r"mask of shape \(10, 6\) does not fit a weight of shape \(6, 10\)"):
        make_layer().set_mask(torch.ones(10, 6, dtype=torch.bool))


def test_the_layer_describes_itself() -> None:
    assert "in=10, out=6, rank=3/5, s=2" in repr(make_layer())


def test_a_changed_weight_leaves_the_dense_one_as_it_was_and_the_effective_one_as_asked() -> None:
    linear = nn.Linear(6, 4)
    dense = linear.weight.detach().clone()
    layer = MaskedLoRALinear(linear, max_rank=2, rank=2, scaling=2.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    kept = torch.arange(24).reshape(4, 6) % 3 != 0
    layer.set_mask(kept)
    assert not layer.weight_changed
    assert torch.equal(layer.dense_weight, dense)
    target = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    layer.set_effective_weight(target)
    # 1e-6: one float32 subtraction and one addition of numbers below 10
    torch.testing.assert_close(layer.merged(), target * kept, atol=1e-6, rtol=0)
    assert not layer.weight[~kept].any()
    assert layer.weight_changed
    assert torch.equal(layer.dense_weight, dense)
    assert torch.equal(linear.weight, dense)
    assert not layer.weight.requires_grad


def test_a_weight_of_another_shape_is_refused() -> None:
    layer = MaskedLoRALinear(nn.Linear(6, 4), max_rank=1, rank=1, scaling=2.0, generator=torch.Generator())
    for change in (layer.set_weight, layer.set_effective_weight):
        with pytest.raises(MaskError, match=r"weight of shape \(6, 4\) cannot replace one of shape \(4, 6\)"):
            change(torch.zeros(6, 4))
