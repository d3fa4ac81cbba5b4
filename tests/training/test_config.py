from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from losa_export.errors import ConfigError, InputError
from losa_export.training.config import TrainConfig, from_table, read_run_config, to_table, write_toml

GOOD = TrainConfig(model=Path("model"), output=Path("run"), tuning_text=(Path("a.txt"),))


@pytest.mark.parametrize(
    ("field", "value", "mend"),
    [
        ("sparsity_fraction", -0.1, "at least 0 and below 1"),
        ("sparsity_fraction", 1.0, "at least 0 and below 1"),
        ("sparsity_fraction", 50, "at least 0 and below 1"),
        ("sparsity_fraction", float("nan"), "at least 0 and below 1"),
        ("tuning_text", (), "name at least one text file"),
        ("rounds", 0, "at least 1"),
        ("rank", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("calibration_windows", 0, "at least 1"),
        ("window", 1, "at least 2"),
        ("steps", -1, "not be negative"),
        ("time_budget_seconds", 0.0, "must be positive"),
        ("final_round_share", 0.0, "(0, 1]"),
        ("max_rank", 4, "at least the rank, 8"),
        ("scaling", 0.0, "positive and finite"),
        ("learning_rate", float("inf"), "positive and finite"),
        ("weight_decay", -0.1, "0 or a positive finite number"),
        ("gradient_clip", -1.0, "0 or a positive finite number"),
        ("save_every_seconds", -1.0, "0 or a positive finite number"),
        ("warmup_fraction", 1.0, "[0, 1)"),
        ("seed", -1, "not be negative"),
        ("dtype", "fp16", "fp32, bf16"),
        ("compute", "fp16", "auto, fp32, bf16"),
        ("device", "tpu", "auto, cpu, cuda"),
        ("reconstruct_epochs", -1, "not be negative"),
        ("reconstruct_learning_rate", 0.0, "positive and finite"),
        ("reconstruct_target", "dense", "accumulated, local"),
        ("reconstruct_rounds", "first", "last, every"),
        ("kl_weight", -1.0, "0 or a positive finite number"),
        ("squarehead_weight", float("inf"), "0 or a positive finite number"),
        ("adapter_dropout", 1.0, "[0, 1)"),
        ("calibration_window", 0, "must be positive"),
        ("operator", "fast", "auto, exact, exact_bf16, lors"),
        ("learning_rate_schedule", "linear", "cosine, per_round"),
        ("sparsity_allocator", "rmi", "uniform"),
        ("rank_allocator", "error", "uniform"),
        ("criterion", "obs", "choose one of wanda, magnitude, sparsegpt, alps"),
        ("damping", -0.1, "0 or a positive finite number"),
        ("pattern", "4:2", "write N:M with 0 < N < M"),
    ],
)
def test_a_field_out_of_range_is_an_error_that_names_it(field: str, value: object, mend: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(GOOD, **{field: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{field} is {value!r}; ")
    assert mend in str(caught.value)


def test_a_config_survives_toml_unchanged(tmp_path: Path) -> None:
    config = dataclasses.replace(
        GOOD,
        model=Path('we"ird\\name\nü\x7f'),
        calibration_text=(Path("b.jsonl"), Path("c.txt")),
        criterion="alps",
        pattern="mixed:8",
        damping=0.1,
        steps=12,
        time_budget_seconds=1e-7,
        overwrite=True,
    )
    (tmp_path / "config.toml").write_text(write_toml({"train": to_table(config)}), encoding="utf-8")
    assert read_run_config(tmp_path) == config


def test_toml_holds_tables_of_strings_with_any_key() -> None:
    written = write_toml({"base": {"hashes": {"model.safetensors": "ab", "x y": 'c"d'}, "threads": 2}})
    assert tomllib.loads(written) == {"base": {"hashes": {"model.safetensors": "ab", "x y": 'c"d'}, "threads": 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 0.5}, "unknown field 'sparsity'"),
        ({"rounds": "five"}, "rounds is 'five', which is not a int"),
        ({"tuning_text": "a.txt"}, "tuning_text is 'a.txt'"),
        ({"overwrite": 1}, "overwrite is 1"),
    ],
)
def test_a_config_file_with_a_wrong_field_is_an_error_that_names_it(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_table(to_table(GOOD) | change, Path("run/config.toml"))
    assert message in str(caught.value)
    assert "run/config.toml" in str(caught.value)


def test_a_config_file_without_a_model_is_an_error() -> None:
    table = to_table(GOOD)
    del table["model"]
    with pytest.raises(ConfigError, match="lacks the field 'model'"):
        from_table(table, Path("config.toml"))


def test_a_folder_that_is_no_run_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        read_run_config(tmp_path)
    (tmp_path / "config.toml").write_text("[train", encoding="utf-8")
    with pytest.raises(InputError, match="is not TOML"):
        read_run_config(tmp_path)
    (tmp_path / "config.toml").write_text("[other]\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"has no table \[train\]"):
        read_run_config(tmp_path)


def test_a_pattern_that_the_sparsity_contradicts_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"pattern 2:8 keeps 2 of 8; set sparsity_fraction to 0\.75"):
        dataclasses.replace(GOOD, sparsity_fraction=0.5, pattern="2:8")
