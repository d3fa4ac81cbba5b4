"""What an install puts where, and what a light install must never need."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("training", "runtimes", "eval")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-P", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, cwd=folder, timeout=600)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
def test_stages_are_installed_inside_the_package_only(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"losa_export"}
    for stage in STAGES:
        assert f"losa_export/{stage}/__init__.py" in wheel_names


@pytest.mark.slow
def test_every_source_module_and_the_library_are_installed(wheel_names: list[str]) -> None:
    for folder, target in [("losa_export", "losa_export"), *((stage, f"losa_export/{stage}") for stage in STAGES)]:
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{target}/{path.relative_to(ROOT / folder).as_posix()}" in wheel_names
    assert "losa_export/training/presets/recommended.toml" in wheel_names
    assert "losa_export/py.typed" in wheel_names
    for name in ("index.html", "page.css", "page.js"):
        assert f"losa_export/runtimes/serve/page/{name}" in wheel_names
    assert "losa_export/runtimes/liblosa_kernels.so" in wheel_names
    assert not [name for name in wheel_names if name.endswith((".cpp", ".h"))]


def imported(statement: str) -> set[str]:
    """Top-level modules in memory after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, timeout=120)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import losa_export.cli", {"torch", "transformers", "onnxruntime", "onnx", "numpy"}),
        ("from losa_export.runtimes.loader import load_runtime", {"torch", "transformers", "onnx", "onnx_ir"}),
        (
            "import losa_export.runtimes.ort, losa_export.runtimes.generate",
            {"torch", "transformers", "onnx", "onnx_ir"},
        ),
        ("import losa_export.export", {"torch", "transformers"}),
        ("import losa_export.merge", {"torch", "transformers"}),
    ],
)
def test_imports_stay_light(statement: str, forbidden: set[str]) -> None:
    assert imported(statement) & forbidden == set()


def test_imports_point_one_way() -> None:
    # the spine knows no stage (but for the orchestrating modules, which import inside functions);
    # stages know the spine, and eval also the runtimes
    allowed = {"losa_export": set(), "training": set(), "runtimes": set(), "eval": {"runtimes"}}
    for folder, stages in allowed.items():
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text().splitlines():
                for stage in set(STAGES) - stages - {folder}:
                    top_level = line.startswith((f"from losa_export.{stage}", f"import losa_export.{stage}"))
                    assert not top_level, f"{path.relative_to(ROOT)} imports the stage '{stage}': {line}"
