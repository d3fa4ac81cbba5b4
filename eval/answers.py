"""The answers of one engine, to hold another engine against before any of them is timed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from losa_export.runtimes.base import Runtime

CHECK_PROMPTS = 3
CHECK_PROMPT_TOKENS = 16
CHECK_NEW_TOKENS = 32
CHECK_DECODE_STEPS = 4
# Positions of the timed prompt whose logits are compared: a long prefill runs through other kernels
# than a short one, but all its logits would be 25 MB for 128 positions of a vocabulary of 49,152.
_WORKLOAD_POSITIONS = 16


@dataclass(frozen=True)
class Answers:
    """What one engine says; fits `parity.ReferenceAnswers`, where the shapes are."""

    prompts: tuple[NDArray[np.int64], ...]
    logits: NDArray[np.float32]
    greedy: NDArray[np.int64]
    decode_logits: NDArray[np.float32]
    greedy_margin: NDArray[np.float32]


@dataclass(frozen=True)
class Workload:
    """The token ids of a benchmark: the same for both engines, whatever they would have answered.

    Attributes:
        prompt: (S,) int64, prefilled.
        forced: (N,) int64, then decoded one by one.
        check_prompts: prompts of the answer check, all of one length.
        check_new_tokens: greedy tokens of the answer check.
    """

    prompt: NDArray[np.int64]
    forced: NDArray[np.int64]
    check_prompts: tuple[NDArray[np.int64], ...]
    check_new_tokens: int

    def key(self) -> Hashable:
        """Equal for equal workloads."""
        ids = (self.prompt, self.forced, *self.check_prompts)
        return (self.check_new_tokens, *(part.tobytes() for part in ids))


def make_workload(
    vocab_size: int, max_positions: int, prompt_tokens: int, new_tokens: int, generator: np.random.Generator
) -> Workload:
    """Random token ids; the answer check is shortened where the model has few positions."""
    length = max(1, min(CHECK_PROMPT_TOKENS, max_positions // 2))
    return Workload(
        prompt=generator.integers(0, vocab_size, prompt_tokens),
        forced=generator.integers(0, vocab_size, new_tokens),
        check_prompts=tuple(generator.integers(0, vocab_size, length) for _ in range(CHECK_PROMPTS)),
        check_new_tokens=min(CHECK_NEW_TOKENS, max_positions - length),
    )


def answers_of(runtime: Runtime, prompts: tuple[NDArray[np.int64], ...], new_tokens: int) -> Answers:
    """Logits and greedy continuations of `prompts` (equal lengths), one prompt at a time."""
    steps = min(CHECK_DECODE_STEPS, new_tokens - 1)
    logits, greedy, decoded, margins = [], [], [], []
    for prompt in prompts:
        state = runtime.new_state(1, len(prompt) + new_tokens)
        logits.append(runtime.prefill(state, 0, prompt))
        line = logits[-1][-1]
        tokens: list[int] = []
        lead: list[float] = []
        lines: list[NDArray[np.float32]] = []
        for step in range(new_tokens):
            second, first = np.partition(line, -2)[-2:]
            tokens.append(int(np.argmax(line)))
            lead.append(float(first - second))
            if step + 1 < new_tokens:
                line = runtime.decode(state, np.array(tokens[-1:], dtype=np.int64))[0]
                if step < steps:
                    lines.append(line.copy())
        greedy.append(tokens)
        margins.append(lead)
        decoded.append(np.stack(lines))
    return Answers(
        prompts=prompts,
        logits=np.stack(logits),
        greedy=np.array(greedy, dtype=np.int64),
        decode_logits=np.stack(decoded),
        greedy_margin=np.array(margins, dtype=np.float32),
    )


def workload_positions(prompt_tokens: int) -> NDArray[np.int64]:
    """Up to 16 positions spread over the prompt, the last one included, ascending."""
    count = min(_WORKLOAD_POSITIONS, prompt_tokens)
    return np.unique(np.linspace(prompt_tokens - 1, 0, count).round().astype(np.int64))


def workload_logits(runtime: Runtime, workload: Workload) -> NDArray[np.float32]:
    """Logits of the timed work itself: chosen positions of the prompt, then the last decode step.

    As in the timed work the prompt's last logits, which decoding goes on from, are asked for alone.

    Returns: (positions + 1, V) float32.
    """
    capacity = len(workload.prompt) + len(workload.forced)
    whole = runtime.prefill(runtime.new_state(1, capacity), 0, workload.prompt)
    before = whole[workload_positions(len(workload.prompt))[:-1]]
    state = runtime.new_state(1, capacity)
    after_prompt = last = runtime.prefill(state, 0, workload.prompt, last_only=True)
    for token in workload.forced:
        last = runtime.decode(state, np.array([token], dtype=np.int64))
    return np.concatenate([before, after_prompt, last])
