"""How a round's sparsity and rank are shared out among the blocks.

An allocator sees everything that any of them needs; `uniform` looks at none of it. What has to be measured first is
listed here by allocator, so that nothing is measured that none looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from losa_export.errors import ConfigError
from losa_export.training.rank_allocators import IntVector as IntVector
from losa_export.training.rank_allocators import (
    proportional_ranks,
    rank_budget,
    requested_ranks,
    uniform_ranks,
    water_filling_ranks,
)
from losa_export.training.sparsity_allocators import FloatVector as FloatVector
from losa_export.training.sparsity_allocators import (
    atp_targets,
    band,
    band_half_width,
    linear_targets,
    lp_targets,
    owl_targets,
    redundancy,
    rescaled_targets,
    within_bounds,
)

# Sparsity targets are sums of a few float64 terms: anything past this is a real disagreement.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class SparsityInputs:
    """What a sparsity allocator may look at. L blocks.

    Attributes:
        round_number: 1 to `rounds`.
        rounds: T.
        parameter_counts: (L,) prunable weights of each block.
        previous: (L,) targets of the round before; zeros in the first. No target may fall below them,
            since a pruned weight stays pruned.
        rmi: (L, L) representation mutual information between block inputs, measured on the model as the
            last round left it; None where it was not measured, or a model of one block has nothing to compare.
        outliers: (L,) share of each block's scores far above their mean; None where it was not measured.
        half_width: δ, how far a block may lie from the target; None is that of `band_half_width`.
        owl_spread: λ, half the span of densities that outliers cause.
        atp_difference: by how much each block is sparser than the one before it.
        block_sparsities: (L,) a sparsity for each block, of which the proportions count; None without any.
    """

    round_number: int
    rounds: int
    parameter_counts: FloatVector
    previous: FloatVector
    rmi: FloatVector | None = None
    outliers: FloatVector | None = None
    half_width: float | None = None
    owl_spread: float = 0.08
    atp_difference: float = 0.01
    block_sparsities: FloatVector | None = None

    @property
    def weights(self) -> FloatVector:
        """(L,) each block's part of all prunable weights."""
        return np.asarray(self.parameter_counts / self.parameter_counts.sum(), dtype=np.float64)


@dataclass(frozen=True)
class RankInputs:
    """What a rank allocator may look at. L blocks.

    Attributes:
        round_number: 1 to `rounds`.
        rounds: T.
        min_rank: smallest rank of a block.
        max_rank: rank that is allocated, hence the largest.
        previous: (L,) ranks of the round before; those of the first round before it.
        errors: (L,) reconstruction error of each block after this round's pruning; None where it was
            not measured.
    """

    round_number: int
    rounds: int
    min_rank: int
    max_rank: int
    previous: IntVector
    errors: FloatVector | None = None


class SparsityAllocator(Protocol):
    """Shares a global sparsity out among blocks."""

    def allocate(self, target: float, inputs: SparsityInputs) -> FloatVector:
        """Targets of the blocks, (L,) in [0, 1), whose mean weighted by parameters is `target`."""
        ...


class RankAllocator(Protocol):
    """Shares rank out among blocks."""

    def allocate(self, mean_rank: float, inputs: RankInputs) -> IntVector:
        """Ranks of the blocks, (L,) in [min_rank, max_rank], whose sum is round(mean_rank · L)."""
        ...


class UniformSparsity:
    """Every block at the global target."""

    def allocate(self, target: float, inputs: SparsityInputs) -> FloatVector:
        """(L,) filled with `target`."""
        return np.full(inputs.parameter_counts.shape, target, dtype=np.float64)


class LinearProgramSparsity:
    """LoSA: the blocks most redundant with others at one end of the band, the least at the other."""

    def allocate(self, target: float, inputs: SparsityInputs) -> FloatVector:
        """(L,) targets, nearly all at a bound."""
        if inputs.parameter_counts.size == 1:
            return np.full(1, target, dtype=np.float64)
        scores = redundancy(_measured(inputs.rmi, "lp", "mutual information"))
        lower, upper = band(target, _half_width(target, inputs), inputs.previous)
        return lp_targets(scores, target, lower, upper, inputs.weights)


class LinearSparsity:
    """Sparsity linear in how redundant a block is, over the whole band."""

    def allocate(self, target: float, inputs: SparsityInputs) -> FloatVector:
        """(L,) targets that change little when the mutual information does."""
        if inputs.parameter_counts.size == 1:
            return np.full(1, target, dtype=np.float64)
        scores = redundancy(_measured(inputs.rmi, "linear", "mutual information"))
        half_width = _half_width(target, inputs)
        lower, upper = band(target, half_width, inputs.previous)
        return linear_targets(scores, target, half_width, lower, upper, inputs.weights)


class OutlierSparsity:
    """OWL: less sparsity where more scores stand out."""

    def allocate(self, target: float, inputs: SparsityInputs) -> FloatVector:
        """(L,) targets, moved up where a block has lost more already."""
        outliers = _measured(inputs.outliers, "owl", "outliers")
        wanted = owl_targets(outliers, target, inputs.owl_spread, inputs.weights)
        return within_bounds(wanted, target, *band(target, 1.0, inputs.previous), inputs.weights)


class ProgressionSparsity:
    """ATP: sparsity rises by the same amount from block to block."""

    def allocate(self, target: float, inputs: SparsityInputs) -> FloatVector:
        """(L,) targets, moved into [0, 1) where the progression leaves it."""
        wanted = atp_targets(target, inputs.atp_difference, inputs.weights)
        return within_bounds(wanted, target, *band(target, 1.0, inputs.previous), inputs.weights)


