"""The kernels under AddressSanitizer, LeakSanitizer and UBSan; AVX-512 over emulated instructions.

`tests/native` holds the program: every kernel row over sound weights of every type, and 10,000 broken ones.
"""

from __future__ import annotations

import os
import platform
import re
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
PARTS = ("attention", "dispatch", "large_pages", "matmul", "norm", "scalar", "stages", "validate")
SOURCES = [NATIVE / "src" / f"{name}.cpp" for name in PARTS]
X86_FLAGS = {  # of the files whose names start so: as in CMakeLists.txt, but AVX-512 is emulated
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi", "-mbmi2", "-fno-trapping-math"],
    "avx512": [f"-I{TESTS / 'emulated'}", "-O0"],  # optimised, its loops would take minutes to compile
}
X86 = platform.machine().lower() in ("x86_64", "amd64")
FUZZ_CASES = 10_000
RUNS = {  # two of each, to fill two processors
    "rows 0": ["rows", 0, 2],
    "rows 1": ["rows", 1, 2],
    "fuzz 0": ["fuzz", 1, 0, FUZZ_CASES // 2],
    "fuzz 1": ["fuzz", 1, FUZZ_CASES // 2, FUZZ_CASES // 2],
}


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def compiler(folder: Path, sanitizers: list[str]) -> str:
    """A compiler whose sanitizers work, or a skip."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler (CXX, g++ or c++)")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if run(found, *sanitizers, probe, "-o", folder / "probe").returncode or run(folder / "probe").returncode:
        pytest.skip(f"{found} has no working {' '.join(sanitizers)}")
    return found


def build(folder: Path) -> Path:
    """The program, with sanitizers."""
    cxx = compiler(folder, SANITIZERS)
    flags = [*FLAGS, *SANITIZERS, *(["-DLOSA_X86"] if X86 else [])]
    jobs: dict[Path, list[str]] = {source: [] for source in (*SOURCES, *TESTS.glob("*.cpp"))}
    for prefix, extra in X86_FLAGS.items() if X86 else ():
        jobs |= dict.fromkeys((NATIVE / "src").glob(f"{prefix}*.cpp"), extra)

    def compile_one(source: Path) -> subprocess.CompletedProcess[str]:
        return run(cxx, *flags, *jobs[source], "-c", source, "-o", folder / f"{source.stem}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, built in zip(jobs, pool.map(compile_one, jobs), strict=True):
            assert built.returncode == 0, f"{source}: {built.stderr}"
    linked = run(
        cxx, *SANITIZERS, *(folder / f"{source.stem}.o" for source in jobs), "-pthread", "-o", folder / "harness"
    )
    assert linked.returncode == 0, linked.stderr
    return folder / "harness"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """What each of RUNS came to."""
    harness = build(tmp_path_factory.mktemp("sanitized"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(RUNS, pool.map(lambda arguments: run(harness, *arguments), RUNS.values()), strict=True))


def assert_clean(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("ok\n")


@pytest.mark.slow  # compiles the library once more, with sanitizers
@pytest.mark.parametrize("part", [0, 1])
def test_every_row_is_clean_and_right_under_sanitizers(
    results: dict[str, subprocess.CompletedProcess[str]], part: int
) -> None:
    result = results[f"rows {part}"]
    assert_clean(result)
    assert "row scalar: 175 examples" in result.stdout
    if X86:
        assert "row avx512: 175 examples" in result.stdout
        assert "row avx512vnni: 175 examples" in result.stdout


@pytest.mark.slow  # as above
@pytest.mark.parametrize("part", [0, 1])
def test_a_broken_weight_is_refused_or_run_rightly(
    results: dict[str, subprocess.CompletedProcess[str]], part: int
) -> None:
    """A failure names its seed and case: `harness fuzz SEED CASE 1` repeats it."""
    result = results[f"fuzz {part}"]
    assert_clean(result)
    counts = re.search(r"fuzz: (\d+) of (\d+) broken weights accepted and run", result.stdout)
    assert counts is not None
    accepted, cases = map(int, counts.groups())
    assert cases == FUZZ_CASES // 2
    assert cases / 5 < accepted < cases / 2, "the mutations no longer try both sides of validation"


def test_stages_keep_threads_out_of_each_others_way(tmp_path: Path) -> None:
    sanitizers = ["-fsanitize=thread"]
    cxx, program = compiler(tmp_path, sanitizers), tmp_path / "threads"
    flags = [*FLAGS, *sanitizers, *(["-DLOSA_X86"] if X86 else [])]
    built = run(cxx, *flags, TESTS / "threads" / "main.cpp", NATIVE / "src" / "stages.cpp", "-pthread", "-o", program)
    assert built.returncode == 0, built.stderr
    assert_clean(run(program))
