"""Whole runs on unpacked instructions, with schedule and optimizer anew each round, stopped and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_export.errors import ConfigError
from losa_export.masks import load_masks
from losa_export.training.config import TrainConfig
from losa_export.training.journal import read_journal
from losa_export.training.preflight import check_inputs
from losa_export.training.train import StepRecord, train

ConfigMaker = Callable[..., TrainConfig]
WORDS = ("cat", "dog", "tree", "road", "sat", "found", "big", "little", "moon", "ball")


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    """Forty rows of an instruction and an answer of one to forty words."""
    generator = np.random.default_rng(0)
    rows = [
        {"instruction": str(generator.choice(WORDS)), "output": " ".join(generator.choice(WORDS, size=size))}
        for size in generator.integers(1, 41, size=40)
    ]
    path = tmp_path / "instructions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def everything(tiny_config: ConfigMaker, instructions: Path, tiny_text: Path) -> ConfigMaker:
    """Makes a config with all that this file is about; keyword arguments change fields."""

    def make(**changes: Any) -> TrainConfig:
        fields: dict[str, Any] = {
            "tuning_text": (instructions,),
            "calibration_text": (tiny_text,),
            "packing": False,
            "add_bos": True,
            "window": 48,
            "calibration_window": 20,
            "learning_rate_schedule": "per_round",
            "warmup_fraction": 0.3,
            "adapter_dropout": 0.2,
            "kl_weight": 0.5,
            "squarehead_weight": 0.5,
            "gradient_checkpointing": True,
            "operator": "lors",
        }
        return tiny_config(**(fields | changes))

    return make


def test_unpacked_inputs_are_whole_documents_and_calibration_has_no_padding(everything: ConfigMaker) -> None:
    inputs = check_inputs(everything())
    assert isinstance(inputs.tuning, list)
    assert len(inputs.tuning) == 40
    assert all(example[0] == 1 and example.size <= 48 for example in inputs.tuning)  # 1 begins a text, 2 ends it
    assert all(example[-1] == 2 for example in inputs.tuning if example.size < 48)
    assert len({example.size for example in inputs.tuning}) > 5
    assert inputs.calibration.shape == (5, 20)
    assert not (inputs.calibration == 0).any()


def test_beginning_of_text_needs_a_model_that_has_it(everything: ConfigMaker, tmp_path: Path) -> None:
    config = everything()
    model = shutil.copytree(config.model, tmp_path / "model")
    values = json.loads((model / "config.json").read_text())
    del values["bos_token_id"]
    (model / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"add_bos is on, but '.*config\.json' names no bos_token_id; turn it off"):
        check_inputs(everything(model=model))


def test_a_calibration_window_beyond_the_context_is_an_error(everything: ConfigMaker) -> None:
    with pytest.raises(ConfigError, match="calibration_window is 300, but the model reads at most 256 tokens"):
        check_inputs(everything(calibration_window=300))


@pytest.mark.parametrize("stop_at", [(1, 0), (3, 2)])
def test_a_stopped_run_goes_on_bit_by_bit(everything: ConfigMaker, tmp_path: Path, stop_at: tuple[int, int]) -> None:
    whole, config = everything(output=tmp_path / "whole"), everything()
    train(whole, show_progress=False)

    def note(record: StepRecord) -> None:
        if (record.round_number, record.step) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    assert train(config, show_progress=False, on_step=note).status == "interrupted"
    assert train(config, show_progress=False, resume=True).status == "completed"
    kept = ("losses", "block_ranks", "sparsity", "tokens", "learning_rate_last")
    for mine, wanted in zip(read_journal(config.output), read_journal(whole.output), strict=True):
        assert [getattr(mine, name) for name in kept] == [getattr(wanted, name) for name in kept]
    adapters = [run / "adapter" / "adapter_model.safetensors" for run in (config.output, whole.output)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    masks = [load_masks(run / "masks.safetensors") for run in (config.output, whole.output)]
    for name in masks[1].names:
        np.testing.assert_array_equal(masks[0].read(name), masks[1].read(name))


def test_each_round_has_a_triangle_of_its_own_and_counts_its_tokens(everything: ConfigMaker) -> None:
    rates: dict[tuple[int, int], float] = {}

    def note(record: StepRecord) -> None:
        rates[record.round_number, record.step] = record.learning_rate

    config = everything(steps=20, operator="exact", adapter_dropout=0.0)
    result = train(config, show_progress=False, on_step=note)
    for number in (1, 2, 3):
        of_round = [rate for (round_number, _), rate in rates.items() if round_number == number]
        peak = of_round.index(max(of_round))
        assert 0 < peak < len(of_round) - 1
        assert of_round[: peak + 1] == sorted(of_round[: peak + 1])
        assert of_round[peak:] == sorted(of_round[peak:], reverse=True)
    record = result.rounds[0]
    assert 0 < record.tokens < record.steps * config.batch_size * config.window
