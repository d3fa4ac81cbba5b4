"""From a GGUF file of the Llama family to an ordinary Hugging Face checkpoint folder.

GGUF stores a model for llama.cpp: quantised blocks, tensor names of its own, the rows of the query and key
projections interleaved for its rotary embedding, and the tokenizer as bare lists. All of it is undone here.
The weights are those of the quantised file, widened to float32: rounding that GGUF did is not undone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from losa_export.checkpoint import CheckpointWriter
from losa_export.errors import CheckpointError, MissingDependencyError, UnsupportedArchitectureError
from losa_export.files import output_folder, write_text_atomic

FloatArray = NDArray[np.float32]

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

# Digits one by one, then bytes: how SmolLM's tokenizer cuts text before merging. The GGUF file only names
# it ("smollm"); without the digit rule "1984" would become one token that the model saw under other numbers.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
}
_CONTROL_TOKEN = 3


def convert_gguf(source: Path, output: Path, *, overwrite: bool = False) -> None:
    """Write the model in a GGUF file as a Hugging Face folder that plain transformers opens.

    Args:
        source: a ``.gguf`` file of architecture ``llama`` whose tokenizer is byte-level BPE.
        output: the new folder: config.json, model.safetensors (float32), tokenizer.json,
            tokenizer_config.json, generation_config.json. It appears whole or not at all.
        overwrite: replace a non-empty folder.
    Raises:
        MissingDependencyError: the package gguf is not installed.
        CheckpointError: the file cannot be read, or lacks a field or a tensor.
        UnsupportedArchitectureError: another architecture or tokenizer.
        OutputError: as `files.output_folder`.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError.for_extra("gguf", "demo", "converting a GGUF file") from error
    try:
        reader = gguf.GGUFReader(source)
    except Exception as error:  # a damaged file ends in whatever numpy or struct make of it
        raise CheckpointError(
            f"'{source}' is not a GGUF file that can be read ({error}); get it again", path=source
        ) from error
    fields = _Fields(source, reader.fields, {tensor.name for tensor in reader.tensors})
    config = model_config(fields)
    tokenizer = build_tokenizer(fields)
    with output_folder(output, overwrite=overwrite) as folder, CheckpointWriter(folder, config) as writer:
        tokenizer.save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", tokenizer_config(fields))
        _write_json(folder / "generation_config.json", _token_ids(fields))
        heads = {
            "attn_q": config["num_attention_heads"],
            "attn_k": config["num_key_value_heads"],
        }
        for tensor in reader.tensors:
            name = hugging_face_name(tensor.name, source)
            weight: FloatArray = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            kind = tensor.name.split(".")[-2]
            if kind in heads:
                weight = unpermute_rotary(weight, heads[kind])
            writer.add(name, weight)


def hugging_face_name(name: str, source: Path) -> str:
    """Name of GGUF tensor `name` in a Hugging Face checkpoint.

    Raises: UnsupportedArchitectureError for a tensor that a Llama decoder does not have.
    """
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _INNER and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.weight"
    raise UnsupportedArchitectureError(
        f"'{source}' holds the tensor '{name}', which a Llama decoder does not have; only the plain Llama "
        "family is converted",
        tensor=name,
    )


def gguf_name(name: str) -> str:
    """Name in a GGUF file of tensor `name` of a Llama checkpoint: the inverse of `hugging_face_name`.

    Raises: UnsupportedArchitectureError for a tensor that a Llama decoder does not have.
    """
    outer = {ours: theirs for theirs, ours in _OUTER.items()}
    if name in outer:
        return outer[name]
    block, _, rest = name.removeprefix("model.layers.").partition(".")
    inner = {f"{ours}.weight": theirs for theirs, ours in _INNER.items()}
    if name.startswith("model.layers.") and block.isdigit() and rest in inner:
        return f"blk.{block}.{inner[rest]}.weight"
    raise UnsupportedArchitectureError(f"tensor '{name}' has no place in a GGUF file of the Llama family", tensor=name)


