from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from losa_export import cli
from losa_export.errors import EngineUnavailableError
from losa_export.eval import bench_sweep
from losa_export.eval.answer_check import PassedChecks
from losa_export.eval.bench import BenchConfig
from losa_export.eval.bench_sweep import COLUMNS, SweepReport, combinations, sweep


def document(config: BenchConfig) -> dict[str, Any]:
    """As much of a benchmark's document as a sweep reads; a decode step takes a millisecond for each row."""
    estimate = {"ratio": 2.0, "low": 1.9, "high": 2.1, "verdict": "FASTER"}
    return {
        "threads": config.threads or 2,
        "config": config.as_dict(),
        "candidate": {
            "folder": config.candidate.name,
            "runtime": config.candidate_runtime,
            "prefill": {"median_ms": 10.0},
            "decode": {"median_ms": float(config.batch), "tokens_per_s": 1000.0},
        },
        "baseline": {
            "folder": config.baseline.name,
            "runtime": config.baseline_runtime,
            "prefill": {"median_ms": 20.0},
            "decode": {"median_ms": 2.0 * config.batch},
        },
        "prefill": {"all_blocks": estimate},
        "decode": {"all_blocks": estimate},
        "samples": [{"disturbed": True}, {"disturbed": False}],
    }


def run(config: BenchConfig) -> Any:
    if config.candidate_runtime == "deepsparse":
        raise EngineUnavailableError("the engine 'deepsparse' is not installed")
    return SimpleNamespace(as_dict=lambda: document(config))


@pytest.fixture
def common(tmp_path: Path) -> BenchConfig:
    return BenchConfig(tmp_path / "sparse", tmp_path / "dense")


def all_of(common: BenchConfig) -> list[BenchConfig]:
    return combinations(
        common,
        engines=[("ort", None), ("deepsparse", Path("ds"))],
        threads=[1, None],
        batches=[1, 4],
        prompts=[16],
        news=[8, 64],
    )


def test_every_combination_comes_once_the_lengths_changing_fastest(common: BenchConfig) -> None:
    configs = all_of(common)
    assert len(configs) == len(set(configs)) == 16
    assert [(one.candidate_runtime, one.threads, one.batch, one.new_tokens) for one in configs[:3]] == [
        ("ort", 1, 1, 8),
        ("ort", 1, 1, 64),
        ("ort", 1, 4, 8),
    ]
    assert {(one.candidate_runtime, one.candidate.name) for one in configs} == {("ort", "sparse"), ("deepsparse", "ds")}


def test_a_run_that_fails_costs_no_other_and_each_is_kept_at_once(common: BenchConfig) -> None:
    kept: list[int] = []
    report = sweep(all_of(common), keep=lambda found: kept.append(len(found.runs) + len(found.failed)), run=run)
    assert (len(report.runs), len(report.failed)) == (8, 8)
    assert kept == list(range(1, 17))
    assert report.failed[0] == {
        "runtime": "deepsparse",
        "threads": 1,
        "batch": 1,
        "prompt_tokens": 16,
        "new_tokens": 8,
        "error": "the engine 'deepsparse' is not installed",
    }


def test_all_runs_share_what_they_have_checked(common: BenchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    memories: list[int] = []

    def noting(config: BenchConfig, *, passed: PassedChecks) -> Any:
        memories.append(id(passed))
        return run(config)

    monkeypatch.setattr(bench_sweep, "bench", noting)
    sweep(all_of(common))
    assert len(memories) == 16
    assert len(set(memories)) == 1


def test_tables_have_a_line_for_each_run(common: BenchConfig) -> None:
    report = sweep(all_of(common), run=run)
    rows = list(csv.DictReader(io.StringIO(report.csv())))
    assert len(rows) == 8
    assert tuple(rows[0]) == COLUMNS
    assert (rows[2]["batch"], rows[2]["decode_ms"], rows[2]["baseline_decode_ms"]) == ("4", "4.0", "8.0")
    assert rows[0]["disturbed_fraction"] == "0.5"
    text = report.markdown()
    assert text.count("2.00x (1.90–2.10) FASTER") == 16
    assert "Ratios against dense (ort-stock)" in text
    assert "Failed: deepsparse, auto threads: the engine" in text


def test_the_command_writes_all_its_outputs_and_fails_if_a_run_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = sweep
    monkeypatch.setattr(bench_sweep, "sweep", lambda configs, *, keep: whole(configs, keep=keep, run=run))
    words = ["bench", str(tmp_path / "sparse"), "--against", str(tmp_path / "dense"), "--batch", "1,4"]
    outputs = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "markdown")}
    words += [word for kind, path in outputs.items() for word in (f"--{kind}", str(path))]
    assert cli.main([*words, "--runtime", "ort"]) == 0
    assert json.loads(outputs["json"].read_text())["schema"] == bench_sweep.SCHEMA
    assert outputs["csv"].read_text().count("\n") == 3
    assert outputs["markdown"].read_text() == capsys.readouterr().out
    assert cli.main([*words, "--runtime", "ort,deepsparse:ds"]) == 1
    assert len(json.loads(outputs["json"].read_text())["failed"]) == 2


def test_numbers_that_are_none_are_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "a", "--against", "b", "--threads", "1,two"])
    assert caught.value.code == 2
    assert "'1,two' are no whole numbers" in capsys.readouterr().err


def test_an_unknown_runtime_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(tmp_path), "--against", str(tmp_path), "--runtime", "tensorrt"]) == 1
    assert "candidate_runtime is 'tensorrt'; choose one of ort" in capsys.readouterr().err


def test_an_empty_sweep_has_empty_tables() -> None:
    assert SweepReport().csv().count("\n") == 1
    assert "Ratios against" not in SweepReport().markdown()
