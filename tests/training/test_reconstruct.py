from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from losa_export.training.calibration import BlockBatch, capture_block_inputs, run_block
from losa_export.training.config import TrainConfig
from losa_export.training.model import AdaptedModel, load_adapted_model
from losa_export.training.prune import prune_blocks
from losa_export.training.reconstruct import (
    Reconstructor,
    ReconstructSettings,
    reconstruct_block,
)

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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_fit_lowers_the_error_and_pruned_weights_stay_exactly_zero(tiny_config: ConfigMaker, dtype: str) -> None:
    adapted = load_adapted_model(tiny_config(dtype=dtype), "fp32")
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


def test_the_fit_never_raises_the_error_even_at_a_rate_that_destroys(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    batches, targets = pruned_block(adapted)
    block, layers = adapted.blocks[0], adapted.layers_of(0)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    wild = ReconstructSettings(epochs=1, learning_rate=1e3)
    result = reconstruct_block(block, 0, layers, batches, targets, wild, (0,))
    assert result.error_after == result.error_before > 0.0
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())


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
