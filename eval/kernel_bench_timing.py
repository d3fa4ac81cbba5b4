"""The timed loop of a kernel benchmark: engines take turns in blocks, there and back, and nothing else is done here.

A block is A B C … C B A. What slows the machine for longer than a turn slows all engines of the block, so ratios
taken within blocks bear it; what drifts within a block meets every engine once early and once late.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Protocol

import numpy as np

from losa_export.errors import BenchmarkError
from losa_export.eval.bench import DISTURBED_SPIN
from losa_export.eval.stats import MIN_BLOCKS, agree_within
from losa_export.eval.worker import spin_probe

DRIFT_FRACTION = 0.1
_MAX_RUNS = 8
# A run this long needs no untimed one before it: waking the threads and refilling page tables is lost in it.
_LONG_RUN_S = 0.05


class Timed(Protocol):
    """What is timed: `run` does `copies` products, `rest` returns once the engine is idle."""

    copies: int

    def run(self) -> None:
        """Do the work once."""
        ...

    def rest(self) -> None:
        """Wait until no thread of it is busy."""
        ...


@dataclass(frozen=True)
class TimingPlan:
    """How long to look.

    Attributes:
        seconds: of the timed part; `min_blocks` wins over it.
        min_blocks, max_blocks: blocks of two turns for each engine.
        turn_seconds: length of a turn aimed at.
    """

    seconds: float
    min_blocks: int = 6
    max_blocks: int = 60
    turn_seconds: float = 0.03

    def __post_init__(self) -> None:
        """Raises: BenchmarkError when no interval could come of it."""
        if not MIN_BLOCKS <= self.min_blocks <= self.max_blocks:
            raise BenchmarkError(
                f"{self.min_blocks} to {self.max_blocks} blocks were asked for; an interval needs at least {MIN_BLOCKS}"
            )


@dataclass(frozen=True)
class Timings:
    """What the loop saw.

    Attributes:
        seconds: engine → block → seconds per product of each timed run.
        disturbed: of each block: a spin took over 5 % longer than it does in quiet.
        bandwidth: bytes a second read from memory, measured between the turns; empty if not measured.
        elapsed_s: of the timed part.
    """

    seconds: tuple[tuple[tuple[float, ...], ...], ...]
    disturbed: tuple[bool, ...]
    bandwidth: tuple[float, ...]
    elapsed_s: float


def drifts(blocks: Sequence[Sequence[float]]) -> bool:
    """Whether the medians of the first and the second half of the blocks differ by more than a tenth."""
    half = len(blocks) // 2
    halves = [median([value for block in part for value in block]) for part in (blocks[:half], blocks[half:])]
    return not agree_within(halves, DRIFT_FRACTION)


def measure(
    engines: Sequence[Timed],
    plan: TimingPlan,
    *,
    bandwidth: Callable[[], float] | None = None,
    probe: Callable[[], tuple[float, ...]] = spin_probe,
    clock: Callable[[], float] = time.perf_counter,
    after_block: Callable[[int, float], None] | None = None,
) -> Timings:
    """Time the engines.

    Args:
        engines: at least one, each ready to run.
        plan: how long to look.
        bandwidth: reads memory once and says how fast, in bytes a second; called at both ends of a block.
        probe: times a fixed spin on each processor.
        clock: seconds from any origin.
        after_block: told the blocks done and the seconds passed.
    """
    runs = [_plan_turn(engine, plan.turn_seconds, clock) for engine in engines]
    taken: list[list[tuple[float, ...]]] = [[] for _ in engines]
    probes: list[list[tuple[float, ...]]] = []
    rates: list[float] = []
    order = range(len(engines))
    start = clock()
    while True:
        block: list[list[float]] = [[] for _ in engines]
        spins = []
        for way in (order, reversed(order)):
            if bandwidth is not None:
                rates.append(bandwidth())
            spins.append(probe())
            for index in way:
                block[index] += _turn(engines[index], *runs[index], clock)
        for index, values in enumerate(block):
            taken[index].append(tuple(values))
        probes.append(spins)
        elapsed = clock() - start
        if after_block is not None:
            after_block(len(probes), elapsed)
        if len(probes) >= plan.max_blocks or (len(probes) >= plan.min_blocks and elapsed >= plan.seconds):
            break
    return Timings(tuple(tuple(blocks) for blocks in taken), disturbed_blocks(probes), tuple(rates), elapsed)


def disturbed_blocks(probes: Sequence[Sequence[tuple[float, ...]]]) -> tuple[bool, ...]:
    """Blocks with a spin that was slower than the quiet time of its processor, which is the tenth percentile."""
    spins = np.array(probes)
    quiet = np.percentile(spins.reshape(-1, spins.shape[-1]), 10, axis=0)
    return tuple(bool(slow) for slow in (spins > DISTURBED_SPIN * quiet).any(axis=(1, 2)))


def _plan_turn(engine: Timed, turn_seconds: float, clock: Callable[[], float]) -> tuple[bool, int]:
    """Warm an engine up. Returns: whether a turn starts with an untimed run, and how many are timed."""
    engine.run()
    start = clock()
    engine.run()
    seconds = clock() - start
    engine.rest()
    return seconds < _LONG_RUN_S, int(np.clip(round(turn_seconds / max(seconds, 1e-9)), 1, _MAX_RUNS))


def _turn(engine: Timed, warm: bool, runs: int, clock: Callable[[], float]) -> list[float]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        if warm:
            engine.run()
        times = [clock()]
        for _ in range(runs):
            engine.run()
            times.append(clock())
    finally:
        if was_enabled:
            gc.enable()
    engine.rest()
    return [(last - first) / engine.copies for first, last in pairwise(times)]
