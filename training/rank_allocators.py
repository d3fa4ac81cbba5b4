"""Sharing rank out among blocks by their reconstruction errors: pure functions of L-vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_export.training.sparsity_allocators import FloatVector

IntVector = NDArray[np.int64]

# Stands for an error of zero, beside a largest of one: such a block gets rank only when the others are full.
_NO_ERROR = 1e-12
# Parts of a rank that differ by less are equal: they come from a division, and ties have an order of their own.
_DECIMALS = 9


def rank_budget(mean_rank: float, blocks: int, min_rank: int, max_rank: int) -> int:
    """R = round(mean_rank · L), and no more nor less than the bounds of the blocks allow."""
    return min(max(round(mean_rank * blocks), min_rank * blocks), max_rank * blocks)


def uniform_ranks(budget: int, blocks: int) -> IntVector:
    """(L,) ranks that differ by at most 1 and add up to `budget`; the first blocks get the larger ones."""
    ranks = np.full(blocks, budget // blocks, dtype=np.int64)
    ranks[: budget % blocks] += 1
    return ranks


def requested_ranks(errors: FloatVector, budget: int) -> FloatVector:
    """(L,) shares of `budget` in proportion to `errors`, before any bound; equal ones if all errors are 0."""
    total = float(errors.sum())
    if total == 0.0:
        return np.full(errors.size, budget / errors.size, dtype=np.float64)
    return np.asarray(errors * (budget / total), dtype=np.float64)


def proportional_ranks(errors: FloatVector, budget: int, min_rank: int, max_rank: int) -> IntVector:
    """Rounded shares, clipped, and repaired by one pass of ±1: the released method.

    A surplus is taken from the smallest errors, a deficit goes to the largest. One pass may not be enough: with heavy
    tails the sum misses `budget`.

    Args:
        errors: (L,) finite, ≥ 0.
        budget: R.
        min_rank: smallest rank.
        max_rank: largest rank.
    Returns: (L,) ranks.
    Source: Huang et al. 2025, "Dynamic Low-Rank Sparse Adaptation", arXiv:2502.14816, as released.
    """
    ranks = np.clip(np.rint(requested_ranks(errors, budget)), min_rank, max_rank).astype(np.int64)
    missing = budget - int(ranks.sum())
    step, order = (1, np.argsort(-errors, kind="stable")) if missing > 0 else (-1, np.argsort(errors, kind="stable"))
    for block in order:
        if missing != 0 and min_rank <= ranks[block] + step <= max_rank:
            ranks[block] += step
            missing -= step
    return ranks


def water_filling_ranks(errors: FloatVector, budget: int, min_rank: int, max_rank: int) -> IntVector:
    """clip(κ·e, min_rank, max_rank) with the κ whose sum is `budget`, made whole.

    Floors first; what is left goes to the largest fractional parts, among equal ones to the larger error, then to
    the lower block. The sum is exact, a larger error never has a smaller rank, and a common factor of all errors
    changes nothing.

    Args:
        errors: (L,) finite, ≥ 0; all zero gives uniform ranks.
        budget: R, from min_rank · L to max_rank · L.
        min_rank: smallest rank.
        max_rank: largest rank.
    Returns: (L,) ranks.
    """
    largest = float(errors.max())
    if largest == 0.0:
        return uniform_ranks(budget, errors.size)
    scaled = np.maximum(errors / largest, _NO_ERROR)
    shares = np.clip(_level(scaled, budget, min_rank, max_rank) * scaled, min_rank, max_rank)
    shares = np.round(shares, _DECIMALS)
    ranks = np.floor(shares).astype(np.int64)
    # At most one more for each block that has a fractional part, and those lie below max_rank.
    order = np.lexsort((np.arange(errors.size), -errors, -np.round(shares - ranks, _DECIMALS)))
    ranks[order[: budget - int(ranks.sum())]] += 1
    return ranks


def _level(errors: FloatVector, budget: int, min_rank: int, max_rank: int) -> float:
    """κ with Σ clip(κ·e, min_rank, max_rank) = budget; the sum is piecewise linear in κ and rises."""
    corners = np.unique(np.concatenate([min_rank / errors, max_rank / errors]))
    sums = np.array([float(np.clip(corner * errors, min_rank, max_rank).sum()) for corner in corners])
    after = int(np.searchsorted(sums, budget))
    if after == 0:
        return float(corners[0])
    if after == corners.size:
        return float(corners[-1])
    # Between two corners the same blocks are free: solve for them alone.
    middle = 0.5 * (corners[after - 1] + corners[after])
    full, empty = middle * errors >= max_rank, middle * errors <= min_rank
    free = ~full & ~empty
    if not bool(free.any()):
        return float(corners[after])
    left = budget - max_rank * int(full.sum()) - min_rank * int(empty.sum())
    return float(left / errors[free].sum())
