"""Centres of small samples and intervals that hold whatever the distribution, by ranks instead of variances.

A timing that the system disturbed is large beyond any normal law; by its rank it is one value above the middle and no
more. Coverage is exact for one sample that is symmetric about its centre, and for two of which one is the other, moved.

Source: Hodges and Lehmann 1963, "Estimates of Location Based on Rank Tests", Annals of Mathematical Statistics 34(2);
intervals as in Hollander, Wolfe and Chicken 2014, "Nonparametric Statistical Methods", sections 3.3 and 4.3.
"""

from __future__ import annotations

from math import comb, floor, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

# Up to so many values the distribution of ranks is counted; beyond, the normal law is as good.
_COUNTED = 60
Interval = tuple[float, float, float]


def signed_rank_interval(values: NDArray[np.float64], confidence: float = 0.95) -> Interval | None:
    """Centre of one sample with its interval: (centre, low, high); None where no interval is that sure.

    The centre is the median of the means of all pairs, each value paired with itself too. Six values are the fewest for
    95 %.
    """
    count = len(values)
    cut = _largest_rank(_signed_rank_tail(count), (1.0 - confidence) / 2.0)
    if cut is None:
        return None
    first, second = np.triu_indices(count)
    means = np.sort((values[first] + values[second]) / 2.0)
    return float(np.median(means)), float(means[cut]), float(means[-1 - cut])


def rank_sum_interval(
    before: NDArray[np.float64], after: NDArray[np.float64], confidence: float = 0.95
) -> Interval | None:
    """How far `after` lies above `before`, with its interval: (shift, low, high); None where none is that sure.

    The shift is the median of all differences between one value of each.
    """
    cut = _largest_rank(_rank_sum_tail(len(before), len(after)), (1.0 - confidence) / 2.0)
    if cut is None:
        return None
    differences = np.sort((after[:, None] - before[None, :]).reshape(-1))
    return float(np.median(differences)), float(differences[cut]), float(differences[-1 - cut])


def _largest_rank(tail: NDArray[np.float64], limit: float) -> int | None:
    """The largest k with P(rank ≤ k) ≤ limit, of the lower half of a distribution."""
    reached = int(np.searchsorted(tail, limit, side="right"))
    return reached - 1 if reached > 0 else None


def _signed_rank_tail(count: int) -> NDArray[np.float64]:
    """P(T ≤ k) for k from 0 to the mean, of the sum of those of 1 … count that a fair coin picks each."""
    mean = count * (count + 1) / 4.0
    if count > _COUNTED:
        deviation = sqrt(count * (count + 1) * (2 * count + 1) / 24.0)
        return _normal_tail(mean, deviation)
    ways = np.zeros(count * (count + 1) // 2 + 1)
    ways[0] = 1.0
    for rank in range(1, count + 1):
        ways[rank:] = ways[rank:] + ways[:-rank]
    return np.cumsum(ways[: floor(mean) + 1]) / 2.0**count


def _rank_sum_tail(first: int, second: int) -> NDArray[np.float64]:
    """P(U ≤ k) for k from 0 to the mean, of the pairs in which a value of the first sample is the larger one."""
    mean = first * second / 2.0
    if first + second > _COUNTED:
        return _normal_tail(mean, sqrt(first * second * (first + second + 1) / 12.0))
    # ways[m][s]: choices of m of the ranks so far whose sum is s above the smallest possible.
    ways = np.zeros((first + 1, first * second + 1))
    ways[0, 0] = 1.0
    for rank in range(1, first + second + 1):
        for chosen in range(min(first, rank), 0, -1):
            above = rank - chosen
            if above <= second:
                ways[chosen, above:] += ways[chosen - 1, : ways.shape[1] - above]
    return np.cumsum(ways[first, : floor(mean) + 1]) / comb(first + second, first)


def _normal_tail(mean: float, deviation: float) -> NDArray[np.float64]:
    """The same of a normal law, at half ranks since ranks are whole."""
    law = NormalDist(mean, deviation)
    return np.array([law.cdf(rank + 0.5) for rank in range(floor(mean) + 1)])
