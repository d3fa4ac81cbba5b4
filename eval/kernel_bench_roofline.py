"""From which sparsity a kind of value pays: as measured, and as far as bytes alone could allow. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from losa_export.errors import BenchmarkError
from losa_export.eval.kernel_bench_weights import GROUP, ValueKind, bytes_per_weight
from losa_export.eval.stats import RatioEstimate


class Pays(StrEnum):
    """What the measurements let one say about a crossing."""

    EVERYWHERE = "everywhere"
    FROM = "from"
    UNDECIDED = "undecided"
    NOWHERE = "nowhere"


@dataclass(frozen=True)
class Crossing:
    """The sparsity above which ours is the faster one, within the sparsities measured.

    Attributes:
        pays: EVERYWHERE: the intervals lie above 1 at all sparsities. NOWHERE: below 1 at the highest. FROM: there is a
            crossing, and at the highest sparsity the interval lies above 1. UNDECIDED: it does not.
        sparsity: estimate from the ratios; None if they never stay at 1 or above.
        earliest: the same from the upper ends of the intervals.
        latest: the same from the lower ends.
    """

    pays: Pays
    sparsity: float | None
    earliest: float | None
    latest: float | None


def crossing(sparsities: Sequence[float], ratios: Sequence[RatioEstimate]) -> Crossing:
    """Where ratios, peer time over our time, come to 1 for good as sparsity rises.

    Between two measured sparsities the logarithm of the ratio is taken to run straight.

    Args:
        sparsities: fractions of zeros, strictly ascending, at least one.
        ratios: one for each.

    Raises: BenchmarkError if they are not that.
    """
    if not sparsities or len(ratios) != len(sparsities):
        raise BenchmarkError(f"{len(ratios)} ratios were given for {len(sparsities)} sparsities; give one for each")
    if any(second <= first for first, second in pairwise(sparsities)):
        raise BenchmarkError(f"the sparsities {list(sparsities)} do not ascend; sort them, each once")

    def last_rise(value: Callable[[RatioEstimate], float]) -> float | None:
        return last_crossing(sparsities, [value(ratio) for ratio in ratios])

    middle = last_rise(lambda ratio: ratio.ratio)
    earliest, latest = last_rise(lambda ratio: ratio.high), last_rise(lambda ratio: ratio.low)
    if latest is not None:
        pays = Pays.EVERYWHERE if all(ratio.low > 1 for ratio in ratios) else Pays.FROM
    else:
        pays = Pays.NOWHERE if earliest is None else Pays.UNDECIDED
    return Crossing(pays, middle, earliest, latest)


def last_crossing(sparsities: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The sparsity from which on all ratios are at least 1; the lowest one if all are, None if the last is not."""
    below = [index for index, ratio in enumerate(ratios) if ratio < 1]
    if not below:
        return sparsities[0]
    before = below[-1]
    if before == len(ratios) - 1:
        return None
    low, high = math.log(ratios[before]), math.log(ratios[before + 1])
    share = -low / (high - low)
    return sparsities[before] + share * (sparsities[before + 1] - sparsities[before])


def break_even_by_bytes(kind: ValueKind, peer_bytes: float, *, group: int = GROUP) -> float | None:
    """The sparsity at which our form of a weight takes as many bytes as the peer's; None if it never does.

    Below it ours cannot win where memory is the limit, however good the kernel.

    Args:
        kind: how our values are stored.
        peer_bytes: bytes of the peer for each weight.
        group: columns that share a scale.
    """

    def cost(sparsity: float) -> float:
        return bytes_per_weight(kind, sparsity, group=group)

    low, high = 0.0, 1.0
    if cost(low) <= peer_bytes:
        return low
    if cost(high) > peer_bytes:
        return None
    for _ in range(60):  # bisection: cost falls with sparsity
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= peer_bytes else (middle, high)
    return high


def roofline_us(weight_bytes: int, bandwidth: float) -> float:
    """Microseconds to read a weight at `bandwidth` bytes a second: no kernel can be faster on weights from memory."""
    return 1e6 * weight_bytes / bandwidth
