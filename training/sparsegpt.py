"""SparseGPT: prune column after column, and let the columns to come make up for the error."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_export.training.gram import Gram
from losa_export.training.scores import Amount

_BLOCK_COLUMNS = 128


def sparsegpt(weight: Tensor, gram: Gram, amount: Amount, kept_before: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Prune by w²/U_jj², where UᵀU is the inverse of the damped Gram matrix, and compensate.

    In blocks of 128 columns (the largest multiple of M up to that, for a pattern), exactly
    ⌊out · columns · sparsity + 1e-6⌋ weights go, compared over all rows of the block jointly; a pattern is chosen
    when its first column is reached. What was pruned before counts, and stays pruned: compensation may move such a
    weight, but when its column is reached it is pruned again and its move compensated in turn. Weights of inputs
    that were never active score zero, so they go first; those that stay are left as they are.

    Args:
        weight: (out, in) effective weight, zero where pruned; computed in float32, or float64 if it is that.
        gram: second moments of its inputs.
        amount: how much is to be pruned in all.
        kept_before: (out, in) bool, the mask so far.
        damping: part of the Gram matrix's mean diagonal that is added to it.
    Returns: (out, in) bool mask, True = keep, and (out, in) compensated weight, zero where pruned.
    Raises: ConfigError if the damped Gram matrix is singular.
    Source: Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        arXiv:2301.00774. The published code prunes one weight more in each block, and forgets earlier masks.
    """
    precise = weight.dtype if weight.dtype == torch.float64 else torch.float32
    current, kept = weight.to(precise, copy=True), kept_before.clone()
    factor, dead = gram.inverse_factor(damping).to(precise), gram.dead
    step = _BLOCK_COLUMNS if amount.kept is None else max(1, _BLOCK_COLUMNS // amount.width) * amount.width
    for start in range(0, weight.shape[1], step):
        part = slice(start, min(start + step, weight.shape[1]))
        # Columns as rows, so that each is contiguous.
        columns, inner = current[:, part].T.contiguous(), factor[part, part]
        scale = inner.diagonal().square().reciprocal().masked_fill(dead[part], 0.0)
        if amount.kept is None:
            scores = columns.T.square() * scale
            kept[:, part] = amount.select(scores, kept[:, part], jointly=True)
        errors = torch.zeros_like(columns)
        for place in range(columns.shape[0]):
            if amount.kept is not None and place % amount.width == 0:
                group = slice(place, place + amount.width)
                chosen = slice(start + place, start + place + amount.width)
                scores = columns[group].T.square() * scale[group]
                kept[:, chosen] = amount.select(scores, kept[:, chosen])
            gone = columns[place].masked_fill(kept[:, start + place], 0.0)
            errors[place] = gone / inner[place, place]
            columns[place:] -= torch.outer(inner[place, place:], errors[place])
        current[:, part] = columns.T
        current[:, part.stop :] -= errors.T @ factor[part, part.stop :]
    return kept, current.mul_(kept)
