from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from losa_export.errors import CheckpointError, ConfigError, InputError
from losa_export.runtimes.base import (
    DecodeState,
    Runtime,
    RuntimeDescription,
    check_next_tokens,
    check_prompt,
    check_state_size,
)
from losa_export.runtimes.detokenize import StreamDecoder, load_stop_ids
from losa_export.runtimes.generate import GenerationConfig, TextModel, generate_text, generate_tokens
from losa_export.runtimes.loader import load_runtime

VOCAB = 300


class CountingState:
    def __init__(self, batch: int, capacity: int) -> None:
        self.lengths = np.zeros(batch, np.int64)
        self.capacity = capacity

    def reset(self, row: int) -> None:
        self.lengths[row] = 0


class CountingRuntime:
    """After token t comes t + 1; the cache only counts."""

    name = "counting"
    vocab_size = VOCAB

    def __init__(self, max_positions: int = 64) -> None:
        self.max_positions = max_positions
        self.closed = False
        self.states: list[CountingState] = []

    def new_state(self, batch: int, capacity: int) -> CountingState:
        check_state_size(batch, capacity, self.max_positions)
        self.states.append(CountingState(batch, capacity))
        return self.states[-1]

    def prefill(
        self, state: DecodeState, row: int, token_ids: NDArray[np.int64], *, last_only: bool = False
    ) -> NDArray[np.float32]:
        prompt = check_prompt(state, row, token_ids, VOCAB)
        state.lengths[row] = prompt.size
        return self._logits(prompt[-1:] if last_only else prompt)

    def decode(self, state: DecodeState, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        tokens = check_next_tokens(state, token_ids, VOCAB)
        state.lengths[:] += 1
        return self._logits(tokens)

    def describe(self) -> RuntimeDescription:
        return RuntimeDescription(self.name, "none", "0", 1, None, {})

    def close(self) -> None:
        self.closed = True

    def _logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = np.zeros((tokens.size, VOCAB), np.float32)
        logits[np.arange(tokens.size), (tokens + 1) % VOCAB] = 2.0
        return logits


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """Every byte is a token, as in byte-level BPE without merges, after two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece_tokenizer() -> Tokenizer:
    """Words that begin with ▁, and bytes for the rest, as Llama's."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁cat", "▁sat", "s", "."]
    scores = [(piece, -1.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    decoder = StreamDecoder(tokenizer, prompt or [])
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@given(text=st.text(max_size=20))
def test_streamed_text_is_the_text_for_any_characters(byte_tokenizer: Tokenizer, text: str) -> None:
    ids = byte_tokenizer.encode(text).ids
    assert "".join(streamed(byte_tokenizer, ids)) == byte_tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 257), max_size=12))
def test_streamed_text_is_the_whole_decoding_for_any_bytes(byte_tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(byte_tokenizer, ids)) == byte_tokenizer.decode(ids)


WORDS = ["▁a", "▁cat", "▁sat", "s", ".", "<0xE4> <0xB8> <0xAD>", "</s>"]


@given(words=st.lists(st.sampled_from(WORDS), max_size=12))
def test_streamed_words_keep_their_spaces(sentencepiece_tokenizer: Tokenizer, words: list[str]) -> None:
    ids = [sentencepiece_tokenizer.token_to_id(piece) for word in words for piece in word.split(" ")]
    assert "".join(streamed(sentencepiece_tokenizer, ids)) == sentencepiece_tokenizer.decode(ids)


def test_the_first_new_word_keeps_its_space_behind_a_prompt(sentencepiece_tokenizer: Tokenizer) -> None:
    a, cat, sat = (sentencepiece_tokenizer.token_to_id(word) for word in ("▁a", "▁cat", "▁sat"))
    assert streamed(sentencepiece_tokenizer, [cat, sat], prompt=[0, a]) == [" cat", " sat", ""]


def test_a_character_is_held_back_until_it_is_whole(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("a€").ids
    assert streamed(byte_tokenizer, ids) == ["a", "", "", "€", ""]
    assert streamed(byte_tokenizer, ids[:-1]) == ["a", "", "", "�"]


def test_endless_invalid_bytes_still_stream(byte_tokenizer: Tokenizer) -> None:
    invalid = byte_tokenizer.encode("€").ids[1]
    pieces = streamed(byte_tokenizer, [invalid] * 100)
    assert "".join(pieces[:-1]) == "�" * 96


def test_greedy_follows_the_most_likely_token() -> None:
    tokens = list(generate_tokens(CountingRuntime(), np.array([3, 7]), GenerationConfig(max_new_tokens=4)))
    assert tokens == [8, 9, 10, 11]


def test_generation_ends_before_a_stop_token() -> None:
    config = GenerationConfig(max_new_tokens=9)
    assert list(generate_tokens(CountingRuntime(), np.array([3]), config, stop_token_ids=[99, 6])) == [4, 5]


def test_stop_tokens_of_the_config_replace_those_of_the_model() -> None:
    config = GenerationConfig(max_new_tokens=4, stop_token_ids=())
    assert list(generate_tokens(CountingRuntime(), np.array([3]), config, stop_token_ids=[6])) == [4, 5, 6, 7]


def test_generation_ends_where_the_positions_do() -> None:
    runtime = CountingRuntime(max_positions=8)
    tokens = list(generate_tokens(runtime, np.arange(6), GenerationConfig(max_new_tokens=50)))
    assert tokens == [6, 7]
    assert runtime.states[0].capacity == 7


def test_the_same_seed_draws_the_same_text_and_another_seed_another() -> None:
    def draw(seed: int | None) -> list[int]:
        config = GenerationConfig(max_new_tokens=30, temperature=2.0, top_p=0.9, seed=seed)
        return list(generate_tokens(CountingRuntime(), np.array([3]), config))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)  # 30 draws out of 270 tokens: equal about once in 10^70 runs


