"""Weights rounded to int8 levels or to a 16-entry int4 codebook, with one float16 scale per row and group of columns.

int8 scales put the largest kept weight of a group at level ±127.

int4 weights share one codebook of int8 levels, and each group has the scale that suits it best. Both come from least
squares (Lloyd, "Least squares quantization in PCM", 1982; Max, "Quantizing for minimum distortion", 1960), so levels
gather where kept weights lie and leave out what pruning emptied. With integer levels the codebook has a global
optimum that dynamic programming finds (Bruce, "Optimum quantization", 1965); Lloyd's iteration would stop at a local
one.

An error matters by what it does to the layer's output, so its square counts as much as the square of the column's
input. The exporter sees no inputs, but the mask has seen them: see `column_importance`. On weights pruned by Wanda this
halves the error of the outputs, and comes within a few percent of what calibration data would do
(docs/studies/codebooks.md).

All codes are chosen for the scale as it is stored, after rounding to float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import FormatError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
_Entry = TypeVar("_Entry", bound=np.generic)

LARGEST_LEVEL = 127
CODEBOOK_SIZE = 16

# float16: steps between subnormal numbers, the smallest normal number, the largest number.
_SMALLEST_STEP = 2.0**-24
_SMALLEST_NORMAL = 2.0**-14
_LARGEST_SCALE = 65504.0

# Weights handled at a time: temporaries stay within a few MB, mostly in cache.
_WEIGHTS_AT_ONCE = 1 << 18

# Weights that the importance of columns, and that codebooks are fitted to: more do not lower the error. A column's
# threshold hangs on few of its weights, so it takes more of them.
_IMPORTANCE_SAMPLE = 1 << 20
_CODEBOOK_SAMPLE = 1 << 18

# After the first codebook, for absmax scales: further ones, each for the scales that suit the last.
CODEBOOK_REFITS = 2

# Scales that are tried for each group, in units of the absmax scale, before the fit by least squares.
_SCALE_TRIALS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2)

# The share of a column's kept weights that may lie below the threshold it is taken to have had.
_THRESHOLD_QUANTILE = 0.02
# A kept weight may be exactly zero for no reason; no column counts more than 10^4 times the usual.
_SMALLEST_THRESHOLD = 0.01

# Half-level cells of the histogram. The border between two integer levels is a multiple of 1/2, so each cell
# belongs to one level as a whole, and a table over cells finds the nearest level exactly.
_CELLS = 4 * LARGEST_LEVEL + 4
_FIRST_CELL = -2 * LARGEST_LEVEL - 2


@dataclass(frozen=True)
class Int8Weight:
    """A weight as level · scale.

    Attributes:
        levels: (N, K) int8 in [-127, 127], 0 where pruned.
        scales: (N, ceil(K / group)) float16, finite, ≥ 0; 0 for a group without a kept weight other than 0.
        group: columns that share a scale; the last group of a row may be short.
    """

    levels: NDArray[np.int8]
    scales: NDArray[np.float16]
    group: int

    def dequantise(self) -> Float32:
        """The (N, K) float32 weight that the levels stand for."""
        return self.levels.astype(np.float32) * _by_column(self.scales, self.group, self.levels.shape[1])


@dataclass(frozen=True)
class Int4Weight:
    """A weight as codebook[code] · scale.

    Attributes:
        codes: (N, K) uint8 in [0, 15]; 0 where pruned, which only the mask tells from a kept code 0.
        scales: (N, ceil(K / group)) float16, finite, ≥ 0; 0 for a group without a kept weight other than 0.
        codebook: (16,) int8, ascending, in [-127, 127].
        group: columns that share a scale; the last group of a row may be short.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    codebook: NDArray[np.int8]
    group: int

    def dequantise(self, keep: Bool) -> Float32:
        """The (N, K) float32 weight that the codes stand for, exactly 0 where `keep` is False."""
        values = self.codebook.astype(np.float32)[self.codes]
        values *= _by_column(self.scales, self.group, self.codes.shape[1])
        values[~keep] = 0
        return values


