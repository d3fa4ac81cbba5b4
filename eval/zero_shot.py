"""Log-likelihoods of the choices of zero-shot items, in any runtime, and what follows from them.

A choice's input is its context's tokens and its own, as lm-evaluation-harness cuts them: with the special tokens that
the tokenizer puts there by itself, usually beginning-of-text or none; trailing spaces of the context go to the
continuation, and the continuation's tokens are those of both together behind as many as the context has. An input that
exceeds the model's positions loses its first tokens. What the choices of an item have in common, nearly always the
context, is read once where the runtime can go on from it (`ExtendingRuntime`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from losa_export.errors import RuntimeFailureError, TextError
from losa_export.eval.perplexity import token_nll
from losa_export.eval.tasks import Item
from losa_export.runtimes.base import ExtendingRuntime, Runtime

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Choice:
    """One choice as the model reads it.

    Attributes:
        ids: (S,) int64, context and continuation.
        scored: how many of them, the last ones, are the continuation.
        cut: how many tokens of the context were left out before them, because the model has no positions for all.
    """

    ids: Int64
    scored: int
    cut: int = 0


@dataclass(frozen=True)
class Score:
    """What the model makes of one choice.

    Attributes:
        log_likelihood: of the continuation after the context, nats.
        greedy: whether each of its tokens is the likeliest one.
    """

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class ItemScores:
    """What the model makes of one item.

    Attributes:
        row: line of the task's file.
        log_likelihoods: of each choice, nats.
        correct: whether the likeliest choice is the right one.
        correct_normalised: the same of log-likelihood by character.
    """

    row: int
    log_likelihoods: tuple[float, ...]
    correct: bool
    correct_normalised: bool


def encode_choice(tokenizer: Tokenizer, context: str, continuation: str) -> Choice:
    """Token ids of a context, which is not empty, and its continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before = tokenizer.encode(context).ids
    whole = tokenizer.encode(context + continuation).ids
    behind = whole[len(before) :]
    return Choice(np.array(before + behind, dtype=np.int64), len(behind))


def encode_item(tokenizer: Tokenizer, item: Item, runtime: Runtime, source: str) -> list[Choice]:
    """The choices of an item; `source` is where it comes from, for messages.

    Raises: TextError naming the row if a continuation is longer than the model's positions, has ids that it does not
        know, or nothing to score.
    """
    choices = [encode_choice(tokenizer, *pair) for pair in zip(item.contexts, item.continuations, strict=True)]
    for place, choice in enumerate(choices):
        where = f"{source}, row {item.row}, choice {place}"
        if choice.scored == 0 or choice.scored == choice.ids.size:
            raise TextError(f"{where}: the tokenizer leaves nothing of context or continuation; drop the row")
        if choice.scored > runtime.max_positions:
            raise TextError(
                f"{where} has {choice.scored} tokens, but the model knows {runtime.max_positions} positions; drop "
                "the row, or choose a model of longer context",
                row=item.row,
            )
        if choice.ids.max() >= runtime.vocab_size:
            raise TextError(f"{where} has token {choice.ids.max()}, which the model lacks; use its own tokenizer")
    return [shortened(choice, runtime.max_positions) for choice in choices]


def shortened(choice: Choice, positions: int) -> Choice:
    """The choice without as many of its first tokens as the model has no positions for; the last is only predicted."""
    excess = choice.ids.size - 1 - positions
    return Choice(choice.ids[excess:], choice.scored, excess) if excess > 0 else choice


def score(runtime: Runtime, choices: Sequence[Choice]) -> list[Score]:
    """What the model makes of the choices of an item.

    Raises: RuntimeFailureError if the runtime gives NaN or infinity.
    """
    inputs = [choice.ids[:-1] for choice in choices]
    longest = max(ids.size for ids in inputs)
    logits: Iterator[Float32]
    if not isinstance(runtime, ExtendingRuntime) or _common(inputs) == 0:
        logits = (runtime.prefill(runtime.new_state(1, longest), 0, ids) for ids in inputs)
    else:
        logits = _going_on(runtime, inputs, longest)
    return [_score(runtime, choice, rows) for choice, rows in zip(choices, logits, strict=True)]


def _going_on(runtime: ExtendingRuntime, inputs: Sequence[Int64], capacity: int) -> Iterator[Float32]:
    """Logits (S, V) of each input; what all begin with is read once."""
    shared, state = _common(inputs), runtime.new_state(1, capacity)
    common = runtime.prefill(state, 0, inputs[0][:shared])
    for ids in inputs:
        if ids.size == shared:
            yield common
        else:
            yield np.concatenate([common, runtime.extend(state, 0, ids[shared:])])
            runtime.truncate(state, 0, shared)


def _score(runtime: Runtime, choice: Choice, logits: Float32) -> Score:
    rows, targets = logits[-choice.scored :], choice.ids[-choice.scored :]
    nll = token_nll(rows, targets)
    if not np.isfinite(nll).all():
        raise RuntimeFailureError(
            f"runtime '{runtime.name}' gave NaN or infinite logits; the model or a kernel is broken"
        )
    return Score(-math.fsum(nll), bool((rows.argmax(axis=1) == targets).all()))


def _common(inputs: Sequence[Int64]) -> int:
    """How many tokens all inputs begin with alike; all of them for one that is a beginning of the others."""
    shortest = min(ids.size for ids in inputs)
    alike = np.all([ids[:shortest] == inputs[0][:shortest] for ids in inputs], axis=0)
    return shortest if alike.all() else int(np.argmin(alike))


def judge(item: Item, scores: Sequence[float]) -> ItemScores:
    """Which choice the model takes. Of equal ones it is the first, as numpy's argmax has it."""
    by_character = np.array(scores) / np.array(item.characters)
    return ItemScores(
        row=item.row,
        log_likelihoods=tuple(scores),
        correct=int(np.argmax(scores)) == item.gold,
        correct_normalised=int(np.argmax(by_character)) == item.gold,
    )


def accuracy(correct: Sequence[bool]) -> tuple[float, float]:
    """Share of right answers, and its standard error as lm-evaluation-harness has it, of a mean with n − 1."""
    count = len(correct)
    share = sum(correct) / count
    return share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[int, int, float]:
    """Exact test of whether two models differ on the same items.

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions", with the
    binomial distribution in place of its limit.

    Returns: items that only we have right, that only they have, and the two-sided p-value.
    """
    only_ours = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    count = only_ours + only_theirs
    tail = sum(math.comb(count, k) for k in range(min(only_ours, only_theirs) + 1))
    return only_ours, only_theirs, min(1.0, 2 * tail / 2**count)
