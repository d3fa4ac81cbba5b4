from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from losa_export.masks import digest, load_masks
from losa_export.training.config import TrainConfig
from losa_export.training.model import AdaptedModel, load_adapted_model
from losa_export.training.outputs import write_outputs

ConfigMaker = Callable[..., TrainConfig]


@pytest.fixture
def trained(tiny_config: ConfigMaker) -> AdaptedModel:
    """Adapters of several ranks that do something."""
    adapted = load_adapted_model(tiny_config(), "fp32")
    generator = torch.Generator().manual_seed(0)
    for number, layer in enumerate(adapted.layers.values()):
        layer.set_rank(2 if number == 1 else 4 if number == 9 else 3)
        with torch.no_grad():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    return adapted


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_loads_the_adapter_and_gives_the_unmasked_answers(
    trained: AdaptedModel, tiny_config: ConfigMaker, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_config().model
    write_outputs(tmp_path, trained, base, {})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        theirs, ours = peft(input_ids=ids).logits, trained.model(input_ids=ids).logits
    # 1e-4: float32, two matrix products against a fused one, through two blocks
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_only_active_slices_are_written_and_alpha_keeps_the_scaling(trained: AdaptedModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_outputs(tmp_path, trained, Path("/models/base"), {})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "/models/base"
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert config["rank_pattern"] == {
        "model.layers.0.self_attn.k_proj": 2,
        "model.layers.1.self_attn.v_proj": 4,
    }
    assert config["alpha_pattern"] == {
        "model.layers.0.self_attn.k_proj": 4,
        "model.layers.1.self_attn.v_proj": 8,
    }
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(trained.layers)
    for name, layer in trained.layers.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = layer.active()
        assert torch.equal(tensors[f"{module}.lora_A.weight"], a)
        assert torch.equal(tensors[f"{module}.lora_B.weight"], b)


def test_masks_are_written_under_the_names_of_their_weights(trained: AdaptedModel, tmp_path: Path) -> None:
    for layer in trained.layers.values():
        layer.set_mask(torch.rand(layer.mask.shape) < 0.4)
    write_outputs(tmp_path, trained, Path("base"), {"note": "x"})
    file = load_masks(tmp_path / "masks.safetensors")
    assert file.metadata["note"] == "x"
    assert {name: digest(file.read(name)) for name in file.names} == {
        name: digest(keep) for name, keep in trained.masks().items()
    }


def test_writing_again_replaces_the_adapter(trained: AdaptedModel, tmp_path: Path) -> None:
    write_outputs(tmp_path, trained, Path("first"), {})
    write_outputs(tmp_path, trained, Path("second"), {})
    assert "second" in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "masks.safetensors"]
