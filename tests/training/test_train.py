from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from losa_export.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    OutputError,
    StateError,
    TextError,
    UnsupportedArchitectureError,
)
from losa_export.masks import digest, load_masks
from losa_export.merge import merge_run
from losa_export.training import train as train_module
from losa_export.training.config import TrainConfig, read_run_config
from losa_export.training.journal import read_journal
from losa_export.training.scores import pruned_per_row
from losa_export.training.state import is_resumable
from losa_export.training.train import StepRecord, TrainResult, one_shot, train

ConfigMaker = Callable[..., TrainConfig]
Losses = dict[tuple[int, int], float]


def run(config: TrainConfig, **options: Any) -> tuple[TrainResult, Losses]:
    """Train quietly, and note the loss of every (round, step)."""
    losses: Losses = {}

    def note(record: StepRecord) -> None:
        losses[record.round_number, record.step] = record.loss

    return train(config, show_progress=False, on_step=note, **options), losses


def outcome(folder: Path) -> dict[str, Any]:
    """What two runs must share to count as the same: masks, adapter bytes and the journal without its clock."""
    masks = load_masks(folder / "masks.safetensors")
    clocked = ("prune_seconds", "tune_seconds", "peak_memory_bytes")
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return {
        "masks": {name: digest(masks.read(name)) for name in masks.names},
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "rounds": [{key: value for key, value in row.items() if key not in clocked} for row in rows],
    }


def test_a_run_reaches_its_target_and_leaves_what_it_promises(tiny_config: ConfigMaker) -> None:
    config = tiny_config()
    result, losses = run(config)
    assert result.status == "completed"
    assert [record.round_number for record in result.rounds] == [1, 2, 3]
    assert sum(record.steps for record in result.rounds) == len(losses) == 10
    assert [record.target_sparsity for record in result.rounds] == pytest.approx([0.422222, 0.577778, 0.6], abs=1e-6)
    assert list(result.rounds[0].losses) == [losses[1, step] for step in range(result.rounds[0].steps)]
    assert read_journal(result.run) == list(result.rounds)
    masks = load_masks(result.masks_file)
    for name in masks.names:
        keep = masks.read(name)
        assert set((~keep).sum(axis=1)) == {pruned_per_row(keep.shape[1], 0.6)}
    assert read_run_config(result.run) == config.absolute()
    assert (result.adapter_folder / "adapter_config.json").is_file()
    assert sorted(os.listdir(result.run)) == ["adapter", "config.toml", "masks.safetensors", "rounds.jsonl", "state"]


def test_the_run_config_names_the_base_and_its_hash(tiny_config: ConfigMaker) -> None:
    import tomllib

    from losa_export.files import sha256_of

    config = tiny_config(rounds=1, steps=0)
    train(config, show_progress=False)
    tables = tomllib.loads((config.output / "config.toml").read_text())
    assert tables["base"]["path"] == str(config.model)
    assert tables["base"]["weights_sha256"] == {"model.safetensors": sha256_of(config.model / "model.safetensors")}
    assert tables["base"]["architecture"] == "LlamaForCausalLM"
    assert tables["environment"]["compute"] == "fp32"
    assert tables["environment"]["device"] == "cpu"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_run(tiny_config: ConfigMaker, tmp_path: Path, dtype: str) -> None:
    first, second, other = (
        run(tiny_config(output=tmp_path / name, dtype=dtype, seed=seed, rounds=2, steps=5))[1]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == second
    assert first != other
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_masks_grow_from_round_to_round_and_the_base_stays(
    tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, np.ndarray]] = []
    bases: list[dict[str, torch.Tensor]] = []
    prune_blocks = train_module.prune_blocks

    def watch(adapted: Any, *arguments: Any, **options: Any) -> None:
        prune_blocks(adapted, *arguments, **options)
        seen.append(adapted.masks())
        bases.append({name: layer.weight.clone() for name, layer in adapted.layers.items()})

    monkeypatch.setattr(train_module, "prune_blocks", watch)
    run(tiny_config())
    assert len(seen) == 3
    for before, after in itertools.pairwise(seen):
        for name, keep in after.items():
            assert not (keep & ~before[name]).any()
            assert (~keep).sum() > (~before[name]).sum()
    for base in bases[1:]:
        assert all(torch.equal(weight, bases[0][name]) for name, weight in base.items())


