"""OpenVINO beside ONNX Runtime on the same file; skipped where the engine is not installed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from losa_export.errors import CheckpointError, EngineUnavailableError, RuntimeFailureError
from losa_export.eval.engine import EngineProcess
from losa_export.export import ExportConfig, export_onnx
from losa_export.runtimes.folder_settings import model_sizes
from losa_export.runtimes.isolated import ENGINES
from losa_export.runtimes.openvino import OpenVinoRuntime
from losa_export.synth import LlamaShape, SynthConfig, write_random_checkpoint

ENGINE = ENGINES["openvino"]
SHAPE = LlamaShape(64, 176, heads=4, kv_heads=2, blocks=2, vocabulary=128, positions=128)
needs_engine = pytest.mark.skipif(
    not ENGINE.installed, reason="needs the engine's own environment: losa runtimes install openvino"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("openvino")
    config = SynthConfig("llama-2-7b", work / "model", sparsity_fraction=0.5, progress=False)
    write_random_checkpoint(SHAPE, 2, config)
    for weights in ("dense", "sparse"):
        export_onnx(
            ExportConfig(
                work / "model",
                work / weights,
                profile="standard",
                weights=weights,  # type: ignore[arg-type]
                gate=False,
                progress=False,
            )
        )
    return work


def test_without_the_engine_loading_says_where_it_lives(folders: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="losa runtimes install openvino"):
        OpenVinoRuntime.load(folders / "dense")


def test_sizes_come_from_the_folders_settings(folders: Path, tmp_path: Path) -> None:
    assert model_sizes(folders / "dense") == (128, 128)
    with pytest.raises(CheckpointError, match=r"no usable genai_config\.json \(FileNotFoundError"):
        model_sizes(tmp_path)
    (tmp_path / "genai_config.json").write_text('{"model": {"vocab_size": 3}}')
    with pytest.raises(CheckpointError, match="KeyError: 'context_length'"):
        model_sizes(tmp_path)


@needs_engine
@pytest.mark.parametrize("lengths", [(16, 8), (1, 1), (5, 30)])
def test_it_answers_as_onnx_runtime_does(folders: Path, lengths: tuple[int, int]) -> None:
    from losa_export.eval.answers import Workload, workload_logits
    from losa_export.runtimes.ort import OrtRuntime

    generator = np.random.default_rng(0)
    prompt, forced = (generator.integers(0, 128, count) for count in lengths)
    workload = Workload(prompt, forced, (prompt,), 1)
    with closing(OrtRuntime.load(folders / "dense", threads=1, custom_op=False)) as stock:
        wanted = workload_logits(stock, workload)
    with EngineProcess("OpenVINO", timeout_s=120, engine=ENGINE) as process:
        loaded = process.call("load", name="openvino", folder=folders / "dense", threads=1)
        # Twice: the second time with a request whose cache must be empty again.
        for _ in range(2):
            found = process.call("workload_logits", workload=workload)
            # 1e-4: float32, other orders of summation
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert (loaded.vocab_size, loaded.max_positions) == (128, 128)


@needs_engine
def test_sparse_weights_are_refused_with_what_to_do(folders: Path) -> None:
    with (
        EngineProcess("OpenVINO", timeout_s=120, engine=ENGINE) as process,
        pytest.raises(RuntimeFailureError, match="export it with dense weights and --profile standard"),
    ):
        process.call("load", name="openvino", folder=folders / "sparse", threads=1)
