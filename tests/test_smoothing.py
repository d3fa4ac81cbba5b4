"""Outliers of activations move into the weights that read them; answers and zeros stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file

from losa_export import export as export_module
from losa_export import export_gate
from losa_export.architecture import DecoderSpec
from losa_export.checkpoint import open_checkpoint
from losa_export.cli import main_export
from losa_export.errors import CheckpointError, ConfigError, FormatError, MissingDependencyError
from losa_export.export import ExportConfig, export_onnx
from losa_export.reference import compute_reference
from losa_export.smoothing import (
    ChannelMaxima,
    SmoothedReader,
    can_smooth,
    differ_by_powers_of_two,
    norm_readers,
    smoothing_factors,
    smoothing_scales,
)

POSITIVE = st.floats(2.0**-20, 2.0**20, width=32)
NORM = "model.layers.0.input_layernorm"
LOUD = 17  # a channel whose activations are outliers in `spoilt`


def vectors(size: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, size, elements=POSITIVE)


@given(vectors(9), vectors(9), st.floats(0, 1))
def test_factors_are_powers_of_two_around_one(activations: np.ndarray, weights: np.ndarray, strength: float) -> None:
    factors = smoothing_factors(ChannelMaxima(activations, weights), strength)
    assert factors.dtype == np.float32
    assert np.array_equal(np.frexp(factors)[0], np.full(9, 0.5))
    assert factors.min() >= 2.0**-7
    assert factors.max() <= 2.0**7
    assert factors.min() <= 1 <= factors.max()


@given(vectors(9), vectors(9))
def test_at_full_strength_all_channels_are_nearly_even(activations: np.ndarray, weights: np.ndarray) -> None:
    activations = np.clip(activations, 2.0**-3, 2.0**3)
    even = activations / smoothing_factors(ChannelMaxima(activations, weights), 1.0)
    assert even.max() / even.min() <= 2.0 * (1 + 1e-6)


def test_a_channel_of_which_nothing_is_known_stays_as_it_is() -> None:
    maxima = ChannelMaxima(np.array([0, 64, 1, 1], dtype=np.float32), np.array([1, 1, 0, 1], dtype=np.float32))
    assert smoothing_factors(maxima, 1.0).tolist() == [1, 8, 1, 2.0**-3]
    nothing = ChannelMaxima(np.zeros(4, dtype=np.float32), np.ones(4, dtype=np.float32))
    assert smoothing_factors(nothing, 1.0).tolist() == [1, 1, 1, 1]


@pytest.fixture
def spoilt(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A pruned checkpoint, one channel of whose norms is 60 times as large as the others."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "spoilt"))
    tensors = load_file(folder / "model.safetensors")
    generator = np.random.default_rng(5)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[LOUD] *= 60
        elif "_proj." in name:
            tensor *= generator.random(tensor.shape) < 0.4
        if any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensor[:, LOUD] /= 60
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def spec_of(folder: Path) -> DecoderSpec:
    return DecoderSpec.from_config(open_checkpoint(folder).config, folder / "config.json")


def manifest(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return parsed


def test_only_powers_of_two_pass_for_smoothing() -> None:
    before = np.array([0.3, -5, 0, 1e-3], dtype=np.float32)
    assert differ_by_powers_of_two(before, before * np.array([1, 4, 1, 2.0**-7], dtype=np.float32))
    for spoilt_by in ([1, 4, 1, 1.5], [1, -4, 1, 1], [0, 1, 1, 1]):
        assert not differ_by_powers_of_two(before, before * np.array(spoilt_by, dtype=np.float32))
    assert not differ_by_powers_of_two(before, before[:3])
    assert not differ_by_powers_of_two(before, np.ones(4, dtype=np.float32))


def test_a_spoilt_norm_is_not_taken_for_a_smoothed_one(spoilt: Path, tmp_path: Path) -> None:
    """The gate's reference takes norms from the file, but only what smoothing can have made of them."""
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    export_onnx(ExportConfig(spoilt, tmp_path / "onnx", values="int8", smoothing=0, gate=False, progress=False))
    compute_reference(spoilt, exported=tmp_path / "onnx")
    tensors = load_file(spoilt / "model.safetensors")
    tensors[f"{NORM}.weight"][3] *= 1.25
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"stores '{NORM}.weight' otherwise than smoothing would have left"):
        compute_reference(spoilt, exported=tmp_path / "onnx")


