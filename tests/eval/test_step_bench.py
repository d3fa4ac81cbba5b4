"""The benchmark of training steps: what it compares, and what it says. Never how fast."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from losa_export.errors import ConfigError, MissingDependencyError
from losa_export.eval import step_bench
from losa_export.eval.step_bench import VARIANTS, StepBenchConfig, StepTimes, bench_steps, main, make_step, table

SMALL = StepBenchConfig(hidden=64, intermediate=96, blocks=1, batch=1, window=8, rank=2, rounds=4)


def test_each_variant_is_timed_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_bench, "_in_own_process", lambda config, variant: 1)
    results = bench_steps(SMALL)
    assert tuple(result.variant for result in results) == VARIANTS
    assert all(len(result.seconds) == 4 and min(result.seconds) > 0 for result in results)


def test_turns_begin_with_another_variant_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(step_bench, "_in_own_process", lambda config, variant: 1)
    monkeypatch.setattr(step_bench, "make_step", lambda config, variant: lambda: order.append(variant))
    bench_steps(SMALL)
    measured = order[2 * len(VARIANTS) :]
    assert measured[:5] == [*VARIANTS, "exact_bf16"]
    assert measured[4:8] == ["exact_bf16", "lors", "peft", "exact"]


def test_the_peak_is_measured(tmp_path: Path) -> None:
    assert step_bench.peak_rss_bytes(SMALL, "exact") > 2**20


def test_the_table_gives_each_time_beside_pefts() -> None:
    results = [StepTimes("exact", (0.010, 0.012, 0.011), 2**21), StepTimes("peft", (0.022, 0.022, 0.022), 2**22)]
    assert table(results).splitlines()[2:] == [
        "| exact | 11.0 | 1.0 | 0.500 | 2 | 0.50 |",
        "| peft | 22.0 | 0.0 | 1.000 | 4 | 1.00 |",
    ]


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"PEFT's LoRA needs the package 'peft'.*losa-export\[peft\]"):
        make_step(SMALL, "peft")


def test_the_command_prints_the_table_and_keeps_every_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_bench, "_in_own_process", lambda config, variant: 1)
    monkeypatch.setattr(step_bench, "make_step", lambda config, variant: lambda: None)
    command = ["--rounds", "3", "--sparsity", "0.5", "--default-products", "--json", str(tmp_path / "out.json")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| peft |" in printed
    assert printed.endswith("float32 products by library: default\n")
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["config"]["sparsity_fraction"] == 0.5
    assert [len(result["seconds"]) for result in record["results"]] == [3] * len(VARIANTS)


def test_in_bfloat16_every_variant_steps_in_it() -> None:
    for variant in VARIANTS:
        make_step(dataclasses.replace(SMALL, compute="bf16"), variant)()


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden", 100), ("rounds", 0), ("window", 1), ("sparsity_fraction", 1.0), ("threads", 0), ("compute", "fp16")],
)
def test_a_setting_out_of_range_is_an_error(field: str, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--{field.removesuffix('_fraction')}", str(value)]) == 1
    assert f"error: {field} is {value!r}; " in capsys.readouterr().err


def test_an_unknown_variant_is_an_error() -> None:
    with pytest.raises(ConfigError, match="variant is 'dora'; choose one of exact, exact_bf16, lors, peft"):
        make_step(SMALL, "dora")
