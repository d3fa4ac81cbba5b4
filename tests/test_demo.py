"""The demo goes the whole path, goes on where it stopped, and refuses to mix two demos."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from losa_export.demo import DemoConfig, DemoEffort, run_demo
from losa_export.errors import OutputError

EFFORT = DemoEffort(
    train_seconds=3.0,
    rounds=2,
    calibration_windows=2,
    window=32,
    batch_size=2,
    learning_rate=1e-3,
    perplexity_windows=4,
    perplexity_window=32,
    bench_seconds=1.0,
    warmup_blocks=1,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_text: Path) -> DemoConfig:
    output = tmp_path_factory.mktemp("demo") / "out"
    return DemoConfig(
        output, model=str(tiny_checkpoint), texts=(tiny_text,), sparsity_fraction=0.6, threads=1, effort=EFFORT
    )


@pytest.mark.slow
def test_the_demo_ends_with_one_table_and_a_second_call_repeats_nothing(
    config: DemoConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_demo(config)
    assert [row.name for row in report.rows] == ["dense", "one-shot Wanda", "LoSA"]
    assert report.rows[2].model_bytes < report.rows[0].model_bytes
    text = str(report)
    assert "losa generate" in text
    assert str(config.output / "onnx") in text
    record = json.loads((config.output / "demo.json").read_text())
    assert record["rows"][2]["perplexity"] == report.rows[2].perplexity
    capsys.readouterr()
    again = run_demo(config)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert lines
    assert all(line.endswith("done before") for line in lines)
    assert [row.perplexity for row in again.rows] == [row.perplexity for row in report.rows]


@pytest.mark.slow
def test_a_demo_of_other_settings_is_refused(config: DemoConfig) -> None:
    with pytest.raises(OutputError, match="holds a demo of other settings"):
        run_demo(replace(config, sparsity_fraction=0.5))
