"""Runs that hold one block at a time give every bit of those that hold the whole model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from losa_export.errors import CheckpointError
from losa_export.training import train as train_module
from losa_export.training.config import TrainConfig
from losa_export.training.model import load_adapted_model
from losa_export.training.state import load_state
from losa_export.training.train import TrainResult, train
from losa_export.training.weight_store import WeightStore
from tests.conftest import write_tiny_checkpoint

ConfigMaker = Callable[..., TrainConfig]

RECONSTRUCT = {"reconstruct_epochs": 2, "reconstruct_least_squares": True, "reconstruct_rounds": "every"}
CASES: dict[str, dict[str, Any]] = {
    "wanda": {},
    "wanda-rounds-rmi-ranks": {"rounds": 3, "sparsity_allocator": "linear", "rank_allocator": "water_filling"},
    "bf16-local-errors": {"dtype": "bf16", "compute": "bf16", "rank_allocator": "water_filling", "error_kind": "local"},
    "bf16-base-fp32-compute": {"dtype": "bf16", "compute": "fp32", "sparsity_allocator": "owl"},
    "sparsegpt-rounds": {"criterion": "sparsegpt", "rounds": 2, "rank_allocator": "water_filling"},
    "pattern": {"pattern": "2:4", "sparsity_fraction": 0.5, "rounds": 1},
    "mixed-pattern-rounds": {"pattern": "mixed:8", "sparsity_fraction": 0.6, "rounds": 2},
    "reconstruction": {"rounds": 2, **RECONSTRUCT},
    "local-reconstruction-bf16": {"dtype": "bf16", "compute": "fp32", "reconstruct_target": "local", **RECONSTRUCT},
}
TENSOR_FILES = ("masks.safetensors", "weights.safetensors", "adapter/adapter_model.safetensors")


def run(config: TrainConfig, *, whole: bool, monkeypatch: pytest.MonkeyPatch) -> TrainResult:
    with monkeypatch.context() as patch:
        if whole:
            patch.setattr(train_module._Session, "_held", lambda _: "all")
        return train(config, show_progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        f"{name}:{key}": tensor.tobytes()
        for name in TENSOR_FILES
        if (folder / name).exists()
        for key, tensor in load_file(folder / name).items()
    }


@pytest.mark.parametrize("case", CASES)
def test_one_block_at_a_time_gives_the_bits_of_the_whole_model(
    tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    import ml_dtypes  # noqa: F401  (bfloat16 for NumPy)

    fields = {"rounds": 1, "steps": 0, **CASES[case]}
    streamed = run(tiny_config(output=tmp_path / "a", **fields), whole=False, monkeypatch=monkeypatch)
    whole = run(tiny_config(output=tmp_path / "b", **fields), whole=True, monkeypatch=monkeypatch)
    assert contents(streamed.run) == contents(whole.run)
    changes = fields.get("criterion") == "sparsegpt" or "reconstruct_epochs" in fields
    assert (streamed.run / "weights.safetensors").exists() == changes
    for ours, theirs in zip(streamed.rounds, whole.rounds, strict=True):
        for name in ("sparsity", "block_targets", "block_errors", "block_fits", "block_ranks", "rmi_row_sums"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert 'blocks_in_memory = "one at a time"' in (streamed.run / "config.toml").read_text()
    assert 'blocks_in_memory = "all"' in (whole.run / "config.toml").read_text()
    # Nothing is left of the weights that lay beside.
    assert sorted(path.name for path in (streamed.run / "state").iterdir()) == ["current.safetensors"]


def test_a_run_that_tunes_holds_the_whole_model(tiny_config: ConfigMaker) -> None:
    result = train(tiny_config(rounds=1, steps=1), show_progress=False)
    assert 'blocks_in_memory = "all"' in (result.run / "config.toml").read_text()


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A checkpoint of six blocks."""
    write_tiny_checkpoint(tmp_path / "deep", seed=1, num_hidden_layers=6)
    return tmp_path / "deep"


