"""The gradient operators, dropout before the adapter, and the teacher's view of a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from losa_export.training import adapter
from losa_export.training.adapter import MaskedLoRALinear, Operator


def make_layer(
    operator: Operator,
    *,
    density: float = 0.6,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
) -> MaskedLoRALinear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(10, 6, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer = MaskedLoRALinear(
        linear, max_rank=5, rank=3, scaling=2.0, generator=generator, operator=operator, dropout=dropout
    )
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    layer.set_mask(torch.rand(6, 10, generator=generator) < density)
    return layer


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 7, 10, dtype=dtype, generator=torch.Generator().manual_seed(1), requires_grad=True)
    return x, torch.randn(2, 7, 6, dtype=dtype, generator=torch.Generator().manual_seed(2))


def gradients(layer: MaskedLoRALinear) -> tuple[Tensor, ...]:
    x, signal = inputs()
    return torch.autograd.grad((layer(x) * signal).sum(), [x, layer.lora_A, layer.lora_B])


@pytest.mark.parametrize("operator", ["exact", "exact_bf16", "lors"])
def test_every_operator_is_exact_where_nothing_is_pruned(operator: Operator) -> None:
    layer = make_layer(operator, density=1.1)
    x, signal = inputs()
    a, b = layer.active()
    plain = functional.linear(x, layer.weight + 2.0 * b @ a, layer.bias)
    wanted = torch.autograd.grad((plain * signal).sum(), [x, layer.lora_A, layer.lora_B])
    for mine, other in zip(gradients(layer), wanted, strict=True):
        # 1e-12 relative: float64 sums of some hundred terms in two orders
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_rounding_to_bfloat16_moves_the_adapters_gradients_a_little_and_no_other() -> None:
    exact, rounded = gradients(make_layer("exact")), gradients(make_layer("exact_bf16"))
    assert torch.equal(rounded[0], exact[0])
    for mine, wanted in zip(rounded[1:], exact[1:], strict=True):
        # 2^-7 in norm: eight bits of mantissa, rounded half a dozen times on the way
        assert 0.0 < float((mine - wanted).norm()) < 2.0**-7 * float(wanted.norm())


@pytest.mark.parametrize("operator", ["exact", "lors"])
def test_a_weight_that_is_kept_for_the_backward_pass_changes_no_bit(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, sizes = [], []
    for times in (0, 1_000_000):
        monkeypatch.setattr(adapter, "_KEPT_BESIDE_INPUT", times)
        layer, kept = make_layer(operator), []

        def note(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            results.append(gradients(layer))
        sizes.append(sum(kept))
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))
    assert sizes[1] == sizes[0] + 6 * 10


def test_lors_equals_finite_differences_where_nothing_is_pruned() -> None:
    layer = make_layer("lors", density=1.1)
    x = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    # 1e-6: what gradcheck's differences over 1e-6 resolve in float64
    assert torch.autograd.gradcheck(lambda x, a, b: layer(x), (x, layer.lora_A, layer.lora_B), atol=1e-6)


def test_under_a_mask_lors_leaves_the_mask_out_of_the_adapters_gradients_alone() -> None:
    layer = make_layer("lors")
    x, signal = inputs()
    rows, features = signal.reshape(-1, 6), x.detach().reshape(-1, 10)
    a, b = (factor.detach() for factor in layer.active())
    output_exact = make_layer("exact")(x)
    torch.testing.assert_close(layer(x), output_exact, rtol=0, atol=0)
    mine, exact = gradients(layer), gradients(make_layer("exact"))
    torch.testing.assert_close(mine[0], exact[0], rtol=0, atol=0)
    # 1e-12 relative: float64 sums in two orders
    torch.testing.assert_close(mine[1][:3], 2.0 * b.T @ (rows.T @ features), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine[2][:, :3], 2.0 * (rows.T @ features) @ a.T, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(mine[1], exact[1])


@pytest.mark.parametrize("operator", ["exact", "exact_bf16", "lors"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_only_active_slices_of_the_adapters_get_gradients(operator: Operator, dropout: float) -> None:
    layer = make_layer(operator, dropout=dropout).train()
    x, signal = inputs()
    (layer(x) * signal).sum().backward()  # type: ignore[no-untyped-call]
    receivers = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert receivers == {"lora_A", "lora_B"}
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    assert bool((layer.lora_A.grad[3:] == 0).all())
    assert bool((layer.lora_B.grad[:, 3:] == 0).all())
    assert bool((layer.lora_A.grad[:3] != 0).any())
    assert bool((layer.lora_B.grad[:, :3] != 0).any())


@pytest.mark.parametrize("operator", ["exact", "exact_bf16", "lors"])
def test_bfloat16_activations_give_float32_gradients_to_float32_adapters(operator: Operator) -> None:
    layer = make_layer(operator, dtype=torch.float32)
    x, signal = inputs(torch.float32)
    (layer(x.bfloat16()).float() * signal).sum().backward()  # type: ignore[no-untyped-call]
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.dtype == torch.float32
    low = layer.lora_A.grad.clone()
    layer.lora_A.grad = None
    (layer(x) * signal).sum().backward()  # type: ignore[no-untyped-call]
    assert layer.lora_A.grad is not None
    # 3e-2 in norm: bfloat16 in two products in a row
    assert float((low - layer.lora_A.grad).norm()) < 3e-2 * float(low.norm())


@pytest.mark.parametrize("bias", [True, False])
def test_dropout_meets_the_adapter_alone_with_the_gradients_of_plain_autograd(bias: bool) -> None:
    layer = make_layer("exact", dropout=0.4, bias=bias).train()
    x, signal = inputs()
    torch.manual_seed(7)
    ours = layer(x)
    mine = torch.autograd.grad((ours * signal).sum(), [x, layer.lora_A, layer.lora_B])
    torch.manual_seed(7)
    a, b = layer.active()
    reference = functional.linear(x, layer.weight * layer.mask, layer.bias)
    reference = reference + functional.dropout(x, 0.4) @ (2.0 * (b @ a) * layer.mask).T
    wanted = torch.autograd.grad((reference * signal).sum(), [x, layer.lora_A, layer.lora_B])
    # 1e-12 relative: float64 sums in two orders
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    for left, right in zip(mine, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_a_new_layer_drops_nothing_before_it_is_put_into_training_mode() -> None:
    layer, plain = make_layer("exact", dropout=0.4), make_layer("exact")
    x, _ = inputs()
    assert torch.equal(layer(x), plain(x))
    assert not torch.equal(layer.train()(x), plain(x))


def test_the_dense_view_ignores_mask_adapters_and_a_changed_base_weight() -> None:
    layer = make_layer("exact")
    x, _ = inputs()
    expected = functional.linear(x, layer.weight.clone(), layer.bias)
    layer.set_weight(torch.zeros(6, 10, dtype=torch.float64))
    with layer.dense():
        assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x), expected)
