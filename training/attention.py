"""Causal attention as plain products of matrices: where bfloat16 multiplies fast, two to three times PyTorch's own.

PyTorch's fused attention for CPUs takes its small products one at a time from a library that has no fast bfloat16 on
processors with AVX512-BF16 but without AMX; `torch.bmm` takes them from oneDNN, which has. The price is memory: a
window's probabilities are kept for the backward pass, heads × tokens² of them in each block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# The name under which transformers finds this attention.
NAME = "losa_products"

# Windows of more tokens go to PyTorch's attention: 9 heads × 1,024² bfloat16 is 19 MB a window and block.
_MOST_TOKENS = 1024

# Settings that change nothing here, or are minded: no window slides over sequences that have no mask.
_UNDERSTOOD = {"dropout", "scaling", "is_causal", "position_ids", "sliding_window", "use_cache", "cache_position"}


def register() -> str:
    """Make this attention known to transformers. Returns: its name, for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def helps(compute: torch.dtype, device: torch.device) -> bool:
    """Whether products in `compute` are so much faster on `device` that this attention is too."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return device.type == "cpu" and compute == torch.bfloat16 and bool(native())


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """What transformers calls: (windows, heads, tokens, width) each to (windows, tokens, heads, width)."""
    asked = {name for name, setting in settings.items() if setting is not None and setting is not False}
    # Whatever else a family asks of attention is left to the implementation that knows it, or refuses it.
    plain = asked <= _UNDERSTOOD and not settings.get("dropout") and attention_mask is None
    plain = plain and settings.get("is_causal", getattr(module, "is_causal", True)) is not False
    tokens = query.shape[2]
    if not plain or key.shape != value.shape or key.shape[2] != tokens or not 1 < tokens <= _MOST_TOKENS:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        fused: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return fused
    scaling = settings.get("scaling")
    attended = causal_attention(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling)
    return attended.transpose(1, 2).contiguous(), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling·QKᵀ + causal mask)·V.

    Args:
        query: (windows, heads, tokens, width).
        key: (windows, groups, tokens, width); `heads` is a multiple of `groups`, which serve so many heads each.
        value: likewise.
        scaling: factor of the scores before the softmax.
    Returns: (windows, heads, tokens, width).
    """
    windows, heads, tokens, width = query.shape
    groups = key.shape[1]
    # The heads of a group read the same keys, so they are one product with more rows.
    rows = heads // groups * tokens
    future = torch.full((tokens, tokens), float("-inf"), dtype=query.dtype, device=query.device).triu_(1)
    products = torch.bmm(
        (query * scaling).reshape(windows * groups, rows, width),
        key.reshape(windows * groups, tokens, width).transpose(1, 2),
    )
    scores = products.view(windows, heads, tokens, tokens).add_(future)
    probabilities = torch.softmax(scores, dim=-1).view(windows * groups, rows, tokens)
    attended = torch.bmm(probabilities, value.reshape(windows * groups, tokens, width))
    return attended.view(windows, heads, tokens, width)
