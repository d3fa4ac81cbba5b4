"""The kernels under AddressSanitizer, LeakSanitizer and UBSan; AVX-512 over emulated instructions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "runtimes" / "native"
TESTS = ROOT / "tests" / "native"
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE / 'include'}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
X86_SOURCES = {  # flags as in CMakeLists.txt, but for AVX-512, whose instructions are emulated
    NATIVE / "src/avx2.cpp": ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi", "-mbmi2", "-fno-trapping-math"],
    NATIVE / "src/avx512.cpp": [f"-I{TESTS / 'emulated'}"],
}
SOURCES = [NATIVE / "src" / f"{name}.cpp" for name in ("dispatch", "matmul", "scalar", "validate")]


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler (CXX, g++ or c++)")
    return found


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


@pytest.mark.slow  # compiles the library once more, with sanitizers
def test_every_row_is_clean_and_right_under_sanitizers(tmp_path: Path) -> None:
    cxx = compiler()
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if run(cxx, *SANITIZERS, probe, "-o", tmp_path / "probe").returncode or run(tmp_path / "probe").returncode:
        pytest.skip(f"{cxx} has no working sanitizers")

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = [*FLAGS, *SANITIZERS, *(["-DLOSA_X86"] if x86 else [])]
    jobs: dict[Path, list[str]] = {source: [] for source in (*SOURCES, TESTS / "harness.cpp")}
    if x86:
        jobs |= X86_SOURCES

    def build(source: Path) -> subprocess.CompletedProcess[str]:
        return run(cxx, *flags, *jobs[source], "-c", source, "-o", tmp_path / f"{source.stem}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, built in zip(jobs, pool.map(build, jobs), strict=True):
            assert built.returncode == 0, f"{source}: {built.stderr}"
    objects = [tmp_path / f"{source.stem}.o" for source in jobs]
    linked = run(cxx, *SANITIZERS, *objects, "-pthread", "-o", tmp_path / "harness")
    assert linked.returncode == 0, linked.stderr

    result = run(tmp_path / "harness")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("ok\n")
    if x86:
        assert "row avx512: 1040 cases" in result.stdout