def test_a_prompt_that_cannot_be_continued_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="the prompt is empty: give at least one token"):
        generate_tokens(CountingRuntime(), np.array([], np.int64), GenerationConfig())
    with pytest.raises(InputError, match=r"prompt has 8 tokens, and the model knows 8 positions.*shorten the prompt"):
        generate_tokens(CountingRuntime(max_positions=8), np.arange(8), GenerationConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but must be a whole number of at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"seed": -1}, "seed is -1, but must be a whole number of at least 0, or None"),
        ({"stop_token_ids": (1, -2)}, "stop_token_ids is .*must hold token ids of at least 0"),
        ({"chat": "perhaps"}, "chat is 'perhaps', but must be one of auto, always, never"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_an_impossible_option_is_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**change)  # type: ignore[arg-type]


def test_the_fake_runtime_is_one(byte_tokenizer: Tokenizer) -> None:
    runtime = CountingRuntime()
    assert isinstance(runtime, Runtime)
    assert isinstance(runtime.new_state(1, 1), DecodeState)


@pytest.fixture
def byte_folder(tmp_path: Path, byte_tokenizer: Tokenizer) -> Path:
    byte_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    return tmp_path


def test_text_streams_and_closing_closes_the_runtime(byte_folder: Path) -> None:
    runtime = CountingRuntime()
    with TextModel.open(byte_folder, runtime) as model:
        # byte-level pieces are sorted by their stand-in character, where the letters stand in order
        assert list(model.stream("ab", GenerationConfig(max_new_tokens=3))) == ["c", "d", "e"]
    assert runtime.closed


def test_a_chat_template_wraps_the_prompt_unless_told_not_to(byte_folder: Path) -> None:
    (byte_folder / "chat_template.jinja").write_text("<s>{{ messages[-1].content }}:")
    model = TextModel.open(byte_folder, CountingRuntime())
    text = "<s>hi:"
    assert model.prompt_ids("hi").tolist() == model.tokenizer.encode(text, add_special_tokens=False).ids
    assert model.prompt_ids("hi")[0] == 0
    assert model.prompt_ids("hi", chat="never").tolist() == model.tokenizer.encode("hi").ids
    talk = [{"role": "user", "content": "hi"}]
    assert model.prompt_ids(talk, chat="never").tolist() == model.prompt_ids("hi").tolist()


def test_a_conversation_needs_a_chat_template(byte_folder: Path) -> None:
    model = TextModel.open(byte_folder, CountingRuntime())
    with pytest.raises(InputError, match="has no chat template; give plain text, with --raw"):
        model.prompt_ids([{"role": "user", "content": "hi"}])
    with pytest.raises(InputError, match="has no chat template"):
        model.stream("hi", GenerationConfig(chat="always"))


def test_an_empty_text_is_refused(byte_folder: Path) -> None:
    model = TextModel.open(byte_folder, CountingRuntime())
    with pytest.raises(InputError, match="the prompt is empty: give at least one word to continue"):
        model.stream("", GenerationConfig())


def test_stop_ids_come_from_the_first_file_that_has_them(tmp_path: Path) -> None:
    assert load_stop_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_stop_ids(tmp_path) == (7,)
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": [5, 6]}}))
    assert load_stop_ids(tmp_path) == (5, 6)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert load_stop_ids(tmp_path) == (5, 6)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"generation_config.json' cannot be read as JSON.*copy it again"):
        load_stop_ids(tmp_path)


def test_an_unknown_runtime_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runtime 'gpu' is not known; choose one of ort, ort-stock, genai, torch"):
        load_runtime("gpu", tmp_path)  # type: ignore[arg-type]


def test_generate_text_closes_the_runtime_when_the_prompt_is_refused(
    byte_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = CountingRuntime()
    monkeypatch.setattr("losa_export.runtimes.generate.load_runtime", lambda name, folder, threads: runtime)
    with pytest.raises(InputError, match="the prompt is empty"):
        generate_text(byte_folder, "")
    assert runtime.closed
    runtime.closed = False
    pieces = generate_text(byte_folder, "ab", GenerationConfig(max_new_tokens=2))
    assert (next(pieces), runtime.closed) == ("c", False)
    assert list(pieces) == ["d"]
    assert runtime.closed
