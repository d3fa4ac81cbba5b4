"""`losa verify` at the end of the whole path: train, merge, export, eval, and then what is changed afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra 'train'")

from losa_export.cli import main


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_text: Path) -> Path:
    """A folder with run/, merged/, onnx/ and eval.json, each made by its command."""
    folder = tmp_path_factory.mktemp("path")
    train = ["train", str(tiny_checkpoint), "--sparsity", "60%", "-o", str(folder / "run"), "--text", str(tiny_text)]
    train += ["--rounds", "1", "--steps", "2", "--window", "32", "--batch-size", "2", "--calibration-windows", "2"]
    assert main(train) == 0
    assert main(["merge", str(folder / "run"), "-o", str(folder / "merged")]) == 0
    assert main(["export", str(folder / "merged"), "--values", "int8", "-o", str(folder / "onnx")]) == 0
    evaluate = ["eval", str(folder / "onnx"), "--text", str(tiny_text), "--window", "32", "--windows", "2"]
    assert main([*evaluate, "--runtime", "ort-stock", "--json", str(folder / "eval.json")]) == 0
    return folder


def sources(path: Path) -> list[str]:
    given = {"--merged": "merged", "--run": "run", "--eval": "eval.json"}
    return [word for option, name in given.items() for word in (option, str(path / name))]


def test_the_whole_chain_is_confirmed(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    record = tmp_path / "verify.json"
    assert main(["verify", str(path / "onnx"), *sources(path), "--json", str(record)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[-1] == "CONFIRMED"
    assert captured.err == ""
    found = json.loads(record.read_text())
    assert (found["schema"], found["folder"], found["confirmed"]) == ("losa-verify", "onnx", True)
    assert {check["status"] for check in found["checks"]} == {"ok"}
    assert len(found["checks"]) == len(lines) - 1 == 15


def test_a_changed_export_is_named_and_ends_with_1(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = Path(shutil.copytree(path / "onnx", tmp_path / "onnx"))
    (onnx / "tokenizer.json").write_text("{}")
    manifest = json.loads((onnx / "export.json").read_text())
    manifest["gate"]["deviation"]["kl_mean"] = 7.0
    (onnx / "export.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(["verify", str(onnx), *sources(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == (
        "DIFFERS: files (tokenizer.json); gate (deviation kl_mean); evaluated files (export.json, tokenizer.json)"
    )
    assert captured.err == ""


def test_what_cannot_be_verified_is_one_message(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([str(tmp_path / "no")], "does not exist"),
        ([str(path / "merged")], "has no export.json"),
        ([str(path / "onnx"), "--json", str(tmp_path / "no" / "verify.json")], "there is no folder"),
    ):
        capsys.readouterr()
        assert main(["verify", *words]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("losa: error: ")
        assert message in captured.err
