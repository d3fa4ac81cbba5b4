"""genai_config.json: what onnxruntime-genai, and our own runtimes, need to know beside the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from losa_export.architecture import DecoderFacts, DecoderSpec
from losa_export.graph.external import MODEL_FILE
from losa_export.graph.profiles import ProfileName

GENAI_FILE = "genai_config.json"

# The families of ours that onnxruntime-genai knows by name, and its name for a decoder of any other.
_GENAI_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ANY_DECODER = "decoder"


def genai_config(
    spec: DecoderSpec | DecoderFacts, profile: ProfileName, generation: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of one exported decoder.

    Args:
        spec: sizes and tokens.
        profile: under `ort` past and present share one buffer; under others the cache grows.
        generation: the parsed generation_config.json, or nothing. Its token ids win over those of config.json,
            which often lack the token that ends a chat turn.

    Returns: a JSON object with the sections `model` and `search`.
    """
    ends = _token_ids(generation.get("eos_token_id")) or list(spec.eos_token_ids)
    begin = _token_ids(generation.get("bos_token_id")) or _known(spec.bos_token_id)
    pad = _token_ids(generation.get("pad_token_id")) or _known(spec.pad_token_id) or ends or [0]
    return {
        "model": {
            "type": spec.model_type if spec.model_type in _GENAI_TYPES else _ANY_DECODER,
            "vocab_size": spec.vocab_size,
            "context_length": spec.max_positions,
            "bos_token_id": begin[0] if begin else 0,
            # A model without an ending token runs to max_length; -1 is no token.
            "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else -1,
            "pad_token_id": pad[0],
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": spec.head_dim,
                "hidden_size": spec.hidden_size,
                "num_attention_heads": spec.num_heads,
                "num_hidden_layers": spec.num_layers,
                "num_key_value_heads": spec.num_kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "temperature": _number(generation, "temperature", 1.0),
            "top_k": int(_number(generation, "top_k", 50)),
            "top_p": _number(generation, "top_p", 1.0),
            "repetition_penalty": _number(generation, "repetition_penalty", 1.0),
            "min_length": 0,
            "max_length": spec.max_positions,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": profile == "ort",
        },
    }


def _token_ids(value: object) -> list[int]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, int) and not isinstance(item, bool) and item >= 0]


def _known(token: int | None) -> list[int]:
    return [] if token is None else [token]


def _number(generation: Mapping[str, Any], name: str, default: float) -> float:
    value = generation.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else default
