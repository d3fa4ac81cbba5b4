"""DeepSparse exports rewritten with products of 8 bits and fixed activation scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from losa_export.errors import ConfigError, FormatError, TextError
from losa_export.runtimes.isolated import ENGINES
from losa_export.runtimes.loader import load_runtime

pytest.importorskip("onnx_ir", reason="needs the extra 'export'")

from losa_export.eval import deepsparse_peer
from losa_export.eval.deepsparse_peer import quantise_for_deepsparse
from losa_export.export import ExportConfig, export_onnx
from losa_export.graph.external import ModelFolder, check_external_data
from losa_export.synth import LlamaShape, SynthConfig, write_random_checkpoint
from tests.conftest import write_tiny_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with half of its weights zero, exported for DeepSparse."""
    work = tmp_path_factory.mktemp("peer")
    shape = LlamaShape(64, 176, heads=4, kv_heads=2, blocks=2, vocabulary=128, positions=128)
    write_random_checkpoint(shape, 2, SynthConfig("llama-2-7b", work / "model", sparsity_fraction=0.5, progress=False))
    export_onnx(ExportConfig(work / "model", work / "ds", profile="deepsparse", gate=False, progress=False))
    return work / "ds"


@pytest.fixture(scope="module")
def rounded(source: Path) -> Path:
    quantise_for_deepsparse(source, source.parent / "int8", windows=4)
    return source.parent / "int8"


def logits(folder: Path) -> np.ndarray:
    runtime = load_runtime("ort-stock", folder, threads=1)
    try:
        return runtime.prefill(runtime.new_state(1, 16), 0, np.arange(12) % runtime.vocab_size)
    finally:
        runtime.close()


def test_every_product_becomes_one_of_integers_and_answers_stay_close(source: Path, rounded: Path) -> None:
    before, after = check_external_data(source), check_external_data(rounded)
    products = [
        node for node in before.proto.graph.node if node.op_type == "MatMul" and node.input[1] in before.tensors
    ]
    assert len(products) == 2 * 7 + 1
    kinds = [node.op_type for node in after.proto.graph.node]
    assert kinds.count("MatMulInteger") == len(products)
    # q, k, v read the same, and so do gate and up: each input is rounded once
    assert kinds.count("QuantizeLinear") == 2 * 4 + 1
    assert not [node for node in after.proto.graph.node if node.op_type == "MatMul" and node.input[1] in after.tensors]
    exact, found = logits(source), logits(rounded)
    assert 0 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.1


def test_zeros_stay_zeros_and_others_are_within_half_a_step(source: Path, rounded: Path) -> None:
    before, after = check_external_data(source), check_external_data(rounded)
    names = [name for name in after.tensors if name.endswith(".int8")]
    assert names
    for name in names:
        weight = before.read(name.removesuffix(".int8"))
        values = after.read(name)
        assert values.shape == weight.shape
        assert (values[weight == 0] == 0).all()
        steps = np.abs(weight).max(axis=0) / 127
        assert (np.abs(values * steps - weight) <= steps / 2 * (1 + 1e-5)).all()


def test_activation_ranges_are_those_of_the_text(source: Path, rounded: Path) -> None:
    model = check_external_data(source)
    tokens = np.random.default_rng(0).integers(0, 128, (4, 128))
    ranges = deepsparse_peer._measure(source, model, tokens)
    scales = rounded_scales(check_external_data(rounded))
    assert scales.keys() == ranges.keys()
    for name, (low, high) in ranges.items():
        assert scales[name] == pytest.approx((max(high, 0.0) - min(low, 0.0)) / 255, rel=1e-6)


def rounded_scales(model: ModelFolder) -> dict[str, float]:
    nodes = [node for node in model.proto.graph.node if node.op_type == "QuantizeLinear"]
    return {node.input[0]: float(model.read(node.input[1])) for node in nodes}


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0), (-1e-9, 1e30)])
def test_zero_is_one_of_the_numbers_an_activation_can_have(low: float, high: float) -> None:
    scale, zero = deepsparse_peer._affine(low, high)
    assert 0 <= zero <= 255
    assert scale > 0
    # the range is covered to half a step on either side
    assert -zero * scale <= min(low, 0) + scale / 2 * 1.001
    assert (255 - zero) * scale >= max(high, 0) - scale / 2 * 1.001


def test_text_is_measured_on_where_it_is_given(tmp_path: Path, tiny_text: Path) -> None:
    write_tiny_checkpoint(tmp_path / "model", seed=0)
    export_onnx(ExportConfig(tmp_path / "model", tmp_path / "ds", profile="deepsparse", gate=False, progress=False))
    assert deepsparse_peer.main([*map(str, [tmp_path / "ds", "-o", tmp_path / "a", "--text", tiny_text])]) == 0
    assert "16 windows of 128 tokens of sentences.txt" in (tmp_path / "a" / "export.json").read_text(encoding="utf-8")
    with pytest.raises(TextError):
        quantise_for_deepsparse(tmp_path / "ds", tmp_path / "b", text=tiny_text, windows=10_000)
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_rounded_is_refused(
    source: Path, rounded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="windows is 0"):
        quantise_for_deepsparse(source, tmp_path / "out", windows=0)
    with pytest.raises(FormatError, match="has no product with a constant matrix"):
        quantise_for_deepsparse(rounded, tmp_path / "out")
    export_onnx(ExportConfig(source.parent / "model", tmp_path / "ort", weights="dense", gate=False, progress=False))
    with pytest.raises(FormatError, match="is not of profile 'deepsparse'"):
        quantise_for_deepsparse(tmp_path / "ort", tmp_path / "out")
    assert deepsparse_peer.main([str(tmp_path / "missing"), "-o", str(tmp_path / "out")]) == 1
    assert "losa: error:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not ENGINES["deepsparse"].installed, reason="needs the engine's own environment: losa runtimes install deepsparse"
)
def test_the_engine_answers_as_onnx_runtime_does_with_the_same_integers(rounded: Path) -> None:
    from losa_export.eval.engine import EngineProcess

    wanted = logits(rounded)
    with EngineProcess("DeepSparse", timeout_s=120, engine=ENGINES["deepsparse"]) as process:
        process.call("load", name="deepsparse", folder=rounded, threads=1)
        from losa_export.eval.answers import Workload

        prompt = np.arange(12) % 128
        found = process.call("workload_logits", workload=Workload(prompt, np.zeros(0, np.int64), (prompt,), 1))
    # 3 %: where an activation lies between two integers, float32 sums in another order decide
    assert np.linalg.norm(found[:12] - wanted) / np.linalg.norm(wanted) < 0.03
