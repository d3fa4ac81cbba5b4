from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from losa_export.errors import OutputError
from losa_export.training.state import RunState, save_state
from losa_export.training.tensors import write_tensors


def fail_with(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError(text)

    monkeypatch.setattr(safetensors.torch, "save_file", full)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("I/O error: Permission denied (os error 13)", errno.EACCES),
        ("something else", errno.EIO),
    ],
)
def test_an_error_of_the_tensor_writer_becomes_the_systems_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, number: int
) -> None:
    fail_with(monkeypatch, text)
    with pytest.raises(OSError, match=r"I/O error|something else") as caught:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    assert caught.value.errno == number


def test_a_full_disk_while_tensors_are_written_is_an_output_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fail_with(monkeypatch, "I/O error: No space left on device (os error 28)")
    with pytest.raises(OutputError, match="no space left"):
        save_state(tmp_path, RunState(), {}, {})


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.arange(3)}, {"k": "v"})
    assert path.stat().st_mode & 0o777 == 0o644
    assert safetensors.torch.load_file(path)["a"].tolist() == [0, 1, 2]
