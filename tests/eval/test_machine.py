from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

from losa_export.eval import machine
from losa_export.eval.machine import CacheLevel, git_revision, machine_record, package_versions

CPUINFO = "processor\t: 0\nmodel name\t: Example CPU 9000\nflags\t\t: sse avx2 fma hypervisor\n"


@pytest.fixture
def fake_roots(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    files = {
        proc / "cpuinfo": CPUINFO,
        proc / "meminfo": "MemTotal:        1000 kB\nMemAvailable:     250 kB\nHugePages_Total:       0\n",
        proc / "loadavg": "0.25 0.50 0.75 1/100 4242\n",
        sys / "devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        sys / "devices/system/cpu/cpu0/cache/index0/level": "1\n",
        sys / "devices/system/cpu/cpu0/cache/index0/type": "Data\n",
        sys / "devices/system/cpu/cpu0/cache/index0/size": "32K\n",
        sys / "devices/system/cpu/cpu0/cache/index0/shared_cpu_list": "0\n",
        sys / "devices/system/cpu/cpu0/cache/index3/level": "3\n",
        sys / "devices/system/cpu/cpu0/cache/index3/type": "Unified\n",
        sys / "devices/system/cpu/cpu0/cache/index3/size": "32M\n",
        sys / "devices/system/cpu/cpu0/cache/index3/shared_cpu_list": "0-3,8\n",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, sys


def test_a_described_machine_is_read_field_by_field(fake_roots):
    record = machine_record(proc=fake_roots[0], sys=fake_roots[1])
    assert record.cpu_model == "Example CPU 9000"
    assert record.cpu_flags == ("avx2", "fma", "hypervisor", "sse")
    assert record.virtual is True
    assert record.memory_bytes == 1_024_000
    assert record.memory_available_bytes == 256_000
    assert record.load_average_1min == 0.25
    assert record.governor == "performance"
    assert record.caches == (CacheLevel(1, "Data", 32 * 1024, 1), CacheLevel(3, "Unified", 32 * 1024**2, 5))
    assert record.affinity_cpus == 2


def test_a_machine_that_shows_nothing_gives_none_rather_than_an_error(tmp_path):
    record = machine_record(proc=tmp_path / "no", sys=tmp_path / "none")
    assert record.cpu_flags == ()
    assert record.virtual is None
    assert record.caches == ()
    assert record.governor is record.memory_bytes is record.load_average_1min is record.cgroup_quota_cpus is None


def test_the_real_record_is_json_and_names_neither_host_nor_folder():
    text = json.dumps(machine_record().as_dict())
    assert json.loads(text)["python"].startswith("3.")
    assert str(Path(__file__).resolve().parents[2]) not in text
    assert str(Path.home()) + "/" not in text
    host = socket.gethostname()
    assert len(host) < 4 or host not in text  # a very short host name may be part of a word


def test_versions_of_missing_packages_are_left_out():
    found = package_versions(("numpy", "a-package-nobody-has"))
    assert list(found) == ["numpy"]


def _git(folder, *arguments):
    subprocess.run(
        [
            "git",
            "-C",
            folder,
            "-c",
            "user.name=n",
            "-c",
            "user.email=e@x",
            "-c",
            "core.hooksPath=/dev/null",
            *arguments,
        ],
        check=True,
        capture_output=True,
    )


def test_only_a_tracked_file_has_a_revision_and_edits_are_marked(tmp_path):
    (tmp_path / "tracked.py").write_text("1")
    (tmp_path / "stranger.py").write_text("1")
    assert git_revision(tmp_path / "tracked.py") is None
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", "tracked.py")
    _git(tmp_path, "commit", "-qm", "one")
    revision = git_revision(tmp_path / "tracked.py")
    assert revision is not None
    assert len(revision) == 40
    assert git_revision(tmp_path / "stranger.py") is None
    (tmp_path / "tracked.py").write_text("2")
    assert git_revision(tmp_path / "tracked.py") == revision + "+changes"


def test_without_git_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(Path(machine.__file__).resolve()) is None
