"""The ARM kernels, built by CMake as for a release and run on an ARM processor or its emulator.

`scripts/install-arm` installs a cross compiler and qemu where they are missing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # compiles the library once more, for another processor

ROOT = Path(__file__).resolve().parents[2]
HARNESS = ROOT / "tests" / "native"
ROWS = ["neon-i8mm", "neon-dotprod", "neon", "scalar"]
CPUS = {  # as qemu calls them, with the rows they run; the real processor's rows are not known here
    "max": ROWS,
    "neoverse-n1": ROWS[1:],
    "cortex-a53": ROWS[2:],
}
# The best processor does it all, in two halves to fill two processors of this machine; the others, whose rows it has as
# well, do a part, so as to show that no row needs more than it says.
RUNS = {
    "max, half": ("max", "rows", "quick", "0", "2"),
    "max, other half": ("max", "rows", "quick", "1", "2"),
    "neoverse-n1": ("neoverse-n1", "rows", "quick", "1", "6"),
    "cortex-a53": ("cortex-a53", "rows", "quick", "2", "6"),
    "broken": ("max", "fuzz", "2", "0", "500"),
}
DESCRIBE = """
#include <cstddef>
#include <cstdio>
extern "C" size_t losa_describe(char* text, size_t capacity);
int main() {
  char text[4096];
  return losa_describe(text, sizeof text) < sizeof text && std::puts(text) >= 0 ? 0 : 1;
}
"""


@dataclass(frozen=True)
class Tools:
    """How to build for ARM and how to run it: `emulator` is empty on an ARM processor."""

    prefix: str
    emulator: str

    @property
    def cxx(self) -> str:
        return f"{self.prefix}g++"

    def run(self, program: Path, cpu: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        if not self.emulator:
            return run(program, *arguments, environment=environment)
        library = run(self.cxx, "-print-file-name=libc.so.6").stdout.strip()  # ROOT/lib/libc.so.6
        emulator = (self.emulator, "-L", Path(library).resolve().parents[1], "-cpu", cpu)
        return run(*emulator, program, *arguments, environment=environment)


def run(*command: object, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "LOSA_KERNEL"}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env=inherited | dict(environment or {}),
    )


def build(*command: object) -> None:
    result = run(*command)
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"


@pytest.fixture(scope="module")
def tools() -> Tools:
    """A compiler for ARM and what runs its programs, or a skip."""
    native = sys.platform == "linux" and platform.machine().lower() in ("aarch64", "arm64")
    found = Tools("", "") if native else Tools("aarch64-linux-gnu-", "qemu-aarch64")
    for tool in filter(None, (found.cxx, found.emulator)):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing; scripts/install-arm installs it")
    return found


@pytest.fixture(scope="module")
def library(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder with liblosa_kernels.so, its objects and the harness, made of the very same objects."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if cmake is None:
        pytest.skip("cmake is missing; scripts/install installs it")
    folder = tmp_path_factory.mktemp("arm")
    build(
        cmake,
        *("-S", ROOT, "-B", folder),
        *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"),
        f"-DCMAKE_CXX_COMPILER={tools.cxx}",
        "-DCMAKE_CXX_FLAGS=-Werror",
    )
    build(cmake, "--build", folder, "--parallel", os.cpu_count() or 1)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'runtimes' / 'native' / 'include'}"]
    sources = sorted(HARNESS.glob("*.cpp"))

    def compile_one(source: Path) -> None:
        build(tools.cxx, *flags, "-c", source, "-o", folder / f"{source.stem}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources))
    program = [folder / f"{source.stem}.o" for source in sources]
    build(tools.cxx, "-static", *program, *kernel_objects(folder), "-pthread", "-o", folder / "harness")
    return folder


def kernel_objects(folder: Path) -> list[Path]:
    objects = sorted((folder / "CMakeFiles").glob("**/src/*.o"))
    assert len(objects) >= len(list((ROOT / "runtimes" / "native" / "src").glob("neon*.cpp"))) + 4
    return objects


def skip_other_cpu(tools: Tools, cpu: str) -> None:
    if not tools.emulator and cpu != "max":
        pytest.skip("runs on the processor that is there")


@pytest.fixture(scope="module")
def results(tools: Tools, library: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """What each of RUNS came to."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda arguments: tools.run(library / "harness", *arguments), RUNS.values())
        return dict(zip(RUNS, done, strict=True))


@pytest.mark.parametrize("name", [name for name in RUNS if name != "broken"])
def test_every_row_agrees_with_scalar_on_a_processor_that_has_just_its_instructions(
    tools: Tools, results: dict[str, subprocess.CompletedProcess[str]], name: str
) -> None:
    cpu = RUNS[name][0]
    skip_other_cpu(tools, cpu)
    result = results[name]
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("ok\n")
    rows = {name: int(count) for name, count in re.findall(r"^row (\S+): (\d+) examples$", result.stdout, re.MULTILINE)}
    assert list(rows) == (CPUS[cpu] if tools.emulator else [name for name in ROWS if name in rows])
    assert min(rows.values()) > 20


def test_a_broken_weight_is_refused_or_run_rightly_on_arm(
    results: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    result = results["broken"]
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^fuzz: [1-9]\d* of 500 broken weights accepted and run$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("cpu", CPUS)
def test_the_library_loads_and_chooses_the_best_row_of_the_processor(
    tools: Tools, library: Path, tmp_path: Path, cpu: str
) -> None:
    skip_other_cpu(tools, cpu)
    (tmp_path / "describe.cpp").write_text(DESCRIBE)
    program = tmp_path / "describe"
    build(
        tools.cxx,
        *(tmp_path / "describe.cpp", library / "liblosa_kernels.so"),
        *(f"-Wl,-rpath,{library}", "-o", program),
    )

    def describe(**environment: str) -> dict[str, object]:
        result = tools.run(program, cpu, **environment)
        assert result.returncode == 0, result.stderr
        description = json.loads(result.stdout)
        assert isinstance(description, dict)
        return description

    best = describe()
    assert best["compiled_rows"] == ROWS
    assert best["available_rows"] == CPUS[cpu] if tools.emulator else best["available_rows"]
    assert best["error"] is None
    available = best["available_rows"]
    assert isinstance(available, list)
    assert best["row"] == available[0]
    for row in ROWS:
        forced = describe(LOSA_KERNEL=row)
        if row in available:
            assert forced["row"] == row
        else:
            assert forced["row"] is None
            assert f"kernel row '{row}' needs instructions that this CPU lacks" in str(forced["error"])


def test_no_kernel_runs_or_is_shared_before_the_processor_has_been_asked(tools: Tools, library: Path) -> None:
    """A file with instructions of its own has no code that runs at load time, and no function that a linker merges."""
    files = [path for path in kernel_objects(library) if path.name.startswith("neon")]
    assert len(files) >= 4
    for path in files:
        sections = run(f"{tools.prefix}objdump", "--section-headers", path)
        assert sections.returncode == 0
        assert ".text" in sections.stdout
        assert ".init_array" not in sections.stdout, f"{path.name} fills something at load time"
        symbols = run(f"{tools.prefix}nm", "--defined-only", path)
        assert symbols.returncode == 0
        assert re.search(r" T ", symbols.stdout) or re.search(r" [DR] ", symbols.stdout)
        assert not re.findall(r" [WVu] .*", symbols.stdout), f"{path.name} has functions that other files may share"