@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity_allocator": "linear", "rank_allocator": "water_filling"},
        {"criterion": "sparsegpt", "rounds": 2},
        {"reconstruct_epochs": 1},
    ],
    ids=["wanda", "sparsegpt", "reconstruction"],
)
def test_no_more_than_one_block_is_in_memory(
    tiny_config: ConfigMaker, deep: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = fetched = 0
    fetch = WeightStore.fetch

    def counting(store: WeightStore, name: str, layer: Any) -> None:
        nonlocal most, fetched
        fetch(store, name, layer)
        alive.add(layer.weight)
        fetched += 1
        most = max(most, len(alive))

    monkeypatch.setattr(WeightStore, "fetch", counting)
    train(tiny_config(**{"model": deep, "rounds": 1, "steps": 0, **fields}), show_progress=False)
    assert fetched >= 6 * 7
    assert most == 7


def test_parked_layers_hold_bits_alone_and_come_back_the_same(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32", parking=tmp_path / "parked")
    whole = load_adapted_model(tiny_config(), "fp32")
    name, layer = next(iter(adapted.layers.items()))
    assert layer.parked
    assert sum(parameter.numel() for parameter in layer.parameters()) == layer.lora_A.numel() + layer.lora_B.numel()
    assert list(layer.buffers()) == []
    kept = torch.rand(layer.out_features, layer.in_features, generator=torch.Generator().manual_seed(0)) < 0.5
    layer.set_mask(kept)
    assert torch.equal(layer.kept, kept)
    replacement = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        with adapted.at_work({name: layer}):
            assert not layer.parked
            assert torch.equal(layer.mask.bool(), kept)
            assert torch.equal(layer.dense_weight, whole.layers[name].weight)
            layer.set_weight(replacement)
        assert layer.parked
        assert layer.weight_changed
        assert torch.equal(adapted.changed_weights()[name], replacement)
    assert list(adapted.changed_weights()) == [name]


def test_a_layer_that_changed_nothing_writes_nothing(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32", parking=tmp_path / "parked")
    with adapted.at_work(adapted.layers_of(0)):
        pass
    assert not (tmp_path / "parked").exists()


def test_a_weight_that_is_not_finite_is_named_when_its_block_comes(tiny_config: ConfigMaker, deep: Path) -> None:
    from safetensors.numpy import save_file

    tensors = load_file(deep / "model.safetensors")
    tensors["model.layers.4.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, deep / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\.layers\.4\.mlp\.up_proj\.weight' .* not finite"):
        train(tiny_config(model=deep, rounds=1, steps=0), show_progress=False)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_an_interrupted_run_goes_on_with_the_same_bits(
    tiny_config: ConfigMaker, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, criterion: str
) -> None:
    fields = {"model": deep, "rounds": 3, "steps": 0, "criterion": criterion, "rank_allocator": "water_filling"}
    expected = train(tiny_config(output=tmp_path / "whole", **fields), show_progress=False)
    config = tiny_config(output=tmp_path / "cut", **fields)
    fetch, count = WeightStore.fetch, 0

    class Killed(BaseException):
        pass

    def dying(store: WeightStore, name: str, layer: Any) -> None:
        nonlocal count
        count += 1
        # Within the second round, in the middle of its fourth block.
        if count == 7 * 6 + 3 * 7 + 4:
            raise Killed
        fetch(store, name, layer)

    with monkeypatch.context() as patch:
        patch.setattr(WeightStore, "fetch", dying)
        # As SIGKILL would, leave the parked weights where they are.
        patch.setattr(WeightStore, "clear", lambda _: None)
        with pytest.raises(Killed):
            train(config, show_progress=False)
    assert load_state(config.output).state.round_number == 2
    assert (config.output / "state" / "parked").exists() == (criterion == "sparsegpt")
    result = train(config, resume=True, show_progress=False)
    assert result.status == "completed"
    assert contents(result.run) == contents(expected.run)
    assert not (config.output / "state" / "parked").exists()
