from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from losa_export.training import attention
from losa_export.training.attention import causal_attention
from losa_export.training.config import TrainConfig
from losa_export.training.model import load_adapted_model

ConfigMaker = Callable[..., TrainConfig]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def heads(groups: int, tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((2, 6, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 8))
    return [randn(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("groups", [6, 3, 1])
@pytest.mark.parametrize("scaling", [8**-0.5, 1.0])
def test_it_computes_what_pytorchs_attention_does(groups: int, scaling: float) -> None:
    inputs = heads(groups, tokens=7)
    ours = causal_attention(*inputs, scaling)
    reference = functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=scaling, enable_gqa=True)
    # 1e-12: float64 sums of a few terms, in another order
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    weights = randn(*ours.shape, seed=9)
    for mine, wanted in zip(*(torch.autograd.grad(o, inputs, weights) for o in (ours, reference)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_no_token_sees_a_later_one() -> None:
    query, key, value = heads(2, tokens=5)
    before = causal_attention(query, key, value, 0.3)
    later = value.detach().clone()
    later[:, :, 3:] = torch.inf
    assert torch.equal(causal_attention(query, key, later, 0.3)[:, :, :3].isfinite().all(), torch.tensor(False))
    later[:, :, 3:] = 7.0
    assert torch.equal(causal_attention(query, key, later, 0.3)[:, :, :3], before[:, :, :3])


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_a_model_gives_the_same_answers_with_it(make_model: Callable[..., nn.Module], family: str) -> None:
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    answers = []
    for name in ("sdpa", attention.register()):
        model = make_model(family, attn_implementation=name).double()
        answers.append(model(input_ids=ids, use_cache=False).logits)
    # 1e-6: transformers takes the angles of rotary positions in float32
    torch.testing.assert_close(*answers, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 1},
        {"tokens": 2000},
        {"attention_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)},
        {"is_causal": False},
        {"dropout": 0.5},
        {"softcap": 30.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_it_does_not_know_is_left_to_pytorchs(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("causal_attention was called")

    monkeypatch.setattr(attention, "causal_attention", never)
    tokens = change.pop("tokens", 5)
    inputs = [randn(1, 2, tokens, 4, seed=i) for i in range(3)]
    mask = change.pop("attention_mask", None)
    arguments = {"dropout": 0.0, "scaling": 0.5} | change
    if "softcap" in change:
        with pytest.raises(ValueError, match="softcap"):
            attention._attend(nn.Module(), *inputs, mask, **arguments)
    else:
        output, _ = attention._attend(nn.Module(), *inputs, mask, **arguments)
        assert output.shape == (1, tokens, 2, 4)


def test_it_serves_bfloat16_on_processors_that_multiply_it_natively(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ConfigMaker
) -> None:
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        for compute in ("fp32", "bf16"):
            model = load_adapted_model(tiny_config(), compute).model  # type: ignore[arg-type]
            wanted = attention.NAME if native and compute == "bf16" else "sdpa"
            assert model.config._attn_implementation == wanted  # type: ignore[union-attr]
    assert not attention.helps(torch.bfloat16, torch.device("cuda"))
