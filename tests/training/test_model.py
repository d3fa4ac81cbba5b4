from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from losa_export.architecture import DecoderSpec, prunable_names
from losa_export.checkpoint import open_checkpoint
from losa_export.errors import CheckpointError, ConfigError
from losa_export.training.config import TrainConfig
from losa_export.training.model import choose_compute, choose_device, choose_operator, load_adapted_model

ConfigMaker = Callable[..., TrainConfig]


def test_every_block_linear_and_nothing_else_gets_an_adapter(tiny_config: ConfigMaker) -> None:
    config = tiny_config()
    adapted = load_adapted_model(config, "fp32")
    spec = DecoderSpec.from_config(open_checkpoint(config.model).config, config.model)
    assert tuple(adapted.layers) == prunable_names(spec)
    trained = [name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(adapted.layers)
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert adapted.sparsity_fraction() == 0.0
    assert adapted.parameter_counts().tolist() == [46080.0, 46080.0]


def test_an_adapted_model_starts_with_the_answers_of_the_dense_one(tiny_config: ConfigMaker) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config()
    ids = torch.arange(4, 24).reshape(2, 10)
    dense = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    adapted = load_adapted_model(config, "fp32")
    with torch.no_grad():
        # 1e-6: B is zero, so only the order of one addition can differ
        torch.testing.assert_close(
            adapted.model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-6, atol=1e-6
        )


def test_a_bfloat16_base_computes_in_either_dtype(tiny_config: ConfigMaker) -> None:
    ids = torch.arange(4, 24).reshape(2, 10)
    logits = {}
    for compute in ("fp32", "bf16"):
        adapted = load_adapted_model(tiny_config(dtype="bf16"), compute)  # type: ignore[arg-type]
        layer = next(iter(adapted.layers.values()))
        assert layer.weight.dtype == torch.bfloat16
        assert layer.lora_A.dtype == torch.float32
        with torch.no_grad():
            logits[compute] = adapted.model(input_ids=ids).logits
    assert logits["bf16"].dtype == torch.bfloat16
    # 0.05 of the largest: bfloat16 activations through two blocks
    difference = (logits["bf16"].float() - logits["fp32"]).abs().max()
    assert float(difference) < 0.05 * float(logits["fp32"].abs().max())


def test_the_start_of_the_adapters_depends_on_the_seed_and_the_place(tiny_config: ConfigMaker) -> None:
    first, second, other = (
        [layer.lora_A.detach() for layer in load_adapted_model(tiny_config(seed=seed), "fp32").layers.values()]
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1][:, : first[0].shape[1]])


def test_a_weight_that_is_not_finite_is_an_error_that_names_it(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    config = tiny_config()
    broken = tmp_path / "broken"
    shutil.copytree(config.model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' .* not finite"):
        load_adapted_model(tiny_config(model=broken), "fp32")


def test_what_transformers_cannot_load_is_a_checkpoint_error(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="transformers cannot load the checkpoint"):
        load_adapted_model(tiny_config(model=tmp_path), "fp32")


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is 'cuda', but PyTorch sees no GPU"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"


def test_bfloat16_products_are_chosen_only_where_they_are_native(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for native, chosen in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert choose_compute("auto", "bf16", cpu) == chosen
        assert choose_operator("auto", cpu) == ("exact_bf16" if native else "exact")
        assert choose_operator("exact", cpu) == "exact"
    assert choose_operator("auto", torch.device("cuda")) == "exact"
    assert choose_compute("auto", "fp32", cpu) == "fp32"
    assert choose_compute("bf16", "fp32", cpu) == "bf16"
