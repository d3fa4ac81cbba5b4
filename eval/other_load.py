"""How busy the processors were with work that is not ours while something was timed."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

# In /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal.
_BUSY, _STEAL = (0, 1, 2, 5, 6), 7


@dataclass(frozen=True)
class CpuTimes:
    """Seconds since the system's start, summed over some processors.

    Attributes:
        busy: that they worked, for anybody.
        stolen: that a hypervisor gave to somebody else.
        ours: processor time of the processes that were named.
    """

    busy: float
    stolen: float
    ours: float


@dataclass(frozen=True)
class OtherLoad:
    """What others took of the processors that we may use, as fractions of all their time.

    Attributes:
        others: other processes of this system.
        stolen: other systems on the same machine.
    """

    others: float
    stolen: float


def read_cpu_times(pids: Collection[int], cpus: Collection[int], proc: Path = Path("/proc")) -> CpuTimes | None:
    """Times of `cpus` and of the processes `pids`; None where the system does not tell."""
    tick = os.sysconf("SC_CLK_TCK")
    try:
        lines = [line.split() for line in (proc / "stat").read_text(encoding="ascii").splitlines()]
        wanted = {f"cpu{number}" for number in cpus}
        counts = [list(map(int, words[1:])) for words in lines if words and words[0] in wanted]
        ours = sum(_process_ticks((proc / str(pid) / "stat").read_text()) for pid in pids)
    except (OSError, ValueError, IndexError):
        return None
    if len(counts) != len(wanted):
        return None
    busy = sum(sum(count[place] for place in _BUSY) for count in counts)
    return CpuTimes(busy / tick, sum(count[_STEAL] for count in counts) / tick, ours / tick)


def _process_ticks(stat: str) -> int:
    """Utime + stime. The second field, the name in brackets, may hold anything."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def other_load(before: CpuTimes | None, after: CpuTimes | None, elapsed_s: float, cpus: int) -> OtherLoad | None:
    """What happened between two readings; None if one of them is missing."""
    if before is None or after is None or elapsed_s <= 0.0:
        return None
    whole = elapsed_s * cpus
    others = (after.busy - before.busy) - (after.ours - before.ours)
    # Clock ticks are coarse: a few of them can seem to be less than nothing.
    return OtherLoad(max(0.0, others / whole), max(0.0, (after.stolen - before.stolen) / whole))


def usable_cpus() -> Sequence[int]:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)
