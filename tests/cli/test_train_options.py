"""Where the settings of `losa train` come from: options, over preset or config file, over defaults."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from losa_export.cli import _parser, main
from losa_export.commands.train import train_config
from losa_export.errors import ConfigError, InputError
from losa_export.training.config import TrainConfig, read_run_config
from losa_export.training.journal import read_journal
from losa_export.training.settings import preset_file, preset_names, read_settings


def config_of(model: Path, *options: str) -> TrainConfig:
    return train_config(_parser().parse_args(["train", str(model), "-o", "run", "--text", "t.txt", *options]))


def train_actions() -> list[argparse.Action]:
    verbs = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return list(verbs.choices["train"]._actions)


def test_without_a_preset_every_setting_is_the_default(tmp_path: Path) -> None:
    plain = TrainConfig(model=tmp_path, output=Path("run"), tuning_text=(Path("t.txt"),), sparsity_fraction=0.7)
    assert config_of(tmp_path, "--sparsity", "70%") == plain


def test_the_help_tells_the_defaults_there_are() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    words = {"yes": True, "no": False, "packed": True, "no pattern": None, "all": None}
    told = 0
    for action in train_actions():
        match = re.search(r"default: ([^);,]+)\)?$", action.help or "")
        if match and action.dest in defaults and not match[1].startswith(("one pass", "embedded", "the tuning", "-")):
            told += 1
            expected: Any = defaults[action.dest]
            assert match[1] in words or match[1] == str(expected), action.dest
            assert match[1] not in words or words[match[1]] == expected, action.dest
    assert told >= 20


def test_presets_are_files_to_read_and_hold_valid_settings(tmp_path: Path) -> None:
    assert preset_names() == ("faithful", "recommended")
    for name in preset_names():
        lines = preset_file(name).read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("# ")
        config = config_of(tmp_path, "--preset", name, "--sparsity", "0.7")
        settings = read_settings(preset_file(name))
        assert {field: getattr(config, field) for field in settings} == settings
        assert not {"model", "output", "tuning_text", "sparsity_fraction", "seed"} & set(settings)


def test_the_faithful_preset_is_the_released_recipe(tmp_path: Path) -> None:
    config = config_of(tmp_path, "--preset", "faithful", "--sparsity", "0.7")
    from losa_export.training.schedule import round_spans, split_steps

    assert config.steps is not None
    spans = round_spans(config.rounds, config.final_round_share)
    assert split_steps(config.steps, spans) == (125, 125, 125, 125, 750)
    assert config.steps * config.batch_size == 10_000
    assert [config.mean_rank(number) for number in range(1, 6)] == [6, 7, 8, 9, 10]
    assert (config.learning_rate, config.weight_decay, config.gradient_clip) == (2e-4, 1e-3, 0.3)
    assert (config.kl_weight, config.squarehead_weight, config.reconstruct_epochs) == (0.0, 0.0, 0)
    assert (config.learning_rate_schedule, config.warmup_fraction, config.adapter_dropout) == ("per_round", 0.3, 0.1)


def test_an_option_wins_over_the_preset(tmp_path: Path) -> None:
    options = ["--preset", "recommended", "--sparsity", "0.5", "--kl-weight", "0", "--rounds", "2", "--no-packing"]
    config = config_of(tmp_path, *options)
    assert (config.kl_weight, config.rounds, config.packing) == (0.0, 2, False)
    assert config.squarehead_weight == 1.0


def test_a_larger_rank_brings_its_own_largest_rank(tmp_path: Path) -> None:
    assert config_of(tmp_path, "--sparsity", "0.5", "--rank", "24").max_rank == 24
    assert config_of(tmp_path, "--sparsity", "0.5", "--rank", "4").max_rank == 16


def test_a_config_file_counts_paths_from_its_own_folder_and_options_win(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        '[train]\nsparsity_fraction = 0.6\nrank = 4\ntuning_text = ["a.txt"]\ncalibration_text = ["b.txt"]\n'
        "[environment]\nthreads = 2\n"
    )
    arguments = ["train", str(tmp_path), "-o", "run", "--config", str(tmp_path / "mine.toml"), "--rank", "5"]
    config = train_config(_parser().parse_args(arguments))
    assert (config.sparsity_fraction, config.rank) == (0.6, 5)
    assert (config.tuning_text, config.calibration_text) == ((tmp_path / "a.txt",), (tmp_path / "b.txt",))


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("[train]\nranks = 4\n", ConfigError, r"mine\.toml' has the unknown field 'ranks' in \[train\]; take it out"),
        ('[train]\nrank = "4"\n', ConfigError, r"mine\.toml': rank is '4', which is not a int; correct it"),
        ("rank = 4\n", InputError, r"mine\.toml' has no table \[train\]; put the settings under that heading"),
        ("[train", InputError, r"mine\.toml' is not TOML .*; mend it"),
        (None, InputError, r"the config file '.*mine\.toml' cannot be read \(No such file.*\); check the path"),
    ],
)
def test_a_config_file_that_cannot_be_used(
    tmp_path: Path, content: str | None, kind: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / "mine.toml").write_text(content)
    with pytest.raises(kind, match=message):
        read_settings(tmp_path / "mine.toml")


def test_a_run_without_a_sparsity_or_with_an_unknown_preset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sparsity_fraction is not given; add for example --sparsity 0\.5"):
        config_of(tmp_path)
    with pytest.raises(ConfigError, match="preset is 'best'; choose one of faithful, recommended"):
        config_of(tmp_path, "--preset", "best", "--sparsity", "0.5")


def test_preset_and_config_file_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "m", "-o", "x", "--preset", "faithful", "--config", "c.toml"])
    assert stop.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["faithful", "recommended"])
def test_a_preset_trains_and_its_run_can_be_repeated_from_its_own_config(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, preset: str
) -> None:
    # As a file, because 64 windows for mutual information are more than the few that are read here.
    small = re.sub(r"rmi_windows = \d+", "rmi_windows = 4", preset_file(preset).read_text(encoding="utf-8"))
    (tmp_path / "small.toml").write_text(small, encoding="utf-8")
    run = tmp_path / "run"
    arguments = ["train", str(tiny_checkpoint), "-o", str(run), "--text", str(tiny_text), "--sparsity", "0.6"]
    arguments += ["--config", str(tmp_path / "small.toml"), "--rounds", "2", "--steps", "4", "--batch-size", "2"]
    arguments += ["--window", "16", "--calibration-windows", "5", "--calibration-window", "16", "--dtype", "fp32"]
    assert main(arguments) == 0
    assert read_run_config(run).rounds == 2
    again = tmp_path / "again"
    assert main(["train", str(tiny_checkpoint), "-o", str(again), "--config", str(run / "config.toml")]) == 0
    assert [record.losses for record in read_journal(again)] == [record.losses for record in read_journal(run)]
