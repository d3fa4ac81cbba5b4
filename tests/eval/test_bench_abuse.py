"""`losa bench` as a command, on a real file, while its surroundings fail: each ends in the promised message."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("onnx_ir", reason="needs the extra 'export'")

from losa_export.export import ExportConfig, export_onnx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers through /proc"),
]


@pytest.fixture(scope="module")
def dense(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("abuse") / "dense"
    export_onnx(ExportConfig(tiny_checkpoint, folder, weights="dense", gate=False, progress=False))
    return folder


def command(dense: Path, output: Path, *more: str) -> list[str]:
    program = "import sys; from losa_export.cli import main; sys.exit(main())"
    words = ["bench", dense, "--against", dense, "--runtime", "ort-stock", "--prompt", "8", "--gen", "8"]
    words += ["--json", output, *more]
    return [sys.executable, "-P", "-c", program, *map(str, words)]


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def commands_of(pids: list[int]) -> dict[int, str]:
    return {pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in pids}


def test_a_worker_that_is_killed_in_the_middle_is_named_and_takes_nothing_down(dense: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(dense, tmp_path / "bench.json", "--max-time", "60s"), stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        workers: list[int] = []
        while len(workers) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            found = commands_of(children(process.pid))
            workers = [pid for pid, line in found.items() if "eval.worker" in line]
        time.sleep(1)
        alive = [pid for pid in children(process.pid) if pid in workers]
        os.kill(alive[0], signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "losa: error: the " in said
    assert "('dense' in ort-stock) died of signal 9 during" in said
    assert "Traceback" not in said
    assert not (tmp_path / "bench.json").exists()
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists() and "eval.worker" in commands_of([pid])[pid]]


def test_a_record_that_finds_no_space_is_an_error_and_leaves_no_half_file(dense: Path, tmp_path: Path) -> None:
    def little_space() -> None:
        # The system then refuses to write beyond, as it does on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = subprocess.run(
        command(dense, tmp_path / "bench.json", "--max-time", "1s"),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=little_space,
        check=False,
    )
    assert done.returncode == 1
    assert f"losa: error: '{tmp_path / 'bench.json'}' would hold a file larger than its disk" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def burners() -> Iterator[None]:
    """A process that does nothing but compute, for each processor."""
    count = len(os.sched_getaffinity(0))
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("burners")
def test_a_machine_under_load_gets_no_verdict_and_is_told_why(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    done = subprocess.run(
        command(dense, path, "--max-time", "3s"), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["decode"]["all_blocks"]["verdict"] == "NO VERDICT"
    assert "NO VERDICT" in done.stdout
    assert "other processes" in " ".join(done.stdout.split())


def test_an_engine_that_is_missing_is_said_with_how_to_get_it(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-engines"))
    words = command(dense, tmp_path / "bench.json")
    words[words.index("ort-stock")] = "openvino"
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "losa: error: the engine 'openvino' is not installed; install it with: losa runtimes install openvino" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr
