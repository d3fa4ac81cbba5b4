"""Every supported family, in awkward shapes: trained for a round, merged and exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from losa_export.checkpoint import open_checkpoint
from losa_export.errors import UnsupportedArchitectureError
from losa_export.export import ExportConfig, export_onnx
from losa_export.masks import load_masks
from losa_export.merge import merge_run
from losa_export.training.config import TrainConfig
from losa_export.training.scores import pruned_per_row
from losa_export.training.train import train

ConfigMaker = Callable[..., TrainConfig]

# No size is a multiple of 128, most not of 8 either.
SHAPE: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases-untied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama-tied-one-block": ("Llama", {"tie_word_embeddings": True, "num_hidden_layers": 1}),
    "llama-multi-query": ("Llama", {"num_key_value_heads": 1, "num_hidden_layers": 2}),
    "mistral-wide-heads": ("Mistral", {"head_dim": 10}),
    "qwen2-biases-tied": ("Qwen2", {"head_dim": None, "tie_word_embeddings": True}),
    "qwen3-head-norms": ("Qwen3", {"head_dim": 14, "tie_word_embeddings": True}),
    "opt-tied": ("OPT", {"ffn_dim": 50}),
    "opt-norms-behind": ("OPT", {"ffn_dim": 50, "do_layer_norm_before": False, "word_embed_proj_dim": 20}),
}


def write_checkpoint(folder: Path, family: str, changes: dict[str, Any], tokenizer: Path) -> None:
    """A random model; its biases and norms are stirred, since they would all start at zero and one."""
    import transformers

    shape = {name: value for name, value in (SHAPE | changes).items() if value is not None}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            else:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)


@pytest.mark.parametrize("case", CASES)
def test_a_round_a_merge_and_an_export_keep_the_zeros(
    tiny_config: ConfigMaker, tiny_checkpoint: Path, tmp_path: Path, case: str
) -> None:
    family, changes = CASES[case]
    write_checkpoint(tmp_path / "base", family, changes, tiny_checkpoint)
    config = tiny_config(
        model=tmp_path / "base", rounds=1, steps=2, window=12, calibration_windows=3, reconstruct_epochs=2
    )
    result = train(config, show_progress=False)
    # (p − 1/c_min, p]: each row loses at most one position to the floor
    assert 0.6 - 1 / 36 < result.sparsity_fraction <= 0.6
    assert all(after < before for before, after in result.rounds[0].block_fits)
    merge_run(result.run, tmp_path / "merged")
    merged, base, masks = (
        open_checkpoint(tmp_path / "merged"),
        open_checkpoint(config.model),
        load_masks(result.masks_file),
    )
    linears = 6 if family == "OPT" else 7
    assert len(masks.names) == linears * changes.get("num_hidden_layers", SHAPE["num_hidden_layers"])
    for name in base.names():
        weight = merged.read(name)
        if name in masks:
            keep = masks.read(name)
            assert not weight[~keep].any(), name
            assert set((~keep).sum(axis=1)) == {pruned_per_row(keep.shape[1], 0.6)}, name
        else:
            assert np.array_equal(weight, base.read(name)), name
    # Profile 'ort' would need heads of a multiple of 8: its attention operator takes no others.
    options: dict[str, Any] = {"profile": "standard", "gate": False, "progress": False}
    report = export_onnx(ExportConfig(tmp_path / "merged", tmp_path / "onnx", **options))
    assert report.weights == "sparse"


@pytest.fixture(scope="module")
def merged_opt(tiny_checkpoint: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small OPT whose norms stand behind, trained for a round and merged."""
    folder = tmp_path_factory.mktemp("opt")
    changes = {"hidden_size": 48, "num_attention_heads": 3, "ffn_dim": 80, "word_embed_proj_dim": 40}
    write_checkpoint(folder / "base", "OPT", changes | {"do_layer_norm_before": False}, tiny_checkpoint)
    config = TrainConfig(
        model=folder / "base",
        output=folder / "run",
        tuning_text=(tiny_text,),
        sparsity_fraction=0.6,
        rounds=2,
        steps=4,
        rank=3,
        max_rank=4,
        learning_rate=5e-3,
        batch_size=2,
        window=16,
        calibration_windows=5,
        reconstruct_epochs=1,
        reconstruct_least_squares=True,
        kl_weight=0.5,
        squarehead_weight=0.1,
        gradient_checkpointing=True,
        device="cpu",
    )
    merge_run(train(config, show_progress=False).run, folder / "merged")
    return folder / "merged"


@pytest.mark.parametrize(("profile", "values"), [("ort", "fp32"), ("standard", "int4")])
def test_a_trained_opt_answers_as_transformers_does(
    merged_opt: Path, tiny_text: Path, tmp_path: Path, profile: Any, values: Any
) -> None:
    """The gate holds prefill, decoding, a batch and greedy tokens against transformers."""
    calibration = (tiny_text,) if values == "int4" else ()
    options: dict[str, Any] = {"calibration": calibration, "calibration_windows": 4, "progress": False}
    report = export_onnx(ExportConfig(merged_opt, tmp_path / "onnx", profile=profile, values=values, **options))
    assert report.gate is not None
    assert report.gate["reference"] == "torch"
    assert report.weights == "sparse"
    assert 0.55 < report.sparsity_fraction <= 0.6


@pytest.mark.parametrize("family", ["GPT2", "Gemma", "Phi"])
def test_other_families_are_refused_by_name(
    tiny_config: ConfigMaker, tiny_checkpoint: Path, tmp_path: Path, family: str
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [name]}))
    with pytest.raises(UnsupportedArchitectureError, match=f"architecture '{name}' is not supported"):
        train(tiny_config(model=tmp_path / "base"), show_progress=False)
