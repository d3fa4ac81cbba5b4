"""Profile and runtime of DeepSparse; its answers are held against ONNX Runtime's in test_isolated_engines."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_export.errors import ConfigError, UnsupportedArchitectureError
from losa_export.eval.answers import Workload, workload_logits
from losa_export.eval.bench import BenchConfig, bench
from losa_export.eval.engine import EngineProcess
from losa_export.export import ExportConfig, export_onnx
from losa_export.runtimes.base import causal_mask
from losa_export.runtimes.deepsparse import program_length
from losa_export.runtimes.isolated import ENGINES
from losa_export.runtimes.ort import OrtRuntime
from tests.conftest import write_tiny_checkpoint

ENGINE = ENGINES["deepsparse"]
needs_engine = pytest.mark.skipif(
    not ENGINE.installed, reason="needs the engine's own environment: losa runtimes install deepsparse"
)


def export(folder: Path, **changes: Any) -> Path:
    write_tiny_checkpoint(folder / "checkpoint", seed=0, **changes)
    for profile in ("deepsparse", "ort"):
        source, output = folder / "checkpoint", folder / profile
        export_onnx(ExportConfig(source=source, output=output, profile=profile, progress=False))  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("deepsparse"))


@pytest.mark.parametrize("prompt", [1, 2, 7, 16, 100])
@pytest.mark.parametrize("new", [0, 1, 5, 64])
def test_a_prompt_is_shorter_than_the_cache_beside_it(prompt: int, new: int) -> None:
    length = program_length(prompt, prompt + new)
    assert prompt < length - prompt
    assert length > prompt + new  # the last place stays empty
    assert length <= 2 * (prompt + new) + 1


@needs_engine
@pytest.mark.parametrize(("prompt", "new"), [(20, 4), (12, 12), (3, 24)])
def test_a_prompt_enters_whole_and_is_answered_as_in_onnx_runtime(folders: Path, prompt: int, new: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 97, (2, prompt + new))
    workloads = [Workload(row[:prompt], row[prompt:], (row[:prompt],), 1) for row in tokens]
    with closing(OrtRuntime.load(folders / "ort", threads=1, custom_op=False)) as stock:
        wanted = [workload_logits(stock, workload) for workload in workloads]
    with EngineProcess("the engine", timeout_s=120, engine=ENGINE) as process:
        process.call("load", name="deepsparse", folder=folders / "deepsparse", threads=1)
        for workload, logits in zip(workloads, wanted, strict=True):
            found = process.call("workload_logits", workload=workload)
            np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4 * float(np.abs(logits).max()))


def test_the_causal_mask_shows_each_token_itself_and_what_stands_before_it() -> None:
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert causal_mask(mask, 2)[:, 0].tolist() == [[[0, 1, 1, 0], [0, 1, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
    # A token that stands under padding sees itself alone, for an empty row would be 0/0.
    assert causal_mask(np.array([[0, 0]]), 2)[0, 0].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("setting", [{"weights": "sparse"}, {"values": "int8"}, {"head": "bf16"}])
def test_our_own_operators_are_refused_for_its_profile(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="does not know our operators"):
        ExportConfig(source=tmp_path, output=tmp_path / "out", profile="deepsparse", **setting)


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    shape = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8}
    write_tiny_checkpoint(tmp_path / "checkpoint", seed=0, **shape)
    config = ExportConfig(tmp_path / "checkpoint", tmp_path / "out", profile="deepsparse", gate=False, progress=False)
    with pytest.raises(UnsupportedArchitectureError, match="a sliding window"):
        export_onnx(config)


def test_zeros_stay_in_ordinary_matrices_of_opset_13(folders: Path) -> None:
    import onnx

    model = onnx.load(str(folders / "deepsparse" / "model.onnx"), load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 13)]
    assert not model.functions
    onnx.checker.check_model(str(folders / "deepsparse" / "model.onnx"))


@needs_engine
@pytest.mark.slow
def test_it_can_be_benchmarked(folders: Path) -> None:
    config = BenchConfig(
        candidate=folders / "deepsparse",
        baseline=folders / "ort",
        candidate_runtime="deepsparse",
        threads=1,
        prompt_tokens=8,
        new_tokens=4,
        min_seconds=0.0,
        max_seconds=1.0,
        load_samples=1,
    )
    report = bench(config, show_progress=False)
    assert report.candidate.engine["engine"] == "deepsparse"
    assert report.candidate.engine["details"]["fraction_of_supported_ops"] == 1.0
