"""A user's mistake costs one message that says what, where and the mend; nothing is written, exit code 1 or 2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from losa_export.cli import main, main_export


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message on stderr of a command that fails with exit code 1."""
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    message = [line for line in captured.err.splitlines() if line.startswith("losa: error: ")]
    assert len(message) == 1
    assert "Traceback" not in captured.err
    return message[0]


def test_a_missing_or_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out")
    assert "is no folder; give a checkpoint folder" in refused(["export", str(tmp_path / "no"), "-o", output], capsys)
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(["export", str(tmp_path / "empty"), "-o", output], capsys)
    assert "does not exist" in refused(["merge", str(tmp_path / "no"), "-o", output], capsys)
    assert "does not exist" in refused(["generate", str(tmp_path / "no"), "hello"], capsys)
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


def test_a_checkpoint_without_config_or_with_truncated_weights(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    assert "truncated or damaged" in refused(["export", str(checkpoint), "-o", str(output)], capsys)
    (checkpoint / "config.json").unlink()
    assert "has no config.json" in refused(["export", str(checkpoint), "-o", str(output)], capsys)
    assert not output.exists()


def test_an_unsupported_architecture_is_named_beside_the_supported_ones(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    message = refused(["export", str(checkpoint), "--exporter", "builder", "-o", str(tmp_path / "out")], capsys)
    assert "GPT2LMHeadModel" in message
    assert "LlamaForCausalLM" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sparsity", ["1", "1.5", "-0.1", "100%", "nan"])
def test_a_sparsity_out_of_range(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, sparsity: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(tiny_checkpoint), f"--sparsity={sparsity}", "-o", str(tmp_path / "run")]
    message = refused([*arguments, "--text", str(tiny_text)], capsys)
    assert "sparsity_fraction" in message
    assert "at least 0 and below 1" in message
    assert not (tmp_path / "run").exists()


def test_text_shorter_than_one_window(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("the cat sat")
    arguments = ["train", str(tiny_checkpoint), "--sparsity", "0.5", "-o", str(tmp_path / "run"), "--window", "64"]
    message = refused([*arguments, "--text", str(tmp_path / "short.txt")], capsys)
    assert "tokens" in message
    assert "give more text" in message
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_not_empty_or_is_the_input(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    message = refused(["export", str(tiny_checkpoint), "-o", str(tmp_path / "out")], capsys)
    assert "is not empty; add --overwrite" in message
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    message = refused(["export", str(tiny_checkpoint), "-o", str(tiny_checkpoint), "--overwrite"], capsys)
    assert "is the input itself" in message
    assert (tiny_checkpoint / "config.json").is_file()


def test_masks_of_another_checkpoint(
    tiny_checkpoint: Path, tiny_text: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["train", str(tiny_checkpoint), "--sparsity", "0.5", "-o", str(run), "--text", str(tiny_text)]
    arguments += ["--rounds", "1", "--steps", "0", "--window", "32", "--calibration-windows", "2"]
    assert main(arguments) == 0
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(bytes(weights))
    message = refused(["merge", str(run), "--base", str(checkpoint), "-o", str(tmp_path / "merged")], capsys)
    assert "another checkpoint" in message or "other checkpoint" in message or "other weights" in message
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["symlink", "hard link", "absolute", "escaping"])
def test_external_data_that_is_not_a_plain_file_of_the_folder(
    tiny_checkpoint: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx_folder = tmp_path / "onnx"
    assert main(["export", str(tiny_checkpoint), "-o", str(onnx_folder), "--no-gate"]) == 0
    data = onnx_folder / "model.onnx.data"
    elsewhere = tmp_path / "elsewhere.data"
    if kind in ("symlink", "hard link"):
        data.rename(elsewhere)
        (os.symlink if kind == "symlink" else os.link)(elsewhere, data)
    else:
        # the same length, so that the protobuf stays well formed
        hostile = b"/etc/xmodel.dat" if kind == "absolute" else b"../../model.dat"
        model = onnx_folder / "model.onnx"
        model.write_bytes(model.read_bytes().replace(b"model.onnx.data", hostile))
    message = refused(["generate", str(onnx_folder), "the cat"], capsys)
    assert kind.split()[0] in message.replace("symbolic link", "symlink") or "outside" in message


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["nonsense"], ["train"], ["train", "m", "--sparsity", "half", "-o", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main_export(["m", "--format", "tflite"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["train", "m", "--sparsity", "0.5", "-o", "x", "--time-budget", "soon"])
    assert stop.value.code == 2
    assert "must be a duration such as 90s, 10m or 1.5h" in capsys.readouterr().err


def test_help_is_printed_without_loading_an_engine() -> None:
    code = (
        "import sys\nfrom losa_export.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'onnxruntime', 'transformers', 'numpy'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "--time-budget" in run.stdout


def test_a_result_file_in_a_missing_folder_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", str(tmp_path), "--against", str(tmp_path), "--json", str(tmp_path / "no" / "bench.json")]
    assert "there is no folder" in refused(arguments, capsys)


def test_a_foreign_adapter_needs_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["merge", "--adapter", str(tmp_path), "-o", str(tmp_path / "out")], capsys)
    assert "--adapter needs --base" in message


def test_demo_refuses_a_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    assert "is not empty; add --overwrite" in refused(["demo", "-o", str(tmp_path)], capsys)
    message = refused(["demo", "-o", str(tmp_path / "new"), "--sparsity", "1"], capsys)
    assert "strictly between 0 and 1" in message
    assert not (tmp_path / "new").exists()
