"""Weights rounded to int8 levels or to a 16-entry int4 codebook, with one float16 scale per row and group of columns.

int8 scales put the largest kept weight of a group at level ±127. int4 weights share one codebook of int8 levels: the
solution of the Lloyd-Max problem (Lloyd, "Least squares quantization in PCM", 1982; Max, "Quantizing for minimum
distortion", 1960) for the kept weights, so it leaves out the dead zone around zero that pruning made. With levels
restricted to integers the problem is small enough for its global optimum, by dynamic programming over the levels
(Bruce, "Optimum quantization", 1965); Lloyd's own iteration would stop at a local one.

All codes are chosen for the scale as it is stored, after rounding to float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import FormatError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

LARGEST_LEVEL = 127
CODEBOOK_SIZE = 16

# float16: steps between subnormal numbers, the smallest normal number, the largest number.
_SMALLEST_STEP = 2.0**-24
_SMALLEST_NORMAL = 2.0**-14
_LARGEST_SCALE = 65504.0

# Weights handled at a time: temporaries stay within a few MB, mostly in cache.
_WEIGHTS_AT_ONCE = 1 << 18

# Weights that the codebook is fitted to. More change no level.
_SAMPLE_WEIGHTS = 1 << 21

# After the first codebook: further ones, each for the scales that suit the last. And scale refits for a codebook.
_CODEBOOK_REFITS = 2
_SCALE_REFITS = 2

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
    levels = np.empty((rows, columns), dtype=np.int8)
    scales = np.empty((rows, -(-columns // group)), dtype=np.float16)
    for part, kept, _ in _grouped(weight, keep, group, range(rows)):
        scales[part] = absmax_scales(kept)
        rounded = np.rint(_over_scale(kept, scales[part]))
        np.clip(rounded, -LARGEST_LEVEL, LARGEST_LEVEL, out=rounded)
        levels[part] = rounded.reshape(len(rounded), -1)[:, :columns]
    return Int8Weight(levels, scales, group)


def quantise_int4(weight: Float32, keep: Bool, group: int) -> Int4Weight:
    """Round kept weights to a codebook fitted to them.

    Args and Raises: as `quantise_int8`.
    """
    _check(weight, keep, group)
    codebook = _fitted_codebook(weight, keep, group)
    rows, columns = weight.shape
    codes = np.empty((rows, columns), dtype=np.uint8)
    scales = np.empty((rows, -(-columns // group)), dtype=np.float16)
    for part, kept, mask in _grouped(weight, keep, group, range(rows)):
        scales[part] = refitted_scales(kept, mask, absmax_scales(kept), codebook)
        chosen = nearest_codes(_over_scale(kept, scales[part]), codebook)
        chosen[(scales[part] == 0)[:, :, None] | ~mask] = 0
        codes[part] = chosen.reshape(len(chosen), -1)[:, :columns]
    return Int4Weight(codes, scales, codebook, group)


def absmax_scales(kept: Float32) -> NDArray[np.float16]:
    """Scales that put the largest magnitude of each group at level 127: (N, groups) from (N, groups, group)."""
    return _to_float16(np.abs(kept).max(axis=2, initial=0) / np.float32(LARGEST_LEVEL))


def refitted_scales(
    kept: Float32, mask: Bool, scales: NDArray[np.float16], codebook: NDArray[np.int8]
) -> NDArray[np.float16]:
    """Scales that fit a codebook in least squares: nearest codes, then Σ w·level / Σ level², a few times over.

    Args:
        kept: (N, groups, group) float32, 0 where pruned.
        mask: the same shape, True = kept.
        scales: (N, groups) to begin with.
        codebook: (16,) int8, ascending.
    """
    table = codebook.astype(np.float32)
    for _ in range(_SCALE_REFITS):
        levels = table[nearest_codes(_over_scale(kept, scales), codebook)]
        levels *= mask
        products = np.einsum("ngk,ngk->ng", kept, levels)
        squares = np.einsum("ngk,ngk->ng", levels, levels)
        # A fit that is not positive (a group whose few weights sit in the dead zone) tells nothing: keep the scale.
        fits = np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)
        fits = np.minimum(fits, _LARGEST_SCALE)
        scales = np.where((fits > 0) & (scales > 0), _to_float16(fits), scales)
    return scales


def nearest_codes(ratios: Float32, codebook: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Index of the codebook level nearest to each value of `ratios`, any shape."""
    centres = (np.arange(_CELLS) + _FIRST_CELL + 0.5) / 2
    table = np.abs(centres[:, None] - codebook.astype(np.float64)).argmin(axis=1).astype(np.uint8)
    codes: NDArray[np.uint8] = table[_cells(ratios)]
    return codes


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


