"""How many compute threads to use when nobody says: what the machine will really let us run.

The default is the smallest of three counts: processors this process may run on (affinity), whole processors
the control group pays for (quota), and physical cores. More threads than any of these make matrix products
slower, because they all wait for the one thread that was throttled or shares a core.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from losa_export.errors import ConfigError

MAX_THREADS = 1024


@dataclass(frozen=True)
class ThreadLimits:
    """The three counts behind the default.

    Attributes:
        affinity: processors this process may run on.
        quota: whole processors that the control group allows, None without a limit.
        physical_cores: distinct cores among the processors of the affinity mask.
    """

    affinity: int
    quota: int | None
    physical_cores: int

    @property
    def default(self) -> int:
        """The smallest of the counts, at least one."""
        counts = [self.affinity, self.physical_cores]
        if self.quota is not None:
            counts.append(self.quota)
        return max(1, min(counts))


def default_threads() -> int:
    """Compute threads to use when none are asked for: min(affinity, quota, physical cores)."""
    return thread_limits().default


def resolve_threads(threads: int | None) -> int:
    """`threads` as given, or the default for None.

    Raises: ConfigError when the number is not within 1 … 1024.
    """
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
        raise ConfigError(
            f"threads is {threads!r}, but must be a whole number from 1 to {MAX_THREADS}; "
            f"leave it out to use the {default_threads()} that this machine offers",
            threads=threads,
        )
    return threads


def thread_limits(*, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> ThreadLimits:
    """Read the limits of this process; `proc` and `sys` may point elsewhere in tests."""
    cpus = _affinity()
    return ThreadLimits(
        affinity=len(cpus),
        quota=_whole(cgroup_quota(proc=proc, sys=sys)),
        physical_cores=physical_cores(cpus, sys=sys),
    )


def physical_cores(cpus: Iterable[int], *, sys: Path = Path("/sys")) -> int:
    """Distinct (package, core) pairs among `cpus`; a processor that hides its topology counts as a core."""
    cores: set[tuple[int, int]] = set()
    for cpu in cpus:
        topology = sys / "devices/system/cpu" / f"cpu{cpu}" / "topology"
        package, core = _number(topology / "physical_package_id"), _number(topology / "core_id")
        # Some virtual machines write -1 for "unknown": then two processors must not be taken for one core.
        known = package is not None and core is not None and package >= 0 and core >= 0
        cores.add((int(package or 0), int(core or 0)) if known else (-1, cpu))
    return max(1, len(cores))


def cgroup_quota(*, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> float | None:
    """Processors that the control group and its parents allow, None without a limit.

    Reads `cpu.max` (version 2) and `cpu.cfs_quota_us` over `cpu.cfs_period_us` (version 1); the
    tightest limit on the way up to the mount point counts.
    """
    limits: list[float] = []
    for folder in cgroup_folders("cpu", proc=proc, sys=sys):
        limits += [limit for limit in (_limit_v2(folder), _limit_v1(folder)) if limit is not None]
    return min(limits, default=None)


def cgroup_folders(controller: str, *, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> Iterator[Path]:
    """Folders of this process's control groups, of either version, and of their parents up to the mount point.

    Args:
        controller: of version 1, such as 'cpu' or 'memory'; version 2 has one folder for all.
        proc: may point elsewhere in tests.
        sys: the same.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        mounts: tuple[str, ...]
        if controllers == "":
            mounts = ("fs/cgroup", "fs/cgroup/unified")
        elif controller in controllers.split(","):
            mounts = (f"fs/cgroup/{controller}", f"fs/cgroup/{controllers}")
        else:
            continue
        for mount in mounts:
            yield from _upwards(sys / mount, path)


def _affinity() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _upwards(mount: Path, path: str) -> list[Path]:
    """`mount` and each folder between it and `mount/path`.

    Inside a container the path may be the host's, which is not mounted: then only `mount` tells anything.
    """
    folders = [mount]
    for part in path.strip("/").split("/"):
        if part in ("", ".", ".."):
            continue
        folders.append(folders[-1] / part)
    return folders


def _limit_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else _ratio(int(quota), int(period))
    except (OSError, ValueError):
        return None


def _limit_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return None if quota is None or period is None else _ratio(quota, period)


def _ratio(quota: int, period: int) -> float | None:
    return quota / period if quota > 0 and period > 0 else None


def _whole(quota: float | None) -> int | None:
    """Whole processors in a quota: the part of a processor would only throttle the thread that got it."""
    return None if quota is None else max(1, int(quota))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
