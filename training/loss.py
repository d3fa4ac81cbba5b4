"""Next-token cross-entropy without ever holding the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Rows of logits alive at once: 256 × 49,152 float32 is 50 MB, where a batch of 1,024 tokens would need three
# times 200 MB (logits, softmax, gradient).
_CHUNK_ROWS = 256


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softmax(h Wᵀ); the gradient for h is made in the same pass, W gets none."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        rows = hidden.shape[0]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, rows, _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            logits = functional.linear(hidden[part], head).to(torch.promote_types(hidden.dtype, torch.float32))
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            wanted = targets[part].unsqueeze(1)
            total += (log_sum - logits.gather(1, wanted)).sum(dtype=torch.float64)
            if grad is not None:
                probabilities = logits.sub_(log_sum).exp_()
                probabilities.scatter_add_(1, wanted, torch.full_like(log_sum, -1.0))
                grad[part] = (probabilities.to(head.dtype) @ head).div_(rows)
        ctx.save_for_backward(grad)
        return (total / rows).to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output.to(grad.dtype), None, None


def next_token_loss(hidden: Tensor, head: Tensor, input_ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of every token but the first of each window.

    Args:
        hidden: (windows, tokens, hidden) final hidden states.
        head: (vocabulary, hidden) frozen output embedding.
        input_ids: (windows, tokens) int64, without padding.
    Returns: scalar, float32 or better; sums are float64.
    """
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = input_ids[:, 1:].reshape(-1)
    loss: Tensor = _FrozenHeadCrossEntropy.apply(states, head, targets)  # type: ignore[no-untyped-call]
    return loss


class CausalLoss(nn.Module):
    """A causal language model that returns its loss: one module for accelerate to wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.causal_model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Mean next-token loss of (windows, tokens) int64."""
        output = self.causal_model.get_submodule("model")(input_ids=input_ids, use_cache=False)
        head = self.causal_model.get_parameter("lm_head.weight")
        return next_token_loss(output.last_hidden_state, head, input_ids)
