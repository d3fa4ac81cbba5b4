from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime_genai", reason="needs the 'genai' extra")

from losa_export.errors import CheckpointError, InputError, RuntimeFailureError
from losa_export.eval.answers import answers_of
from losa_export.eval.parity import gate
from losa_export.export import ExportConfig, export_onnx
from losa_export.runtimes.loader import load_runtime
from losa_export.runtimes.ort import OrtRuntime
from losa_export.synth import LlamaShape, SynthConfig, write_random_checkpoint

SHAPE = LlamaShape(64, 176, heads=4, kv_heads=2, blocks=2, vocabulary=128, positions=128)


@pytest.fixture(scope="module", params=["dense", "sparse"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("genai")
    zeros = 0.7 if request.param == "sparse" else 0.0
    config = SynthConfig("llama-2-7b", work / "model", sparsity_fraction=zeros, progress=False)
    write_random_checkpoint(SHAPE, 2, config)
    export_onnx(ExportConfig(work / "model", work / "onnx", weights=request.param, gate=False, progress=False))
    return work / "onnx"


def test_it_answers_as_onnx_runtime_does_sparse_weights_too(folder: Path) -> None:
    prompts = tuple(np.random.default_rng(0).integers(0, 128, (3, 9)))
    with (
        closing(OrtRuntime.load(folder, threads=1)) as ours,
        closing(load_runtime("genai", folder, threads=1)) as genai,
    ):
        assert (genai.vocab_size, genai.max_positions) == (128, 128)
        gate(answers_of(ours, prompts, 8), genai)
        described = genai.describe()
    assert described.engine == "onnxruntime-genai"
    assert described.details["custom_op"] is True
    assert described.kernel_row is not None


def test_rows_are_kept_apart(folder: Path) -> None:
    with closing(load_runtime("genai", folder, threads=1)) as runtime:
        state = runtime.new_state(2, 16)
        with pytest.raises(InputError, match="row 0 of the cache is empty"):
            runtime.decode(state, np.array([1, 2]))
        runtime.prefill(state, 0, np.array([5, 6, 7]))
        runtime.prefill(state, 1, np.array([9]))
        both = runtime.decode(state, np.array([1, 2]))
        assert state.lengths.tolist() == [4, 2]
        state.reset(0)
        assert state.lengths.tolist() == [0, 2]
        alone = runtime.new_state(1, 16)
        runtime.prefill(alone, 0, np.array([9]))
        # 1e-5: float32, other shapes of the products
        np.testing.assert_allclose(runtime.decode(alone, np.array([2]))[0], both[1], rtol=1e-5, atol=1e-5)


def test_a_folder_without_its_settings_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no usable genai_config\.json"):
        load_runtime("genai", tmp_path)
    shutil.copy(folder / "genai_config.json", tmp_path)
    with pytest.raises(RuntimeFailureError, match="onnxruntime-genai refused"):
        load_runtime("genai", tmp_path)
