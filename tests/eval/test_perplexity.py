from __future__ import annotations

import json
import math

import numpy as np
import pytest

from losa_export.errors import ConfigError, RuntimeFailureError, TextError
from losa_export.eval import perplexity as module
from losa_export.eval.perplexity import cut_windows, perplexity, read_wikitext, token_nll, wikitext_document


class TableRuntime:
    """Logits of the next token depend on the last token alone: row `token` of a table."""

    name = "table"
    max_positions = 64

    def __init__(self, table):
        self.table = table.astype(np.float32)
        self.vocab_size = table.shape[1]

    def new_state(self, batch, capacity):
        return None

    def prefill(self, state, row, token_ids):
        return self.table[token_ids]


def windows_of(random, count, window, vocab):
    return random.integers(0, vocab, size=(count, window))


def test_uniform_logits_give_a_perplexity_of_the_vocabulary():
    windows = windows_of(np.random.default_rng(0), 4, 16, 10)
    report = perplexity(TableRuntime(np.zeros((10, 10))), windows, show_progress=False)
    assert report.ppl == pytest.approx(10.0, rel=1e-12)  # float64 rounding
    assert report.standard_error == pytest.approx(0.0, abs=1e-12)
    assert (report.tokens, report.windows, report.window) == (4 * 15, 4, 16)


def test_perplexity_equals_the_definition_on_random_logits():
    random = np.random.default_rng(1)
    table = random.normal(size=(7, 7)).astype(np.float32)
    windows = windows_of(random, 5, 9, 7)
    probabilities = np.exp(table.astype(np.float64)) / np.exp(table.astype(np.float64)).sum(1, keepdims=True)
    nll = -np.log(probabilities[windows[:, :-1], windows[:, 1:]])
    report = perplexity(TableRuntime(table), windows, show_progress=False)
    assert report.mean_nll == pytest.approx(nll.mean(), rel=1e-12)  # float64 rounding
    assert report.ppl == pytest.approx(math.exp(nll.mean()), rel=1e-12)
    np.testing.assert_allclose(report.window_nll, nll.mean(axis=1), rtol=1e-12)
    assert report.standard_error == pytest.approx(nll.mean(axis=1).std(ddof=1) / math.sqrt(5), rel=1e-9)


def test_the_report_is_plain_json_even_for_one_window():
    report = perplexity(TableRuntime(np.zeros((3, 3))), np.array([[0, 1, 2]]), show_progress=False)
    stored = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert stored["standard_error"] is None
    assert stored["runtime"] == "table"


def test_chunks_do_not_change_the_likelihoods(monkeypatch):
    random = np.random.default_rng(2)
    logits, targets = random.normal(size=(23, 5)).astype(np.float32), random.integers(0, 5, 23)
    whole = token_nll(logits, targets)
    monkeypatch.setattr(module, "_CHUNK_VALUES", 15)  # three rows at a time
    np.testing.assert_array_equal(token_nll(logits, targets), whole)


def test_huge_logits_neither_overflow_nor_lose_the_target():
    nll = token_nll(np.array([[1e30, 0.0], [500.0, 800.0]], dtype=np.float32), np.array([0, 0]))
    np.testing.assert_array_equal(nll, [0.0, 300.0])


def test_a_ruined_model_has_an_infinite_perplexity_rather_than_an_error():
    table = np.array([[0.0, 2000.0], [2000.0, 0.0]])
    report = perplexity(TableRuntime(table), np.array([[0, 0, 0], [1, 1, 1]]), show_progress=False)
    assert report.ppl == math.inf


def test_wikitext_lines_are_joined_as_the_protocol_says():
    text = " \n = Title = \n \n First line. \nSecond.\n"
    assert wikitext_document(text) == "\n\n = Title = \n\n\n\n\n First line. \n\n\nSecond.\n"


def test_a_last_line_without_newline_is_a_line_all_the_same():
    assert wikitext_document("a\nb") == "a\n\n\nb\n"


def test_the_real_test_text_keeps_one_newline_a_line_and_two_between_lines(shared_data):
    path = shared_data / "text" / "wikitext2" / "wiki.test.raw"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == 4358  # as the data's description says
    filled = sum(bool(line.strip()) for line in lines)
    assert read_wikitext(path).count("\n") == filled + 2 * 4357


def test_windows_do_not_overlap_and_the_tail_is_dropped():
    np.testing.assert_array_equal(cut_windows(range(11), 3, None), [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(cut_windows(range(11), 3, 2), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(cut_windows(range(8), 4, None, 2), [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]])
    np.testing.assert_array_equal(cut_windows(range(8), 4, 1, 1), [[0, 1, 2, 3]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cut_windows(range(9), 1, None), ConfigError, r"window is 1"),
        (lambda: cut_windows(range(9), 2, 0), ConfigError, r"count is 0"),
        (lambda: cut_windows(range(9), 4, 3), TextError, r"has 9 tokens, which fill 2 windows of 4; 3 are needed"),
        (lambda: cut_windows([], 4, None), TextError, r"has 0 tokens"),
        (lambda: cut_windows(range(9), 4, 1, 0), ConfigError, r"stride is 0; give 1 … 4"),
        (lambda: cut_windows(range(9), 4, 1, 5), ConfigError, r"stride is 5"),
        (lambda: cut_windows(range(9), 4, 4, 2), TextError, r"which fill 3 windows of 4; 4 are needed"),
    ],
)
def test_windows_that_cannot_be_cut_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_missing_text_names_the_file(tmp_path):
    with pytest.raises(TextError, match=r"absent\.raw' cannot be read"):
        read_wikitext(tmp_path / "absent.raw")


def test_windows_beyond_the_positions_are_refused():
    with pytest.raises(ConfigError, match=r"windows of 65 tokens exceed the model's 64 positions"):
        perplexity(TableRuntime(np.zeros((3, 3))), np.zeros((1, 65), dtype=np.int64), show_progress=False)


def test_ids_of_another_tokenizer_are_refused():
    with pytest.raises(ConfigError, match=r"ids outside 0 … 2"):
        perplexity(TableRuntime(np.zeros((3, 3))), np.array([[0, 3]]), show_progress=False)


def test_logits_of_a_wrong_shape_are_an_error():
    runtime = TableRuntime(np.zeros((3, 3)))
    runtime.prefill = lambda state, row, ids: np.zeros((1, 3), dtype=np.float32)
    with pytest.raises(RuntimeFailureError, match=r"logits of shape \(1, 3\) for a window of 4 tokens"):
        perplexity(runtime, np.zeros((1, 4), dtype=np.int64), show_progress=False)


def test_nan_logits_name_window_and_position():
    table = np.zeros((3, 3))
    table[2] = np.nan
    with pytest.raises(RuntimeFailureError, match=r"NaN or infinite logits in window 1, position 2"):
        perplexity(TableRuntime(table), np.array([[0, 0, 0, 0], [0, 0, 2, 0]]), show_progress=False)