def permute_rotary(weight: FloatArray, heads: int) -> FloatArray:
    """Put the rows of a query or key projection into llama.cpp's order: the inverse of `unpermute_rotary`."""
    rows, columns = weight.shape
    return np.ascontiguousarray(
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def unpermute_rotary(weight: FloatArray, heads: int) -> FloatArray:
    """Undo llama.cpp's row order of a query or key projection.

    llama.cpp turns neighbouring rows of a head together, Hugging Face turns row i with row i + head_dim/2:
    GGUF row (head, pair, half) is Hugging Face row (head, half, pair).

    Args:
        weight: (heads · head_dim, in) float32.
        heads: query heads, or key-value heads for the key projection.
    Returns: the same shape, a new array.
    """
    rows, columns = weight.shape
    return np.ascontiguousarray(
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


class _Fields:
    """Metadata of a GGUF file, read with errors that name file and key."""

    def __init__(self, source: Path, fields: Mapping[str, Any], tensor_names: set[str]) -> None:
        self.source = source
        self.tensor_names = tensor_names
        self._fields = fields
        self._read: dict[str, Any] = {}

    def get(self, key: str, default: object = None) -> Any:
        return self.need(key) if key in self._fields else default

    def need(self, key: str) -> Any:
        if key not in self._fields:
            raise CheckpointError(f"'{self.source}' has no metadata '{key}'; get a complete file", key=key)
        if key not in self._read:  # a vocabulary takes a second to decode
            self._read[key] = self._fields[key].contents()
        return self._read[key]


def model_config(fields: _Fields) -> dict[str, Any]:
    """``config.json`` of the model, with the rotary base in the spelling of transformers 4 and of 5.

    Raises: UnsupportedArchitectureError when the file holds anything but a Llama.
    """
    architecture = fields.need("general.architecture")
    if architecture != "llama":
        raise UnsupportedArchitectureError(
            f"'{fields.source}' holds a model of architecture '{architecture}'; only 'llama' is converted",
            architecture=architecture,
        )
    hidden, heads = int(fields.need("llama.embedding_length")), int(fields.need("llama.attention.head_count"))
    theta = float(fields.get("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields.need("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": int(fields.need("llama.feed_forward_length")),
        "num_hidden_layers": int(fields.need("llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": int(fields.need("llama.context_length")),
        # stored as float32: its shortest decimal is the number that was meant
        "rms_norm_eps": float(str(np.float32(fields.need("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in fields.tensor_names,
        "use_cache": True,
        "dtype": "float32",
        **_token_ids(fields),
    }


def _token_ids(fields: _Fields) -> dict[str, int]:
    keys = {
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "eos_token_id": "tokenizer.ggml.eos_token_id",
        "pad_token_id": "tokenizer.ggml.padding_token_id",
    }
    return {name: int(fields.get(key)) for name, key in keys.items() if fields.get(key) is not None}


def build_tokenizer(fields: _Fields) -> Tokenizer:
    """Byte-level BPE from the file's vocabulary and merges. No token is added at the start of a text.

    Raises: UnsupportedArchitectureError for another tokenizer model or an unknown way of cutting text.
    """
    model, cut = fields.need("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or cut not in _PRE_TOKENIZERS:
        raise UnsupportedArchitectureError(
            f"'{fields.source}' has a tokenizer of model '{model}', pre-tokenizer '{cut}'; only byte-level BPE "
            f"('gpt2') with {', '.join(map(repr, _PRE_TOKENIZERS))} is converted",
            model=model,
            pre=cut,
        )
    tokens: Sequence[str] = fields.need("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in fields.need("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[cut]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _control(fields)])
    return tokenizer


def _control(fields: _Fields) -> list[str]:
    tokens, kinds = fields.need("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type", [])
    return [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL_TOKEN]


def tokenizer_config(fields: _Fields) -> dict[str, Any]:
    """``tokenizer_config.json``: names of the special tokens, and the chat template.

    The generic class is named, not GPT2Tokenizer: transformers 5 rebuilds the latter from vocabulary and
    merges alone, and would lose the rule for digits.
    """
    tokens = fields.need("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(fields.need("llama.context_length")),
    }
    for name in ("bos", "eos", "unknown", "padding"):
        token = fields.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = tokens[int(token)]
    template = fields.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
