"""Rounding in which the weights of a row make up for each other's errors.

A linear's output is off by (Ŵ - W) x, so errors of weights that meet correlated inputs can cancel. With second moments
of the inputs from calibration text the squared error of the outputs is known for any Ŵ:

    E‖x̂ Ŵᵀ - x Wᵀ‖² = Σ over rows  v H vᵀ - 2 v b + const,   H = E[x̂ᵀ x̂],   b = E[x̂ᵀ x] w,

where x are the inputs that the checkpoint has at that place, and x̂ those that come from linears which are rounded
already: so a linear also makes up for what earlier ones did to its input. Three steps lower that error for codes v,
pruned positions staying zero throughout:

1. columns in order of importance, each error pushed on to the kept weights that are left (Frantar et al. 2023, "GPTQ",
   arXiv:2210.17323; under a mask, as in Frantar and Alistarh 2023, "SparseGPT", arXiv:2301.00774);
2. coordinate descent: each code in turn to the best level, all others as they are. This sees a row's mask exactly, and
   never raises the error;
3. scales by least squares for the codes, then descent again.

A row keeps plain rounding where that was better. Matrices lie transposed here, (K, N), so that a column of the weight
is contiguous; rows of the weight do not depend on each other, so a few are taken at a time. Float32 throughout; sums
that decide between two roundings are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from losa_export.quantise import (
    CODEBOOK_SIZE,
    LARGEST_LEVEL,
    Bool,
    Float32,
    Float64,
    Int4Weight,
    Int8Weight,
    level_lookup,
    quantise_int4,
    quantise_int8,
    round_scales,
)

# Added to the diagonal of H, as a part of its mean: keeps it regular, and weights near those of the checkpoint.
_DAMPING = 0.01

# Sweeps of coordinate descent at a time, and how often scales are fitted anew: more gain less than a percent.
_SWEEPS = 2
_REFITS = 2

# The part that the old scale has in the fit of a new one.
_SCALE_DAMPING = 1e-6

# Columns whose errors are pushed on together; the rest of the row follows by one matrix product.
_BLOCK_COLUMNS = 64

# Weights handled at a time: a handful of float32 copies of them are alive at once.
_WEIGHTS_AT_ONCE = 1 << 22

Float16 = NDArray[np.float16]
_Nearest = Callable[[Float32], Float32]


@dataclass(frozen=True)
class InputMoments:
    """Second moments of a linear's inputs over calibration tokens.

    Attributes:
        gram: (K, K) float32, E[x̂ᵀ x̂] of the inputs as rounded blocks give them; symmetric.
        cross: (K, K) float32, E[x̂ᵀ x] with the inputs x that the checkpoint itself gives; `gram` where both agree.
    """

    gram: Float32
    cross: Float32


def compensated_int8(weight: Float32, keep: Bool, group: int, moments: InputMoments) -> Int8Weight:
    """Round kept weights to int8 levels for the least error of the outputs.

    Args:
        weight: (N, K) float32. What stands at pruned positions does not matter.
        keep: (N, K) bool, True = kept.
        group: columns that share a scale, ≥ 1.
        moments: of the inputs.

    Raises: FormatError as `quantise_int8`.
    """
    plain = quantise_int8(weight, keep, group)
    levels, scales = _compensate(weight, keep, _Geometry.of(moments), plain.levels, plain.scales, group, _to_int8)
    return Int8Weight(levels.astype(np.int8), scales, group)


def compensated_int4(weight: Float32, keep: Bool, group: int, moments: InputMoments) -> Int4Weight:
    """Round kept weights to a codebook for the least error of the outputs.

    The codebook is fitted to the weights by what an error in each column costs. That is H_jj if it stands alone and
    1 / (H⁻¹)_jj if all other weights make up for it as well as they can; under a mask and with 16 levels the truth lies
    between, and the geometric mean of both is what leaves the least error.

    Args:
        weight: as `compensated_int8` takes it.
        keep: likewise.
        group: likewise.
        moments: likewise.

    Raises: FormatError as `quantise_int4`.
    """
    geometry = _Geometry.of(moments)
    plain = quantise_int4(weight, keep, group, importance=geometry.importance())
    codebook = plain.codebook
    start = np.where(keep, codebook[plain.codes], np.int8(0))
    levels, scales = _compensate(weight, keep, geometry, start, plain.scales, group, level_lookup(codebook))
    code_of = np.zeros(2 * LARGEST_LEVEL + 1, dtype=np.uint8)
    code_of[codebook.astype(np.int64) + LARGEST_LEVEL] = np.arange(CODEBOOK_SIZE)
    codes = code_of[levels.astype(np.int64) + LARGEST_LEVEL]
    codes[~keep | np.repeat(scales == 0, group, axis=1)[:, : weight.shape[1]]] = 0
    return Int4Weight(codes, scales, codebook, group)


def output_errors(weight: Float32, restored: Float32, moments: InputMoments) -> Float64:
    """Mean squared error of each output with `restored`, less what does not depend on it: (N,) float64.

    It counts what the steps here count, damping included, so that errors of two roundings may be compared.

    Args:
        weight: (N, K) float32, 0 where pruned.
        restored: (N, K) float32.
        moments: of the inputs.
    """
    geometry = _Geometry.of(moments)
    return _errors(geometry.gram, geometry.cross @ weight.T, restored.T)


@dataclass(frozen=True)
class _Geometry:
    """What the inputs mean for all rows.

    Attributes:
        gram: (K, K) float32, damped, so positive definite.
        cross: (K, K) float32, likewise damped.
        inverse: (K, K) float64, of `gram`.
    """

    gram: Float32
    cross: Float32
    inverse: Float64

    @classmethod
    def of(cls, moments: InputMoments) -> _Geometry:
        mean = float(moments.gram.diagonal().mean(dtype=np.float64))
        # Inputs that were never anything but zero say nothing: every column counts the same.
        damping = np.eye(len(moments.gram), dtype=np.float32) * np.float32(_DAMPING * mean if mean > 0 else 1.0)
        gram = moments.gram + damping
        return cls(gram, moments.cross + damping, np.linalg.inv(gram.astype(np.float64)))

    def importance(self) -> Float32:
        """What an error in each column costs: (K,) float32 around 1."""
        found = np.sqrt(self.gram.diagonal() / self.inverse.diagonal())
        importance: Float32 = (found / found.mean()).astype(np.float32)
        return importance

    def order(self) -> NDArray[np.intp]:
        """Columns with the largest inputs first, while most weights are left to make up for their errors."""
        return np.argsort(-self.gram.diagonal(), kind="stable")


@dataclass(frozen=True)
class _Rows:
    """Some rows of a weight, transposed, with n of them side by side.

    Attributes:
        gram: (K, K) float32.
        target: (K, n) float32, b of each row.
        keep: (K, n) bool.
        nearest: the level nearest to each of some values in units of their scale.
        group: columns that share a scale.
    """

    gram: Float32
    target: Float32
    keep: Bool
    nearest: _Nearest
    group: int

    def in_order(self, weight: Float32, scales: Float16, order: NDArray[np.intp], factor: Float32) -> Float32:
        """Step 1: levels (K, n) for `weight` (K, n), 0 where pruned, and `scales` (groups, n).

        `factor` is the upper Cholesky factor of H⁻¹ with columns in that order.
        """
        left, keep = weight[order], self.keep[order]
        wide, over = (values[order] for values in self._wide(scales))
        levels = np.zeros_like(left)
        for block in _column_blocks(len(left)):
            errors = np.zeros((block.stop - block.start, left.shape[1]), dtype=np.float32)
            for place in range(block.start, block.stop):
                levels[place] = np.where(keep[place], self.nearest(left[place] * over[place]), 0)
                error = (left[place] - levels[place] * wide[place]) / factor[place, place]
                errors[place - block.start] = np.where(keep[place], error, 0)
                later = slice(place + 1, block.stop)
                left[later] -= np.multiply.outer(factor[place, later], errors[place - block.start]) * keep[later]
            left[block.stop :] -= (factor[block, block.stop :].T @ errors) * keep[block.stop :]
        back = np.empty_like(levels)
        back[order] = levels
        return back

    def descend(self, levels: Float32, scales: Float16) -> Float32:
        """Step 2: levels (K, n) from which no single change of a code lowers the error much."""
        wide, over = self._wide(scales)
        found, restored = levels.copy(), levels * wide
        for _ in range(_SWEEPS):
            for block in _column_blocks(len(levels)):
                slopes = self.gram[block] @ restored - self.target[block]
                for column in range(block.start, block.stop):
                    best = restored[column] - slopes[column - block.start] / self.gram[column, column]
                    found[column] = np.where(self.keep[column], self.nearest(best * over[column]), 0)
                    change = found[column] * wide[column] - restored[column]
                    restored[column] += change
                    later = slice(column + 1, block.stop)
                    slopes[column + 1 - block.start :] += np.multiply.outer(self.gram[later, column], change)
        return found

    def refit(self, levels: Float32, scales: Float16) -> Float16:
        """Step 3: scales (groups, n) of least error for these levels; those that would not be positive stay."""
        starts = np.arange(0, len(levels), self.group)
        squares = np.empty((levels.shape[1], len(starts), len(starts)))
        for place, start in enumerate(starts):
            part = slice(start, start + self.group)
            products = (self.gram[:, part] @ levels[part]) * levels
            squares[:, :, place] = np.add.reduceat(products, starts, axis=0, dtype=np.float64).T
        slopes = np.add.reduceat(self.target * levels, starts, axis=0, dtype=np.float64).T
        # A group whose codes all stand for 0 has no scale of its own: a little weight on the old one decides.
        old = scales.T.astype(np.float64)
        weight = _SCALE_DAMPING * squares.trace(axis1=1, axis2=2)[:, None] + np.finfo(np.float64).tiny
        squares += weight[:, :, None] * np.eye(len(starts))
        fitted = np.linalg.solve(squares, (slopes + weight * old)[:, :, None])[:, :, 0].T
        return np.where((fitted > 0) & (scales > 0), round_scales(fitted.astype(np.float32)), scales)

    def errors(self, levels: Float32, scales: Float16) -> Float64:
        """As `output_errors`, of these rows."""
        return _errors(self.gram, self.target, levels * self._wide(scales)[0])

    def _wide(self, scales: Float16) -> tuple[Float32, Float32]:
        """Scales (K, n) float32, and what turns weights into units of them: 0 where the scale is."""
        wide = np.repeat(scales.astype(np.float32), self.group, axis=0)[: len(self.keep)]
        return wide, np.divide(1, wide, out=np.zeros_like(wide), where=wide > 0)


def _compensate(
    weight: Float32,
    keep: Bool,
    geometry: _Geometry,
    levels: NDArray[np.int8],
    scales: Float16,
    group: int,
    nearest: _Nearest,
) -> tuple[Float32, Float16]:
    """Improve on levels (N, K) and scales (N, groups), row by row: (levels as float32, scales)."""
    order = geometry.order()
    factor = np.linalg.cholesky(geometry.inverse[np.ix_(order, order)]).T.astype(np.float32)
    best_levels, best_scales = levels.astype(np.float32), scales.copy()
    at_once = max(1, _WEIGHTS_AT_ONCE // max(1, weight.shape[1]))
    for first in range(0, len(weight), at_once):
        part = slice(first, first + at_once)
        kept = np.ascontiguousarray(keep[part].T)
        exact = np.where(kept, weight[part].T, np.float32(0))
        rows = _Rows(geometry.gram, geometry.cross @ exact, kept, nearest, group)
        trial_scales = np.ascontiguousarray(scales[part].T)
        least = rows.errors(np.ascontiguousarray(best_levels[part].T), trial_scales)
        trial = rows.in_order(exact, trial_scales, order, factor)
        for attempt in range(_REFITS + 1):
            if attempt:
                trial_scales = rows.refit(trial, trial_scales)
            trial = rows.descend(trial, trial_scales)
            found = rows.errors(trial, trial_scales)
            better = found < least
            best_levels[part][better], best_scales[part][better] = trial.T[better], trial_scales.T[better]
            least = np.where(better, found, least)
    return best_levels, best_scales


def _errors(gram: Float32, target: Float32, restored: Float32) -> Float64:
    found: Float64 = np.einsum("kn,kn->n", restored, gram @ restored - 2 * target, dtype=np.float64)
    return found


def _to_int8(ratios: Float32) -> Float32:
    return np.clip(np.rint(ratios), -LARGEST_LEVEL, LARGEST_LEVEL)


def _column_blocks(columns: int) -> Iterator[slice]:
    for first in range(0, columns, _BLOCK_COLUMNS):
        yield slice(first, min(columns, first + _BLOCK_COLUMNS))