def _fitted_codebook(weight: Float32, keep: Bool, group: int) -> NDArray[np.int8]:
    """One codebook for a weight: fitted to absmax scales first, then to the scales that suit the last codebook."""
    rows, columns = weight.shape
    sampled = range(0, rows, max(1, -(-rows * columns // _SAMPLE_WEIGHTS)))
    codebook = optimal_codebook(_moments(weight, keep, group, sampled, None))
    for _ in range(_CODEBOOK_REFITS):
        codebook = optimal_codebook(_moments(weight, keep, group, sampled, codebook))
    return codebook


def _moments(weight: Float32, keep: Bool, group: int, rows: range, codebook: NDArray[np.int8] | None) -> Float64:
    """Histogram, as `optimal_codebook` takes it, of the kept weights over the scales that suit `codebook`."""
    moments = np.zeros((3, _CELLS))
    for _, kept, mask in _grouped(weight, keep, group, rows):
        scales = absmax_scales(kept)
        if codebook is not None:
            scales = refitted_scales(kept, mask, scales, codebook)
        counted = mask & (scales > 0)[:, :, None]
        ratios = _over_scale(kept, scales)[counted].astype(np.float64)
        # An error of one level costs scale² in the weight.
        costs = np.square(np.broadcast_to(scales[:, :, None], mask.shape)[counted].astype(np.float64))
        cells = _cells(ratios)
        for power, moment in enumerate(moments):
            moment += np.bincount(cells, costs * ratios**power, minlength=_CELLS)
    return moments


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


def _grouped(weight: Float32, keep: Bool, group: int, rows: range) -> Iterator[tuple[slice, Float32, Bool]]:
    """Parts of the chosen rows as (n, groups, group): where they lie, the weights with 0 where pruned, the mask."""
    columns = weight.shape[1]
    padding = -columns % group
    at_once = _rows_at_once(columns)
    for first in range(0, len(rows), at_once):
        chosen = rows[first : first + at_once]
        part = slice(chosen.start, chosen.stop, chosen.step)
        mask = np.pad(keep[part], ((0, 0), (0, padding)))
        kept = np.where(mask, np.pad(weight[part], ((0, 0), (0, padding))), np.float32(0))
        shape = (len(mask), (columns + padding) // group, group)
        yield part, kept.reshape(shape), mask.reshape(shape)


def _over_scale(kept: Float32, scales: NDArray[np.float16]) -> Float32:
    """Weights (N, groups, group) in units of their group's scale; 0 where the scale is 0."""
    wide = scales.astype(np.float32)[:, :, None]
    result: Float32 = np.divide(kept, wide, out=np.zeros_like(kept), where=wide > 0)
    return result


def _cells(ratios: NDArray[np.floating]) -> NDArray[np.int32]:
    """Half-level cell of each value; values beyond the last level count to the outermost cells."""
    cells = np.floor(ratios * 2)
    np.clip(cells, _FIRST_CELL, _FIRST_CELL + _CELLS - 1, out=cells)
    result: NDArray[np.int32] = cells.astype(np.int32) - np.int32(_FIRST_CELL)
    return result


def _to_float16(scales: Float32) -> NDArray[np.float16]:
    """Round to float16; upward where steps are coarse, so that no weight lies far beyond the last level."""
    upward = np.ceil(scales / _SMALLEST_STEP) * _SMALLEST_STEP
    return np.where(scales < _SMALLEST_NORMAL, upward, scales).astype(np.float16)


def _by_column(scales: NDArray[np.float16], group: int, columns: int) -> Float32:
    return np.repeat(scales.astype(np.float32), group, axis=1)[:, :columns]
