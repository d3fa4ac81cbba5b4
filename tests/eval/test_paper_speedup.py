from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from losa_export import synth
from losa_export.errors import ConfigError
from losa_export.eval.studies import paper_speedup
from losa_export.eval.studies.paper_speedup import Cell, Study, document_of, main, page, whole_model_ms
from losa_export.synth import SHAPES, LlamaShape

SMALL = LlamaShape(64, 176, heads=4, kv_heads=4, blocks=32, vocabulary=128, positions=256)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (synth, paper_speedup):
        monkeypatch.setattr(module, "SHAPES", {**SHAPES, "small": SMALL})


def test_the_line_through_two_depths_gives_the_whole() -> None:
    assert whole_model_ms([(2, 30.0), (4, 50.0)], 32) == pytest.approx(30 + 10 * 30)
    assert whole_model_ms([(4, 50.0), (3, 999.0), (2, 30.0)], 4) == pytest.approx(50.0)
    with pytest.raises(ConfigError, match="a line needs two depths"):
        whole_model_ms([(2, 30.0)], 32)


@pytest.mark.slow
def test_the_command_measures_goes_on_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, pages = tmp_path / "work", tmp_path / "pages"
    words = ["--like", "small", "--blocks", "1", "2", "--sparsities", "0.7", "--forms", "fp32", "int8"]
    words += ["--prompt", "8", "--gen", "4", "--seconds", "1", "--threads", "1", "-o", str(work), "--page", str(pages)]
    assert main(words) == 0
    assert sorted(path.name for path in (work / "cells").iterdir()) == [
        "fp32-70-1.json",
        "fp32-70-2.json",
        "int8-70-1.json",
        "int8-70-2.json",
    ]
    assert not list((work / "models").parent.glob("models"))
    record = json.loads((pages / "speedup.json").read_text())
    assert len(record["cells"]) == 4
    assert str(tmp_path) not in json.dumps(record)
    text = (pages / "speedup.md").read_text()
    assert "| form | zeros | 1 blocks | 2 blocks | 32 blocks, ms, by the line |" in text
    assert "ours, int8" in text
    (pages / "speedup.md").unlink()
    capsys.readouterr()
    assert main(words) == 0  # nothing is measured again
    assert "[1/4]" not in capsys.readouterr().err
    assert main(["--page", str(pages)]) == 0
    assert (pages / "speedup.md").read_text() == text


def cell(kind: str, sparsity: float, blocks: int, ratio: float) -> dict[str, Any]:
    estimate = {"ms": 10.0 * blocks / ratio, "dense_ms": 10.0 * blocks, "ratio": ratio, "low": 0.95 * ratio}
    estimate |= {"high": 1.05 * ratio, "verdict": "FASTER" if ratio > 1.06 else "NO DIFFERENCE SHOWN"}
    return {
        "kind": kind,
        "sparsity": sparsity,
        "blocks": blocks,
        "decode": estimate,
        "prefill": estimate,
        "machine": {"cpu_model": "a processor"},
        "threads": 2,
    }


def test_the_page_says_where_the_claim_holds_and_where_not() -> None:
    rows = [("deepsparse", 0.0, 0.9), ("deepsparse", 0.7, 1.8), ("fp32", 0.7, 2.6), ("int8", 0.7, 7.0)]
    cells = [cell(kind, sparsity, blocks, ratio) for kind, sparsity, ratio in rows for blocks in (2, 4)]
    record = {"like": "small", "whole_blocks": 32, "prompt_tokens": 8, "new_tokens": 4, "command": "…", "failed": {}}
    text = page(record | {"cells": cells})
    assert "- deepsparse: 1.80x (1.71 – 1.89) of dense float32 in ONNX Runtime, which falls short of 2.60x" in text
    assert "of the engine's own dense model 2.00x" in text
    assert "- ours, fp32: 2.60x (2.47 – 2.73) of dense float32 in ONNX Runtime, which may reach 2.60x." in text
    assert "- ours, int8: 7.00x (6.65 – 7.35) of dense float32 in ONNX Runtime, which reaches 2.60x." in text
    assert text.count("NO DIFFERENCE SHOWN") == 4
    assert "| deepsparse | 70% | 1.80x (1.71 – 1.89) | 1.80x (1.71 – 1.89) | 178 | 1.80x |" in text


def test_an_engine_that_is_missing_is_said_and_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(Study, "measure", lambda self, cell: measured.append(cell))
    measured: list[Cell] = []
    words = ["--like", "small", "--blocks", "1", "--sparsities", "0.7", "-o", str(tmp_path / "work")]
    assert main(words) == 1
    assert [one.kind for one in measured] == ["fp32", "int8", "int4"]


def test_records_of_other_settings_do_not_count(tmp_path: Path) -> None:
    study = Study("small", tmp_path)
    assert study.record(Cell("fp32", 0.7, 1)) is None
    assert document_of(study, [Cell("fp32", 0.7, 1)], {"x": "y"}, "…")["cells"] == []


@pytest.mark.parametrize("words", [[], ["--page", "PAGES"], ["--like", "gpt", "-o", "WORK"]])
def test_a_command_that_cannot_work_says_so(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"PAGES": str(tmp_path), "WORK": str(tmp_path / "work")}
    assert main([places.get(word, word) for word in words]) == 1
    assert capsys.readouterr().err.startswith("study: error: ")
