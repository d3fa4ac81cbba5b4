from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from losa_export.training import loss
from losa_export.training.loss import next_token_loss


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_loss_and_gradient_equal_plain_cross_entropy(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(loss, "_CHUNK_ROWS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    head = torch.randn(30, 8, dtype=torch.float64, generator=generator)
    ids = torch.randint(0, 30, (2, 9), generator=generator)
    ours = next_token_loss(hidden, head, ids).total
    reference = functional.cross_entropy((hidden @ head.T)[:, :-1].reshape(-1, 30), ids[:, 1:].reshape(-1))
    # 1e-12: float64 sums of sixteen terms
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=0)
    mine, wanted = (torch.autograd.grad(3.0 * value, hidden)[0] for value in (ours, reference))
    torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)


def test_bfloat16_states_give_a_float32_loss() -> None:
    hidden = torch.randn(1, 5, 8).bfloat16().requires_grad_()
    value = next_token_loss(hidden, torch.randn(30, 8).bfloat16(), torch.randint(0, 30, (1, 5))).total
    assert value.dtype == torch.float32
    value.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.full((1, 3, 2), 1e4, requires_grad=True)
    value = next_token_loss(hidden, torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([[0, 1, 0]])).total
    value.backward()
    assert bool(torch.isfinite(value))
    assert hidden.grad is not None
    assert bool(torch.isfinite(hidden.grad).all())


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    with torch.no_grad():
        value = next_token_loss(torch.randn(1, 3, 2), torch.randn(4, 2), torch.tensor([[0, 1, 2]]))
    assert not value.total.requires_grad
