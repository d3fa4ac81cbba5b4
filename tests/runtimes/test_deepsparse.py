"""Profile and runtime of DeepSparse; its answers are held against ONNX Runtime's in test_isolated_engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_export.errors import ConfigError, UnsupportedArchitectureError
from losa_export.eval.bench import BenchConfig, bench
from losa_export.export import ExportConfig, export_onnx
from losa_export.runtimes.base import causal_mask
from losa_export.runtimes.deepsparse import pieces, program_length
from losa_export.runtimes.isolated import ENGINES
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
def test_pieces_are_shorter_than_the_cache_beside_them(prompt: int, new: int) -> None:
    cut, length = pieces(prompt, prompt + new), program_length(prompt + new)
    assert sum(cut) == prompt
    assert max(cut) - min(cut) <= 1
    assert all(0 < piece < length - piece for piece in cut)


def test_a_prompt_of_128_before_64_new_tokens_is_two_halves() -> None:
    assert pieces(128, 192) == [64, 64]
    assert pieces(128, 256) == [128]


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
