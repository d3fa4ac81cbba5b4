"""Adapters in PEFT's layout: what is read, by whose rules, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from losa_export.checkpoint import Checkpoint, open_checkpoint
from losa_export.errors import AdapterError
from losa_export.peft_adapter import open_adapter

NAME = "model.layers.0.self_attn.q_proj.weight"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none", "fan_in_fan_out": False}


@pytest.fixture
def base(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


def write(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    factors = {KEY.format("A"): np.ones((2, 64), np.float32), KEY.format("B"): np.ones((64, 2), np.float32)}
    save_file(factors if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def test_factors_and_scaling_are_read(base: Checkpoint, tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path / "a"), base)
    assert adapter.names == (NAME,)
    update = adapter.read(NAME, (64, 64))
    assert (update.a.shape, update.b.shape, update.scaling) == ((2, 64), (64, 2), 4.0)


def test_rank_stabilised_scaling_divides_by_the_root(base: Checkpoint, tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path / "a", use_rslora=True), base)
    assert adapter.rank_and_scaling(NAME) == (2, 8 / 2**0.5)


@pytest.mark.parametrize("key", ["q_proj", "self_attn.q_proj", r"layers\.\d+\.self_attn\.q_proj", NAME[:-7]])
def test_patterns_match_the_end_of_a_name(base: Checkpoint, tmp_path: Path, key: str) -> None:
    folder = write(tmp_path / "a", r=16, rank_pattern={key: 2}, alpha_pattern={key: 6})
    assert open_adapter(folder, base).rank_and_scaling(NAME) == (2, 3.0)


def test_patterns_do_not_match_part_of_a_word(base: Checkpoint, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", alpha_pattern={"proj": 100, "k_proj": 100})
    assert open_adapter(folder, base).rank_and_scaling(NAME) == (2, 4.0)


# PEFT 0.21 asks a model for a property that transformers 5.23 has renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_files_that_peft_itself_wrote_give_the_update_that_peft_merges(
    base: Checkpoint, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="needs the 'train' extra")
    peft = pytest.importorskip("peft", reason="needs the 'dev' extra")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 3},
        alpha_pattern={"layers.1.self_attn.q_proj": 5},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint), config)
    model.save_pretrained(tmp_path / "adapter")
    adapter = open_adapter(tmp_path / "adapter", base)
    assert len(adapter.names) == 4
    for name in adapter.names:
        update = adapter.read(name, base.shape(name))
        layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        expected = layer.get_delta_weight("default").detach().numpy()
        # float32 sums of four terms
        assert np.abs(update.scaling * (update.b @ update.a) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("feature", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["x"]),
        ("alora_invocation_tokens", [1]),
    ],
)
def test_features_that_cannot_be_folded_are_named(base: Checkpoint, tmp_path: Path, feature: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=f"uses {feature}, which cannot be folded under a mask; train a plain LoRA"):
        open_adapter(write(tmp_path / "a", **{feature: value}), base)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "is of type 'IA3'; only LORA can be merged"),
        ({"bias": "all"}, "has bias='all'; only bias='none' can be merged"),
        ({"fan_in_fan_out": True}, r"has fan_in_fan_out: its weights lie transposed \(Conv1D\)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base weights too; convert"),
        ({"r": 0}, r"has r=0 in adapter_config\.json; it must be a positive number"),
        ({"lora_alpha": "x"}, r"has lora_alpha='x' in adapter_config\.json; it must be a positive number"),
        ({"rank_pattern": {"q_proj": 0}}, "has rank_pattern=.* it must map names to positive numbers"),
        ({"alpha_pattern": [1]}, "has alpha_pattern=.* it must map names to positive numbers"),
    ],
)
def test_configurations_that_cannot_be_merged_are_named(
    base: Checkpoint, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        open_adapter(write(tmp_path / "a", **config), base)


def test_factors_of_another_rank_than_configured_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match=r"factors A \(2, 64\) and B \(64, 2\) of rank 3 for '.*', which is \(64, 64\)"
    ):
        open_adapter(write(tmp_path / "a", r=3), base)


def test_a_layer_that_the_checkpoint_lacks_is_named(base: Checkpoint, tmp_path: Path) -> None:
    tensors = {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": np.ones((2, 64), np.float32)}
    with pytest.raises(
        AdapterError, match=r"updates 'model\.layers\.7\.mlp\.up_proj\.weight', which checkpoint .* does"
    ):
        open_adapter(write(tmp_path / "a", tensors), base)


def test_a_tensor_that_is_no_factor_is_named(base: Checkpoint, tmp_path: Path) -> None:
    tensors = {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 64), np.float32)}
    with pytest.raises(AdapterError, match=r"holds the tensor '.*lora_embedding_A', which is no LoRA factor"):
        open_adapter(write(tmp_path / "a", tensors), base)


def test_half_a_pair_is_named(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"lacks lora_B of '.*q_proj\.weight'; save the adapter again"):
        open_adapter(write(tmp_path / "a", {KEY.format("A"): np.ones((2, 64), np.float32)}), base)


def test_an_empty_adapter_is_named(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="holds no factors"):
        open_adapter(write(tmp_path / "a", {}), base)


def test_values_that_are_not_finite_are_named(base: Checkpoint, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[KEY.format("B")][0, 0] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"holds values for '.*q_proj\.weight' that are not finite"):
        open_adapter(folder, base)


def test_missing_and_damaged_files_are_named(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json; give a folder that PEFT saved"):
        open_adapter(tmp_path / "a", base)
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors' is truncated or damaged"):
        open_adapter(folder, base)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors; save it with PEFT's save_pretrained"):
        open_adapter(folder, base)
