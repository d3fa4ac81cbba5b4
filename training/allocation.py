"""How a round's sparsity and rank are shared out among the blocks.

An allocator sees everything that any of them needs; `uniform` looks at none of it. Allocators that weigh
blocks by mutual information or by reconstruction error register here under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import ConfigError

FloatVector = NDArray[np.float64]
IntVector = NDArray[np.int64]

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
            last round left it; None where it was not measured.
    """

    round_number: int
    rounds: int
    parameter_counts: FloatVector
    previous: FloatVector
    rmi: FloatVector | None = None


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


class UniformRank:
    """Every block at the mean rank; where that is no integer, the first blocks get one more."""

    def allocate(self, mean_rank: float, inputs: RankInputs) -> IntVector:
        """(L,) integers that differ by at most 1."""
        blocks = inputs.previous.size
        budget = round(mean_rank * blocks)
        ranks = np.full(blocks, budget // blocks, dtype=np.int64)
        ranks[: budget % blocks] += 1
        return np.clip(ranks, inputs.min_rank, inputs.max_rank)


SPARSITY_ALLOCATORS: Mapping[str, SparsityAllocator] = {"uniform": UniformSparsity()}
RANK_ALLOCATORS: Mapping[str, RankAllocator] = {"uniform": UniformRank()}


def allocate_sparsity(name: str, target: float, inputs: SparsityInputs) -> FloatVector:
    """Ask the allocator called `name`, and check its answer.

    Returns: (L,) float64.
    Raises: ConfigError if the targets miss the mean, leave [0, 1), or fall below an earlier round's.
    """
    targets = SPARSITY_ALLOCATORS[name].allocate(target, inputs)
    weights = inputs.parameter_counts / inputs.parameter_counts.sum()
    mean = float(weights @ targets)
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
