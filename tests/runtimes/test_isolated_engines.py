"""Engines with an environment of their own, beside ONNX Runtime on the same weights; skipped where not installed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_export.errors import CheckpointError, EngineUnavailableError, InputError, RuntimeFailureError
from losa_export.eval.engine import EngineProcess
from losa_export.eval.gguf_peer import write_gguf_peer
from losa_export.export import ExportConfig, export_onnx
from losa_export.runtimes import load_runtime
from losa_export.runtimes.base import RuntimeName
from losa_export.runtimes.folder_settings import model_sizes
from losa_export.runtimes.isolated import ENGINES
from losa_export.synth import LlamaShape, SynthConfig, write_random_checkpoint

SHAPE = LlamaShape(64, 176, heads=4, kv_heads=2, blocks=2, vocabulary=128, positions=128)
# What each opens of the folders below.
OPENS: dict[RuntimeName, tuple[str, ...]] = {
    "deepsparse": ("deepsparse",),
    "openvino": ("dense",),
    "optimum": ("dense", "sparse"),
    "llamacpp": ("gguf",),
}
# float32, other orders of summation; llama.cpp keeps its cache in float16
CLOSE: dict[RuntimeName, float] = {"llamacpp": 2e-3}


def installed(name: str) -> None:
    if not ENGINES[name].installed:
        pytest.skip(f"needs the engine's own environment: losa runtimes install {name}")


def worker(name: str) -> EngineProcess:
    return EngineProcess(f"the engine ({name})", timeout_s=120, engine=ENGINES[name])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("engines")
    config = SynthConfig("llama-2-7b", work / "model", sparsity_fraction=0.5, progress=False)
    write_random_checkpoint(SHAPE, 2, config)
    exports: dict[str, dict[str, Any]] = {
        "stock": {"profile": "ort", "weights": "dense"},
        "dense": {"profile": "standard", "weights": "dense"},
        "sparse": {"profile": "standard", "weights": "sparse"},
        "deepsparse": {"profile": "deepsparse"},
    }
    for name, settings in exports.items():
        export_onnx(ExportConfig(work / "model", work / name, gate=False, progress=False, **settings))
    if ENGINES["llamacpp"].installed:
        write_gguf_peer(work / "model", work / "gguf", values="F32")
    return work


def test_every_engine_with_an_environment_is_tried_here() -> None:
    assert sorted(OPENS) == sorted(ENGINES)


@pytest.mark.parametrize("name", OPENS)
def test_without_the_engine_loading_says_where_it_lives(folders: Path, name: RuntimeName) -> None:
    with pytest.raises(EngineUnavailableError, match=f"losa runtimes install {name}"):
        load_runtime(name, folders / OPENS[name][0])


@pytest.mark.parametrize("lengths", [(16, 8), (1, 1), (1, 0), (5, 30)])
@pytest.mark.parametrize(("name", "opened"), [(name, opened) for name in OPENS for opened in OPENS[name]])
def test_it_answers_as_onnx_runtime_does(
    folders: Path, name: RuntimeName, opened: str, lengths: tuple[int, int]
) -> None:
    from losa_export.eval.answers import Workload, workload_logits
    from losa_export.runtimes.ort import OrtRuntime

    installed(name)
    generator = np.random.default_rng(0)
    prompt, forced = (generator.integers(0, 128, count) for count in lengths)
    workload = Workload(prompt, forced, (prompt,), 1)
    with closing(OrtRuntime.load(folders / "stock", threads=1, custom_op=False)) as stock:
        wanted = workload_logits(stock, workload)
    with worker(name) as process:
        loaded = process.call("load", name=name, folder=folders / opened, threads=1)
        # Twice: the second time the cache must be empty again.
        for _ in range(2):
            found = process.call("workload_logits", workload=workload)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE.get(name, 1e-4) * float(np.abs(wanted).max()))
    assert (loaded.vocab_size, loaded.max_positions) == (128, 128)


# The gate reads prompts into the rows of a batch, decodes them together, and takes them out again.
@pytest.mark.parametrize("name", OPENS)
def test_rows_of_a_batch_answer_as_they_do_alone(folders: Path, name: RuntimeName) -> None:
    from losa_export.eval.answers import answers_of
    from losa_export.eval.parity import thresholds_for
    from losa_export.runtimes.ort import OrtRuntime

    installed(name)
    generator = np.random.default_rng(1)
    prompts = tuple(generator.integers(0, 128, 9) for _ in range(3))
    with closing(OrtRuntime.load(folders / "stock", threads=1, custom_op=False)) as stock:
        answers = answers_of(stock, prompts, 6)
    with worker(name) as process:
        process.call("load", name=name, folder=folders / OPENS[name][0], threads=1)
        process.call("gate", answers=answers, thresholds=thresholds_for("int16" if name == "llamacpp" else None))


@pytest.mark.parametrize(
    ("name", "opened", "kind", "message"),
    [
        ("deepsparse", "dense", CheckpointError, "is not of profile 'deepsparse'"),
        ("openvino", "sparse", RuntimeFailureError, "export it with dense weights and --profile standard"),
        ("openvino", "model", CheckpointError, "export it with: losa export"),
        ("optimum", "model", CheckpointError, "export it with: losa export"),
        ("llamacpp", "dense", CheckpointError, "python -m losa_export.eval.gguf_peer"),
    ],
)
def test_what_it_cannot_open_is_refused_with_what_to_do(
    folders: Path, name: RuntimeName, opened: str, kind: type[Exception], message: str
) -> None:
    installed(name)
    with worker(name) as process, pytest.raises(kind, match=message):
        process.call("load", name=name, folder=folders / opened, threads=1)


def test_llama_cpp_says_that_a_file_is_damaged(folders: Path, tmp_path: Path) -> None:
    installed("llamacpp")
    whole = (folders / "gguf" / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[: len(whole) // 2])
    with worker("llamacpp") as process, pytest.raises(RuntimeFailureError, match=r"refused .*model\.gguf"):
        process.call("load", name="llamacpp", folder=tmp_path, threads=1)


def test_prompts_that_do_not_fit_are_refused_by_each_engine(folders: Path) -> None:
    installed("llamacpp")
    with worker("llamacpp") as process, pytest.raises(InputError, match="knows only 128 positions"):
        process.call("load", name="llamacpp", folder=folders / "gguf", threads=1)
        process.call("sample", prompt=np.arange(100), forced=np.arange(40))


def test_sizes_come_from_the_folders_settings(folders: Path, tmp_path: Path) -> None:
    assert model_sizes(folders / "dense") == (128, 128)
    with pytest.raises(CheckpointError, match=r"no usable genai_config\.json \(FileNotFoundError"):
        model_sizes(tmp_path)
    (tmp_path / "genai_config.json").write_text('{"model": {"vocab_size": 3}}')
    with pytest.raises(CheckpointError, match="KeyError: 'context_length'"):
        model_sizes(tmp_path)
