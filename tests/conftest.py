"""Fixtures shared by all tests: tiny seeded models and texts, made here and never fetched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No test here is about speed, and a busy machine makes any example slow now and then.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 176,
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128,
}
WORDS = (
    "the a one old small red cat dog bird man girl boy house tree road river saw ran sat found took gave went "
    "to in on under with and but then so because happy sad big little day night sun moon ball book . , !"
).split()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared texts and models; skips where a clone stands alone."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared data folder beside the project (../shared/data), which a lone clone lacks")
    return SHARED


@pytest.fixture(scope="session")
def stories260k(shared_data: Path) -> Path:
    """A real 260K-parameter Llama checkpoint."""
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks (hidden 64, 4 heads, 2 kv heads, MLP 176, vocabulary 128) with a word tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_tiny_checkpoint(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt file of 600 random sentences over the tiny tokenizer's words, one paragraph each."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    sentences = [" ".join(generator.choice(WORDS, size=24)) for _ in range(600)]
    path.write_text("\n\n".join(sentences) + "\n", encoding="utf-8")
    return path


def write_tiny_checkpoint(folder: Path, *, seed: int, **changes: object) -> None:
    """Write a random checkpoint whose config is `TINY_CONFIG` with `changes`, and its tokenizer."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = TINY_CONFIG | changes
    generator = np.random.default_rng(seed)
    hidden, mlp = int(config["hidden_size"]), int(config["intermediate_size"])
    head, heads, kv = (int(config[key]) for key in ("head_dim", "num_attention_heads", "num_key_value_heads"))

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (generator.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(int(config["vocab_size"]), hidden)}
    for block in range(int(config["num_hidden_layers"])):
        prefix = f"model.layers.{block}."
        tensors |= {
            prefix + "self_attn.q_proj.weight": matrix(heads * head, hidden),
            prefix + "self_attn.k_proj.weight": matrix(kv * head, hidden),
            prefix + "self_attn.v_proj.weight": matrix(kv * head, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, heads * head),
            prefix + "mlp.gate_proj.weight": matrix(mlp, hidden),
            prefix + "mlp.up_proj.weight": matrix(mlp, hidden),
            prefix + "mlp.down_proj.weight": matrix(hidden, mlp),
            prefix + "input_layernorm.weight": np.float32(1) + 0.1 * matrix(1, hidden)[0],
            prefix + "post_attention_layernorm.weight": np.float32(1) + 0.1 * matrix(1, hidden)[0],
        }
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(int(config["vocab_size"]), hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    )
    _write_tiny_tokenizer(folder, int(config["vocab_size"]))


def _write_tiny_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    pieces += [f"filler{number}" for number in range(vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
