"""The whole data path through the command line, on a tiny model: what each verb leaves for the next."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from losa_export.cli import main, main_export
from losa_export.masks import load_masks


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_text: Path) -> Path:
    """A folder with run/, merged/, onnx/ and dense-onnx/, each made by the command of the manual."""
    folder = tmp_path_factory.mktemp("path")
    train = ["train", str(tiny_checkpoint), "--sparsity", "60%", "-o", str(folder / "run"), "--text", str(tiny_text)]
    train += ["--rounds", "2", "--steps", "4", "--window", "32", "--batch-size", "2", "--calibration-windows", "2"]
    assert main(train) == 0
    assert main(["merge", str(folder / "run"), "-o", str(folder / "merged")]) == 0
    assert main_export([str(folder / "merged"), "--format", "onnx", "-o", str(folder / "onnx")]) == 0
    assert main(["export", str(tiny_checkpoint), "-o", str(folder / "dense-onnx")]) == 0
    return folder


def test_zeros_are_the_same_from_the_run_to_the_onnx_file_by_digest(path: Path) -> None:
    from losa_export.masks import digest

    masks = load_masks(path / "run" / "masks.safetensors")
    digests = {name: digest(masks.read(name)) for name in masks.names}
    merged = json.loads((path / "merged" / "sparsity.json").read_text())
    assert {name: entry["mask_sha256"] for name, entry in merged["tensors"].items()} == digests
    exported = json.loads((path / "onnx" / "export.json").read_text())
    assert {name: entry["mask_sha256"] for name, entry in exported["tensors"].items()} == digests
    zeros = sum(entry["zeros"] for entry in exported["tensors"].values())
    size = sum(int(np.prod(entry["shape"])) for entry in exported["tensors"].values())
    assert 0.58 < zeros / size <= 0.6  # exact rows: floor(columns · 0.6) of each


def test_the_file_passes_the_checker_and_runs_in_plain_onnx_runtime(path: Path) -> None:
    import onnxruntime

    onnx.checker.check_model(str(path / "onnx" / "model.onnx"))
    session = onnxruntime.InferenceSession(path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert "logits" in [output.name for output in session.get_outputs()]


def test_generated_text_is_the_same_on_all_runtimes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for runtime, folder in (("ort", "onnx"), ("ort-stock", "onnx"), ("torch", "merged")):
        capsys.readouterr()
        arguments = ["generate", str(path / folder), "the cat sat", "--max-new-tokens", "8", "--runtime", runtime]
        assert main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].strip()
    assert texts[0] == texts[1] == texts[2]


def test_bench_prints_a_table_and_keeps_raw_samples(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", str(path / "onnx"), "--against", str(path / "dense-onnx"), "--prompt", "8", "--gen", "4"]
    assert main([*arguments, "--max-time", "1s", "--threads", "1", "--json", str(tmp_path / "b.json")]) == 0
    table = capsys.readouterr().out
    assert "decode" in table
    assert "prefill" in table
    document = json.loads((tmp_path / "b.json").read_text())
    assert len(document["samples"]) >= 16
    assert document["answers"]["mode"] == "own"  # the dense model holds other weights


def test_training_resumes_a_finished_run_without_doing_it_again(
    path: Path, tiny_checkpoint: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (path / "run" / "masks.safetensors").stat().st_mtime_ns
    train = ["train", str(tiny_checkpoint), "--sparsity", "0.6", "-o", str(path / "run"), "--text", str(tiny_text)]
    train += ["--rounds", "2", "--steps", "4", "--window", "32", "--batch-size", "2", "--calibration-windows", "2"]
    assert main([*train, "--resume"]) == 0
    assert "next: losa merge" in capsys.readouterr().out
    assert (path / "run" / "masks.safetensors").stat().st_mtime_ns == before
