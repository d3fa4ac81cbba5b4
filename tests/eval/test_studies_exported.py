from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from losa_export.eval.studies.exported import compare, main
from losa_export.export import ExportConfig, export_onnx


class TableRuntime:
    """Logits of the next token depend on the last token alone: row `token` of a table."""

    name = "table"

    def __init__(self, table: np.ndarray) -> None:
        self.table = table.astype(np.float32)

    def new_state(self, batch: int, capacity: int) -> None:
        return None

    def prefill(self, state: None, row: int, token_ids: np.ndarray) -> np.ndarray:
        return self.table[token_ids]


def test_rise_and_divergence_follow_their_definitions() -> None:
    exact = np.log(np.array([[0.5, 0.5], [0.25, 0.75]]))
    other = np.log(np.array([[0.5, 0.5], [0.75, 0.25]]))
    windows = np.array([[0, 1, 1], [1, 1, 0]])
    first, second = compare([TableRuntime(exact), TableRuntime(other)], windows, show_progress=False)  # type: ignore[list-item]
    assert (first.rise_fraction, first.kl_divergence) == (0, 0)
    # scored: 0→1, 1→1 and 1→1, 1→0
    assert first.perplexity == pytest.approx(math.exp(-np.log([0.5, 0.75, 0.75, 0.25]).mean()), rel=1e-6)
    assert second.perplexity == pytest.approx(math.exp(-np.log([0.5, 0.25, 0.25, 0.75]).mean()), rel=1e-6)
    assert second.rise_fraction == pytest.approx(second.perplexity / first.perplexity - 1, rel=1e-6)
    assert (first.tipped, second.tipped) == (0, pytest.approx(3 / 4))  # all after token 1, of 0.55 nats
    assert second.kl_divergence == pytest.approx(3 / 4 * (0.75 - 0.25) * math.log(3), rel=1e-6)


def test_the_command_compares_exported_files(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for values in ("fp32", "int8"):
        export_onnx(
            ExportConfig(tiny_checkpoint, tmp_path / values, values=values, smoothing=0, gate=False, progress=False)  # type: ignore[arg-type]
        )
    folders = [str(tmp_path / "fp32"), str(tmp_path / "int8")]
    assert main([*folders, "--text", str(tiny_text), "--windows", "2", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| values | MB | perplexity | rise | KL | > 0.3 |"
    assert lines[2].startswith("| fp32 |")
    assert all(line.count("|") == 7 for line in lines)
    assert lines[3].startswith("| int8, group 128, int16 activations, head int8 |")
    assert "%" in lines[3]
    assert main([*folders, "--random", "--windows", "1", "--threads", "1"]) == 0
    drawn = capsys.readouterr().out.splitlines()
    assert drawn[:2] == lines[:2]
    assert drawn[3] != lines[3]


def test_a_folder_that_is_no_export_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path), "--text", str(tmp_path / "text.txt")]) == 1
    assert "losa: error:" in capsys.readouterr().err
