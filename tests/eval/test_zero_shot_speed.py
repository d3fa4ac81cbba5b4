"""The comparison with lm-eval's speed: that it runs, checks the answers first, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from losa_export.errors import BenchmarkError, ConfigError
from losa_export.eval.stats import paired_ratio
from losa_export.eval.studies import zero_shot_speed
from losa_export.eval.studies.zero_shot_speed import Row, SpeedConfig, _check, main, table
from losa_export.eval.tasks import Item


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("mmlu",)}, "'mmlu' is not known"),
        ({"tasks": ()}, "there is no task"),
        ({"blocks": 5}, "blocks is 5; an interval needs at least 6"),
        ({"batch_sizes": ()}, r"batch_sizes is \(\)"),
        ({"batch_sizes": (0, 8)}, r"batch_sizes is \(0, 8\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeedConfig(tmp_path, tmp_path, tmp_path, **changes)


def test_without_lm_eval_the_mend_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "piqa.jsonl").write_text('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n')
    words = [str(tmp_path), "--onnx", str(tmp_path), "--task-folder", str(tmp_path), "--tasks", "piqa"]
    assert main(words) == 1
    assert "pip install 'losa-export[lm-eval,train]'" in capsys.readouterr().err


def test_scores_that_differ_are_not_timed() -> None:
    items = [Item(1, ("a", "a"), (" b", " c"), (1, 1), 0)] * 2
    _check("piqa", items, [[-1.0, -2.0]] * 2, [[-1.0005, -2.0]] * 2)
    with pytest.raises(BenchmarkError, match=r"on piqa log-likelihoods lie up to 0\.5 of their size apart"):
        _check("piqa", items, [[-1.0, -3.0]] * 2, [[-1.0, -2.0]] * 2)
    with pytest.raises(BenchmarkError, match=r"50\.0% of 2 items are answered alike"):
        _check("piqa", items, [[-1.0, -1.0001], [-1.0, -2.0]], [[-1.0001, -1.0], [-1.0, -2.0]])


def test_the_table_has_rates_and_ratios() -> None:
    theirs, ours = (4.0, 4.1, 3.9, 4.0, 4.2, 4.0), (2.0, 2.1, 1.9, 2.0, 2.1, 2.0)
    row = Row("piqa", 8, 16, theirs, ours, paired_ratio([[one] for one in theirs], [[one] for one in ours]))
    assert table([row]).splitlines()[-1].startswith("| piqa | 8 | 16 | 2.00 | 4.00 | 2.0")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what other packages warn of while lm-eval is loaded and run is theirs
def test_both_sides_are_timed_on_the_same_items(
    stories260k: Path, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'losa-export[lm-eval]'")
    pytest.importorskip("onnx_ir", reason="needs the extra 'export'")
    from losa_export.export import ExportConfig, export_onnx

    export_onnx(ExportConfig(stories260k, tmp_path / "onnx", gate=False, progress=False))
    words = [stories260k, "--onnx", tmp_path / "onnx", "--task-folder", shared_data / "tasks", "--runtime", "ort-stock"]
    words += ["--tasks", "piqa", "openbookqa", "--limit", 3, "--threads", 1, "--batch-sizes", 1, 4]
    assert main([str(word) for word in [*words, "--json", tmp_path / "speed.json"]]) == 0
    assert "| all of them | 6 |" in capsys.readouterr().out
    record = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert record["schema"] == zero_shot_speed.SCHEMA
    assert [row["task"] for row in record["rows"]] == ["piqa", "openbookqa", "all of them"]
    assert {row["batch_size"] for row in record["rows"][:2]} <= {1, 4}
    assert record["scoring"] == "packed"
    both = record["rows"]
    for side in ("theirs_s", "ours_s"):
        assert both[2][side] == pytest.approx([a + b for a, b in zip(both[0][side], both[1][side], strict=True)])
        assert len(both[2][side]) == 6
