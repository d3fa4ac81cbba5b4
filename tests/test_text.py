"""Text files to documents, documents to token windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from losa_export.errors import CheckpointError, TextError
from losa_export.text import load_tokenizer, read_documents, token_windows


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[eos]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[eos]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[eos] $A", special_tokens=[("[eos]", 0)])
    return tokenizer


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_a_plain_file_is_one_document_with_its_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n\ntwo\n")
    assert read_documents([path]) == ["one\n\ntwo\n"]


def test_each_jsonl_row_is_a_document_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one\u2028still one", "title": "x"}\n\n{"text": " "}\n{"text": "two"}')
    assert read_documents([path]) == ["one\u2028still one", "two"]


def test_files_are_read_in_the_order_given(tmp_path: Path) -> None:
    first, second = write(tmp_path / "z.txt", "first"), write(tmp_path / "a.raw", "second")
    assert read_documents([first, second]) == ["first", "second"]


def test_a_malformed_row_is_named_with_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": \n')
    with pytest.raises(TextError, match=r"row 2 of '.*a\.jsonl' is not JSON .*mend the row"):
        read_documents([path])


@pytest.mark.parametrize("row", ['{"body": "x"}', '{"text": 3}', '["text"]'])
def test_a_row_without_text_is_named_with_its_file(tmp_path: Path, row: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "one"}}\n{row}\n')
    with pytest.raises(TextError, match=r"row 2 of '.*a\.jsonl' has no string field 'text'") as caught:
        read_documents([path])
    assert caught.value.facts["row"] == 2


def test_bytes_that_are_not_utf8_are_named_with_their_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"good\ngood\nb\xff")
    with pytest.raises(TextError, match=r"'.*a\.txt' is not UTF-8: byte 11, row 3; save it again as UTF-8"):
        read_documents([path])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"'.*gone\.txt' cannot be read \(No such file or directory\)"):
        read_documents([tmp_path / "gone.txt"])


def test_an_unknown_kind_of_file_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", "PAR1")
    with pytest.raises(TextError, match=r"a\.parquet' is not a kind of text that can be read; give \.jsonl .*\.txt"):
        read_documents([path])


def test_no_text_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"there is no text in '.*a\.txt'; name files"):
        read_documents([write(tmp_path / "a.txt", " \n")])
    with pytest.raises(TextError, match="there is no text in no file"):
        read_documents([])


def test_documents_are_joined_by_the_separator_without_special_tokens() -> None:
    windows = token_windows(["a b", "c"], word_tokenizer(), 2, None, None, separator=0)
    assert windows.dtype == np.int64
    assert windows.tolist() == [[1, 2], [0, 3]]


def test_without_a_separator_documents_touch() -> None:
    assert token_windows(["a b", "c"], word_tokenizer(), 3, None, None, separator=None).tolist() == [[1, 2, 3]]


def test_a_function_from_text_to_ids_serves_as_tokenizer() -> None:
    assert token_windows(["ab", "c"], letters, 2, None, None, separator=7).tolist() == [[97, 98], [7, 99]]


def test_more_documents_than_one_batch_keep_their_order() -> None:
    documents = [chr(1000 + i) for i in range(200)]
    windows = token_windows(documents, letters, 399, 1, None, separator=5)
    assert windows[0, ::2].tolist() == list(range(1000, 1200))
    assert set(windows[0, 1::2].tolist()) == {5}


@given(
    documents=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8),
    window=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_shuffled_windows_are_the_windows_of_the_text_each_once(documents: list[str], window: int, seed: int) -> None:
    stream = sum(len(text) for text in documents) + len(documents) - 1
    if stream < window:
        with pytest.raises(TextError, match=f"the text has {stream} tokens"):
            token_windows(documents, letters, window, None, seed, separator=0)
        return
    plain = token_windows(documents, letters, window, None, None, separator=0)
    shuffled = token_windows(documents, letters, window, None, seed, separator=0)
    assert plain.shape == (stream // window, window)
    assert sorted(plain.tolist()) == sorted(shuffled.tolist())
    assert np.array_equal(shuffled, token_windows(documents, letters, window, None, seed, separator=0))


def test_fewer_windows_are_a_prefix_of_more() -> None:
    text = ["".join(chr(i) for i in range(100, 400))]
    eight = token_windows(text, letters, 10, 8, 3, separator=None)
    assert np.array_equal(token_windows(text, letters, 10, 3, 3, separator=None), eight[:3])
    assert not np.array_equal(token_windows(text, letters, 10, 3, 4, separator=None), eight[:3])


def test_text_shorter_than_one_window_tells_both_counts_and_the_mend() -> None:
    with pytest.raises(TextError, match=r"the text has 4 tokens, 0 windows of 16, but 16 tokens .*give more text"):
        token_windows(["abcd"], letters, 16, None, 0, separator=0)


def test_asking_for_more_windows_than_there_are_is_an_error() -> None:
    with pytest.raises(TextError, match=r"4 tokens, 2 windows of 2, but 6 tokens \(3 windows\) are needed"):
        token_windows(["abcd"], letters, 2, 3, 0, separator=0)


def test_a_saved_tokenizer_loads_again(tmp_path: Path) -> None:
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a c", add_special_tokens=False).ids == [1, 3]


def test_a_missing_tokenizer_is_named_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no readable tokenizer\.json \(No such file.*save_pretrained"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer.json", "{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json' is not a tokenizer that can be read .*copy it"):
        load_tokenizer(tmp_path)
