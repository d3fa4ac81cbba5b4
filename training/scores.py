"""Which weights matter: tensors in, new tensors out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from losa_export.errors import MaskError

# Sits below every score, so that what is pruned is pruned first again.
_ALREADY_PRUNED = -1.0


def wanda_scores(weight: Tensor, input_sq_sum: Tensor) -> Tensor:
    """Importance of each weight: |W| times the L2 norm of its input feature.

    Args:
        weight: (out, in), any float dtype; computed in float32, or float64 if it is that.
        input_sq_sum: (in,) sum of squares of the feature over calibration tokens. A common factor, such as
            the number of tokens, changes no comparison.
    Returns: (out, in), finite, ≥ 0. Compare within a row only.
    Raises: MaskError if the `in` sizes differ.
    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
        arXiv:2306.11695.
    """
    if input_sq_sum.shape != weight.shape[1:]:
        raise MaskError(
            f"statistics of {tuple(input_sq_sum.shape)} input features do not fit a weight of shape "
            f"{tuple(weight.shape)}; calibrate on this model again"
        )
    precise = weight.dtype if weight.dtype == torch.float64 else torch.float32
    return weight.to(precise).abs() * input_sq_sum.to(precise).sqrt()


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W|, (out, in), in float32, or float64 if W is that: what needs no calibration."""
    precise = weight.dtype if weight.dtype == torch.float64 else torch.float32
    return weight.to(precise).abs()


@dataclass(frozen=True)
class Amount:
    """How much of a matrix is to be pruned in all, counting what is pruned already.

    Attributes:
        sparsity_fraction: zeros of an unstructured matrix.
        kept: N of an N:M pattern; None for an unstructured matrix.
        width: M of an N:M pattern.
    """

    sparsity_fraction: float
    kept: int | None = None
    width: int = 1

    def select(self, scores: Tensor, kept_before: Tensor, *, jointly: bool = False) -> Tensor:
        """The mask that prunes the least important weights.

        Args:
            scores: (out, in), ≥ 0; `in` is a multiple of M where there is a pattern.
            kept_before: (out, in) bool, the mask so far; what was pruned stays pruned.
            jointly: compare the weights of all rows with each other; otherwise each row loses the same number.
                A pattern compares within its groups alone.
        Returns: (out, in) bool, True = keep.
        """
        if self.kept is not None:
            columns, count = self.width, self.width - self.kept
        else:
            columns = scores.numel() if jointly else scores.shape[1]
            count = pruned_per_row(columns, self.sparsity_fraction)
        flat = select_kept(scores.reshape(-1, columns), count, kept_before.reshape(-1, columns))
        return flat.reshape(scores.shape)


def pruned_per_row(columns: int, sparsity_fraction: float) -> int:
    """Weights to prune in a row of `columns`: ⌊columns · sparsity + 1e-6⌋.

    The small term guards products such as 0.29 · 100 = 28.999…
    """
    return int(columns * sparsity_fraction + 1e-6)


def select_kept(scores: Tensor, prune_count: int, kept_before: Tensor) -> Tensor:
    """The mask that prunes the `prune_count` least important weights of each row.

    What was pruned stays pruned and counts towards `prune_count`; a row that has more pruned already keeps its
    mask. Among equal scores the lower column goes first, as in a stable sort.

    Args:
        scores: (out, in), ≥ 0.
        prune_count: weights to prune in each row, 0 to in.
        kept_before: (out, in) bool, the mask so far.
    Returns: (out, in) bool, True = keep.
    """
    if prune_count == 0:
        return kept_before.clone()
    ordered = scores.masked_fill(~kept_before, _ALREADY_PRUNED)
    # A selection, not a sort: the threshold is found in linear time, and only ties at it need an order.
    threshold = ordered.kthvalue(prune_count, dim=1, keepdim=True).values
    below = ordered < threshold
    tied = ordered == threshold
    needed = prune_count - below.sum(dim=1, keepdim=True)
    pruned = below | tied
    crowded = (tied.sum(dim=1, keepdim=True) > needed).squeeze(1)
    if bool(crowded.any()):
        rows = tied[crowded]
        first = rows & (rows.cumsum(dim=1) <= needed[crowded])
        pruned[crowded] = below[crowded] | first
    return kept_before & ~pruned
