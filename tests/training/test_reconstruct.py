from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from losa_export.checkpoint import open_checkpoint
from losa_export.masks import load_masks
from losa_export.merge import merge_run
from losa_export.text import load_tokenizer, read_documents, token_windows
from losa_export.training import train as train_module
from losa_export.training.adapter import all_folded
from losa_export.training.calibration import BlockBatch, capture_block_inputs, input_grams, run_block
from losa_export.training.config import Dtype, TrainConfig
from losa_export.training.journal import read_journal
from losa_export.training.model import AdaptedModel, load_adapted_model
from losa_export.training.prune import prune_blocks
from losa_export.training.reconstruct import (
    Reconstructor,
    ReconstructSettings,
    reconstruct_block,
)
from losa_export.training.train import StepRecord, one_shot, train

ConfigMaker = Callable[..., TrainConfig]
WINDOWS = torch.randint(4, 60, (6, 16), generator=torch.Generator().manual_seed(0))
SETTINGS = ReconstructSettings(epochs=10)


def stir(adapted: AdaptedModel) -> None:
    """Adapters as if they had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.lora_B.copy_(0.02 * torch.randn(layer.lora_B.shape, generator=generator))


def pruned_block(adapted: AdaptedModel) -> tuple[list[BlockBatch], list[Tensor]]:
    """Block 0 pruned to 60 %, with what enters it and what the dense block answers."""
    batches = capture_block_inputs(adapted.model, adapted.blocks, WINDOWS, 2)
    targets = [run_block(adapted.blocks[0], 0, batch) for batch in batches]
    prune_blocks(adapted, WINDOWS, np.array([0.6] * len(adapted.blocks)), batch_size=2)
    return batches, targets


@pytest.mark.parametrize(("dtype", "compute"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_the_fit_lowers_the_error_and_pruned_weights_stay_exactly_zero(
    tiny_config: ConfigMaker, dtype: str, compute: Dtype
) -> None:
    adapted = load_adapted_model(tiny_config(dtype=dtype), compute)
    stir(adapted)
    batches, targets = pruned_block(adapted)
    block, layers = adapted.blocks[0], adapted.layers_of(0)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    others = {
        name: parameter.detach().clone()
        for name, parameter in adapted.model.named_parameters()
        if not (name.startswith("model.layers.0.") and name.endswith("proj.weight"))
    }
    result = reconstruct_block(block, 0, layers, batches, targets, SETTINGS, (0, 1))
    assert 0.0 < result.error_after < 0.6 * result.error_before
    for name, layer in layers.items():
        moved = layer.weight != before[name]
        assert moved.any(), name
        assert not (moved & ~layer.kept).any(), name
        assert not layer.merged()[~layer.kept].any(), name
        assert layer.weight.dtype == before[name].dtype
        assert not layer.weight.requires_grad
    after = dict(adapted.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in others.items())


def test_least_squares_is_the_best_answer_of_each_row_on_its_kept_weights(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    stir(adapted)
    batches, targets = pruned_block(adapted)
    block, layers = adapted.blocks[0], adapted.layers_of(0)
    kept = {name: layer.kept.clone() for name, layer in layers.items()}
    gram = next(iter(input_grams(block, 0, {"first": next(iter(layers.values()))}, batches).values())).damped(0.01)
    settings = ReconstructSettings(epochs=0, target="local", least_squares=True)
    result = reconstruct_block(block, 0, layers, batches, targets, settings, (0,))
    assert result.error_after < result.error_before
    for name, layer in layers.items():
        assert not layer.merged()[~kept[name]].any()
    for layer in list(layers.values())[:3]:  # queries, keys and values read what enters the block
        fitted, dense = layer.merged().double(), layer.dense_weight.double()
        for row in range(0, layer.out_features, 7):
            support = layer.kept[row]
            exact = torch.linalg.solve(gram[support][:, support], gram[support] @ dense[row])
            # 2e-3: conjugate gradients stop after as many steps as there are unknowns at most, in float32
            torch.testing.assert_close(fitted[row, support], exact, rtol=2e-3, atol=2e-3)


def test_least_squares_and_descent_go_together(tiny_config: ConfigMaker) -> None:
    errors = []
    for settings in (
        ReconstructSettings(epochs=3),
        ReconstructSettings(epochs=0, least_squares=True),
        ReconstructSettings(epochs=3, least_squares=True),
    ):
        adapted = load_adapted_model(tiny_config(), "fp32")
        batches, targets = pruned_block(adapted)
        fit = reconstruct_block(adapted.blocks[0], 0, adapted.layers_of(0), batches, targets, settings, (0,))
        errors.append(fit.error_after)
    assert errors[2] < min(errors[:2])


def test_the_fit_never_raises_the_error_even_at_a_rate_that_destroys(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    batches, targets = pruned_block(adapted)
    block, layers = adapted.blocks[0], adapted.layers_of(0)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    wild = ReconstructSettings(epochs=1, learning_rate=1e3)
    result = reconstruct_block(block, 0, layers, batches, targets, wild, (0,))
    assert result.error_after == result.error_before > 0.0
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())


def test_a_token_of_huge_states_does_not_decide_alone(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    batches, targets = pruned_block(adapted)
    block, layers = adapted.blocks[0], adapted.layers_of(0)
    # as in real models, where the first token collects attention that has nowhere else to go
    targets = [torch.cat([1000.0 * target[:, :1], target[:, 1:]], dim=1) for target in targets]

    def error_of_others() -> float:
        with all_folded(layers):
            outputs = [run_block(block, 0, batch) for batch in batches]
        pairs = zip(outputs, targets, strict=True)
        return sum(float((output - target)[:, 1:].square().sum()) for output, target in pairs)

    before = error_of_others()
    reconstruct_block(block, 0, layers, batches, targets, SETTINGS, (0,))
    assert error_of_others() < 0.6 * before


def test_a_block_that_answers_its_target_is_left_alone(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    block, layers = adapted.blocks[0], adapted.layers_of(0)
    batches = capture_block_inputs(adapted.model, adapted.blocks, WINDOWS, 2)
    for layer in layers.values():
        layer.set_mask(layer.weight.abs() > 0.1)
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.folded())
        targets = [run_block(block, 0, batch) for batch in batches]
    result = reconstruct_block(block, 0, layers, batches, targets, SETTINGS, (0,))
    assert (result.error_before, result.error_after) == (0.0, 0.0)


def test_the_gradient_descent_is_the_same_every_time(tiny_config: ConfigMaker) -> None:
    weights = []
    for seed in (1, 1, 2):
        adapted = load_adapted_model(tiny_config(), "fp32")
        batches, targets = pruned_block(adapted)
        reconstruct_block(adapted.blocks[0], 0, adapted.layers_of(0), batches, targets, SETTINGS, (seed,))
        weights.append([layer.weight.clone() for layer in adapted.layers_of(0).values()])
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


@pytest.mark.parametrize("target", ["local", "accumulated"])
def test_every_block_of_a_pass_is_fitted_on_what_the_fitted_ones_before_it_hand_on(
    tiny_config: ConfigMaker, target: str
) -> None:
    config = tiny_config()
    plain, fitted = (load_adapted_model(config, "fp32") for _ in range(2))
    reconstructor = Reconstructor(ReconstructSettings(epochs=10, target=target), (0,))  # type: ignore[arg-type]
    targets = np.array([0.6, 0.6])
    prune_blocks(plain, WINDOWS, targets, batch_size=2)
    prune_blocks(fitted, WINDOWS, targets, batch_size=2, reconstructor=reconstructor)
    assert len(reconstructor.results) == 2
    assert all(result.error_after < result.error_before for result in reconstructor.results)
    # The first block is pruned before anything is fitted, the second on other inputs than without a fit.
    assert all(torch.equal(layer.mask, plain.layers[name].mask) for name, layer in fitted.layers_of(0).items())
    assert not all(torch.equal(layer.mask, plain.layers[name].mask) for name, layer in fitted.layers_of(1).items())
    dense = load_adapted_model(config, "fp32").model
    with torch.no_grad():
        exact, one_shot, after = (model(input_ids=WINDOWS).logits for model in (dense, plain.model, fitted.model))
    assert (after - exact).square().sum() < 0.7 * (one_shot - exact).square().sum()


def test_reconstruction_lowers_the_perplexity_of_one_shot_pruning(
    stories260k: Path, shared_data: Path, tmp_path: Path
) -> None:
    texts = shared_data / "text" / "tinystories"
    perplexities = {}
    fits: dict[str, dict[str, Any]] = {
        "one-shot": {},
        "solved": {"reconstruct_least_squares": True},
        "fitted": {"reconstruct_epochs": 4},
    }
    for name, fit in fits.items():
        config = TrainConfig(
            model=stories260k,
            output=tmp_path / name,
            tuning_text=(texts / "train.txt",),
            sparsity_fraction=0.6,
            rounds=1,
            steps=0,
            window=128,
            calibration_windows=8,
            device="cpu",
            **fit,
        )
        train(config, show_progress=False)
        merge_run(tmp_path / name, tmp_path / f"{name}-merged")
        perplexities[name] = perplexity(tmp_path / f"{name}-merged", texts / "valid.txt")
    assert perplexities["solved"] < 0.9 * perplexities["one-shot"]
    assert perplexities["fitted"] < 0.6 * perplexities["one-shot"]


def perplexity(folder: Path, text: Path) -> float:
    """Of a checkpoint on 16 windows of a text that no calibration has seen."""
    from transformers import AutoModelForCausalLM

    windows = token_windows(read_documents([text]), load_tokenizer(folder), 128, 16, None, separator=2)
    ids = torch.from_numpy(windows)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss.exp())


def test_a_fitted_run_merges_with_its_zeros_and_nothing_else_changed(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    config = tiny_config(rounds=1, steps=0, reconstruct_epochs=3)
    result = train(config, show_progress=False)
    assert len(result.rounds[0].block_fits) == 2
    assert all(after < before for before, after in result.rounds[0].block_fits)
    assert read_journal(result.run) == list(result.rounds)
    merge_run(result.run, tmp_path / "merged")
    merged, masks = open_checkpoint(tmp_path / "merged"), load_masks(result.masks_file)
    base = open_checkpoint(config.model)
    for name in base.names():
        weight = merged.read(name)
        if name in masks:
            keep = masks.read(name)
            assert not weight[~keep].any()
            assert (weight[keep] != base.read(name)[keep]).any()
        else:
            assert np.array_equal(weight, base.read(name))


@pytest.mark.parametrize(("rounds", "fits"), [("last", [0, 0, 2]), ("every", [2, 2, 2])])
def test_an_interrupted_run_fits_the_same_blocks_to_the_same_bits(
    tiny_config: ConfigMaker, tmp_path: Path, rounds: str, fits: list[int]
) -> None:
    settings: dict[str, Any] = {"steps": 6, "reconstruct_epochs": 2, "reconstruct_rounds": rounds}
    whole = train(tiny_config(output=tmp_path / "whole", **settings), show_progress=False)
    assert [len(record.block_fits) for record in whole.rounds] == fits
    config = tiny_config(**settings)

    def interrupt(record: StepRecord) -> None:
        if record.step == 0:
            os.kill(os.getpid(), signal.SIGINT)

    status = "interrupted"
    sessions = 0
    while status == "interrupted":
        status = train(config, show_progress=False, resume=sessions > 0, on_step=interrupt).status
        sessions += 1
    assert sessions > 1
    for name in ("weights.safetensors", "adapter/adapter_model.safetensors"):
        assert (config.output / name).read_bytes() == (whole.run / name).read_bytes(), name
    resumed_masks, whole_masks = load_masks(config.output / "masks.safetensors"), load_masks(whole.masks_file)
    assert all(np.array_equal(resumed_masks.read(name), whole_masks.read(name)) for name in whole_masks.names)
    for resumed, straight in zip(read_journal(config.output), whole.rounds, strict=True):
        assert (resumed.losses, resumed.block_fits) == (straight.losses, straight.block_fits)


def test_one_shot_is_not_reconstructed(tiny_config: ConfigMaker) -> None:
    assert one_shot(tiny_config(reconstruct_epochs=2), show_progress=False).rounds[0].block_fits == ()


def test_a_time_budget_leaves_room_for_the_fit_that_comes_last(
    tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock by which pruning a round takes 4 s and a step 1 s: of 100 s, 36 go to the fit."""
    now = 0.0
    prune, step = train_module.prune_blocks, train_module.Tuner.step

    def pruning(*arguments: Any, **options: Any) -> Any:
        nonlocal now
        reconstructor = options["reconstructor"]
        now += 4.0 + (2.0 * reconstructor.settings.passes if reconstructor is not None else 0.0)
        return prune(*arguments, **options)

    def stepping(*arguments: Any) -> float:
        nonlocal now
        now += 1.0
        return step(*arguments)

    monkeypatch.setattr(train_module, "prune_blocks", pruning)
    monkeypatch.setattr(train_module.Tuner, "step", stepping)
    config = tiny_config(steps=None, time_budget_seconds=100.0, reconstruct_epochs=5)
    result = train(config, show_progress=False, clock=lambda: now)
    assert ReconstructSettings(epochs=5).passes == 18
    assert 95.0 <= result.elapsed_seconds <= 100.0
    # 52 s are left for steps: 40 % of them in the first two rounds, 60 % in the last
    assert [record.steps for record in result.rounds] == pytest.approx([10.4, 10.4, 31.2], abs=1.5)
