"""Exported folders on every runtime: one checkpoint, one answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx_ir", reason="needs the extra 'export'")

from losa_export.errors import FormatError
from losa_export.export import ExportConfig, export_onnx
from losa_export.onnx_file import check_references
from losa_export.runtimes.base import Runtime, RuntimeName
from losa_export.runtimes.generate import GenerationConfig, generate_text, generate_tokens
from losa_export.runtimes.loader import load_runtime
from losa_export.runtimes.native import describe
from losa_export.runtimes.ort import OrtRuntime

# float32, logits of order 5 after two blocks; each engine sums in its own order
TOLERANCE = 5e-5
PROMPTS = [4, 9, 6]
# Greedy needs a clear winner: below this difference two engines may rightly choose differently.
MARGIN = 1e-3


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with six tenths of each block linear set to zero."""
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("pruned") / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            threshold = np.quantile(np.abs(weight), 0.6)
            tensors[name] = np.where(np.abs(weight) < threshold, np.float32(0), 2 * weight)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["ort-sparse", "ort-dense", "standard-sparse"])
def exported(request: pytest.FixtureRequest, pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    profile, weights = request.param.split("-")
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export_onnx(ExportConfig(pruned, folder, profile=profile, weights=weights, gate=False, progress=False))
    return folder


@pytest.fixture(scope="module", params=["ort", "ort-stock"])
def runtime(request: pytest.FixtureRequest, exported: Path) -> Runtime:
    if request.param == "ort":
        request.getfixturevalue("kernels")
    return load_runtime(request.param, exported, threads=1)


@pytest.fixture(scope="module")
def torch_runtime(pruned: Path) -> Runtime:
    pytest.importorskip("transformers", reason="needs the extra 'train'")
    return load_runtime("torch", pruned, threads=1)


def sequences() -> list[NDArray[np.int64]]:
    generator = np.random.default_rng(3)
    return [generator.integers(3, 128, size=length + 5) for length in PROMPTS]


def alone(runtime: Runtime, sequence: NDArray[np.int64]) -> NDArray[np.float32]:
    return runtime.prefill(runtime.new_state(1, len(sequence)), 0, sequence)


def test_prefill_answers_as_the_checkpoint_does(runtime: Runtime, torch_runtime: Runtime) -> None:
    for sequence in sequences():
        np.testing.assert_allclose(alone(runtime, sequence), alone(torch_runtime, sequence), atol=TOLERANCE)


@pytest.mark.parametrize("length", [1, 9])
def test_the_last_logits_alone_are_those_of_the_whole_prompt(runtime: Runtime, length: int) -> None:
    sequence = sequences()[1][: length + 1]
    whole = alone(runtime, sequence)
    state = runtime.new_state(2, 12)
    last = runtime.prefill(state, 1, sequence[:length], last_only=True)
    assert last.shape == (1, runtime.vocab_size)
    np.testing.assert_allclose(last[0], whole[length - 1], atol=TOLERANCE)
    assert state.lengths.tolist() == [0, length]
    decoded = runtime.decode(state, np.array([3, sequence[length]]))[1]
    np.testing.assert_allclose(decoded, whole[length], atol=TOLERANCE)


def test_the_head_of_an_export_reads_no_more_tokens_than_are_asked_for(runtime: Runtime) -> None:
    """In profile 'ort'; heads of profile 'standard' reshape what they read."""
    assert isinstance(runtime, OrtRuntime)
    assert runtime.chooses_logits == runtime.layout.shared


@pytest.mark.parametrize("engine", ["ort", "ort-stock"])
def test_a_head_of_ours_with_its_norm_inside_reads_no_more_either(
    pruned: Path, tmp_path: Path, kernels: Path, engine: RuntimeName
) -> None:
    export_onnx(ExportConfig(pruned, tmp_path / "onnx", head="int8", gate=False, progress=False))
    assert ("losa.sparse", "SkipNormDenseMatMulInt8") in check_references(tmp_path / "onnx").operators
    runtime = load_runtime(engine, tmp_path / "onnx", threads=1)
    assert isinstance(runtime, OrtRuntime)
    assert runtime.chooses_logits
    prompt = sequences()[1]
    last = runtime.prefill(runtime.new_state(1, 20), 0, prompt, last_only=True)
    # What the head reads is rounded to 16 bits, where a float32 that was summed otherwise may fall to the other side.
    np.testing.assert_allclose(last, alone(runtime, prompt)[-1:], atol=1e-3)


def test_decoding_rows_of_different_lengths_equals_each_row_alone(runtime: Runtime) -> None:
    whole = [alone(runtime, sequence) for sequence in sequences()]
    state = runtime.new_state(3, 20)
    for row in (1, 2, 0):
        runtime.prefill(state, row, sequences()[row][: PROMPTS[row]])
    for step in range(5):
        at = [length + step for length in PROMPTS]
        got = runtime.decode(state, np.array([sequence[a] for sequence, a in zip(sequences(), at, strict=True)]))
        np.testing.assert_allclose(got, [w[a] for w, a in zip(whole, at, strict=True)], atol=TOLERANCE)


def test_greedy_tokens_are_those_of_the_checkpoint(runtime: Runtime, torch_runtime: Runtime) -> None:
    prompt = sequences()[0]
    config = GenerationConfig(max_new_tokens=24)
    tokens = list(generate_tokens(torch_runtime, prompt, config))
    top_two = np.sort(alone(torch_runtime, np.concatenate([prompt, tokens])), axis=1)[len(prompt) - 1 :, -2:]
    assert np.diff(top_two).min() > MARGIN
    assert list(generate_tokens(runtime, prompt, config)) == tokens


def test_sampled_text_is_the_same_on_both_engines(exported: Path, kernels: Path) -> None:
    config = GenerationConfig(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=5)
    texts = [
        "".join(generate_text(exported, "the cat", config, runtime=name, threads=1)) for name in ("ort", "ort-stock")
    ]
    assert texts[0] == texts[1]
    assert texts[0]


def test_a_sparse_file_runs_our_kernels_and_a_dense_one_none(exported: Path, kernels: Path) -> None:
    sparse = ("losa.sparse", "SparseMatMulFp32") in check_references(exported).operators
    row = load_runtime("ort", exported, threads=1).describe().kernel_row
    assert row == (describe().row if sparse else None)
    assert load_runtime("ort-stock", exported, threads=1).describe().kernel_row is None


def test_references_found_are_those_of_the_onnx_package(exported: Path) -> None:
    from losa_export.graph.external import check_external_data

    stored = check_external_data(exported).tensors.values()
    assert check_references(exported).data_files == {tensor.path for tensor in stored if tensor.path is not None}


def test_a_corrupted_sparse_weight_is_refused_at_load(pruned: Path, kernels: Path, tmp_path: Path) -> None:
    from losa_export.graph.external import check_external_data

    folder = tmp_path / "onnx"
    export_onnx(ExportConfig(pruned, folder, gate=False, progress=False))
    stored = check_external_data(folder).tensors["model.layers.1.mlp.down_proj.weight.mask"]
    assert stored.path is not None
    with stored.path.open("r+b") as file:
        file.seek(stored.offset)
        file.write(b"\xff" * stored.length)
    with pytest.raises(
        FormatError, match=r"cannot load '.*model.onnx': SkipNormSparseMLPFp32 .*; export the model again"
    ):
        load_runtime("ort", folder, threads=1)


def test_weights_answer_alike_in_large_pages_and_in_the_file(
    pruned: Path, kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_onnx(ExportConfig(pruned, tmp_path / "onnx", values="int8", gate=False, progress=False))
    found = []
    for setting in ("0", "1"):
        monkeypatch.setenv("LOSA_LARGE_PAGES", setting)
        runtime = load_runtime("ort", tmp_path / "onnx", threads=1)
        state = runtime.new_state(1, 20)
        found.append(runtime.prefill(state, 0, np.arange(5, 17)))
        runtime.close()
    np.testing.assert_array_equal(*found)
