from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from losa_export import synth
from losa_export.architecture import DecoderSpec, check_tensors, prunable_names
from losa_export.checkpoint import open_checkpoint
from losa_export.cli import main
from losa_export.errors import ConfigError, OutputError
from losa_export.synth import SHAPES, LlamaShape, SynthConfig, random_words, synthesise

SMALL = LlamaShape(64, 176, heads=4, kv_heads=2, blocks=5, vocabulary=512, positions=256)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "SHAPES", {**SHAPES, "small": SMALL})


@pytest.mark.parametrize(
    ("name", "millions"),
    [("smollm2-135m", 134.515), ("tinyllama-1.1b", 1100.048), ("llama-2-7b", 6738.416), ("llama-2-13b", 13015.864)],
)
def test_the_shapes_have_as_many_weights_as_the_published_models(name: str, millions: float) -> None:
    shape = SHAPES[name]
    spec = DecoderSpec.from_config(shape.config(shape.blocks, "fp32"), Path("config.json"))
    count = sum(int(np.prod(size)) for size in synth.tensor_shapes(spec).values())
    assert count / 1e6 == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_is_sound_sparse_and_nowhere_alike(tmp_path: Path, dtype: str) -> None:
    config = SynthConfig("small", tmp_path / "model", 2, 0.7, dtype=dtype, progress=False)  # type: ignore[arg-type]
    size = synthesise(config)
    checkpoint = open_checkpoint(tmp_path / "model")
    spec = DecoderSpec.from_config(checkpoint.config, tmp_path)
    check_tensors(checkpoint, spec)
    assert spec.num_layers == 2
    assert size == sum(checkpoint.read(name).size for name in checkpoint.names()) * (4 if dtype == "fp32" else 2)
    seen = set()
    for name in checkpoint.names():
        weight = checkpoint.read(name)
        if weight.ndim == 1:
            continue
        seen.add(weight.tobytes())
        zeros = (weight == 0).sum(axis=1)
        assert (zeros == (int(0.7 * weight.shape[1]) if name in prunable_names(spec) else 0)).all()
        # 1 %: rounding to bfloat16
        assert np.square(weight).sum(axis=1).mean() == pytest.approx(1.0, rel=0.01)
    assert len(seen) == 2 * 7 + 2


def test_the_same_seed_writes_the_same_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthesise(SynthConfig("small", tmp_path / name, 1, seed=seed, progress=False))
    a, b, c = (open_checkpoint(tmp_path / name).weights_sha256() for name in "abc")
    assert a == b != c


def test_the_command_writes_what_export_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, onnx = str(tmp_path / "model"), str(tmp_path / "onnx")
    assert main(["synth", "--like", "small", "--blocks", "1", "--sparsity", "70%", "-o", model]) == 0
    assert "next: losa export" in capsys.readouterr().out
    assert main(["export", model, "-o", onnx, "--no-gate"]) == 0
    assert "sparse fp32" in capsys.readouterr().out


def test_a_disk_without_the_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(OutputError, match=r"needs 27\.0 GB, and its disk has 1\.0 GB free"):
        synthesise(SynthConfig("llama-2-7b", tmp_path / "model", progress=False))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change", [{"like": "gpt-5"}, {"blocks": 0}, {"sparsity_fraction": 1.0}, {"dtype": "fp8"}], ids=str
)
def test_a_setting_that_makes_no_sense_is_an_error(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        SynthConfig(**({"like": "small", "output": tmp_path} | change))  # type: ignore[arg-type]


def test_random_words_are_as_many_as_asked_for() -> None:
    assert len(random_words(7).split()) == 7
    assert random_words(7) == random_words(7) != random_words(7, seed=1)
