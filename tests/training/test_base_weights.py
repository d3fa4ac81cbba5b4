from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from losa_export.checkpoint import open_checkpoint
from losa_export.errors import CheckpointError, OutputError
from losa_export.files import sha256_of
from losa_export.masks import load_masks
from losa_export.merge import merge_run
from losa_export.training import base_weights
from losa_export.training.config import TrainConfig
from losa_export.training.model import AdaptedModel, load_adapted_model
from losa_export.training.outputs import write_outputs
from losa_export.training.state import RunState, load_state, save_state

ConfigMaker = Callable[..., TrainConfig]
CHANGED = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight")


@pytest.fixture
def changed(tiny_config: ConfigMaker) -> AdaptedModel:
    """Masked, trained, and with two weights replaced."""
    adapted = load_adapted_model(tiny_config(), "fp32")
    generator = torch.Generator().manual_seed(0)
    for layer in adapted.layers.values():
        layer.set_mask(torch.rand(layer.mask.shape, generator=generator) < 0.5)
        with torch.no_grad():
            layer.lora_B.copy_(0.02 * torch.randn(layer.lora_B.shape, generator=generator))
    for name in CHANGED:
        layer = adapted.layers[name]
        layer.set_effective_weight(torch.randn(layer.weight.shape, generator=generator))
    return adapted


@pytest.fixture
def run(changed: AdaptedModel, tiny_config: ConfigMaker, tmp_path: Path) -> Path:
    folder, base = tmp_path / "run", tiny_config().model
    folder.mkdir()
    identity = {f"base_sha256:{path.name}": sha256_of(path) for path in open_checkpoint(base).weight_files()}
    write_outputs(folder, changed, base, identity)
    (folder / "config.toml").write_text(f'[train]\nmodel = "{base}"\n')
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_changed_weights_alone_are_saved_and_come_back_with_every_bit(
    tiny_config: ConfigMaker, tmp_path: Path, dtype: str
) -> None:
    config = tiny_config(dtype=dtype)
    adapted = load_adapted_model(config, "fp32")
    for name in CHANGED:
        adapted.layers[name].set_weight(torch.randn(adapted.layers[name].weight.shape))
    save_state(tmp_path, RunState(), base_weights.state_tensors(adapted), {})
    tensors = load_state(tmp_path).tensors
    assert sorted(tensors) == [f"weight:{name}" for name in CHANGED]
    fresh = load_adapted_model(config, "fp32")
    base_weights.restore(fresh, {**tensors, "rng:cpu": torch.zeros(1)})
    for name, layer in fresh.layers.items():
        assert torch.equal(layer.weight, adapted.layers[name].weight)
        assert layer.weight_changed == (name in CHANGED)
        assert torch.equal(layer.dense_weight, adapted.layers[name].dense_weight)


def test_a_run_that_changed_no_weights_leaves_no_file_of_them(
    changed: AdaptedModel, tiny_config: ConfigMaker, tmp_path: Path
) -> None:
    write_outputs(tmp_path, changed, tiny_config().model, {})
    assert sorted(load_file(tmp_path / "weights.safetensors")) == sorted(CHANGED)
    write_outputs(tmp_path, load_adapted_model(tiny_config(), "fp32"), tiny_config().model, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "masks.safetensors"]


def test_merge_folds_into_the_changed_weights_and_leaves_every_other_tensor(
    changed: AdaptedModel, run: Path, tmp_path: Path
) -> None:
    report = merge_run(run, tmp_path / "merged")
    assert report.lost == 0
    written = open_checkpoint(tmp_path / "merged")
    base = open_checkpoint(tmp_path / "merged").folder
    for name, layer in changed.layers.items():
        merged = torch.from_numpy(written.read(name))
        assert not merged[~layer.kept].any()
        # 1e-6: float32 sums of a few terms here, float64 and one rounding there
        torch.testing.assert_close(merged, layer.merged(), atol=1e-6, rtol=1e-6)
    text = (base / "sparsity.json").read_text()
    assert sha256_of(run / "weights.safetensors") in text
    ids = torch.arange(4, 24).reshape(2, 10)
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=ids).logits
        ours = changed.model(input_ids=ids).logits
    # 1e-5 of the largest logit: property P2 in float32
    torch.testing.assert_close(theirs, ours, atol=1e-5 * float(ours.abs().max()), rtol=1e-5)


def test_merge_refuses_masks_whose_weights_are_gone(run: Path, tmp_path: Path) -> None:
    (run / "weights.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"changed weights of its base, but '.*weights\.safetensors' is gone; run"
    ):
        merge_run(run, tmp_path / "merged")


def test_merge_refuses_weights_of_another_run(run: Path, tmp_path: Path) -> None:
    save_file({CHANGED[0]: torch.zeros(176, 64)}, run / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"of another run than the masks beside it \(the sha256 differs\); run"):
        merge_run(run, tmp_path / "merged")


def test_merge_refuses_weights_beside_masks_that_know_of_none(
    run: Path, tiny_config: ConfigMaker, tmp_path: Path
) -> None:
    weights = (run / "weights.safetensors").read_bytes()
    write_outputs(run, load_adapted_model(tiny_config(), "fp32"), tiny_config().model, {})
    (run / "weights.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"masks of a run that changed no weights; it is of another run: take it"):
        merge_run(run, tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.mlp.gate.weight", r"is \(3, 3\), but missing in '.*'; give the checkpoint it was made for"),
        (CHANGED[0], r"is \(3, 3\), but \(176, 64\) in '.*'; give the checkpoint it was made for"),
    ],
)
def test_weights_that_do_not_fit_the_checkpoint_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, name: str, message: str
) -> None:
    save_file({name: torch.zeros(3, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tiny_checkpoint).overlaid(tmp_path / "w.safetensors")


def test_a_changed_weight_without_a_mask_is_refused(run: Path, tmp_path: Path) -> None:
    from losa_export.masks import save_masks

    masks = load_masks(run / "masks.safetensors")
    rest = {name: masks.read(name) for name in masks.names if name != CHANGED[0]}
    header = {key: value for key, value in masks.metadata.items() if key not in ("format", "shapes")}
    save_masks(run / "masks.safetensors", rest, header)
    with pytest.raises(CheckpointError, match=r"changes tensor 'model\.layers\.0\.mlp\.up_proj\.weight', which has no"):
        merge_run(run, tmp_path / "merged")


def test_a_full_disk_leaves_neither_half_a_file_nor_a_wrong_one(
    changed: AdaptedModel, tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(base_weights, "write_tensors", full)
    with pytest.raises(OutputError, match="no space left"):
        write_outputs(tmp_path, changed, tiny_config().model, {})
    assert list(tmp_path.iterdir()) == []