Rounded = Int8Weight | Int4Weight


@dataclass(frozen=True)
class KeptGroups:
    """The kept weights of some rows, group after group, without the groups that are all zero.

    Attributes:
        rows: which rows of the weight these are.
        keep: (n, K) bool, True where a weight of a living group is kept; its positions in order are the values'.
        living: (n, groups) bool, True for groups with a kept weight other than 0.
        values: (kept,) float32.
        costs: (kept,) float32, what a squared error of 1 in each costs.
        starts: (living groups,) where each group's values begin.
        counts: (living groups,) how many there are.
    """

    rows: slice
    keep: Bool
    living: Bool
    values: Float32
    costs: Float32
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    def absmax_scales(self) -> Float32:
        """Scales (living groups,) that put the largest magnitude at level 127, not rounded yet."""
        if not len(self.starts):
            return np.zeros(0, dtype=np.float32)
        largest: Float32 = np.maximum.reduceat(np.abs(self.values), self.starts)
        return largest / np.float32(LARGEST_LEVEL)

    def over(self, scales: Float32 | NDArray[np.float16]) -> Float32:
        """The values in units of their group's scale."""
        wide: Float32 = np.repeat(scales.astype(np.float32), self.counts)
        return self.values / wide

    def spread(self, scales: NDArray[np.float16]) -> NDArray[np.float16]:
        """Scales of the living groups as (n, groups), 0 for the others."""
        found = np.zeros(self.living.shape, dtype=np.float16)
        found[self.living] = scales
        return found


