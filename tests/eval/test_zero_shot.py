"""Scores of choices: against the definition, and alike whether the shared beginning is read once or each time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from losa_export.errors import RuntimeFailureError, TextError
from losa_export.eval.tasks import Item
from losa_export.eval.zero_shot import (
    Choice,
    accuracy,
    encode_choice,
    encode_item,
    judge,
    mcnemar,
    score,
)


@pytest.fixture
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE({token: place for place, token in enumerate("Ġabcdefghij")}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return made


def log_likelihoods(runtime, item: list[Choice]) -> list[float]:
    return [found.log_likelihood for found in score(runtime, item)]


def choices(*pairs: tuple[list[int], list[int]]) -> list[Choice]:
    return [Choice(np.array(context + behind), len(behind)) for context, behind in pairs]


SHARED = choices(([1, 2, 3, 4], [5, 6]), ([1, 2, 3, 4], [7]), ([1, 2, 3, 4], [5, 6, 7, 8]))
APART = choices(([1, 2, 3], [5, 6]), ([1, 4], [5, 6]))
ONE_IS_THE_BEGINNING = choices(([1, 2], [3]), ([1, 2], [3, 4]), ([1, 2], [3, 4, 5]))
UNLIKE = choices(([1], [2]), ([3], [4, 5]))


def by_definition(runtime, choice: Choice) -> float:
    logits = runtime.prefill(runtime.new_state(1, 64), 0, choice.ids).astype(np.float64)
    rows = logits - logits.max(axis=1, keepdims=True)
    logs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    first = choice.ids.size - choice.scored
    return float(sum(logs[place - 1, choice.ids[place]] for place in range(first, choice.ids.size)))


@pytest.mark.parametrize("item", [SHARED, APART, ONE_IS_THE_BEGINNING, UNLIKE, SHARED[:1]])
def test_scores_are_the_sums_of_log_probabilities(fake_runtime, item: list[Choice]) -> None:
    runtime = fake_runtime()
    assert log_likelihoods(runtime, item) == pytest.approx([by_definition(runtime, one) for one in item], rel=1e-12)


@pytest.mark.parametrize("name", ["ort-stock", "torch"])
@pytest.mark.parametrize("profile", ["ort", "standard"])
def test_what_choices_share_is_read_once_with_the_same_scores(
    tiny_checkpoint: Path, tmp_path: Path, name: str, profile: str
) -> None:
    pytest.importorskip("onnx_ir", reason="needs the extra 'export'")
    from losa_export.export import ExportConfig, export_onnx
    from losa_export.runtimes.base import ExtendingRuntime
    from losa_export.runtimes.loader import load_runtime

    folder = tiny_checkpoint
    if name == "torch" and profile == "standard":
        pytest.skip("a checkpoint has no profile")
    if name != "torch":
        folder = tmp_path / "onnx"
        export_onnx(ExportConfig(tiny_checkpoint, folder, profile=profile, gate=False, progress=False))  # type: ignore[arg-type]
    runtime = load_runtime(name, folder, threads=1)  # type: ignore[arg-type]
    try:
        assert isinstance(runtime, ExtendingRuntime)
        read = []
        prefill = runtime.prefill
        runtime.prefill = lambda state, row, ids: (read.append(ids.size), prefill(state, row, ids))[1]  # type: ignore[method-assign]
        for item in (SHARED, APART, ONE_IS_THE_BEGINNING):
            found = log_likelihoods(runtime, item)
            # 1e-5: float32, other shapes of the same products
            assert found == pytest.approx([by_definition(runtime, one) for one in item], rel=1e-5)
        beginnings = [4, 1, 2]
        assert [read[place] for place in (0, 4, 7)] == beginnings
    finally:
        runtime.close()


def test_a_runtime_that_breaks_is_named(fake_runtime) -> None:
    runtime = fake_runtime(disturb=lambda kind, row, state, logits: logits * np.nan)
    with pytest.raises(RuntimeFailureError, match="runtime 'fake' gave NaN"):
        log_likelihoods(runtime, SHARED)


def test_spaces_go_to_the_continuation(tokenizer: Tokenizer) -> None:
    plain, spaced = encode_choice(tokenizer, "ab", " cd"), encode_choice(tokenizer, "ab ", "cd")
    assert plain.ids.tolist() == spaced.ids.tolist() == [1, 2, 0, 3, 4]
    assert plain.scored == spaced.scored == 3


def item(context: str, *texts: str) -> Item:
    return Item(7, (context,) * len(texts), texts, tuple(map(len, texts)), 0)


def test_items_that_cannot_be_asked_name_file_row_and_choice(fake_runtime, tokenizer: Tokenizer) -> None:
    runtime, file = fake_runtime(), "'task.jsonl'"
    assert [one.scored for one in encode_item(tokenizer, item("ab", " c", " dd"), runtime, file)] == [2, 3]
    with pytest.raises(TextError, match=r"'task\.jsonl', row 7, choice 1 has 513 tokens"):
        encode_item(tokenizer, item("ab", " c", " " + "d" * 512), runtime, file)
    # characters without a token vanish
    with pytest.raises(TextError, match=r"row 7, choice 0: the tokenizer leaves nothing"):
        encode_item(tokenizer, item("ZZ", " c", " d"), runtime, file)
    small = fake_runtime(vocab_size=4)
    with pytest.raises(TextError, match=r"row 7, choice 1 .* 4, which the model lacks|choice 1 has token 4"):
        encode_item(tokenizer, item("ab", " c", " d"), small, file)


def test_an_input_that_is_too_long_loses_its_beginning(fake_runtime, tokenizer: Tokenizer) -> None:
    runtime = fake_runtime(max_positions=4)
    (fits, cut) = encode_item(tokenizer, item("abcd", " e", " efg"), runtime, "file")
    # the last token is only predicted, so five fit
    assert (fits.ids.tolist(), fits.scored, fits.cut) == ([2, 3, 4, 0, 5], 2, 1)
    assert (cut.ids.tolist(), cut.scored, cut.cut) == ([4, 0, 5, 6, 7], 4, 3)
    assert log_likelihoods(runtime, [fits]) == pytest.approx([by_definition(runtime, fits)])


def test_special_tokens_are_those_that_the_tokenizer_puts_there_by_itself(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="j $A", special_tokens=[("j", 10)])
    choice = encode_choice(tokenizer, "ab", " cd")
    assert (choice.ids.tolist(), choice.scored) == ([10, 1, 2, 0, 3, 4], 3)


def test_a_choice_is_greedy_if_each_of_its_tokens_is_the_likeliest(fake_runtime) -> None:
    runtime = fake_runtime()
    start, ids = [1, 2], [1, 2]
    for _ in range(3):
        ids.append(int(runtime.prefill(runtime.new_state(1, 64), 0, np.array(ids))[-1].argmax()))
    other = [*ids[:3], (ids[3] + 1) % runtime.vocab_size, ids[4]]
    found = score(runtime, choices((start, ids[2:]), (start, other[2:]), (start, ids[2:3])))
    assert [one.greedy for one in found] == [True, False, True]


def test_the_choice_is_the_likeliest_in_sum_or_by_character() -> None:
    asked = Item(3, ("c",) * 2, (" long one", " one"), (8, 3), 0)
    found = judge(asked, [-8.0, -4.0])
    assert (found.row, found.correct, found.correct_normalised) == (3, False, True)
    assert judge(asked, [-4.0, -4.0]).correct  # the first of equals


def test_accuracy_has_the_standard_error_of_a_mean() -> None:
    share, error = accuracy([True] * 3 + [False])
    assert (share, error) == (0.75, pytest.approx(np.std([1, 1, 1, 0], ddof=1) / 2))
    assert math.isnan(accuracy([True])[1])


def test_mcnemar_is_the_exact_sign_test_of_the_items_that_differ() -> None:
    ours = [True] * 9 + [False] * 1 + [True] * 5
    theirs = [False] * 9 + [True] * 1 + [True] * 5
    only_ours, only_theirs, p = mcnemar(ours, theirs)
    assert (only_ours, only_theirs) == (9, 1)
    assert p == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar([True], [True]) == (0, 0, 1.0)
    assert mcnemar([True, False], [False, True])[2] == 1.0
