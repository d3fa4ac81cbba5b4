"""Statistics of timings: medians, spreads, percentiles, and a ratio with an interval and a verdict.

Pure functions of arrays. Timings are skewed and now and then disturbed, so everything rests on medians, and intervals
on ranks rather than on a normal law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import exp, inf, pi, sqrt, tan
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from losa_export.errors import BenchmarkError
from losa_export.eval.rank_intervals import rank_sum_interval, signed_rank_interval

PERCENTILES = (50, 90, 95, 99)
# The fewest for an interval at 95 % (`signed_rank_interval`).
MIN_BLOCKS = 6


class Verdict(StrEnum):
    """What an interval of a ratio lets one say."""

    FASTER = "FASTER"
    SLOWER = "SLOWER"
    NO_DIFFERENCE_SHOWN = "NO DIFFERENCE SHOWN"
    # Of a run that somebody else's work took part in, whatever its interval.
    NO_VERDICT = "NO VERDICT"


@dataclass(frozen=True)
class RatioEstimate:
    """How many times faster the candidate is than the baseline.

    Attributes:
        ratio: baseline time over candidate time, the centre of the blocks' ratios; above 1 the candidate is faster.
        low, high: ends of the interval at `confidence`.
        confidence: for example 0.95.
        blocks: paired blocks behind it.
        verdict: FASTER if low > 1, SLOWER if high < 1, else NO DIFFERENCE SHOWN; NO VERDICT where the machine was too
            busy to give one.
        smallest_shown: the smallest ratio (above 1) that an interval of this width could have told
            from 1, in either direction: a true speed-up below it would have gone unseen.
    """

    ratio: float
    low: float
    high: float
    confidence: float
    blocks: int
    verdict: Verdict
    smallest_shown: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width, as a fraction of the ratio."""
        return (self.high - self.low) / (2 * self.ratio)


def median(values: ArrayLike) -> float:
    """Median of at least one value.

    Raises:
        BenchmarkError: there is no value, or one is not finite.
    """
    return float(np.median(_checked(values)))


def median_absolute_deviation(values: ArrayLike) -> float:
    """Median distance from the median, in the unit of the values (not rescaled to a normal's deviation).

    Raises:
        BenchmarkError: there is no value, or one is not finite.
    """
    checked = _checked(values)
    return float(np.median(np.abs(checked - np.median(checked))))


def percentiles(values: ArrayLike, levels: Sequence[float] = PERCENTILES) -> dict[str, float]:
    """Percentiles by linear interpolation between order statistics, as {"p50": …, "p90": …}.

    Raises:
        BenchmarkError: there is no value, or one is not finite.
    """
    found = np.percentile(_checked(values), levels)
    return {f"p{level:g}": float(value) for level, value in zip(levels, found, strict=True)}


def agree_within(medians: Sequence[float], fraction: float, count: int = 2) -> bool:
    """Whether the last `count` medians lie within `fraction` of their smallest; False if there are fewer."""
    last = list(medians)[-count:]
    return len(last) == count and max(last) <= min(last) * (1 + fraction)


def verdict(low: float, high: float) -> Verdict:
    """The rule: FASTER only if the whole interval lies above 1, SLOWER only if it all lies below."""
    if low > 1:
        return Verdict.FASTER
    if high < 1:
        return Verdict.SLOWER
    return Verdict.NO_DIFFERENCE_SHOWN


def paired_ratio(baseline: ArrayLike, candidate: ArrayLike, *, confidence: float = 0.95) -> RatioEstimate:
    """How many times as long the baseline takes, with an interval over paired blocks.

    Within a block both sides were timed in turns, so what slowed a block slowed both: each block gives one ratio, of
    its median times. Their centre and its interval go by ranks (`rank_intervals`), which a few disturbed blocks move
    little.

    Args:
        baseline: (B, n) times of the baseline: n samples in each of B blocks, any one unit, above 0.
        candidate: (B, m) times of the candidate in the same blocks.
        confidence: coverage aimed at, between 0 and 1.
    Raises: BenchmarkError for fewer than six blocks, block counts that differ, or times not above 0.
    """
    logarithms = _log_ratios(baseline, candidate)
    found = signed_rank_interval(logarithms, confidence)
    if found is None:
        raise _too_few(len(logarithms))
    return _estimate(found, len(logarithms), confidence)