def quantise_int8(weight: Float32, keep: Bool, group: int) -> Int8Weight:
    """Round kept weights to int8 levels.

    Args:
        weight: (N, K) float32. What stands at pruned positions does not matter.
        keep: (N, K) bool, True = kept; all True for a dense weight.
        group: columns that share a scale, ≥ 1.

    Raises: FormatError if shapes differ, or a kept weight is not finite or beyond what float16 scales reach.
    """
    _check(weight, keep, group)
    rows, columns = weight.shape
    levels = np.zeros((rows, columns), dtype=np.int8)
    scales = np.zeros((rows, -(-columns // group)), dtype=np.float16)
    for part in kept_groups(weight, keep, group):
        stored = round_scales(part.absmax_scales())
        scales[part.rows] = part.spread(stored)
        levels[part.rows][part.keep] = np.clip(np.rint(part.over(stored)), -LARGEST_LEVEL, LARGEST_LEVEL)
    return Int8Weight(levels, scales, group)


def quantise_int4(weight: Float32, keep: Bool, group: int, *, importance: Float32 | None = None) -> Int4Weight:
    """Round kept weights to a codebook fitted to them.

    Args:
        weight: as `quantise_int8` takes it.
        keep: likewise.
        group: likewise.
        importance: (K,) ≥ 0, what a squared error in each column costs, best the mean square of the layer's input.
            None reads it off the weight and its mask.

    Raises: FormatError as `quantise_int8`.
    """
    _check(weight, keep, group)
    if importance is None:
        importance = column_importance(weight, keep)
    return apply_codebook(weight, keep, group, fit_codebook(weight, keep, group, importance), importance)


def column_importance(weight: Float32, keep: Bool) -> Float32:
    """What an error in each column costs, as far as a mask tells: (K,) float32 around 1.

    Wanda keeps a weight when |w| · ‖input of its column‖ is above the threshold of its row. So the smallest weights
    that a column kept are in inverse proportion to its input. After pruning by magnitude they are the same
    everywhere, and so is the importance; a weight without zeros tells nothing and gets 1.
    """
    rows = _sampled_rows(weight, _IMPORTANCE_SAMPLE)
    kept = keep[rows]
    if kept.all():
        return np.ones(weight.shape[1], dtype=np.float32)
    ordered = np.sort(np.where(kept, np.abs(weight[rows]), np.inf), axis=0)
    counts = np.count_nonzero(kept, axis=0)
    place = (counts * _THRESHOLD_QUANTILE).astype(np.int64)
    thresholds = np.take_along_axis(ordered, place[None], axis=0)[0]  # infinite for a column without kept weights
    known = np.isfinite(thresholds) & (thresholds > 0)
    if not known.any():
        return np.ones(weight.shape[1], dtype=np.float32)
    usual = np.median(thresholds[known])
    importance: Float32 = np.square(usual / np.maximum(thresholds, _SMALLEST_THRESHOLD * usual)).astype(np.float32)
    return importance


def fit_codebook(
    weight: Float32, keep: Bool, group: int, importance: Float32, *, refits: int = CODEBOOK_REFITS
) -> NDArray[np.int8]:
    """One codebook for a weight: first for absmax scales, then for the scales that suit the last codebook.

    Args:
        weight: as `quantise_int4` takes it.
        keep: likewise.
        group: likewise.
        importance: likewise.
        refits: codebooks after the first; 0 leaves it at the one for absmax scales.

    Returns: (16,) int8, strictly ascending.
    """
    rows = _sampled_rows(weight, _CODEBOOK_SAMPLE)
    codebook = optimal_codebook(_moments(weight, keep, group, importance, rows, None))
    for _ in range(refits):
        codebook = optimal_codebook(_moments(weight, keep, group, importance, rows, codebook))
    return codebook


def apply_codebook(
    weight: Float32, keep: Bool, group: int, codebook: NDArray[np.int8], importance: Float32, *, search: bool = True
) -> Int4Weight:
    """Choose scales for a codebook, and the nearest code for each kept weight.

    Args:
        weight: as `quantise_int4` takes it.
        keep: likewise.
        group: likewise.
        codebook: (16,) int8, ascending.
        importance: as `quantise_int4` takes it.
        search: False for absmax scales instead of those that suit the codebook.
    """
    rows, columns = weight.shape
    codes = np.zeros((rows, columns), dtype=np.uint8)
    scales = np.zeros((rows, -(-columns // group)), dtype=np.float16)
    for part in kept_groups(weight, keep, group, importance):
        stored = round_scales(suited_scales(part, codebook) if search else part.absmax_scales())
        scales[part.rows] = part.spread(stored)
        codes[part.rows][part.keep] = nearest_codes(part.over(stored), codebook)
    return Int4Weight(codes, scales, codebook, group)


def suited_scales(part: KeptGroups, codebook: NDArray[np.int8]) -> Float32:
    """The scale of each living group with the least squared error for a codebook, not rounded yet.

    A few scales are tried. For the codes that one leads to, the best scale is s = Σ c·w·level / Σ c·level², with c
    the cost, and it takes s · Σ c·w·level off the error that no weight at all would leave: the most wins.
    """
    scales = part.absmax_scales()
    if not len(scales):
        return scales
    ratios = part.over(scales)
    weighted = part.values * part.costs
    levels = _nearest_table(codebook, codebook.astype(np.float32))
    squares = levels * levels
    most = np.zeros_like(scales)
    for trial in _SCALE_TRIALS:
        cells = _cells(ratios / np.float32(trial))
        products = np.add.reduceat(weighted * levels.take(cells), part.starts)
        fit = products / np.add.reduceat(part.costs * squares.take(cells), part.starts)
        # A fit is not positive where the few weights of a group are small beside every level: it never wins.
        gain = np.where(fit > 0, fit * products, 0)
        scales = np.where(gain > most, fit, scales)
        most = np.maximum(gain, most)
    return scales


def nearest_codes(ratios: Float32, codebook: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Index of the codebook level nearest to each value of `ratios`, any shape."""
    codes: NDArray[np.uint8] = _nearest_table(codebook, np.arange(CODEBOOK_SIZE, dtype=np.uint8)).take(_cells(ratios))
    return codes


def level_lookup(codebook: NDArray[np.int8]) -> Callable[[Float32], Float32]:
    """A function that gives the codebook level nearest to each of its values, any shape, as float32."""
    table = _nearest_table(codebook, codebook.astype(np.float32))
    return lambda ratios: table.take(_cells(ratios))


def optimal_codebook(moments: Float64) -> NDArray[np.int8]:
    """The 16 integer levels in [-127, 127] with the least squared error for a histogram over half-level cells.

    Args:
        moments: (3, cells): in each cell the sum of cost, of cost · value and of cost · value², where cost says what
            a squared error of 1 in that value costs.

    Returns: (16,) int8, strictly ascending.
    """
    levels = np.arange(-LARGEST_LEVEL, LARGEST_LEVEL + 1, dtype=np.float64)
    cumulated = [np.concatenate([[0.0], np.cumsum(moment)]) for moment in moments]

    def error(level: Float64, begin: NDArray[np.int64], end: NDArray[np.int64]) -> Float64:
        """Squared error of the cells begin … end - 1 when they go to `level`."""
        sums = [moment[end] - moment[begin] for moment in cumulated]
        result: Float64 = sums[2] - 2 * level * sums[1] + level * level * sums[0]
        return result

    at = (2 * levels).astype(np.int64) - _FIRST_CELL  # the cell that begins at a level
    low, high = levels[:, None], levels[None, :]
    middle = (at[:, None] + at[None, :]) // 2
    between = error(low, np.broadcast_to(at[:, None], middle.shape), middle)
    between = between + error(high, middle, np.broadcast_to(at[None, :], middle.shape))
    between[np.tril_indices(len(levels))] = np.inf  # the next level is a higher one
    best = error(levels, np.zeros_like(at), at)
    before = []
    for _ in range(CODEBOOK_SIZE - 1):
        total = best[:, None] + between
        before.append(total.argmin(axis=0))
        best = total.min(axis=0)
    chosen = [int((best + error(levels, at, np.full_like(at, _CELLS))).argmin())]
    for step in reversed(before):
        chosen.append(int(step[chosen[-1]]))
    return levels[chosen[::-1]].astype(np.int8)


def kept_groups(
    weight: Float32, keep: Bool, group: int, importance: Float32 | None = None, rows: range | None = None
) -> Iterator[KeptGroups]:
    """The kept weights, some rows at a time.

    Args:
        weight: (N, K) float32.
        keep: (N, K) bool.
        group: columns that share a scale.
        importance: (K,) float32; None for costs of 1.
        rows: those to go through; None for all.
    """
    columns = weight.shape[1]
    firsts = np.arange(0, columns, group)
    rows = range(len(weight)) if rows is None else rows
    at_once = _rows_at_once(columns)
    for first in range(0, len(rows) if columns else 0, at_once):
        chosen = rows[first : first + at_once]
        part = slice(chosen.start, chosen.stop, chosen.step)
        kept = keep[part]
        values = np.where(kept, weight[part], np.float32(0))
        living = np.logical_or.reduceat(values != 0, firsts, axis=1)
        kept = kept & np.repeat(living, group, axis=1)[:, :columns]
        counts = np.add.reduceat(kept, firsts, axis=1, dtype=np.int64)[living]
        costs = np.ones(1, np.float32) if importance is None else importance.astype(np.float32)
        yield KeptGroups(
            rows=part,
            keep=kept,
            living=living,
            values=values[kept],
            costs=np.broadcast_to(costs, kept.shape)[kept],
            starts=np.cumsum(counts) - counts,
            counts=counts,
        )


def round_scales(scales: Float32) -> NDArray[np.float16]:
    """Round to float16; upward where steps are coarse, so that no weight lies far beyond the last level."""
    upward = np.ceil(scales / _SMALLEST_STEP) * _SMALLEST_STEP
    within = np.minimum(np.where(scales < _SMALLEST_NORMAL, upward, scales), _LARGEST_SCALE)
    return within.astype(np.float16)


def _moments(
    weight: Float32, keep: Bool, group: int, importance: Float32, rows: range, codebook: NDArray[np.int8] | None
) -> Float64:
    """Histogram, as `optimal_codebook` takes it, over the scales that suit `codebook`, or absmax ones for None."""
    moments = np.zeros((3, _CELLS))
    for part in kept_groups(weight, keep, group, importance, rows):
        scales = round_scales(part.absmax_scales() if codebook is None else suited_scales(part, codebook))
        ratios = part.over(scales)
        cells = _cells(ratios)
        # An error of one level is one scale in the weight.
        costs = part.costs * np.repeat(np.square(scales.astype(np.float64)), part.counts)
        for moment in moments:
            moment += np.bincount(cells, costs, minlength=_CELLS)
            costs = costs * ratios
    return moments


def _sampled_rows(weight: Float32, size: int) -> range:
    """Rows at even distances that hold about `size` weights, or all."""
    return range(0, len(weight), max(1, -(-weight.size // size)))


def _check(weight: Float32, keep: Bool, group: int) -> None:
    if weight.ndim != 2 or keep.shape != weight.shape or keep.dtype != np.bool_:
        raise FormatError(
            f"mask {keep.dtype} {keep.shape} does not fit a weight of shape {weight.shape}; give bool of the same shape"
        )
    if group < 1:
        raise FormatError(f"a scale for groups of {group} columns is not possible; give a group of 1 or more")
    largest = 0.0
    for first in range(0, len(weight), rows := _rows_at_once(weight.shape[1])):
        kept = np.where(keep[first : first + rows], np.abs(weight[first : first + rows]), 0)
        part = float(kept.max(initial=0))
        if not np.isfinite(part):
            row, column = np.argwhere(~np.isfinite(kept))[0]
            raise FormatError(
                f"the weight at row {first + row}, column {column} is {weight[first + row, column]}, which has no "
                "level; mend the checkpoint",
                row=int(first + row),
                column=int(column),
            )
        largest = max(largest, part)
    if largest / LARGEST_LEVEL > _LARGEST_SCALE:
        raise FormatError(
            f"the largest weight is {largest:.4g}, but float16 scales reach {_LARGEST_SCALE * LARGEST_LEVEL:.4g}; "
            "choose the value type fp32 or bf16 for this weight",
            largest=largest,
        )
    # Below this the step between float16 scales costs more than rounding to 127 levels of the largest weight would.
    # Single groups may be that small: then their error is, too.
    if 0 < largest < LARGEST_LEVEL * _SMALLEST_STEP:
        raise FormatError(
            f"the largest weight is {largest:.4g}, but float16 scales resolve only "
            f"{LARGEST_LEVEL * _SMALLEST_STEP:.4g}; choose the value type fp32 or bf16 for this weight",
            largest=largest,
        )


def _rows_at_once(columns: int) -> int:
    return max(1, _WEIGHTS_AT_ONCE // max(1, columns))


def _nearest_table(codebook: NDArray[np.int8], entries: NDArray[_Entry]) -> NDArray[_Entry]:
    """For each half-level cell, the entry that belongs to its nearest level."""
    centres = (np.arange(_CELLS) + _FIRST_CELL + 0.5) / 2
    nearest = np.abs(centres[:, None] - codebook.astype(np.float64)).argmin(axis=1)
    table: NDArray[_Entry] = entries[nearest]
    return table


def _cells(ratios: Float32) -> NDArray[np.intp]:
    """Half-level cell of each value; values beyond the last level count to the outermost cells."""
    # Truncation is floor from 0 on, and much faster.
    cells = np.clip(ratios * 2 - _FIRST_CELL, 0, _CELLS - 1)
    return cells.astype(np.intp)


def _by_column(scales: NDArray[np.float16], group: int, columns: int) -> Float32:
    return np.repeat(scales.astype(np.float32), group, axis=1)[:, :columns]
