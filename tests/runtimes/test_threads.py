from __future__ import annotations

from pathlib import Path

import pytest

from losa_export.errors import ConfigError
from losa_export.runtimes.threads import (
    ThreadLimits,
    cgroup_quota,
    default_threads,
    physical_cores,
    resolve_threads,
    thread_limits,
)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def topology(sys: Path, cores: dict[int, tuple[int, int]]) -> None:
    for cpu, (package, core) in cores.items():
        folder = sys / "devices/system/cpu" / f"cpu{cpu}" / "topology"
        write(folder / "physical_package_id", f"{package}\n")
        write(folder / "core_id", f"{core}\n")


def test_the_default_is_the_smallest_of_affinity_quota_and_cores() -> None:
    assert ThreadLimits(affinity=8, quota=None, physical_cores=4).default == 4
    assert ThreadLimits(affinity=2, quota=None, physical_cores=4).default == 2
    assert ThreadLimits(affinity=8, quota=3, physical_cores=4).default == 3


def test_this_machine_offers_at_least_one_thread() -> None:
    assert 1 <= default_threads() <= thread_limits().affinity


def test_hyperthreads_of_one_core_count_once(tmp_path: Path) -> None:
    topology(tmp_path, {0: (0, 0), 1: (0, 1), 2: (0, 0), 3: (0, 1), 4: (1, 0)})
    assert physical_cores([0, 1, 2, 3], sys=tmp_path) == 2
    assert physical_cores([0, 2, 4], sys=tmp_path) == 2


def test_processors_that_hide_their_topology_count_as_cores(tmp_path: Path) -> None:
    topology(tmp_path, {0: (-1, -1), 1: (-1, -1)})
    assert physical_cores([0, 1], sys=tmp_path) == 2
    assert physical_cores([0, 1, 2], sys=tmp_path / "absent") == 3


def test_a_version_2_quota_is_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    write(proc / "self/cgroup", "0::/outer/inner\n")
    write(sys / "fs/cgroup/outer/cpu.max", "150000 100000\n")
    write(sys / "fs/cgroup/outer/inner/cpu.max", "max 100000\n")
    assert cgroup_quota(proc=proc, sys=sys) == 1.5


def test_a_version_1_quota_is_read_at_the_mount_when_the_path_is_the_hosts(tmp_path: Path) -> None:
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    write(proc / "self/cgroup", "5:cpuset:/\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/\nnonsense\n")
    write(sys / "fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "250000\n")
    write(sys / "fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert cgroup_quota(proc=proc, sys=sys) == 2.5


@pytest.mark.parametrize("quota", ["-1", "garbage"])
def test_an_unlimited_or_unreadable_group_sets_no_quota(tmp_path: Path, quota: str) -> None:
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    write(proc / "self/cgroup", "1:cpu:/\n0::/\n")
    write(sys / "fs/cgroup/cpu/cpu.cfs_quota_us", quota)
    write(sys / "fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    write(sys / "fs/cgroup/cpu.max", "max 100000\n")
    assert cgroup_quota(proc=proc, sys=sys) is None
    assert cgroup_quota(proc=tmp_path / "absent", sys=sys) is None


def test_a_part_of_a_processor_gets_one_thread_and_no_more(tmp_path: Path) -> None:
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    write(proc / "self/cgroup", "0::/\n")
    write(sys / "fs/cgroup/cpu.max", "50000 100000\n")
    assert thread_limits(proc=proc, sys=sys).quota == 1
    write(sys / "fs/cgroup/cpu.max", "290000 100000\n")
    assert thread_limits(proc=proc, sys=sys).quota == 2


def test_a_given_number_of_threads_is_taken_as_it_is() -> None:
    assert resolve_threads(3) == 3
    assert resolve_threads(None) == default_threads()


@pytest.mark.parametrize("threads", [0, -1, 1025, 1.5, True, "2"])
def test_an_impossible_number_of_threads_is_refused(threads: object) -> None:
    with pytest.raises(ConfigError, match=r"threads is .*must be a whole number from 1 to 1024; leave it out"):
        resolve_threads(threads)  # type: ignore[arg-type]
