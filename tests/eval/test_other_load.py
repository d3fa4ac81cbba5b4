from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from losa_export.eval.other_load import CpuTimes, OtherLoad, other_load, read_cpu_times, usable_cpus

STAT = """cpu  9 9 9 9 9 9 9 9 0 0
cpu0 100 20 30 4000 5 6 7 80 0 0
cpu1 1 2 3 4 5 6 7 8 0 0
cpu10 1000 0 0 0 0 0 0 0 0 0
intr 1 2 3
"""


def fake_proc(folder: Path) -> Path:
    (folder / "stat").write_text(STAT)
    (folder / "42").mkdir()
    (folder / "42" / "stat").write_text("42 (a (strange) name) S 1 42 42 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 1 0 5\n")
    return folder


def test_only_the_processors_and_processes_that_are_named_count(tmp_path: Path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    found = read_cpu_times([42], [0, 1], fake_proc(tmp_path))
    assert found is not None
    assert (found.busy * tick, found.stolen * tick, found.ours * tick) == pytest.approx((163 + 19, 88, 300))


@pytest.mark.parametrize(("pids", "cpus"), [([7], [0]), ([42], [0, 3])])
def test_what_the_system_does_not_tell_is_unknown(tmp_path: Path, pids: list[int], cpus: list[int]) -> None:
    assert read_cpu_times(pids, cpus, fake_proc(tmp_path)) is None


def test_the_load_of_others_is_what_we_did_not_do() -> None:
    before, after = CpuTimes(100.0, 5.0, 50.0), CpuTimes(118.0, 6.0, 65.0)
    assert other_load(before, after, 10.0, 2) == OtherLoad(0.15, 0.05)
    assert other_load(before, CpuTimes(114.9, 5.0, 65.0), 10.0, 2) == OtherLoad(0.0, 0.0)
    assert other_load(None, after, 10.0, 2) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_busy_process_is_others_until_it_is_named_as_ours() -> None:
    burn = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    cpus = usable_cpus()
    with subprocess.Popen([sys.executable, "-c", burn]) as process:
        try:
            pids = {"stranger": [os.getpid()], "ours": [os.getpid(), process.pid]}
            before = {name: read_cpu_times(group, cpus) for name, group in pids.items()}
            started = time.monotonic()
            time.sleep(1.5)
            elapsed = time.monotonic() - started
            loads = {
                name: other_load(before[name], read_cpu_times(group, cpus), elapsed, len(cpus))
                for name, group in pids.items()
            }
        finally:
            process.kill()
    stranger, ours = loads["stranger"], loads["ours"]
    assert stranger is not None
    assert ours is not None
    # However busy the machine is otherwise, the process got some share of a processor.
    assert stranger.others - ours.others > 0.2 / len(cpus)
