"""Export with calibration text: what is written, what is recorded, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from losa_export import export as export_module
from losa_export.checkpoint import open_checkpoint
from losa_export.cli import main_export
from losa_export.errors import CheckpointError, ConfigError, LosaError, MissingDependencyError, TextError
from losa_export.export import ExportConfig, export_onnx
from losa_export.files import sha256_of
from losa_export.graph.external import check_external_data
from losa_export.graph.stored import read_weights
from losa_export.masks import save_masks

pytest.importorskip("transformers", reason="needs the 'train' extra")


@pytest.fixture
def sparse(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint pruned to 50 %, with masks."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "sparse"))
    tensors = load_file(folder / "model.safetensors")
    generator = np.random.default_rng(5)
    masks = {name: generator.random(tensor.shape) < 0.5 for name, tensor in tensors.items() if "_proj." in name}
    for name, keep in masks.items():
        tensors[name] *= keep
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_masks(folder / "masks.safetensors", masks, {})
    return folder


def config(source: Path, output: Path, text: Path | None, **changes: Any) -> ExportConfig:
    defaults: dict[str, Any] = {"values": "int4", "group": 32, "smoothing": 0, "gate": False, "progress": False}
    calibration = {} if text is None else {"calibration": (text,), "calibration_windows": 8}
    return ExportConfig(source=source, output=output, **(defaults | calibration | changes))


def stored(folder: Path) -> dict[str, np.ndarray]:
    return dict(read_weights(check_external_data(folder)))


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("changes", [{}, {"profile": "standard"}, {"weights": "dense"}])
def test_every_layout_holds_weights_that_pass_the_gate(
    values: str, changes: dict[str, Any], sparse: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """The gate computes with what the file says: rows in another order than they were rounded in would fail it."""
    export_onnx(config(sparse, tmp_path / "plain", None, values=values, **changes))
    export_onnx(config(sparse, tmp_path / "onnx", tiny_text, values=values, smoothing=0.7, gate=True, **changes))
    record = json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert record["gate"]["against"] == "checkpoint with the stored weights"
    assert record["smoothing"] == {"strength": 0.7, "tokens": 8 * record["calibration"]["window"]}
    checkpoint = open_checkpoint(sparse)
    plain, found = stored(tmp_path / "plain"), stored(tmp_path / "onnx")
    assert found.keys() == plain.keys()
    for name, weight in found.items():
        exact = checkpoint.read(name)
        if "_proj." not in name:  # the head, which no text shapes
            np.testing.assert_array_equal(weight, plain[name])
            continue
        assert np.any(weight != plain[name])
        # Made up for each other, but still the same weights: a row that got another's would be off by 140 %.
        assert np.linalg.norm(weight - exact) < 0.3 * np.linalg.norm(exact)
        if changes.get("weights") != "dense":
            assert not weight[exact == 0].any()


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_head_of_four_bits_is_rounded_by_the_text_too(
    values: str, sparse: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_onnx(config(sparse, tmp_path / "plain", None, values=values, head="int4"))
    report = export_onnx(
        config(sparse, tmp_path / "onnx", tiny_text, values=values, head="int4", gate=True, progress=True)
    )
    # 0.0922 of the linears, and the head
    assert "rounding: 0.1/0.1 M weights, done in" in capsys.readouterr().err
    assert report.gate is not None
    assert report.gate["against"] == "checkpoint with the stored weights"
    plain, found = stored(tmp_path / "plain"), stored(tmp_path / "onnx")
    assert np.any(found["lm_head.weight"] != plain["lm_head.weight"])
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


def test_a_table_that_is_head_and_embedding_is_rounded_without_text(
    sparse: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """What suits the head's outputs does not suit the embedding's."""
    tables = {"head": "int4", "embedding": "int4"}
    export_onnx(config(sparse, tmp_path / "plain", None, **tables))
    export_onnx(config(sparse, tmp_path / "onnx", tiny_text, **tables))
    plain, found = stored(tmp_path / "plain"), stored(tmp_path / "onnx")
    assert "lm_head.weight" not in found
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


def test_the_manifest_says_what_the_weights_were_rounded_by(sparse: Path, tiny_text: Path, tmp_path: Path) -> None:
    export_onnx(config(sparse, tmp_path / "onnx", tiny_text))
    record = json.loads((tmp_path / "onnx" / "export.json").read_text())["calibration"]
    assert record.pop("method").startswith("blockwise compensation under the mask")
    assert record == {
        "files": [{"name": "sentences.txt", "sha256": sha256_of(tiny_text)}],
        "windows": 8,
        "window": 256,  # all that the model reads
        "tokens": 8 * 256,
    }
    export_onnx(config(sparse, tmp_path / "plain", None))
    assert "calibration" not in json.loads((tmp_path / "plain" / "export.json").read_text())


def test_results_repeat(sparse: Path, tiny_text: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        export_onnx(config(sparse, tmp_path / name, tiny_text))
    assert sha256_of(tmp_path / "first" / "model.onnx.data") == sha256_of(tmp_path / "second" / "model.onnx.data")


def test_the_command_takes_files_and_shows_how_far_it_is(
    sparse: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(sparse), "--format", "onnx", "--values", "int4", "--calibration", str(tiny_text)]
    arguments += ["--calibration-windows", "4", "-o", str(tmp_path / "onnx")]
    assert main_export(arguments) == 0
    captured = capsys.readouterr()
    assert "int4" in captured.out
    assert "gate: passed" in captured.out
    assert "rounding: 0.0922/0.0922 M weights, done in" in captured.err


def refused(kind: type[LosaError], message: str, settings: ExportConfig) -> None:
    before = sorted(settings.output.parent.rglob("*"))
    with pytest.raises(kind, match=message):
        export_onnx(settings)
    assert sorted(settings.output.parent.rglob("*")) == before


@pytest.mark.parametrize("values", ["fp32", "bf16"])
def test_values_without_levels_take_no_text(values: str, tiny_text: Path, tmp_path: Path) -> None:
    message = f"ExportConfig.calibration is text for rounding to int8 or int4, but values are '{values}'"
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, tmp_path / "onnx", tiny_text, values=values)


def test_no_windows_at_all_are_refused(tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ExportConfig\.calibration_windows is 0; give 1 or more"):
        config(tmp_path, tmp_path / "onnx", tiny_text, calibration_windows=0)


def test_text_that_cannot_be_used_is_refused_before_any_work(sparse: Path, tiny_text: Path, tmp_path: Path) -> None:
    output, empty = tmp_path / "onnx", tmp_path / "empty.txt"
    empty.write_text(" \n")
    refused(TextError, "the text file .*no.txt' cannot be read", config(sparse, output, tmp_path / "no.txt"))
    refused(TextError, "there is no text in", config(sparse, output, empty))
    refused(
        TextError,
        r"windows of 256, but 256000 tokens \(1000 windows\) are needed; give more text",
        config(sparse, output, tiny_text, calibration_windows=1000),
    )


def test_a_tokenizer_of_another_model_is_refused(sparse: Path, tmp_path: Path) -> None:
    tokenizer = sparse / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"filler7": ', '"filler7": 9'))
    text = tmp_path / "text.txt"
    text.write_text("filler7 " * 3000)
    refused(CheckpointError, "gives the token 9.* has only 128 embeddings", config(sparse, tmp_path / "onnx", text))


def test_without_torch_the_message_says_what_to_install(
    sparse: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "is_installed", lambda package: package != "torch")
    message = "rounding by calibration text needs the package 'torch'.*losa-export\\[train\\]"
    refused(MissingDependencyError, message, config(sparse, tmp_path / "onnx", tiny_text))
