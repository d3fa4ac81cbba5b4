from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from losa_export.errors import ConfigError
from losa_export.training import allocation
from losa_export.training.allocation import RankInputs, SparsityInputs, allocate_ranks, allocate_sparsity

SPARSITY = SparsityInputs(2, 5, np.array([10.0, 10.0, 20.0]), np.array([0.3, 0.3, 0.3]))
RANKS = RankInputs(2, 5, 1, 16, np.array([8, 8, 8]))


class _Fixed:
    """Answers the same whatever it is asked: stands for an allocator of another kind."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = np.array(values)

    def allocate(self, _target: float, _inputs: object) -> np.ndarray:
        return self._values


def _register(monkeypatch: pytest.MonkeyPatch, table: str, values: Sequence[float]) -> None:
    monkeypatch.setattr(allocation, table, {"other": _Fixed(values)})


def test_uniform_sparsity_gives_every_block_the_target() -> None:
    assert allocate_sparsity("uniform", 0.55, SPARSITY).tolist() == [0.55, 0.55, 0.55]


def test_another_allocator_drops_in_if_its_weighted_mean_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    _register(monkeypatch, "SPARSITY_ALLOCATORS", [0.4, 0.4, 0.6])
    assert allocate_sparsity("other", 0.5, SPARSITY).tolist() == [0.4, 0.4, 0.6]


def test_an_allocator_that_misses_the_mean_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _register(monkeypatch, "SPARSITY_ALLOCATORS", [0.4, 0.4, 0.5])
    with pytest.raises(ConfigError, match=r"'other' gives a mean of 0\.450000 in round 2, not 0\.500000"):
        allocate_sparsity("other", 0.5, SPARSITY)


@pytest.mark.parametrize("values", [[0.2, 0.6, 0.6], [1.0, 0.2, 0.4]])
def test_an_allocator_that_would_unprune_or_empty_a_block_is_refused(
    monkeypatch: pytest.MonkeyPatch, values: list[float]
) -> None:
    _register(monkeypatch, "SPARSITY_ALLOCATORS", values)
    with pytest.raises(ConfigError, match=r"gives block 0 the target .* pruned weights stay pruned"):
        allocate_sparsity("other", 0.5, SPARSITY)


def test_uniform_ranks_differ_by_at_most_one_and_add_up() -> None:
    assert allocate_ranks("uniform", 8.0, RANKS).tolist() == [8, 8, 8]
    assert allocate_ranks("uniform", 8.34, RANKS).tolist() == [9, 8, 8]
    assert allocate_ranks("uniform", 99.0, replace(RANKS, max_rank=12)).tolist() == [12, 12, 12]


def test_a_rank_beyond_what_is_allocated_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _register(monkeypatch, "RANK_ALLOCATORS", [8, 17, 8])
    with pytest.raises(ConfigError, match="gives block 1 the rank 17; it must lie between 1 and 16"):
        allocate_ranks("other", 8.0, RANKS)
