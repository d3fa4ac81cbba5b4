"""GGUF files to Hugging Face folders, on a tiny file written here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_export.checkpoint import open_checkpoint
from losa_export.errors import CheckpointError, MissingDependencyError, UnsupportedArchitectureError
from losa_export.gguf_import import convert_gguf, hugging_face_name, unpermute_rotary
from losa_export.text import load_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the 'demo' extra (package gguf)")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 16, 4, 2, 4, 24
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *"0123456789abcdefghijklmnopqrstuvwxyzĠ", "he", "Ġhe", "19", "Ġ1"]
MERGES = ["h e", "Ġ he", "1 9", "Ġ 1"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def rotary_order(heads: int) -> np.ndarray:
    """Hugging Face row of each GGUF row, spelled out: (head, pair, half) is (head, half, pair)."""
    return np.array(
        [
            head * HEAD_DIM + half * (HEAD_DIM // 2) + pair
            for head in range(heads)
            for pair in range(HEAD_DIM // 2)
            for half in range(2)
        ]
    )


def tiny_weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens": (len(TOKENS), HIDDEN),
        "model.norm": (HIDDEN,),
        "model.layers.0.self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "model.layers.0.self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "model.layers.0.self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "model.layers.0.self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "model.layers.0.mlp.gate_proj": (MLP, HIDDEN),
        "model.layers.0.mlp.up_proj": (MLP, HIDDEN),
        "model.layers.0.mlp.down_proj": (HIDDEN, MLP),
        "model.layers.0.input_layernorm": (HIDDEN,),
        "model.layers.0.post_attention_layernorm": (HIDDEN,),
    }
    return {f"{name}.weight": generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, **changes: Any) -> dict[str, np.ndarray]:
    """A whole model in one block; `changes` of 'architecture', 'pre', 'extra' (tensor), 'context' (None omits)."""
    weights = tiny_weights()
    architecture = changes.get("architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture)
    context = changes.get("context", 64)
    if context is not None:
        writer.add_context_length(context)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in weights.items():
        short = name.removesuffix(".weight").removeprefix("model.layers.0.")
        prefix = "blk.0." if "layers" in name else ""
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(short)
        stored = weight if heads is None else weight[rotary_order(heads)]
        writer.add_tensor(f"{prefix}{GGUF_NAMES[short]}.weight", np.ascontiguousarray(stored))
    if "extra" in changes:
        writer.add_tensor(changes["extra"], np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("gguf")
    weights = write_gguf(folder / "tiny.gguf")
    convert_gguf(folder / "tiny.gguf", folder / "model")
    return folder / "model", weights


def test_every_weight_arrives_bit_for_bit_in_hugging_face_order(
    converted: tuple[Path, dict[str, np.ndarray]],
) -> None:
    folder, weights = converted
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names()) == set(weights)
    for name, weight in weights.items():
        assert checkpoint.dtype(name) == "F32"
        assert np.array_equal(checkpoint.read(name), weight), name


def test_rows_of_queries_go_from_neighbouring_pairs_to_halves() -> None:
    weight = np.arange(8, dtype=np.float32)[:, None]
    # one head of 8 rows: the pairs (0,1) (2,3) (4,5) (6,7) become row i and row i + 4
    assert unpermute_rotary(weight, 1)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert unpermute_rotary(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_config_has_the_rotary_base_in_both_spellings(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    config = open_checkpoint(converted[0]).config
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] is None
    assert config["rope_parameters"] == {"rope_theta": 5000.0, "rope_type": "default"}
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 4)


def test_tokenizer_cuts_digits_one_by_one_and_adds_nothing(
    converted: tuple[Path, dict[str, np.ndarray]],
) -> None:
    tokenizer = load_tokenizer(converted[0])
    encoding = tokenizer.encode("he he19<|im_end|>")
    assert encoding.tokens == ["he", "Ġhe", "1", "9", "<|im_end|>"]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=True) == "he he19"


def test_tokenizer_settings_name_the_special_tokens_and_keep_the_chat_template(
    converted: tuple[Path, dict[str, np.ndarray]],
) -> None:
    settings = json.loads((converted[0] / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == "<|im_start|>"
    assert settings["eos_token"] == settings["pad_token"] == "<|im_end|>"
    assert settings["unk_token"] == "<|endoftext|>"
    assert settings["chat_template"] == TEMPLATE
    assert json.loads((converted[0] / "generation_config.json").read_text())["eos_token_id"] == 2


def test_plain_transformers_opens_the_folder(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the 'train' extra")
    folder, weights = converted
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    query = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    assert np.array_equal(query, weights["model.layers.0.self_attn.q_proj.weight"])
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("he he19") == ["he", "Ġhe", "1", "9"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert chat == "<|im_start|>he<|im_end|>"


def test_another_architecture_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", architecture="mamba")
    with pytest.raises(
        UnsupportedArchitectureError, match=r"a\.gguf' holds a model of architecture 'mamba'; only 'llama'"
    ):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_way_of_cutting_text_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", pre="qwen2")
    with pytest.raises(
        UnsupportedArchitectureError, match=r"tokenizer of model 'gpt2', pre-tokenizer 'qwen2'; .*'smollm'"
    ):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", context=None)
    with pytest.raises(CheckpointError, match=r"a\.gguf' has no metadata 'llama\.context_length'; get a complete file"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")


def test_a_tensor_of_another_family_leaves_no_output(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", extra="blk.0.attn_q.bias")
    with pytest.raises(UnsupportedArchitectureError, match=r"holds the tensor 'blk\.0\.attn_q\.bias', which a Llama"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("name", ["blk.0.ssm_a.weight", "rope_freqs.weight", "blk.0.attn_q", "x"])
def test_unknown_tensor_names_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="which a Llama decoder does not have"):
        hugging_face_name(name, Path("a.gguf"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.gguf' is not a GGUF file that can be read .*get it again"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")


def test_without_the_reader_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"needs the package 'gguf'.*losa-export\[demo\]"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
