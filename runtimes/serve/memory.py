"""How large the keys and values of all slots may be, decided before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from losa_export.errors import ConfigError
from losa_export.runtimes.threads import cgroup_folders

DEFAULT_CONTEXT = 2048
# Fewer tokens than this hold no conversation, so a pool of them is a mistake.
LEAST_CONTEXT = 16


@dataclass(frozen=True)
class PoolPlan:
    """The pool of one worker.

    Attributes:
        slots: requests answered together.
        context_tokens: prompt and answer of each.
        token_bytes: keys and values of one token in all blocks.
    """

    slots: int
    context_tokens: int
    token_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of the whole pool."""
        return self.slots * self.context_tokens * self.token_bytes


def plan_pool(
    *,
    slots: int,
    context_tokens: int | None,
    memory: int | None,
    token_bytes: int,
    max_positions: int,
    workers: int = 1,
    available: int | None = None,
) -> PoolPlan:
    """Divide the memory among the slots.

    Args:
        slots: of a worker.
        context_tokens: of a slot; None takes what `memory` holds, else 2,048, and never more than the model knows.
        memory: bytes that the pool may take; None: no more than is available.
        token_bytes: 2 · blocks · kv_heads · head_dim · 4.
        max_positions: tokens that the model knows.
        workers: pools of this size on the machine.
        available: bytes that can still be allocated; None if unknown.
    Raises: ConfigError when the slots do not fit into `memory`, or not into what is available.
    """
    if context_tokens is not None and context_tokens > max_positions:
        raise ConfigError(
            f"context_tokens is {context_tokens}, but the model knows {max_positions} positions; ask for fewer",
            field="context_tokens",
        )
    fits = max_positions if memory is None else memory // (slots * token_bytes)
    wanted = context_tokens if context_tokens is not None else min(fits, max_positions)
    if context_tokens is None and memory is None:
        wanted = min(DEFAULT_CONTEXT, max_positions)
    plan = PoolPlan(slots, wanted, token_bytes)
    if wanted > fits or wanted < min(LEAST_CONTEXT, max_positions):
        needed = slots * token_bytes * (context_tokens or LEAST_CONTEXT)
        raise ConfigError(
            f"{slots} slots of {context_tokens or LEAST_CONTEXT} tokens take {needed:,} bytes ({token_bytes:,} a "
            f"token), but memory is {memory:,}; raise memory, or lower slots or context_tokens",
            field="memory",
        )
    if available is not None and plan.total_bytes * workers > available:
        raise ConfigError(
            f"{slots} slots of {wanted} tokens in {workers} worker(s) take {plan.total_bytes * workers:,} bytes, but "
            f"this machine has {available:,} left; lower slots, context_tokens, memory or workers",
            field="memory",
        )
    return plan


def available_bytes(*, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> int | None:
    """What can still be allocated: the machine's free memory, or less if a control group allows less.

    Returns: bytes; None where neither is told. `proc` and `sys` may point elsewhere in tests.
    """
    found: list[int] = []
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass  # not Linux
    for folder in cgroup_folders("memory", proc=proc, sys=sys):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                found.append(max(0, int((folder / limit).read_text()) - int((folder / used).read_text())))
            except (OSError, ValueError):
                continue  # no such file, or 'max'
    return min(found, default=None)
