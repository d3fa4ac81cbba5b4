"""Specifications read from config.json, in both spellings, and the checkpoints that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_export.architecture import (
    SUPPORTED,
    DecoderSpec,
    inverse_frequencies,
    linear_shape,
    prunable_names,
    rotary_caches,
    tensor_shapes,
)
from losa_export.errors import CheckpointError, UnsupportedArchitectureError
from losa_export.layout import INPUT_GROUPS, LAYOUTS, by_inputs, layout_of

WHERE = Path("folder/config.json")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [2, 5],
    "bos_token_id": 1,
    "pad_token_id": -1,
}
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 64,
    "ffn_dim": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(**changes: object) -> DecoderSpec:
    return DecoderSpec.from_config(LLAMA | changes, WHERE)


def read_opt(**changes: object) -> DecoderSpec:
    return DecoderSpec.from_config(OPT | changes, WHERE)


def test_a_llama_config_gives_its_sizes_and_tokens() -> None:
    spec = read()
    assert (spec.hidden_size, spec.head_dim, spec.num_kv_heads, spec.max_positions) == (64, 16, 2, 256)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (1, (2, 5), None)
    assert not any((spec.tied_embeddings, spec.attention_bias, spec.output_bias, spec.mlp_bias, spec.qk_norm))


def test_both_rope_spellings_mean_the_same() -> None:
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    old = read(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    oldest = read(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    assert new.rope == old.rope == oldest.rope
    assert new.rope.theta == 5e5
    assert new.rope.original_max_position == 64


def test_the_newer_rope_spelling_wins_where_both_stand() -> None:
    spec = read(rope_theta=1.0, rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 7e4})
    assert spec.rope.theta == 7e4
    assert read(rope_theta=123.0, rope_parameters={"rope_type": "default"}).rope.theta == 123.0
    assert read().rope.theta == 10000.0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
    ],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rotary_frequencies_are_those_of_transformers(rope: dict[str, Any], head_dim: int) -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs the 'train' extra")
    import torch
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=256, rope_parameters=dict(rope)
    )
    module = modeling.LlamaRotaryEmbedding(config)
    spec = read(hidden_size=4 * head_dim, head_dim=head_dim, rope_parameters=rope)
    # One unit in the last place: the two power functions may round one element in a hundred differently.
    np.testing.assert_allclose(inverse_frequencies(spec.rope, head_dim), module.inv_freq.numpy(), rtol=1.3e-7, atol=0)
    cos, sin = module(torch.zeros(1), torch.arange(256)[None])
    ours = rotary_caches(spec.rope, head_dim, 256)
    # 256 positions turn that last place into 256 * 1.2e-7 radians.
    np.testing.assert_allclose(ours[0], cos[0, :, : head_dim // 2].numpy(), rtol=0, atol=4e-5)
    np.testing.assert_allclose(ours[1], sin[0, :, : head_dim // 2].numpy(), rtol=0, atol=4e-5)


def test_qwen2_has_biases_on_queries_keys_and_values_only() -> None:
    spec = read(architectures=["Qwen2ForCausalLM"])
    assert (spec.attention_bias, spec.output_bias, spec.mlp_bias) == (True, False, False)
    shapes = tensor_shapes(spec)
    assert shapes["model.layers.0.self_attn.k_proj.bias"] == (32,)
    assert "model.layers.0.self_attn.o_proj.bias" not in shapes


def test_qwen3_has_head_norms_and_its_own_head_size() -> None:
    spec = read(architectures=["Qwen3ForCausalLM"], head_dim=32)
    assert spec.qk_norm
    assert tensor_shapes(spec)["model.layers.1.self_attn.q_norm.weight"] == (32,)
    assert linear_shape(spec, "self_attn.q_proj") == (128, 64)
    assert read(architectures=["Qwen3ForCausalLM"]).head_dim == 128


def test_llama_biases_follow_the_config() -> None:
    shapes = tensor_shapes(read(attention_bias=True, mlp_bias=True))
    assert shapes["model.layers.0.self_attn.o_proj.bias"] == (64,)
    assert shapes["model.layers.0.mlp.gate_proj.bias"] == (176,)


def test_a_tied_head_is_no_tensor_of_its_own() -> None:
    assert "lm_head.weight" in tensor_shapes(read())
    assert "lm_head.weight" not in tensor_shapes(read(tie_word_embeddings=True))


def test_prunable_names_are_all_linears_of_all_blocks() -> None:
    names = prunable_names(read())
    assert len(names) == 2 * 7
    assert names[0] == "model.layers.0.self_attn.q_proj.weight"
    assert set(names) <= set(tensor_shapes(read()))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Mistral", {}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("OPT", {"ffn_dim": 88, "tie_word_embeddings": False}),
        ("OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 24, "tie_word_embeddings": False}),
        ("OPT", {"enable_bias": False, "_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    ],
)
def test_expected_tensors_are_those_of_transformers(family: str, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the 'train' extra")
    config = getattr(transformers, f"{family}Config")(
        **{key: value for key, value in LLAMA.items() if key not in ("architectures", "pad_token_id")} | changes
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert (
        tensor_shapes(DecoderSpec.from_config(config.to_dict() | {"architectures": [f"{family}ForCausalLM"]}, WHERE))
        == expected
    )


def test_an_opt_config_has_defaults_of_its_own() -> None:
    spec = read_opt()
    assert spec.opt is not None
    assert (spec.rope, spec.norm_eps, spec.num_kv_heads, spec.head_dim) == (None, 1e-5, 4, 16)
    assert all((spec.tied_embeddings, spec.attention_bias, spec.output_bias, spec.mlp_bias))
    assert (spec.embedding_size, spec.opt.norm_first, spec.opt.final_norm) == (64, True, True)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (2, (2,), 1)


def test_the_first_linear_that_reads_an_input_stands_for_all() -> None:
    for layout in LAYOUTS.values():
        assert len(layout.inputs) == INPUT_GROUPS
        for linear in layout.linears:
            assert layout.place(layout.weight(3, linear)) == (3, linear)
            assert layout.first_reader(layout.first_reader(linear)) == layout.first_reader(linear)
    assert read_opt().layout.first_reader("self_attn.v_proj") == "self_attn.q_proj"


def test_linears_of_a_block_are_told_apart_by_what_they_read() -> None:
    layout = read_opt().layout
    names = [layout.weight(1, linear) for linear in reversed(layout.linears)]
    assert by_inputs(names) == [[layout.weight(1, linear) for linear in group] for group in layout.inputs]
    assert by_inputs(names[:1]) == [[layout.weight(1, "fc2")]]
    with pytest.raises(UnsupportedArchitectureError, match=r"are not linears of one block; known are LlamaForCausalLM"):
        by_inputs([*names, layout.weight(2, "fc1")])


def test_a_model_of_another_class_has_no_layout() -> None:
    with pytest.raises(
        UnsupportedArchitectureError, match=r"'.*Path' is no model whose parts are known; known are Llama"
    ):
        layout_of(Path())


def test_a_window_that_hides_nothing_counts_as_none() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert read(**mistral, sliding_window=None).sliding_window is None
    assert read(**mistral, sliding_window=256).sliding_window is None
    assert read(**mistral, sliding_window=32).sliding_window == 32
    assert read(sliding_window=32).sliding_window is None


def test_qwen_windows_count_only_when_switched_on_for_all_layers() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}
    assert read(**qwen).sliding_window is None
    assert read(**qwen, use_sliding_window=True, max_window_layers=0).sliding_window == 32
    assert read(**qwen, use_sliding_window=True, max_window_layers=2).sliding_window is None
    assert read(**qwen, use_sliding_window=True, layer_types=["full_attention"] * 2).sliding_window is None
    with pytest.raises(UnsupportedArchitectureError, match="some layers use a sliding window and some do not"):
        read(**qwen, use_sliding_window=True, max_window_layers=1)


def test_an_unsupported_architecture_is_named_with_the_supported_ones() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="'GemmaForCausalLM' is not supported") as caught:
        read(architectures=["GemmaForCausalLM"])
    for name in SUPPORTED:
        assert name in str(caught.value)
    assert str(WHERE) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary scaling 'yarn' is not supported; supported are default"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_unsupported_parts_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu'; only 'relu'"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is false"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"ffn_dim": None}, "ffn_dim is missing; it must be a positive integer"),
        ({"word_embed_proj_dim": 0}, "word_embed_proj_dim is 0; it must be a positive integer"),
    ],
)
def test_what_an_opt_cannot_have_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_opt(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "'architectures' must be a list of one name"),
        ({"architectures": ["A", "B"]}, "'architectures' must be a list of one name"),
        ({"hidden_size": None}, "hidden_size is missing; it must be a positive integer"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a positive integer"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'; it must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"hidden_act": 3}, "hidden_act is 3; it must be a string"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'; it must be a token id"),
        ({"rope_parameters": 7}, "rope_parameters must be an object, not 7"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "must exceed low_freq_factor 1"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9, "use_sliding_window": True, "layer_types": 1},
            "layer_types is 1; it must be a list of strings",
        ),
    ],
)
def test_a_field_that_is_missing_or_of_a_wrong_type_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(**changes)
