"""Dense models as GGUF files: names and row orders without llama.cpp, files and answers where it is installed."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from losa_export.architecture import DecoderSpec, tensor_shapes
from losa_export.checkpoint import open_checkpoint
from losa_export.errors import ConfigError, EngineUnavailableError, UnsupportedArchitectureError
from losa_export.eval import gguf_peer
from losa_export.eval.gguf_peer import write_gguf_peer
from losa_export.gguf_import import gguf_name, hugging_face_name, permute_rotary, unpermute_rotary
from losa_export.runtimes.isolated import ENGINES
from losa_export.synth import LlamaShape, SynthConfig, write_random_checkpoint
from tests.conftest import write_tiny_checkpoint

needs_engine = pytest.mark.skipif(
    not ENGINES["llamacpp"].installed, reason="needs the engine's own environment: losa runtimes install llamacpp"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose rows are whole blocks of 256, which the mixtures of llama.cpp need."""
    folder = tmp_path_factory.mktemp("gguf") / "model"
    shape = LlamaShape(256, 512, heads=4, kv_heads=2, blocks=2, vocabulary=96, positions=128)
    write_random_checkpoint(shape, 2, SynthConfig("llama-2-7b", folder, progress=False))
    return folder


def test_every_tensor_has_a_name_there_and_back(tiny_checkpoint: Path) -> None:
    spec = DecoderSpec.from_config(open_checkpoint(tiny_checkpoint).config, tiny_checkpoint)
    names = list(tensor_shapes(spec))
    assert [hugging_face_name(gguf_name(name), Path("f")) for name in names] == names
    for other in ("model.layers.0.self_attn.q_proj.bias", "model.layers.x.mlp.up_proj.weight", "nothing"):
        with pytest.raises(UnsupportedArchitectureError, match="has no place in a GGUF file"):
            gguf_name(other)


def test_rows_of_a_head_are_interleaved_and_put_back() -> None:
    # one head of eight rows: halves 0–3 and 4–7 become neighbours
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert permute_rotary(rows, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    weight = np.random.default_rng(0).standard_normal((24, 5)).astype(np.float32)
    np.testing.assert_array_equal(unpermute_rotary(permute_rotary(weight, 3), 3), weight)


def test_what_llama_cpp_would_read_wrongly_is_refused(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "qwen", seed=0, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    with pytest.raises(UnsupportedArchitectureError, match="is no plain Llama"):
        write_gguf_peer(tmp_path / "qwen", tmp_path / "out")
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    write_tiny_checkpoint(tmp_path / "scaled", seed=0, rope_scaling=scaled, rope_parameters=scaled)
    with pytest.raises(UnsupportedArchitectureError, match="no scaled rotary embedding"):
        write_gguf_peer(tmp_path / "scaled", tmp_path / "out")
    with pytest.raises(ConfigError, match="values is 'Q9'"):
        write_gguf_peer(tmp_path / "scaled", tmp_path / "out", values="Q9")  # type: ignore[arg-type]


def test_without_llama_cpp_it_says_where_it_lives(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(EngineUnavailableError, match="losa runtimes install llamacpp"):
        write_gguf_peer(model, tmp_path / "out")
    assert gguf_peer.main([str(model), "-o", str(tmp_path / "out")]) == 1
    assert "losa: error:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_engine
@pytest.mark.parametrize(("values", "pure"), [("F32", False), ("BF16", False), ("Q8_0", False), ("Q4_0", True)])
def test_the_checkpoint_beside_it_holds_the_weights_of_the_file(
    model: Path, tmp_path: Path, values: gguf_peer.Values, pure: bool
) -> None:
    size = write_gguf_peer(model, tmp_path / "peer", values=values, pure=pure)
    assert size == (tmp_path / "peer" / "model.gguf").stat().st_size
    source, rounded = open_checkpoint(model), open_checkpoint(tmp_path / "peer")
    assert rounded.names() == source.names()
    # half a step of each type, as a share of the largest weight; scales are float16
    limit = {"F32": 0.0, "BF16": 2**-8, "Q8_0": 0.5 / 127 + 2**-11, "Q4_0": 0.5 / 7 * 1.3}[values]
    for name in source.names():
        before, after = source.read(name), rounded.read(name)
        assert np.abs(after - before).max() <= limit * np.abs(before).max()
    record = json.loads((tmp_path / "peer" / "export.json").read_text(encoding="utf-8"))
    assert record["values"] == f"GGUF {values}{', pure' if pure else ''}"


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("values", ["BF16", "Q8_0", "Q4_K_M", "Q4_0"])
def test_llama_cpp_passes_the_gate_with_what_it_rounded(model: Path, tmp_path: Path, values: gguf_peer.Values) -> None:
    from losa_export.eval.answers import answers_of
    from losa_export.eval.engine import EngineProcess
    from losa_export.eval.parity import thresholds_for
    from losa_export.runtimes.torch_cpu import TorchRuntime

    write_gguf_peer(model, tmp_path / "peer", values=values)
    generator = np.random.default_rng(0)
    prompts = tuple(generator.integers(0, 96, 16) for _ in range(3))
    with closing(TorchRuntime.load(tmp_path / "peer", threads=1)) as reference:
        answers = answers_of(reference, prompts, 8)
    limits = thresholds_for("int16" if values == "BF16" else "int8")
    with EngineProcess("llama.cpp", timeout_s=120, engine=ENGINES["llamacpp"]) as process:
        process.call("load", name="llamacpp", folder=tmp_path / "peer", threads=1)
        process.call("gate", answers=answers, thresholds=limits)