class FixedSparsity:
    """A sparsity for each block, given by the user and scaled to each round's target."""

    def allocate(self, target: float, inputs: SparsityInputs) -> FloatVector:
        """(L,) targets in the given proportions."""
        values = _measured(inputs.block_sparsities, "fixed", "a sparsity for each block")
        if values.shape != inputs.parameter_counts.shape:
            raise ConfigError(
                f"block_sparsities has {values.size} values, but the model has {inputs.parameter_counts.size} blocks; "
                "give one for each",
                field="block_sparsities",
            )
        return rescaled_targets(values, target, inputs.weights)


def _half_width(target: float, inputs: SparsityInputs) -> float:
    return band_half_width(target) if inputs.half_width is None else inputs.half_width


def _measured(values: FloatVector | None, allocator: str, what: str) -> FloatVector:
    if values is None:
        raise ConfigError(f"allocator '{allocator}' needs {what}, which it was not given; pass it", allocator=allocator)
    if not bool(np.isfinite(values).all()):
        raise ConfigError(
            f"allocator '{allocator}' cannot use values that are not finite ({what}); "
            "compute in fp32, and look for damaged weights if that does not help",
            allocator=allocator,
        )
    return values


class UniformRank:
    """Every block at the mean rank; where that is no integer, the first blocks get one more."""

    def allocate(self, mean_rank: float, inputs: RankInputs) -> IntVector:
        """(L,) integers that differ by at most 1."""
        return uniform_ranks(_budget(mean_rank, inputs), inputs.previous.size)


class ProportionalRank:
    """LoSA as released: rank in proportion to error, rounded, with one pass of repair."""

    def allocate(self, mean_rank: float, inputs: RankInputs) -> IntVector:
        """(L,) integers; their sum misses the budget if errors have a heavy tail."""
        errors = _measured(inputs.errors, "proportional", "reconstruction errors")
        return proportional_ranks(errors, _budget(mean_rank, inputs), inputs.min_rank, inputs.max_rank)


class WaterFillingRank:
    """Rank in proportion to error within bounds, with the exact sum."""

    def allocate(self, mean_rank: float, inputs: RankInputs) -> IntVector:
        """(L,) integers that add up to the budget."""
        errors = _measured(inputs.errors, "water_filling", "reconstruction errors")
        return water_filling_ranks(errors, _budget(mean_rank, inputs), inputs.min_rank, inputs.max_rank)


def _budget(mean_rank: float, inputs: RankInputs) -> int:
    return rank_budget(mean_rank, inputs.previous.size, inputs.min_rank, inputs.max_rank)


SPARSITY_ALLOCATORS: Mapping[str, SparsityAllocator] = {
    "uniform": UniformSparsity(),
    "lp": LinearProgramSparsity(),
    "linear": LinearSparsity(),
    "owl": OutlierSparsity(),
    "atp": ProgressionSparsity(),
    "fixed": FixedSparsity(),
}
RANK_ALLOCATORS: Mapping[str, RankAllocator] = {
    "uniform": UniformRank(),
    "proportional": ProportionalRank(),
    "water_filling": WaterFillingRank(),
}
# Windows that mutual information needs to be defined, and its unbiased estimator.
MIN_WINDOWS = 2
MIN_WINDOWS_DEBIASED = 4
# What has to be measured for which allocator.
NEED_RMI = frozenset({"lp", "linear"})
NEED_OUTLIERS = frozenset({"owl"})
NEED_ERRORS = frozenset({"proportional", "water_filling"})


def allocate_sparsity(name: str, target: float, inputs: SparsityInputs) -> FloatVector:
    """Ask the allocator called `name`, and check its answer.

    Returns: (L,) float64.
    Raises: ConfigError if the targets miss the mean, leave [0, 1), or fall below an earlier round's.
    """
    targets = SPARSITY_ALLOCATORS[name].allocate(target, inputs)
    mean = float(inputs.weights @ targets)
    if abs(mean - target) > _TOLERANCE:
        raise ConfigError(
            f"sparsity allocator '{name}' gives a mean of {mean:.6f} in round {inputs.round_number}, not "
            f"{target:.6f}; use another allocator",
            allocator=name,
        )
    outside = np.flatnonzero((targets < 0.0) | (targets >= 1.0) | (targets < inputs.previous - _TOLERANCE))
    if outside.size:
        block = int(outside[0])
        raise ConfigError(
            f"sparsity allocator '{name}' gives block {block} the target {targets[block]:.6f} in round "
            f"{inputs.round_number}; it must lie in [{inputs.previous[block]:.6f}, 1), since pruned weights stay "
            "pruned: use another allocator",
            allocator=name,
            block=block,
        )
    return targets


def allocate_ranks(name: str, mean_rank: float, inputs: RankInputs) -> IntVector:
    """Ask the allocator called `name`, and check its answer.

    Returns: (L,) int64.
    Raises: ConfigError if a rank leaves [min_rank, max_rank].
    """
    ranks = RANK_ALLOCATORS[name].allocate(mean_rank, inputs)
    outside = np.flatnonzero((ranks < inputs.min_rank) | (ranks > inputs.max_rank))
    if outside.size:
        block = int(outside[0])
        raise ConfigError(
            f"rank allocator '{name}' gives block {block} the rank {ranks[block]}; it must lie between "
            f"{inputs.min_rank} and {inputs.max_rank}: raise max_rank or use another allocator",
            allocator=name,
            block=block,
        )
    return ranks


def ask_ranks(mean_rank: float, inputs: RankInputs) -> FloatVector:
    """(L,) what each block would get if neither bounds nor whole numbers were in the way; equal without errors."""
    budget = round(mean_rank * inputs.previous.size)
    errors = np.zeros(inputs.previous.size) if inputs.errors is None else inputs.errors
    return requested_ranks(errors, budget)
