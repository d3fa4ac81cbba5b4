"""Criteria and patterns on whole tiny models: statistics, several rounds, resuming, and merging."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from losa_export.checkpoint import open_checkpoint
from losa_export.errors import ConfigError
from losa_export.masks import load_masks
from losa_export.merge import merge_run
from losa_export.training.calibration import capture_block_inputs, input_grams, input_square_sums
from losa_export.training.config import TrainConfig
from losa_export.training.model import AdaptedModel, attach_adapters, load_adapted_model
from losa_export.training.pattern import Pattern
from losa_export.training.prune import prune_blocks
from losa_export.training.rule import PruneRule
from losa_export.training.train import StepRecord, TrainResult, train

ConfigMaker = Callable[..., TrainConfig]
WINDOWS = torch.randint(4, 60, (5, 16), generator=torch.Generator().manual_seed(0))


def stir(adapted: AdaptedModel, seed: int) -> None:
    """Adapters as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.lora_B.copy_(0.02 * torch.randn(layer.lora_B.shape, generator=generator))


def test_second_moments_are_those_of_all_tokens_and_shared_by_linears_with_one_input(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    layers, block = adapted.layers_of(0), adapted.blocks[0]
    batches = capture_block_inputs(adapted.model, adapted.blocks, WINDOWS, 2)
    grams = input_grams(block, 0, layers, batches)
    sums = input_square_sums(block, 0, layers, batches)
    for name, gram in grams.items():
        assert gram.matrix.dtype == torch.float64
        # 1e-5: float32 products within a batch
        torch.testing.assert_close(gram.matrix.diagonal().float(), sums[name], rtol=1e-5, atol=1e-6)
    whole = input_grams(block, 0, layers, capture_block_inputs(adapted.model, adapted.blocks, WINDOWS, 5))
    for name, gram in grams.items():
        torch.testing.assert_close(gram.matrix, whole[name].matrix, rtol=1e-4, atol=1e-4)
    short = {name.removeprefix("model.layers.0.").split(".")[1]: gram for name, gram in grams.items()}
    assert short["q_proj"] is short["k_proj"] is short["v_proj"]
    assert short["gate_proj"] is short["up_proj"]
    assert len({id(gram) for gram in grams.values()}) == 4


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_masks_only_shrink_and_only_compensation_changes_weights(
    tiny_config: ConfigMaker, criterion: str, dtype: str
) -> None:
    adapted = load_adapted_model(tiny_config(dtype=dtype), "fp32")
    bases = {name: layer.weight.clone() for name, layer in adapted.layers.items()}
    before = adapted.masks()
    for round_number, targets in enumerate([(0.2, 0.3), (0.5, 0.5), (0.5, 0.6)]):
        prune_blocks(adapted, WINDOWS, np.array(targets), batch_size=2, rule=PruneRule(criterion))
        masks = adapted.masks()
        for name, keep in masks.items():
            target = targets[int(name.split(".")[2])]
            # each row or block of 128 columns, or the whole matrix, loses less than one position to the floor
            assert target - 1 / keep.shape[1] < 1 - keep.mean() <= target
            assert not (keep & ~before[name]).any()
            assert not adapted.layers[name].merged()[torch.from_numpy(~keep)].any()
        before = masks
        stir(adapted, round_number)
    changed = {name for name, layer in adapted.layers.items() if not torch.equal(layer.weight, bases[name])}
    assert changed == (set(adapted.layers) if criterion in ("sparsegpt", "alps") else set())
    assert all(torch.equal(layer.dense_weight, bases[name]) for name, layer in adapted.layers.items())


def test_the_frozen_weight_is_the_compensated_one_less_the_adapter(tiny_config: ConfigMaker) -> None:
    # Without adapters and with them folded into the base by hand: the effective weights must be the same.
    adapted, plain = (load_adapted_model(tiny_config(), "fp32") for _ in range(2))
    stir(adapted, 0)
    for name, layer in plain.layers.items():
        layer.set_weight(adapted.layers[name].merged())
    for model in (adapted, plain):
        prune_blocks(model, WINDOWS, np.array([0.5, 0.5]), batch_size=2, rule=PruneRule("sparsegpt"))
    for name, layer in plain.layers_of(0).items():
        assert torch.equal(layer.kept, adapted.layers[name].kept)
        # 1e-5: one float32 subtraction and addition
        torch.testing.assert_close(adapted.layers[name].merged(), layer.merged(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_without_compensation_effective_weights_change_only_where_newly_pruned(
    tiny_config: ConfigMaker, criterion: str
) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    stir(adapted, 0)
    for target in (0.3, 0.6):
        before = {name: layer.merged() for name, layer in adapted.layers.items()}
        prune_blocks(adapted, WINDOWS, np.array([target, target]), batch_size=2, rule=PruneRule(criterion))
        for name, layer in adapted.layers.items():
            assert torch.equal(layer.merged(), before[name] * layer.mask)


@pytest.mark.parametrize(("criterion", "pattern"), [("wanda", "2:4"), ("magnitude", "2:8"), ("alps", "4:8")])
def test_a_fixed_pattern_holds_in_every_group_after_the_last_round(
    tiny_config: ConfigMaker, criterion: str, pattern: str
) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    rule = PruneRule(criterion, Pattern.parse(pattern))
    assert rule.pattern is not None
    assert rule.pattern.kept is not None
    final = 1 - rule.pattern.kept / rule.pattern.width
    for target in (0.5 * final, final):
        prune_blocks(adapted, WINDOWS, np.array([target, target]), batch_size=2, rule=rule)
    for keep in adapted.masks().values():
        assert set(keep.reshape(-1, rule.pattern.width).sum(axis=1)) == {rule.pattern.kept}


def test_mixed_patterns_follow_each_blocks_target(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    rule = PruneRule("wanda", Pattern.parse("mixed:8"))
    for targets, expected in (((0.2, 0.3), (6, 6)), ((0.5, 0.75), (4, 2))):
        prune_blocks(adapted, WINDOWS, np.array(targets), batch_size=2, rule=rule)
        for name, keep in adapted.masks().items():
            assert set(keep.reshape(-1, 8).sum(axis=1)) == {expected[int(name.split(".")[2])]}


def test_columns_that_groups_do_not_divide_are_an_error_before_anything_is_pruned(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    rule = PruneRule("wanda", Pattern.parse("mixed:7"))
    with pytest.raises(
        ConfigError, match=r"q_proj\.weight' has 64 input columns, which groups of 7 do not divide; use"
    ):
        prune_blocks(adapted, WINDOWS, np.array([0.5, 0.5]), batch_size=2, rule=rule)
    assert adapted.sparsity_fraction() == 0.0


@pytest.mark.parametrize("criterion", ["sparsegpt", "alps"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Mistral", {"head_dim": 8}),
        ("Qwen3", {"head_dim": 16, "intermediate_size": 149}),
    ],
)
def test_every_family_is_compensated(
    make_model: Callable[..., nn.Module],
    tiny_config: ConfigMaker,
    criterion: str,
    family: str,
    changes: dict[str, Any],
) -> None:
    adapted = attach_adapters(make_model(family, **changes), tiny_config(), torch.float32)
    prune_blocks(adapted, WINDOWS, np.array([0.5] * 3), batch_size=2, rule=PruneRule(criterion))
    assert 0.5 - 1 / 32 < adapted.sparsity_fraction() <= 0.5
    assert all(torch.isfinite(layer.weight).all() for layer in adapted.layers.values())


# ---- whole runs ---------------------------------------------------------------------------------------------------


def run(config: TrainConfig, *, resume: bool = False, stop_after: int | None = None) -> tuple[TrainResult, list[float]]:
    import signal

    losses: list[float] = []

    def on_step(record: StepRecord) -> None:
        losses.append(record.loss)
        if stop_after is not None and len(losses) == stop_after:
            signal.raise_signal(signal.SIGINT)

    return train(config, resume=resume, show_progress=False, on_step=on_step), losses


@pytest.mark.parametrize("criterion", ["sparsegpt", "alps"])
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(
    tiny_config: ConfigMaker, tmp_path: Path, criterion: str
) -> None:
    config = tiny_config(rounds=2, steps=6, criterion=criterion, dtype="bf16", compute="fp32")
    whole, losses = run(config)
    other = dataclasses.replace(config, output=tmp_path / "other")
    # The first stop is in the first round, so that the second is pruned from restored weights; the second stop
    # is in that one.
    first = run(other, stop_after=1)
    second = run(other, resume=True, stop_after=3)
    assert (first[0].status, second[0].status) == ("interrupted", "interrupted")
    last = run(other, resume=True)
    assert [*first[1], *second[1], *last[1]] == losses
    for name in ("weights.safetensors", "adapter/adapter_model.safetensors", "masks.safetensors"):
        one, two = load_file(whole.run / name), load_file(tmp_path / "other" / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("criterion", "pattern", "sparsity", "dtype"),
    [
        ("sparsegpt", None, 0.6, "fp32"),
        ("alps", "2:4", 0.5, "fp32"),
        ("sparsegpt", "2:8", 0.75, "bf16"),
        ("magnitude", "4:8", 0.5, "fp32"),
    ],
)
def test_the_zeros_of_a_run_survive_the_merge(
    tiny_config: ConfigMaker, tmp_path: Path, criterion: str, pattern: str | None, sparsity: float, dtype: str
) -> None:
    changes = {"sparsity_fraction": sparsity, "criterion": criterion, "pattern": pattern, "dtype": dtype}
    config = tiny_config(rounds=2, steps=2, compute="fp32", **changes)
    result, _ = run(config)
    assert (result.run / "weights.safetensors").exists() == (criterion != "magnitude")
    report = merge_run(result.run, tmp_path / "merged")
    assert report.lost == 0
    written, masks = open_checkpoint(tmp_path / "merged"), load_masks(result.run / "masks.safetensors")
    for name in masks.names:
        keep, weight = masks.read(name), written.read(name)
        assert np.array_equal(weight != 0, keep)
        if pattern is not None:
            kept, width = (int(number) for number in pattern.split(":"))
            assert set((weight != 0).reshape(-1, width).sum(axis=1)) == {kept}


def test_columns_that_groups_do_not_divide_are_found_before_the_run_before_is_cleared(tiny_config: ConfigMaker) -> None:
    config = tiny_config(rounds=1, steps=0)
    run(config)
    with pytest.raises(
        ConfigError, match=r"has 64 input columns, which groups of 7 do not divide; use a pattern whose"
    ):
        run(dataclasses.replace(config, pattern="mixed:7", overwrite=True))
    assert (config.output / "masks.safetensors").exists()


def test_starting_again_takes_the_changed_weights_of_the_run_before_away(tiny_config: ConfigMaker) -> None:
    config = tiny_config(rounds=1, steps=0, criterion="sparsegpt")
    assert (run(config)[0].run / "weights.safetensors").exists()
    result, _ = run(dataclasses.replace(config, criterion="wanda", overwrite=True))
    assert not (result.run / "weights.safetensors").exists()