def test_products_keep_their_bits(spoilt: Path) -> None:
    spec, checkpoint = spec_of(spoilt), open_checkpoint(spoilt)
    generator = np.random.default_rng(0)
    size = spec.hidden_size
    maxima = {
        norm: ChannelMaxima(*generator.lognormal(0, 2, (2, size)).astype(np.float32))
        for block in range(spec.num_layers)
        for norm in norm_readers(spec, block)
    }
    reader = SmoothedReader(checkpoint, smoothing_scales(spec, maxima, 0.7))
    x = generator.standard_normal(size).astype(np.float32)
    for norm, linears in norm_readers(spec, 1).items():
        gamma, smoothed = checkpoint.read(f"{norm}.weight"), reader.read(f"{norm}.weight")
        assert not np.array_equal(gamma, smoothed)
        for linear in linears:
            before = x * gamma * checkpoint.read(f"{linear}.weight")
            assert np.array_equal(before, x * smoothed * reader.read(f"{linear}.weight"))
    for other in ("model.norm.weight", "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
        assert np.array_equal(checkpoint.read(other), reader.read(other))


def test_maxima_are_those_of_the_running_model(spoilt: Path) -> None:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    from losa_export.channel_maxima import channel_maxima, channel_maxima_apart

    tokens = np.arange(24, dtype=np.int64).reshape(2, 12)
    maxima = channel_maxima(spoilt, tokens)
    spec, checkpoint = spec_of(spoilt), open_checkpoint(spoilt)
    assert set(maxima) == {norm for block in range(spec.num_layers) for norm in norm_readers(spec, block)}
    embedded = checkpoint.read("model.embed_tokens.weight")[tokens]
    normed = embedded / np.sqrt((embedded**2).mean(-1, keepdims=True) + spec.norm_eps)
    expected = np.abs(normed * checkpoint.read(f"{NORM}.weight")).max((0, 1))
    assert np.allclose(maxima[NORM].activations, expected, rtol=1e-5)
    assert int(maxima[NORM].activations.argmax()) == LOUD
    columns = [np.abs(checkpoint.read(f"{linear}.weight")).max(0) for linear in norm_readers(spec, 0)[NORM]]
    assert np.array_equal(maxima[NORM].weights, np.max(columns, axis=0))
    apart = channel_maxima_apart(spoilt, tokens)
    assert all(np.array_equal(apart[norm].activations, found.activations) for norm, found in maxima.items())


def test_activations_that_are_not_finite_are_named(spoilt: Path) -> None:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    from losa_export.channel_maxima import channel_maxima

    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.embed_tokens.weight"][3] = np.inf
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'{NORM}' of .* gives activations that are not finite.*--smoothing 0"):
        channel_maxima(spoilt, np.array([[1, 3]], dtype=np.int64))


@pytest.mark.parametrize("profile", ["ort", "standard"])
def test_rounding_costs_less_and_zeros_stay(profile: Any, spoilt: Path, tmp_path: Path) -> None:
    """The gate holds the file against the checkpoint with its weights, norms included."""
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    costs = {}
    for strength in (0.0, 0.7):
        folder = tmp_path / f"onnx-{strength}"
        export_onnx(
            ExportConfig(spoilt, folder, profile, values="int8", activations="int8", smoothing=strength, progress=False)
        )
        record = manifest(folder)
        assert record["gate"]["against"] == "checkpoint with the stored weights"
        costs[strength] = record["gate"]["deviation"]["kl_mean"]
        assert record.get("smoothing") == ({"strength": 0.7, "tokens": 48} if strength else None)
    if record["gate"]["runtime"] == "ort":
        assert costs[0.7] < costs[0.0] / 4
    plain, smooth = (manifest(tmp_path / f"onnx-{strength}")["tensors"] for strength in (0.0, 0.7))
    assert plain
    for name, entry in plain.items():
        assert smooth[name]["mask_sha256"] == entry["mask_sha256"]


def test_the_command_smooths_unless_told_not_to(
    spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    given = [str(spoilt), "--values", "int4", "--no-gate", "-o"]
    assert main_export([*given, str(tmp_path / "default")]) == 0
    said = capsys.readouterr()
    assert "smoothing: outliers of activations moved into weights, strength 0.7, by 48 tokens" in said.out
    assert "looking for outliers: 1/1" in said.err
    assert main_export([*given, str(tmp_path / "none"), "--smoothing", "0"]) == 0
    assert "smoothing" not in capsys.readouterr().out
    assert manifest(tmp_path / "default")["smoothing"]["strength"] == 0.7
    assert "smoothing" not in manifest(tmp_path / "none")


def test_without_torch_it_is_left_out_or_refused(spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = export_gate.is_installed
    monkeypatch.setattr(export_module, "is_installed", lambda package: package != "torch" and installed(package))
    export_onnx(ExportConfig(spoilt, tmp_path / "onnx", values="int8", gate=False, progress=False))
    assert "smoothing" not in manifest(tmp_path / "onnx")
    with pytest.raises(MissingDependencyError, match="smoothing activations needs the package 'torch'"):
        export_onnx(ExportConfig(spoilt, tmp_path / "other", values="int8", smoothing=0.5, gate=False, progress=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": "int8", "smoothing": 1.5}, r"ExportConfig.smoothing is 1.5; give 0 to 1"),
        ({"values": "int8", "smoothing": float("nan")}, r"ExportConfig.smoothing is nan; give 0 to 1"),
        ({"values": "bf16", "smoothing": 0.5}, r"ExportConfig.smoothing prepares values for .* they are 'bf16'"),
    ],
)
def test_an_impossible_strength_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportConfig(Path("in"), Path("out"), **changes)


def test_norms_behind_additions_are_not_smoothed(tmp_path: Path) -> None:
    config = {
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 96,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    before = DecoderSpec.from_config(config, tmp_path)
    behind = DecoderSpec.from_config(config | {"do_layer_norm_before": False}, tmp_path)
    assert can_smooth(before)
    assert not can_smooth(behind)
    even = ChannelMaxima(*np.ones((2, 32), dtype=np.float32))
    scales = smoothing_scales(before, dict.fromkeys(norm_readers(before, 0), even), 0.7)
    prefix = "model.decoder.layers.0."
    norms = [f"{prefix}{norm}.{part}" for norm in before.layout.norms for part in ("weight", "bias")]
    linears = [f"{prefix}{name}.weight" for name in (*(f"self_attn.{part}_proj" for part in "qkv"), "fc1")]
    assert sorted(scales) == sorted([*norms, *linears])
