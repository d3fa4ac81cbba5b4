"""Pruning criteria behind one interface: weight and input statistics in, mask and perhaps new weights out.

`wanda` and `magnitude` choose what goes and leave the rest alone, so the frozen weights stay those of the
checkpoint. `sparsegpt` and `alps` compensate: each round they change the kept weights too, starting from the
effective weight as the last round's tuning left it. Under every criterion what was pruned stays pruned, so that
masks only shrink over the rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from losa_export.training.alps import alps
from losa_export.training.gram import Gram
from losa_export.training.scores import Amount, magnitude_scores, wanda_scores
from losa_export.training.sparsegpt import sparsegpt

Statistic = Literal["none", "squares", "gram"]


@dataclass(frozen=True)
class InputStatistics:
    """What calibration found of a linear's inputs: as much as the criterion asks for.

    Attributes:
        squares: (in,) sum of squares of each input feature.
        gram: second moments of the inputs.
    """

    squares: Tensor | None = None
    gram: Gram | None = None


@dataclass(frozen=True)
class Problem:
    """One linear to be pruned.

    Attributes:
        weight: (out, in) effective weight, float32 or float64, zero where pruned.
        inputs: what is known of its inputs.
        amount: how much is to be pruned in all.
        kept_before: (out, in) bool, the mask so far, True = keep.
        damping: part of the Gram matrix's mean diagonal that is added to it.
    """

    weight: Tensor
    inputs: InputStatistics
    amount: Amount
    kept_before: Tensor
    damping: float


@dataclass(frozen=True)
class Solution:
    """What is left of a linear.

    Attributes:
        kept: (out, in) bool, True = keep; no position that was pruned before.
        weight: (out, in) compensated effective weight; None where kept weights stay as they are.
    """

    kept: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Criterion:
    """A way to prune a linear, and what it must know of the inputs."""

    statistic: Statistic
    solve: Callable[[Problem], Solution]


def _magnitude(problem: Problem) -> Solution:
    return Solution(problem.amount.select(magnitude_scores(problem.weight), problem.kept_before))


def _wanda(problem: Problem) -> Solution:
    squares = problem.inputs.squares
    assert squares is not None  # the criterion's statistic
    return Solution(problem.amount.select(wanda_scores(problem.weight, squares), problem.kept_before))


def _compensating(
    method: Callable[[Tensor, Gram, Amount, Tensor, float], tuple[Tensor, Tensor]],
) -> Callable[[Problem], Solution]:
    def solve(problem: Problem) -> Solution:
        gram = problem.inputs.gram
        assert gram is not None  # the criterion's statistic
        kept, weight = method(problem.weight, gram, problem.amount, problem.kept_before, problem.damping)
        # Where nothing goes there is no error to make up for, and rounding alone would change the weights.
        return Solution(kept, None if torch.equal(kept, problem.kept_before) else weight)

    return solve


CRITERIA: Mapping[str, Criterion] = {
    "wanda": Criterion("squares", _wanda),
    "magnitude": Criterion("none", _magnitude),
    "sparsegpt": Criterion("gram", _compensating(sparsegpt)),
    "alps": Criterion("gram", _compensating(alps)),
}
