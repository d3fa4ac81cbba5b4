"""Checkpoint folders: exact reading, streaming writing, and a message for each way they can be broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from losa_export.checkpoint import CheckpointWriter, copy_companions, open_checkpoint
from losa_export.errors import CheckpointError, InputError, UnsafePathError


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def test_half_precision_tensors_are_widened_exactly(tmp_path: Path) -> None:
    values = np.array([[1.5, -0.375], [2.0**-20, 3e4]], np.float32)
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {"bf": values.astype(ml_dtypes.bfloat16), "half": values.astype(np.float16), "full": values},
        tmp_path / "model.safetensors",
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == ("bf", "full", "half")
    assert [checkpoint.dtype(name) for name in checkpoint.names()] == ["BF16", "F32", "F16"]
    np.testing.assert_array_equal(checkpoint.read("full"), values)
    np.testing.assert_array_equal(checkpoint.read("bf"), values.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(checkpoint.read("half"), values.astype(np.float16).astype(np.float32))


def test_bfloat16_is_read_by_a_process_that_has_not_met_it_yet(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": np.array([1.5, -0.375], ml_dtypes.bfloat16)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from pathlib import Path; from losa_export.checkpoint import open_checkpoint; "
        "print(open_checkpoint(Path(sys.argv[1])).read('w').tolist())"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[1.5, -0.375]"


@pytest.mark.parametrize(("limit", "files"), [(1 << 30, 1), (40, 2), (1, 3)])
def test_written_shards_read_back_bit_for_bit(tmp_path: Path, limit: int, files: int) -> None:
    tensors = {f"t{number}": np.arange(4, dtype=np.float32).reshape(2, 2) + number for number in range(3)}
    with CheckpointWriter(tmp_path, {"model_type": "llama"}, max_shard_bytes=limit) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.weight_files()) == files
    assert checkpoint.config == {"model_type": "llama"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor)
        assert checkpoint.shape(name) == (2, 2)
        assert checkpoint.exists(name)


def test_a_tensor_written_twice_is_refused(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {})
    writer.add("t", np.zeros((1, 1), np.float32))
    with pytest.raises(InputError, match="tensor 't' was written twice"):
        writer.add("t", np.zeros((1, 1), np.float32))


def test_transformers_opens_what_the_writer_wrote(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(tiny_checkpoint)
    with CheckpointWriter(tmp_path, source.config, max_shard_bytes=1 << 15) as writer:
        for name in source.names():
            writer.add(name, source.read(name))
    names = copy_companions(tiny_checkpoint, tmp_path)
    assert "tokenizer.json" in names
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name in source.names():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), source.read(name))


def test_a_truncated_file_is_named(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"' is truncated or damaged .* download or save it again"):
        open_checkpoint(copy)


def test_missing_parts_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_checkpoint(tmp_path / "absent")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model.safetensors .*found pytorch_model.bin, which is not read"):
        open_checkpoint(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        open_checkpoint(copy)
    (copy / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is nested too deeply to be one of ours; "):
        open_checkpoint(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        open_checkpoint(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json; give a Hugging Face checkpoint folder"):
        open_checkpoint(copy)


def test_tensors_of_other_types_or_names_are_refused_when_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"ids": np.zeros(3, np.int64)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor 'ids' .* has dtype I64; only F32, BF16, F16 are read"):
        checkpoint.read("ids")
    with pytest.raises(CheckpointError, match="has no tensor 'other'"):
        checkpoint.read("other")


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_hostile_or_wrong_index_is_refused(copy: Path) -> None:
    index(copy, {"w": "../../etc/passwd"})
    with pytest.raises(UnsafePathError, match="outside the folder"):
        open_checkpoint(copy)
    index(copy, {"w": "/etc/passwd"})
    with pytest.raises(UnsafePathError, match="outside the folder"):
        open_checkpoint(copy)
    index(copy, {"w": "absent.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks its shard 'absent.safetensors'"):
        open_checkpoint(copy)
    index(copy, {"w": "model.safetensors"})
    with pytest.raises(CheckpointError, match=r"puts tensor 'w' into 'model.safetensors', which does not hold it"):
        open_checkpoint(copy)
    index(copy, 3)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_checkpoint(copy)
