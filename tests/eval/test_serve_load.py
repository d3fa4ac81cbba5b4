"""When requests arrive, and what they ask."""

from __future__ import annotations

import json
from math import exp, inf, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_export.errors import TextError
from losa_export.eval.serve_load import (
    CHAT,
    WORDS,
    Prompt,
    arrival_times,
    count_words,
    parse_prompts,
    random_text,
    vocabulary_words,
)

COUNT = 4000
# Standard errors that an estimate may lie off: by chance no example of fifty does.
FAR = 7.0


def gaps(rate: float, burstiness: float, seed: int) -> np.ndarray:
    return np.diff(arrival_times(COUNT + 1, rate, burstiness, np.random.default_rng(seed)))


@settings(max_examples=50, derandomize=True)
@given(st.floats(0.01, 1000), st.floats(0.3, 20), st.integers(0, 2**32))
def test_gaps_have_the_mean_and_variance_of_the_arrival_process(rate: float, burstiness: float, seed: int) -> None:
    found = gaps(rate, burstiness, seed) * rate
    assert (found >= 0).all()
    assert abs(found.mean() - 1) < FAR / sqrt(burstiness * COUNT)
    # variance of a gamma's sample variance: (kurtosis 3 + 6 / shape, less 1) over the count
    assert abs(found.var() * burstiness - 1) < FAR * sqrt((2 + 6 / burstiness) / COUNT)


@settings(max_examples=20, derandomize=True)
@given(st.integers(0, 2**32))
def test_at_burstiness_one_gaps_are_exponential(seed: int) -> None:
    found = gaps(5.0, 1.0, seed) * 5.0
    for length in (0.1, 1.0, 3.0):
        expected = exp(-length)
        assert abs((found > length).mean() - expected) < FAR * sqrt(expected * (1 - expected) / COUNT)


def test_the_first_request_comes_at_once_and_the_others_in_order() -> None:
    times = arrival_times(100, 3.0, 0.5, np.random.default_rng(0))
    assert times[0] == 0
    assert list(times) == sorted(times)
    assert times == arrival_times(100, 3.0, 0.5, np.random.default_rng(0))
    assert times != arrival_times(100, 3.0, 0.5, np.random.default_rng(1))


def test_the_limits_of_rate_and_burstiness() -> None:
    generator = np.random.default_rng(0)
    assert arrival_times(3, inf, 1.0, generator) == (0, 0, 0)
    assert arrival_times(4, 2.0, inf, generator) == (0, 0.5, 1, 1.5)
    assert arrival_times(1, 2.0, 1.0, generator) == (0,)


def longer_words_are_two(text: str) -> int:
    """A tokenizer of its own: a token of its start, and two for each word of over three letters."""
    return 1 + sum(1 if len(word) <= 3 else 2 for word in text.split())


@given(st.integers(2, 300), st.integers(0, 2**32))
def test_a_random_text_has_exactly_that_many_tokens(tokens: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    assert longer_words_are_two(random_text(tokens, generator, count=longer_words_are_two)) == tokens
    assert count_words(random_text(tokens, generator)) == tokens


def test_a_random_text_continues_its_start() -> None:
    generator = np.random.default_rng(0)
    texts = {random_text(12, generator, start="one two three") for _ in range(5)}
    assert len(texts) == 5
    assert all(text.startswith("one two three ") and count_words(text) == 12 for text in texts)
    assert random_text(3, generator, start="one two three") == "one two three"


def test_texts_that_cannot_be_are_refused() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(TextError, match="no text of exactly 1 tokens was found; ask for more"):
        random_text(1, generator, count=longer_words_are_two)
    with pytest.raises(TextError, match="no text of exactly 4 tokens"):
        random_text(4, generator, words=["longer"], count=longer_words_are_two)
    with pytest.raises(TextError, match="no text of exactly 4 tokens"):
        random_text(4, generator, count=lambda text: 3 if text else 1)  # a tokenizer that merges all words
    with pytest.raises(TextError, match="prefix has 3 tokens, more than the 2 of a prompt"):
        random_text(2, generator, start="one two three")


def test_words_of_a_vocabulary() -> None:
    marked = [f"Ġ{word}" for word in WORDS[:9]]
    assert set(vocabulary_words(["<s>", "ing", "Ġ12", "Ġa", *marked])) == set(WORDS[:9])
    assert set(vocabulary_words([f"▁{word}" for word in WORDS[:9]])) == set(WORDS[:9])
    assert set(vocabulary_words(["<s>", "x", *WORDS[:9]])) == set(WORDS[:9])
    with pytest.raises(TextError, match="holds 1 plain words, too few for random prompts; leave --tokenizer out"):
        vocabulary_words(["<s>", "word", "12"])


def test_prompts_of_a_file() -> None:
    messages = [{"role": "user", "content": "hello"}]
    rows = [{"prompt": "a\u2028b"}, {"messages": messages, "id": 3}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    first, second = parse_prompts(text, "prompts.jsonl")
    assert first.fields("/v1/completions") == {"prompt": "a\u2028b"}
    assert first.fields(CHAT) == {"messages": [{"role": "user", "content": "a\u2028b"}]}
    assert second.fields(CHAT) == {"messages": messages}
    with pytest.raises(TextError, match="/v1/completions takes no conversation; give rows with 'prompt'"):
        second.fields("/v1/completions")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'p.jsonl' holds no prompt"),
        ("\n \n", "'p.jsonl' holds no prompt"),
        ('{"prompt": "a"}\n{', "row 2 of 'p.jsonl' is not JSON"),
        ("[" * 100_000, "row 1 of 'p.jsonl' is not JSON"),
        ("[1]", "row 1 of 'p.jsonl' holds neither a 'prompt' nor 'messages'; each row must look like"),
        ('{"prompt": ""}', "row 1 of 'p.jsonl' holds neither"),
        ('{"prompt": 3}', "row 1 of 'p.jsonl' holds neither"),
        ('{"messages": []}', "row 1 of 'p.jsonl' holds neither"),
        ('{"messages": [{"content": "a"}]}', "row 1 of 'p.jsonl' holds neither"),
    ],
)
def test_rows_that_hold_no_prompt_are_named(text: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        parse_prompts(text, "p.jsonl")


def test_a_prompt_is_a_text_or_a_conversation() -> None:
    assert Prompt(text="a") == Prompt(text="a", messages=())
