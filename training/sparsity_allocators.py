"""Sharing a global sparsity out among blocks: pure functions of L-vectors, all float64.

Everywhere `weights` are the blocks' parts of all prunable weights, (L,) with sum 1, and a mean is weighted by them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import ConfigError

FloatVector = NDArray[np.float64]

# No block is emptied: a target of 1 would cut the model in two.
_MOST_SPARSE = 0.99
# Sums of a few float64 terms below 1.
_TOLERANCE = 1e-9


def band_half_width(target: float) -> float:
    """How far a block may lie from a global target: ±0.01 up to 0.5, ±0.02 up to 0.6, ±0.03 above.

    The released code names no value above 0.7; its last one is kept there.
    Source: Huang et al. 2025, "Dynamic Low-Rank Sparse Adaptation", arXiv:2502.14816, as released.
    """
    if target <= 0.5:
        return 0.01
    return 0.02 if target <= 0.6 else 0.03


def redundancy(rmi: FloatVector) -> FloatVector:
    """(L,) row sums of an (L, L) matrix of representation mutual information, without its diagonal."""
    return np.asarray(rmi.sum(axis=1) - np.diagonal(rmi), dtype=np.float64)


def band(target: float, half_width: float, previous: FloatVector) -> tuple[FloatVector, FloatVector]:
    """Lower and upper bound of each block, (L,) each: the band, never below `previous` nor at a block's last weights.

    Pruned weights stay pruned. Were the bound left out, a late round, whose rise is smaller than the band, would
    aim below what a block has already lost, and the whole would end up sparser than asked.
    """
    highest = min(target + half_width, max(target, _MOST_SPARSE))
    lower = np.maximum(max(target - half_width, 0.0), previous)
    return lower, np.maximum(highest, lower)


def lp_targets(
    scores: FloatVector, target: float, lower: FloatVector, upper: FloatVector, weights: FloatVector
) -> FloatVector:
    """The exact optimum of LoSA's linear program: least importance lost at a mean of `target` within bounds.

    All blocks start at their lower bound; in falling order of `scores` each is raised to its upper one until the mean
    is reached. Any falling function of the scores may be the importance, exp(−β·u) for every β among them: only
    the order counts. Among equal scores the lower block goes first.

    Args:
        scores: (L,) redundancy of each block.
        target: global sparsity.
        lower: (L,) bounds, as `band` gives them.
        upper: likewise.
        weights: (L,) parameters of each block, sum 1.
    Returns: (L,) targets.
    Raises: ConfigError if the bounds leave no room for the mean.
    """
    _check_room(target, lower, upper, weights)
    targets = lower.copy()
    left = target - float(weights @ lower)
    for block in np.argsort(-scores, kind="stable"):
        rise = min(float(upper[block] - lower[block]), max(left, 0.0) / float(weights[block]))
        targets[block] += rise
        left -= rise * float(weights[block])
    return targets


def linear_targets(
    scores: FloatVector,
    target: float,
    half_width: float,
    lower: FloatVector,
    upper: FloatVector,
    weights: FloatVector,
) -> FloatVector:
    """Targets that rise linearly with `scores` and fill the band: p + δ·(s − s̄)/max|s − s̄|, moved into bounds.

    Unlike the linear program's, they change little when the scores do. Arguments, result and errors are those of
    `lp_targets`; `half_width` is δ.
    """
    centred = scores - float(weights @ scores)
    largest = float(np.abs(centred).max())
    # Rounding of the mean must not be blown up to the width of the band.
    spread = centred / largest if largest > 1e-12 * float(np.abs(scores).max()) else np.zeros_like(scores)
    return within_bounds(target + half_width * spread, target, lower, upper, weights)


def owl_targets(outliers: FloatVector, target: float, spread: float, weights: FloatVector) -> FloatVector:
    """Blocks with more outliers keep more: densities span 2·`spread` linearly in `outliers`, mean kept.

    May leave [0, 1]; `within_bounds` mends that.

    Args:
        outliers: (L,) share of each block's scores that lie far above their mean.
        target: global sparsity.
        spread: λ.
        weights: (L,) parameters of each block, sum 1.
    Source: Yin et al. 2023, "Outlier Weighed Layerwise Sparsity", arXiv:2310.05175.
    """
    span = float(outliers.max() - outliers.min())
    if span == 0.0:
        return np.full_like(outliers, target)
    kept = (outliers - outliers.min()) / span * (2.0 * spread)
    return np.asarray(target - kept + float(weights @ kept), dtype=np.float64)


def atp_targets(target: float, difference: float, weights: FloatVector) -> FloatVector:
    """An arithmetic progression: each block is `difference` sparser than the one before it, mean kept.

    May leave [0, 1]; `within_bounds` mends that.
    Source: Huang et al. 2025, "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical
        Perspective", arXiv:2502.14770.
    """
    places = np.arange(weights.size, dtype=np.float64)
    return np.asarray(target + difference * (places - float(weights @ places)), dtype=np.float64)


def rescaled_targets(values: FloatVector, target: float, weights: FloatVector) -> FloatVector:
    """`values`, (L,) and positive somewhere, times the factor that makes their mean `target`."""
    return np.asarray(values * (target / float(weights @ values)), dtype=np.float64)


def within_bounds(
    wanted: FloatVector, target: float, lower: FloatVector, upper: FloatVector, weights: FloatVector
) -> FloatVector:
    """clip(wanted + τ, lower, upper) with the one shift τ that makes the mean `target`.

    Returns: (L,); `wanted` itself where it has that mean within bounds.
    Raises: ConfigError if the bounds leave no room for the mean.
    """
    _check_room(target, lower, upper, weights)
    if bool(np.all((wanted >= lower) & (wanted <= upper))) and abs(float(weights @ wanted) - target) <= _TOLERANCE:
        return wanted
    low, high = float((lower - wanted).min()), float((upper - wanted).max())
    # Each half gives one more bit; float64 has fewer than 100 between any two bounds here.
    for _ in range(100):
        middle = 0.5 * (low + high)
        if float(weights @ np.clip(wanted + middle, lower, upper)) < target:
            low = middle
        else:
            high = middle
    return np.asarray(np.clip(wanted + high, lower, upper), dtype=np.float64)


def _check_room(target: float, lower: FloatVector, upper: FloatVector, weights: FloatVector) -> None:
    least, most = float(weights @ lower), float(weights @ upper)
    if not least - _TOLERANCE <= target <= most + _TOLERANCE:
        raise ConfigError(
            f"a mean sparsity of {target:.6f} does not fit bounds whose means are {least:.6f} and {most:.6f}; "
            "keep allocator and band the same in every round",
            target=target,
        )
