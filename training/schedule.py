"""When to prune how much, and how fast to learn: pure functions of round and step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

# With a time budget and no measured speed yet, the first steps of round 1 are planned as if it had this many.
PROVISIONAL_STEPS = 50


def sparsity_at(final: float, round_number: int, rounds: int) -> float:
    """Global sparsity target of a round: `final − final·(1 − t/T)³`.

    Args:
        final: target of the last round, met exactly.
        round_number: t, from 0 (nothing pruned) to `rounds`.
        rounds: T.
    Source: cubic ramp of Zhu and Gupta 2017, "To prune, or not to prune", arXiv:1710.01878.
    """
    remaining = 1.0 - round_number / rounds
    return final - final * remaining**3


def round_spans(rounds: int, final_share: float) -> tuple[tuple[float, float], ...]:
    """The part of the whole tuning that each round covers, as (start, end) in [0, 1].

    The last round takes `final_share`, the earlier ones an equal part of the rest; a single round takes all.
    """
    if rounds == 1:
        return ((0.0, 1.0),)
    each = (1.0 - final_share) / (rounds - 1)
    bounds = [each * number for number in range(rounds)] + [1.0]
    return tuple((bounds[number], bounds[number + 1]) for number in range(rounds))


def split_steps(total: int, spans: tuple[tuple[float, float], ...]) -> tuple[int, ...]:
    """Steps of each round: proportional to its span, whole, and `total` in sum."""
    bounds = [round(total * start) for start, _ in spans] + [total]
    return tuple(bounds[number + 1] - bounds[number] for number in range(len(spans)))


@dataclass(frozen=True)
class RoundPlan:
    """Steps of one round and the part of the learning-rate schedule they cover.

    Progress runs linearly from `anchor_progress` at `anchor_step` to `end_progress` at `end_step`, so that the
    number of steps can be corrected under way without a jump of the rate.

    Attributes:
        end_step: number of steps in the round.
        end_progress: progress, in [0, 1] over all rounds, when the round ends.
        anchor_step: step from which this plan holds.
        anchor_progress: progress at that step.
        warmup_steps: steps in which the rate rises from zero.
        decay: "cosine" over the progress of all rounds, or "linear" over that of this round, whose progress then
            runs from 0 to 1.
        fall_progress: progress at which the linear decay begins.
    """

    end_step: int
    end_progress: float
    anchor_step: int
    anchor_progress: float
    warmup_steps: int
    decay: Literal["cosine", "linear"] = "cosine"
    fall_progress: float = 0.0

    @classmethod
    def of_round(cls, span: tuple[float, float], steps: int, warmup_fraction: float) -> RoundPlan:
        """A round that covers `span` of the one cosine in `steps` steps."""
        return cls(steps, span[1], 0, span[0], math.ceil(steps * warmup_fraction))

    @classmethod
    def of_its_own(cls, steps: int, warmup_fraction: float) -> RoundPlan:
        """A round whose rate rises to its peak and falls to zero in `steps` steps, whatever other rounds do."""
        warmup = math.ceil(steps * warmup_fraction)
        return cls(steps, 1.0, 0, 0.0, warmup, "linear", warmup / max(1, steps))

    def progress(self, step: int) -> float:
        """Progress over all rounds before step `step` (counted from 0 in this round)."""
        if self.end_step <= self.anchor_step:
            return self.end_progress
        done = (step - self.anchor_step) / (self.end_step - self.anchor_step)
        return self.anchor_progress + (self.end_progress - self.anchor_progress) * done

    def rate_factor(self, step: int) -> float:
        """Learning rate of step `step` as a fraction of its peak: one cosine over all rounds, times warm-up.

        Or with linear decay the round's own triangle, which falls to zero from the peak at the end of the warm-up.
        """
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.decay == "linear":
            fall = 1.0 - self.fall_progress
            return min(warmup, (1.0 - self.progress(step)) / fall) if fall > 0.0 else warmup
        return warmup * 0.5 * (1.0 + math.cos(math.pi * self.progress(step)))

    def corrected(self, step: int, end_step: int) -> RoundPlan:
        """The plan from step `step` on, if the round shall have `end_step` steps."""
        return replace(self, end_step=end_step, anchor_step=step, anchor_progress=self.progress(step))


def steps_in(seconds: float, seconds_per_step: float) -> int:
    """Whole steps that fit into `seconds`, and at least one: a round that only prunes teaches nothing."""
    return max(1, int(seconds / seconds_per_step))
