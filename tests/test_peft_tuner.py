"""Masked LoRA under PEFT: the same answers and the same zeros as a merged run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from losa_export.checkpoint import open_checkpoint
from losa_export.errors import AdapterError, ConfigError, MissingDependencyError
from losa_export.masks import load_masks, save_masks
from losa_export.merge import merge_run

pytest.importorskip("peft", reason="needs the 'peft' extra")

# PEFT 0.21 asks a model for a property that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(4, 24).reshape(2, 10)


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained runs and their merged checkpoints: 'plain', and 'fitted', which changed its base weights."""
    from losa_export.training.config import TrainConfig
    from losa_export.training.train import train

    folder = tmp_path_factory.mktemp("runs")
    for name, epochs in (("plain", 0), ("fitted", 2)):
        config = TrainConfig(
            model=tiny_checkpoint,
            output=folder / name,
            tuning_text=(tiny_text,),
            sparsity_fraction=0.6,
            rounds=1,
            steps=3,
            rank=3,
            max_rank=4,
            learning_rate=2e-2,
            batch_size=2,
            window=16,
            calibration_windows=4,
            device="cpu",
            reconstruct_epochs=epochs,
        )
        train(config, show_progress=False)
        merge_run(folder / name, folder / f"{name}-merged")
    assert (folder / "fitted" / "weights.safetensors").is_file()
    return folder


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Register, and give PEFT its own class back afterwards."""
    from peft import LoraConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from losa_export.peft_tuner import register

    register()
    yield
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = LoraConfig


def dense(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load(base: Path, adapter: Path, **options: Any) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(dense(base), adapter, **options).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["plain", "fitted"])
def test_a_run_loaded_by_peft_answers_as_its_merged_checkpoint(runs: Path, tiny_checkpoint: Path, name: str) -> None:
    model = load(tiny_checkpoint, runs / name / "adapter")
    merged = logits(dense(runs / f"{name}-merged"))
    # 1e-5: float32, an effective weight summed in float32 here and in float64 by the merge
    torch.testing.assert_close(logits(model), merged, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(dense(tiny_checkpoint)))


@pytest.mark.parametrize("name", ["plain", "fitted"])
def test_merging_in_peft_gives_the_merged_checkpoint_with_its_zeros(
    runs: Path, tiny_checkpoint: Path, name: str
) -> None:
    tensors = load(tiny_checkpoint, runs / name / "adapter").merge_and_unload(safe_merge=True).state_dict()
    merged, masks = open_checkpoint(runs / f"{name}-merged"), load_masks(runs / name / "masks.safetensors")
    base = open_checkpoint(tiny_checkpoint)
    for tensor in merged.names():
        ours = tensors[tensor].numpy()
        if tensor in masks:
            assert not ours[~masks.read(tensor)].any(), tensor
            # 1e-6: two float64 sums of the same products, each rounded to float32 once
            np.testing.assert_allclose(ours, merged.read(tensor), rtol=1e-6, atol=1e-9)
        else:
            assert np.array_equal(ours, base.read(tensor)), tensor


def test_a_merge_can_be_taken_back_bit_for_bit(runs: Path, tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, runs / "fitted" / "adapter")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answers = logits(model)
    model.merge_adapter()
    # 1e-5: as above
    torch.testing.assert_close(logits(model), answers, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), answers)


@pytest.mark.parametrize("name", ["plain", "fitted"])
def test_what_peft_saves_it_loads_with_masks_and_weights(
    runs: Path, tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    model = load(tiny_checkpoint, runs / name / "adapter")
    model.save_pretrained(tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "masks.safetensors"} <= names
    assert ("weights.safetensors" in names) == (name == "fitted")
    again = load(tiny_checkpoint, tmp_path / "copy")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "copy")  # onto its own files
    assert torch.equal(logits(load(tiny_checkpoint, tmp_path / "copy")), logits(model))


def test_training_goes_on_under_the_mask(runs: Path, tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, runs / "fitted" / "adapter", is_trainable=True).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    tensors = model.merge_and_unload().state_dict()
    masks = load_masks(runs / "fitted" / "masks.safetensors")
    assert all(not tensors[name].numpy()[~masks.read(name)].any() for name in masks.names)


def test_dropout_reaches_the_update_alone(runs: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "run")
    config = tmp_path / "run" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_dropout": 0.5}))
    model = load(tiny_checkpoint, tmp_path / "run" / "adapter", is_trainable=True)
    still = logits(model)
    torch.manual_seed(0)
    model.train()
    assert not torch.equal(logits(model), still)
    for module in model.modules():
        if hasattr(module, "losa_masks"):
            module.lora_dropout["default"].p = 0.0
    # 1e-5: two products in place of one
    torch.testing.assert_close(logits(model), still, rtol=1e-5, atol=1e-5)


def test_a_lora_without_masks_stays_the_plain_one(runs: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    shutil.copytree(runs / "plain" / "adapter", tmp_path / "run" / "adapter")
    ours = load(tiny_checkpoint, tmp_path / "run" / "adapter")
    ours.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "masks.safetensors").exists()
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = LoraConfig
    theirs = load(tiny_checkpoint, tmp_path / "run" / "adapter")
    assert torch.equal(logits(ours), logits(theirs))
    assert torch.equal(logits(load(tiny_checkpoint, tmp_path / "saved")), logits(theirs))


def test_a_masked_adapter_is_active_alone(runs: Path, tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, runs / "plain" / "adapter")
    first = logits(model)
    model.load_adapter(runs / "fitted" / "adapter", "second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(load(tiny_checkpoint, runs / "fitted" / "adapter"))
    assert torch.equal(logits(model), second)
    with pytest.raises(ConfigError, match="adapter 'default' is masked and cannot be combined with others"):
        model.merge_and_unload(adapter_names=["default", "second"])
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)


def test_masks_that_do_not_belong_are_refused(runs: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    masks = load_masks(runs / "plain" / "masks.safetensors")
    for name, changes, message in (
        ("extra", {"model.embed_tokens.weight": np.ones((128, 64), np.bool_)}, "which adapter .* does not touch"),
        ("wide", {masks.names[0]: np.ones((3, 5), np.bool_)}, r"is \(3, 5\), its weight is \(64, 176\)"),
    ):
        shutil.copytree(runs / "plain", tmp_path / name)
        save_masks(tmp_path / name / "masks.safetensors", masks.read_all() | changes, {})
        with pytest.raises(AdapterError, match=message):
            load(tiny_checkpoint, tmp_path / name / "adapter")


def test_masks_without_their_changed_weights_are_refused(runs: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "fitted", tmp_path / "run")
    (tmp_path / "run" / "weights.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"belong to changed weights, but .* is gone or another file"):
        load(tiny_checkpoint, tmp_path / "run" / "adapter")


def test_more_than_plain_lora_is_refused_beside_masks(runs: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "run")
    config = tmp_path / "run" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(AdapterError, match="use_dora, bias or layer_replication"):
        load(tiny_checkpoint, tmp_path / "run" / "adapter")


def test_without_peft_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from losa_export.errors import MissingDependencyError\n"
        "try: import losa_export.peft_tuner\n"
        "except MissingDependencyError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "the PEFT tuner needs the package 'peft'" in done.stdout
    assert "pip install 'losa-export[peft]'" in done.stdout
    assert MissingDependencyError.exit_code == 1
