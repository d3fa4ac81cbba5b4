from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from losa_export import synth
from losa_export.errors import ConfigError
from losa_export.eval.studies import paper_speedup
from losa_export.eval.studies.paper_speedup import Cell, Study, cells_of, document_of, main
from losa_export.eval.studies.speedup_models import DENSE, FORMS, Model, Models
from losa_export.eval.studies.speedup_page import line_through, page
from losa_export.synth import SHAPES, LlamaShape

SMALL = LlamaShape(64, 176, heads=4, kv_heads=4, blocks=32, vocabulary=128, positions=256)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (synth, paper_speedup):
        monkeypatch.setattr(module, "SHAPES", {**SHAPES, "small": SMALL})


def against_dense(form: str, sparsity: float, blocks: int) -> Cell:
    return Cell(Model(form, sparsity, blocks), Model(DENSE, 0.0, blocks))


def test_the_line_through_two_depths_gives_start_and_slope() -> None:
    assert line_through([(2, 30.0), (4, 50.0)]) == pytest.approx((10.0, 10.0))
    assert line_through([(4, 50.0), (3, 999.0), (2, 30.0)]) == pytest.approx((10.0, 10.0))
    with pytest.raises(ConfigError, match="a line needs two depths"):
        line_through([(2, 30.0)])


def test_dense_peers_are_measured_once_and_duels_at_the_papers_sparsity() -> None:
    cells = cells_of(["int8-a8", "deepsparse", "llamacpp-q4"], [0.7, 0.5], [2, 4])
    plain = [(cell.candidate.form, cell.candidate.sparsity) for cell in cells if not cell.is_duel]
    assert plain[::2] == [
        *[("deepsparse", 0.0), ("deepsparse", 0.0)],
        *[("int8-a8", 0.7), ("int8-a8", 0.7)],
        *[("int8-a8", 0.5), ("int8-a8", 0.5)],
    ]
    assert plain[1::2] == [
        *[("llamacpp-q4", 0.0), ("llamacpp-q4", 0.0)],
        *[("deepsparse", 0.7), ("deepsparse", 0.7)],
        *[("deepsparse", 0.5), ("deepsparse", 0.5)],
    ]
    assert [str(cell) for cell in cells if cell.is_duel] == [
        "DeepSparse, fp32, 70% zeros, 4 blocks, against DeepSparse, fp32, 0% zeros, 4 blocks",
        "ours, int8, activations too, 70% zeros, 4 blocks, against dense Q4_0, llama.cpp, 0% zeros, 4 blocks",
    ]
    assert len({cell.name for cell in cells}) == len(cells)
    shallow = cells_of(["int8-a8"], [0.7], [2, 4], shallow=[0.5])
    assert [(cell.candidate.sparsity, cell.candidate.blocks) for cell in shallow] == [(0.7, 2), (0.7, 4), (0.5, 2)]


def test_models_are_made_once_and_go_when_nobody_wants_them(tmp_path: Path) -> None:
    models = Models(tmp_path / "models", "small")
    sparse, dense = Model("fp32", 0.7, 1), Model(DENSE, 0.0, 1)
    before = {model: models.export(model).joinpath("model.onnx").stat().st_mtime_ns for model in (sparse, dense)}
    models.keep({dense, Model("int8", 0.7, 1)})
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["checkpoint-70-1", "dense-0-1"]
    assert models.export(dense).joinpath("model.onnx").stat().st_mtime_ns == before[dense]
    models.clear()
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_the_command_measures_goes_on_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, pages = tmp_path / "work", tmp_path / "pages"
    words = [
        "--like",
        "small",
        "--blocks",
        "1",
        "2",
        "--sparsities",
        "0.7",
        "--forms",
        "fp32",
        "int8-a8",
        "ort-int4-32",
    ]
    words += ["--prompt", "8", "--gen", "4", "--seconds", "1", "--threads", "1", "-o", str(work), "--page", str(pages)]
    assert main(words) == 0
    assert sorted(path.name for path in (work / "cells").iterdir()) == [
        "fp32-70-1-against-dense-0-1.json",
        "fp32-70-2-against-dense-0-2.json",
        "int8-a8-70-1-against-dense-0-1.json",
        "int8-a8-70-2-against-dense-0-2.json",
        "int8-a8-70-2-against-ort-int4-32-0-2.json",
        "ort-int4-32-0-1-against-dense-0-1.json",
        "ort-int4-32-0-2-against-dense-0-2.json",
    ]
    assert not list((work / "models").parent.glob("models"))
    record = json.loads((pages / "speedup.json").read_text())
    assert len(record["cells"]) == 7
    assert str(tmp_path) not in json.dumps(record)
    text = (pages / "speedup.md").read_text()
    assert (
        "| form | zeros | 1 block | 2 blocks | ms a block | against dense | ms of 32 blocks | against dense |" in text
    )
    assert "| ours, int8, activations too | 70% | " in text
    assert "| ours, int8, activations too | dense int4, ONNX Runtime, blocks of 32 | " in text
    (pages / "speedup.md").unlink()
    capsys.readouterr()
    assert main(words) == 0  # nothing is measured again
    assert "[1/4]" not in capsys.readouterr().err
    assert main(["--page", str(pages)]) == 0
    assert (pages / "speedup.md").read_text() == text


