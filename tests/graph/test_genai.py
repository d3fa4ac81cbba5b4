"""genai_config.json: sizes, names, and which ending tokens count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from losa_export.architecture import DecoderSpec
from losa_export.graph.genai import genai_config

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}


def spec(**changes: object) -> DecoderSpec:
    return DecoderSpec.from_config(CONFIG | changes, Path("config.json"))


def test_sizes_and_names_are_those_of_the_graph() -> None:
    model = genai_config(spec(), "ort", {})["model"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("qwen2", 128, 256)
    decoder = model["decoder"]
    assert (decoder["head_size"], decoder["num_hidden_layers"], decoder["num_key_value_heads"]) == (16, 2, 2)
    assert decoder["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"


def test_a_family_without_a_name_in_genai_is_a_decoder() -> None:
    opt = spec(architectures=["OPTForCausalLM"], ffn_dim=88)
    assert genai_config(opt, "ort", {})["model"]["type"] == "decoder"


def test_only_the_ort_dialect_shares_the_cache_buffer() -> None:
    assert genai_config(spec(), "ort", {})["search"]["past_present_share_buffer"] is True
    assert genai_config(spec(), "standard", {})["search"]["past_present_share_buffer"] is False


def test_the_generation_config_knows_the_ending_tokens_better() -> None:
    model = genai_config(spec(), "ort", {"eos_token_id": [5, 6], "bos_token_id": 1, "pad_token_id": None})["model"]
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([5, 6], 1, 5)


def test_missing_tokens_have_stand_ins() -> None:
    model = genai_config(spec(eos_token_id=None), "ort", {})["model"]
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == (-1, 0, 0)


def test_sampling_settings_are_carried_over_unless_they_are_nonsense() -> None:
    search = genai_config(spec(), "ort", {"temperature": 0.6, "top_k": 20, "do_sample": True, "top_p": "high"})[
        "search"
    ]
    assert (search["temperature"], search["top_k"], search["do_sample"], search["top_p"]) == (0.6, 20, True, 1.0)