def change_of_ratio(
    before: tuple[ArrayLike, ArrayLike], after: tuple[ArrayLike, ArrayLike], *, confidence: float = 0.95
) -> RatioEstimate:
    """How many times larger a ratio has become from one run to another, with an interval.

    Both runs timed their candidate beside the same baseline, so that a machine which is slower on one day than on the
    other slows both sides of a ratio, and leaves it as it is.

    Args:
        before: times of baseline and candidate in the first run, as `paired_ratio` takes them.
        after: likewise of the second, which may have another number of blocks.
        confidence: coverage aimed at, between 0 and 1.
    Returns: an estimate above 1 if the candidate has become faster; `blocks` is the smaller number of blocks.
    Raises: BenchmarkError as `paired_ratio`.
    """
    first, second = _log_ratios(*before), _log_ratios(*after)
    found = rank_sum_interval(first, second, confidence)
    if found is None:
        raise _too_few(min(len(first), len(second)))
    return _estimate(found, min(len(first), len(second)), confidence)


def _log_ratios(baseline: ArrayLike, candidate: ArrayLike) -> NDArray[np.float64]:
    """(B,) logarithms of the blocks' ratios. Raises: BenchmarkError as `paired_ratio`."""
    base, cand = _blocks(baseline, "baseline"), _blocks(candidate, "candidate")
    blocks = base.shape[0]
    if cand.shape[0] != blocks:
        raise BenchmarkError(
            f"the baseline has {blocks} blocks and the candidate {cand.shape[0]}; a ratio needs pairs",
            baseline=blocks,
            candidate=cand.shape[0],
        )
    if blocks < MIN_BLOCKS:
        raise _too_few(blocks)
    return np.asarray(np.log(np.median(base, axis=1) / np.median(cand, axis=1)), dtype=np.float64)


def _too_few(blocks: int) -> BenchmarkError:
    return BenchmarkError(f"{blocks} blocks are too few for an interval; measure at least {MIN_BLOCKS}", blocks=blocks)


def _estimate(found: tuple[float, float, float], blocks: int, confidence: float) -> RatioEstimate:
    ratio, low, high = (exp(value) for value in found)
    return RatioEstimate(
        ratio=ratio,
        low=low,
        high=high,
        confidence=confidence,
        blocks=blocks,
        verdict=verdict(low, high),
        smallest_shown=max(ratio / low, high / ratio),
    )


def student_t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t: exact for one and two degrees of freedom, else the asymptotic expansion in 1/freedom.

    The expansion is within 0.3 % of the tables at 0.975 from three degrees of freedom on.

    Source: Abramowitz & Stegun 1964, formula 26.7.5.
    """
    if freedom == 1:
        return tan(pi * (probability - 0.5))
    if freedom == 2:
        centred = 2 * probability - 1
        return centred * sqrt(2 / (1 - centred**2))
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))


def mean_interval(differences: ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired differences with its interval by Student's t: (mean, low, high).

    Of a single difference nothing is known: its interval is everything.

    Raises:
        BenchmarkError: there is no value, or one is not finite.
    """
    values = _checked(differences)
    mean = float(values.mean())
    if values.size == 1:
        return mean, -inf, inf
    half = student_t_quantile(0.5 + confidence / 2, values.size - 1) * float(values.std(ddof=1)) / sqrt(values.size)
    return mean, mean - half, mean + half


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size == 0:
        raise BenchmarkError("there are no samples to summarise; measure at least one")
    if not np.isfinite(array).all():
        raise BenchmarkError("a sample is NaN or infinite; a clock or a division went wrong, measure again")
    return array


def _blocks(values: ArrayLike, side: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] == 0:
        raise BenchmarkError(
            f"samples of the {side} have shape {array.shape}, but must be (blocks, samples in a block)", side=side
        )
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise BenchmarkError(f"a time of the {side} is not a number above 0; measure again", side=side)
    return array