def cell(
    form: str, sparsity: float, blocks: int, ratio: float, against: str = DENSE, dense_ms: float = 10.0
) -> dict[str, Any]:
    estimate = {"ms": dense_ms * blocks / ratio, "against_ms": dense_ms * blocks, "ratio": ratio, "low": 0.95 * ratio}
    estimate |= {"high": 1.05 * ratio, "verdict": "FASTER" if ratio > 1.06 else "NO DIFFERENCE SHOWN"}
    return {
        "form": form,
        "sparsity": sparsity,
        "blocks": blocks,
        "against": against,
        "against_sparsity": 0.0,
        "decode": estimate,
        "prefill": estimate,
        "machine": {"cpu_model": "a processor"},
        "threads": 2,
    }


def test_a_run_on_slower_memory_does_not_bend_the_lines() -> None:
    cells = [cell(form, 0.7, blocks, ratio) for form, ratio in (("fp32", 2.0), ("int8", 5.0)) for blocks in (1, 2)]
    cells += [cell("deepsparse", 0.7, 1, 4.0), cell("deepsparse", 0.7, 2, 4.0, dense_ms=15.0)]
    record = {"like": "small", "whole_blocks": 32, "prompt_tokens": 8, "new_tokens": 4, "command": "…", "failed": {}}
    text = page(record | {"cells": cells})
    ratio = "4.00x (3.80 – 4.20)"
    assert text.count(f"| DeepSparse, fp32 | 70% | {ratio} | {ratio} | 2.50 | 4.00x | 80 | 4.00x |") == 2
    assert "read off straight lines through the depths: for the dense model through its median times" in text


def test_the_page_says_where_the_claim_holds_and_where_not() -> None:
    rows = [("deepsparse", 0.0, 0.9), ("deepsparse", 0.7, 1.8), ("fp32", 0.7, 2.6), ("int8", 0.7, 7.0)]
    cells = [cell(form, sparsity, blocks, ratio) for form, sparsity, ratio in rows for blocks in (2, 4)]
    cells += [cell("deepsparse", 0.7, 4, 2.0, "deepsparse"), cell("int8", 0.7, 4, 1.6, "llamacpp-q4")]
    record = {"like": "small", "whole_blocks": 32, "prompt_tokens": 8, "new_tokens": 4, "command": "…", "failed": {}}
    text = page(record | {"cells": cells})
    assert "## Beside the paper: decode, 70% zeros, 4 blocks" in text
    dense = "dense float32 in ONNX Runtime"
    assert f"- DeepSparse, fp32: 1.80x (1.71 – 1.89) of {dense}, which falls short of 2.60x." in text
    assert "- DeepSparse, fp32: 2.00x (1.90 – 2.10) of its own dense model, which falls short of 2.60x." in text
    assert f"- ours, fp32: 2.60x (2.47 – 2.73) of {dense}, which may reach 2.60x." in text
    assert f"- ours, int8: 7.00x (6.65 – 7.35) of {dense}, which reaches 2.60x." in text
    assert "of dense Q4_0" not in text
    assert text.count("NO DIFFERENCE SHOWN") == 4
    row = "| DeepSparse, fp32 | 70% | 1.80x (1.71 – 1.89) | 1.80x (1.71 – 1.89) | 5.56 | 1.80x | 178 | 1.80x |"
    assert row in text
    assert "| DeepSparse, fp32 | DeepSparse, fp32, dense | 2.00x (1.90 – 2.10) | 2.00x (1.90 – 2.10) |" in text
    assert "| ours, int8 | dense Q4_0, llama.cpp | 1.60x (1.52 – 1.68) | 1.60x (1.52 – 1.68) |" in text


def test_an_engine_that_is_missing_is_said_and_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(Study, "measure", lambda self, cell, models, passed: measured.append(cell))
    measured: list[Cell] = []
    words = ["--like", "small", "--blocks", "1", "--sparsities", "0.7", "-o", str(tmp_path / "work")]
    assert main(words) == 1
    own = {form for form in FORMS if FORMS[form].runtime in ("ort", "ort-stock")} - {DENSE}
    assert {one.candidate.form for one in measured} == own
    assert {one.baseline.form for one in measured} == {DENSE, "ort-int4-32", "ort-int4-128"}


def test_records_of_other_settings_do_not_count(tmp_path: Path) -> None:
    study, cell = Study("small", tmp_path), against_dense("fp32", 0.7, 1)
    assert study.record(cell) is None
    assert document_of(study, [cell], {"x": "y"}, "…")["cells"] == []


@pytest.mark.parametrize(
    "words", [[], ["--page", "PAGES"], ["--like", "gpt", "-o", "WORK"], ["--sparsities", "70", "-o", "WORK"]]
)
def test_a_command_that_cannot_work_says_so(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"PAGES": str(tmp_path), "WORK": str(tmp_path / "work")}
    assert main([places.get(word, word) for word in words]) == 1
    assert capsys.readouterr().err.startswith("study: error: ")