def test_one_shot_prunes_once_and_leaves_zero_adapters(tiny_config: ConfigMaker) -> None:
    from safetensors.numpy import load_file

    result = one_shot(tiny_config(), show_progress=False)
    assert result.status == "completed"
    assert len(result.rounds) == 1
    assert result.rounds[0].steps == 0
    assert 0.6 - 1 / 64 < result.sparsity_fraction <= 0.6
    adapter = load_file(result.adapter_folder / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_without_sparsity_it_is_plain_lora(tiny_config: ConfigMaker, tmp_path: Path, criterion: str) -> None:
    settings = {"sparsity_allocator": "linear", "rank_allocator": "water_filling", "reconstruct_epochs": 1}
    result, losses = run(tiny_config(sparsity_fraction=0.0, criterion=criterion, steps=30, **settings))
    assert result.sparsity_fraction == 0.0
    assert np.mean([losses[3, step] for step in range(12, 18)]) < losses[1, 0]
    merge_run(result.run, tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "sparsity.json").read_text())
    assert all(tensor["zeros"] == 0 for tensor in record["tensors"].values())


def test_a_run_without_steps_or_budget_passes_once_over_the_text(tiny_config: ConfigMaker) -> None:
    result, losses = run(tiny_config(steps=None, rounds=1, window=200, batch_size=20))
    windows = 600 * 24 // 200
    assert len(losses) == -(-windows // 20) == 4
    assert result.rounds[0].tokens == 4 * 20 * 200


@pytest.mark.parametrize("stop_at", [(1, 0), (1, 1), (2, 0), (3, 2)])
def test_ctrl_c_stops_after_the_step_and_resuming_gives_the_same_run(
    tiny_config: ConfigMaker, tmp_path: Path, stop_at: tuple[int, int]
) -> None:
    whole = tiny_config(output=tmp_path / "whole")
    _, expected = run(whole)
    config = tiny_config()
    losses: Losses = {}

    def note(record: StepRecord) -> None:
        losses[record.round_number, record.step] = record.loss
        if (record.round_number, record.step) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = train(config, show_progress=False, on_step=note)
    assert stopped.status == "interrupted"
    assert max(losses) == stop_at
    assert is_resumable(config.output)
    result, rest = run(config, resume=True)
    assert result.status == "completed"
    assert not set(losses) & set(rest)
    assert losses | rest == expected
    assert outcome(config.output) == outcome(whole.output)


def test_ctrl_c_while_pruning_stops_between_blocks(
    tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prune_layer_calls = []
    from losa_export.training import prune as prune_module

    prune_layer = prune_module.prune_layer

    def interrupt(*arguments: Any) -> None:
        prune_layer_calls.append(1)
        if len(prune_layer_calls) == 16:  # second layer of the first block in round 2
            os.kill(os.getpid(), signal.SIGINT)
        prune_layer(*arguments)

    monkeypatch.setattr(prune_module, "prune_layer", interrupt)
    config = tiny_config()
    assert run(config)[0].status == "interrupted"
    assert len(prune_layer_calls) == 21
    assert [record.round_number for record in read_journal(config.output)] == [1]
    assert run(config, resume=True)[0].status == "completed"
    run(tiny_config(output=tmp_path / "whole"))
    assert outcome(config.output) == outcome(tmp_path / "whole")


def test_resuming_a_finished_run_does_nothing(tiny_config: ConfigMaker) -> None:
    config = tiny_config(rounds=1, steps=2)
    first, _ = run(config)
    again, losses = run(config, resume=True)
    assert losses == {}
    assert again == first
    (config.output / "masks.safetensors").unlink()
    with pytest.raises(StateError, match=r"is finished, but its 'masks\.safetensors' is gone"):
        train(config, resume=True)


def test_resuming_with_other_settings_or_another_model_is_refused(
    tiny_config: ConfigMaker, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    run(tiny_config(rounds=1, steps=1))
    with pytest.raises(StateError, match=r"learning_rate was 0\.005 and is now 0\.1"):
        train(tiny_config(rounds=1, steps=1, learning_rate=0.1), resume=True)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_checkpoint, moved)
    assert run(tiny_config(rounds=1, steps=1, model=moved), resume=True)[0].status == "completed"
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    with pytest.raises(StateError, match="model weights was"):
        train(tiny_config(rounds=1, steps=1, model=moved), resume=True)


def test_resuming_without_a_run_is_refused(tiny_config: ConfigMaker) -> None:
    with pytest.raises(StateError, match="no training state"):
        train(tiny_config(), resume=True)


def test_a_state_that_lacks_a_tensor_is_refused(tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = train_module._Session._tensors

    def forgetful(session: Any) -> Any:
        return {name: tensor for name, tensor in saved(session).items() if not name.startswith("mask:")}

    monkeypatch.setattr(train_module._Session, "_tensors", forgetful)

    def interrupt(_: StepRecord) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    train(tiny_config(), show_progress=False, on_step=interrupt)
    with pytest.raises(StateError, match="lacks or misshapes a tensor"):
        train(tiny_config(), show_progress=False, resume=True)


def test_an_occupied_output_is_refused_and_overwriting_takes_run_files_only(tiny_config: ConfigMaker) -> None:
    config = tiny_config(rounds=1, steps=1)
    run(config)
    (config.output / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty; add --overwrite"):
        train(config)
    again = tiny_config(rounds=1, steps=0, overwrite=True)
    assert run(again)[0].rounds[0].steps == 0
    assert (config.output / "notes.txt").read_text() == "mine"


def test_the_model_folder_is_no_output(tiny_config: ConfigMaker, tiny_checkpoint: Path) -> None:
    with pytest.raises(OutputError, match="is the input itself"):
        train(tiny_config(output=tiny_checkpoint, overwrite=True))


@pytest.mark.parametrize(
    ("architecture", "error", "message"),
    [("FalconForCausalLM", UnsupportedArchitectureError, "'FalconForCausalLM' is not supported; supported are Llama")],
)
def test_an_unsupported_architecture_is_refused_before_anything_is_written(
    tiny_config: ConfigMaker, tiny_checkpoint: Path, tmp_path: Path, architecture: str, error: type, message: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    settings = json.loads((other / "config.json").read_text()) | {"architectures": [architecture]}
    (other / "config.json").write_text(json.dumps(settings))
    config = tiny_config(model=other)
    with pytest.raises(error, match=message):
        train(config)
    assert not config.output.exists()


def test_missing_or_unfit_inputs_are_refused_before_anything_is_written(
    tiny_config: ConfigMaker, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the cat sat")
    wide = tmp_path / "wide"
    shutil.copytree(tiny_checkpoint, wide)
    settings = json.loads((wide / "config.json").read_text()) | {"intermediate_size": 192}
    (wide / "config.json").write_text(json.dumps(settings))
    small = tmp_path / "small"
    shutil.copytree(tiny_checkpoint, small)
    _shrink_vocabulary(small, 16)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"model": tmp_path / "nowhere"}, InputError, "does not exist"),
        ({"tuning_text": (tmp_path / "none.txt",)}, TextError, "cannot be read"),
        ({"tuning_text": (short,)}, TextError, "but 80 tokens"),
        ({"tuning_text": (short,), "calibration_windows": 1}, TextError, "but 16 tokens"),
        ({"window": 1000}, ConfigError, "window is 1000, but the model reads at most 256 tokens"),
        ({"model": wide}, CheckpointError, r"is \(176, 64\), but config\.json asks for \(192, 64\)"),
        ({"model": small}, CheckpointError, "but the model has only 16 embeddings"),
    ]
    for changes, error, message in cases:
        config = tiny_config(**changes)
        with pytest.raises(error, match=message):
            train(config)
        assert not config.output.exists()


def _shrink_vocabulary(folder: Path, size: int) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = np.ascontiguousarray(tensors["model.embed_tokens.weight"][:size])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"vocab_size": size}
    (folder / "config.json").write_text(json.dumps(settings))


def test_a_batch_that_processes_cannot_share_is_refused(
    tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate

    class Two(accelerate.Accelerator):
        num_processes = 2

    monkeypatch.setattr(accelerate, "Accelerator", Two)
    with pytest.raises(ConfigError, match="batch_size is 3, which 2 processes cannot share evenly"):
        train(tiny_config(batch_size=3))


class _Clock:
    """Tells a time that moves on by a fixed amount with every optimizer step, and not otherwise."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.now = 0.0
        self._seconds = seconds

    def __call__(self) -> float:
        return self.now

    def ticking_step(self, step: Callable[..., float]) -> Callable[..., float]:
        def timed(tuner: Any, number: int, rate: float) -> float:
            self.now += next(self._seconds)
            return step(tuner, number, rate)

        return timed


def budgeted(
    monkeypatch: pytest.MonkeyPatch, config: TrainConfig, seconds: Callable[[int], float]
) -> tuple[TrainResult, list[StepRecord]]:
    clock = _Clock(seconds(number) for number in range(10_000))
    monkeypatch.setattr(train_module.Tuner, "step", clock.ticking_step(train_module.Tuner.step))
    steps: list[StepRecord] = []
    result = train(config, show_progress=False, on_step=steps.append, clock=clock)
    monkeypatch.undo()
    return result, steps


def test_a_time_budget_is_shared_by_the_rounds_and_the_rate_still_ends_near_zero(
    tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(steps=None, time_budget_seconds=100.0)
    result, steps = budgeted(monkeypatch, config, lambda _: 2.0)
    assert [record.steps for record in result.rounds] == [10, 10, 30]
    assert result.elapsed_seconds == 100.0
    assert steps[-1].learning_rate < 0.01 * config.learning_rate
    assert max(step.learning_rate for step in steps) <= config.learning_rate


def test_a_machine_that_slows_down_gets_fewer_steps_but_the_same_schedule(
    tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(steps=None, time_budget_seconds=100.0)
    result, steps = budgeted(monkeypatch, config, lambda number: 2.0 if number < 30 else 6.0)
    # one step of 6 s, and a tenth of the last round, is what planning tolerates
    assert 88.0 <= result.elapsed_seconds <= 112.0
    assert result.rounds[-1].steps < 30
    assert steps[-1].learning_rate < 0.1 * config.learning_rate


def test_a_step_limit_holds_within_a_time_budget(tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = budgeted(monkeypatch, tiny_config(steps=10, time_budget_seconds=1000.0), lambda _: 2.0)
    assert [record.steps for record in result.rounds] == [2, 2, 6]


def test_a_budget_that_is_used_up_still_prunes_to_the_target(
    tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(steps=None, time_budget_seconds=1.0)
    result, _ = budgeted(monkeypatch, config, lambda _: 50.0)
    assert 0.6 - 1 / 64 < result.sparsity_fraction <= 0.6
    assert all(record.steps <= 2 for record in result.rounds)


def test_progress_is_reported_on_standard_error(tiny_config: ConfigMaker, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(rounds=1, steps=2))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "round 1/1, pruning to 60.0%: 2/2 blocks" in captured.err
    assert "round 1/1, tuning at" in captured.err
    assert "2/2 steps, loss " in captured.err
    assert "tokens/s " in captured.err


def test_losa_beats_one_shot_pruning_and_its_loss_falls(stories260k: Path, shared_data: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model=stories260k,
        output=tmp_path / "losa",
        tuning_text=(shared_data / "text" / "tinystories" / "train.txt",),
        sparsity_fraction=0.6,
        rounds=2,
        steps=40,
        batch_size=2,
        window=128,
        calibration_windows=4,
        learning_rate=5e-3,
        device="cpu",
    )
    tuned, _ = run(config)
    pruned = one_shot(TrainConfig(**{**config.__dict__, "output": tmp_path / "wanda"}), show_progress=False)
    validation = shared_data / "text" / "tinystories" / "valid.txt"
    losses = [_validation_loss(result.run, config, validation) for result in (tuned, pruned)]
    assert losses[0] < 0.9 * losses[1]
    # Means of five: single batches of 256 tokens differ by more than a few steps teach.
    course = tuned.rounds[-1].losses
    assert np.mean(course[-5:]) < np.mean(course[:5])


def _validation_loss(run_folder: Path, config: TrainConfig, text: Path) -> float:
    from safetensors.torch import load_file

    from losa_export.text import load_tokenizer, read_documents, token_windows
    from losa_export.training.loss import CausalLoss
    from losa_export.training.model import load_adapted_model

    tokenizer = load_tokenizer(config.model)
    windows = token_windows(read_documents([text]), tokenizer, 128, 32, None, separator=2)
    adapted = load_adapted_model(config, "fp32")
    masks = load_masks(run_folder / "masks.safetensors")
    adapter = load_file(run_folder / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():
        for name, layer in adapted.layers.items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            layer.set_mask(torch.from_numpy(masks.read(name)))
            layer.lora_A[: layer.rank] = adapter[f"{module}.lora_A.weight"]
            layer.lora_B[:, : layer.rank] = adapter[f"{module}.lora_B.weight"]
        return float(CausalLoss(adapted.model)(torch.from_numpy(windows)).total)
