"""Fixtures: a tiny deterministic language model in numpy, as a stand-in for a runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

VOCAB = 11


@dataclass
class FakeState:
    hidden: np.ndarray
    lengths: np.ndarray
    capacity: int


@dataclass
class FakeRuntime:
    """The hidden state decays and takes in each token's embedding; logits are a linear map of it.

    `disturb(kind, row, step, logits)` may change the logits of a call: kind is 'prefill' or 'decode',
    step counts the tokens already decoded in that state.
    """

    seed: int = 0
    name: str = "fake"
    vocab_size: int = VOCAB
    max_positions: int = 512
    disturb: object = None
    calls: list = field(default_factory=list)

    def __post_init__(self):
        random = np.random.default_rng(self.seed)
        self.embedding = random.normal(size=(self.vocab_size, 8))
        self.head = random.normal(size=(8, self.vocab_size))

    def new_state(self, batch, capacity):
        state = FakeState(np.zeros((batch, 8)), np.zeros(batch, dtype=np.int64), capacity)
        state.steps = 0
        return state

    def prefill(self, state, row, token_ids, *, last_only=False):
        assert state.lengths[row] == 0, "row must be empty"
        logits = np.stack([self._take(state, row, token) for token in token_ids])
        self.calls.append(("prefill", row, len(token_ids)))
        if self.disturb:
            logits = self.disturb("prefill", row, state, logits)
        return logits[-1:] if last_only else logits

    def decode(self, state, token_ids):
        logits = np.stack([self._take(state, row, token) for row, token in enumerate(token_ids)])
        self.calls.append(("decode", len(token_ids)))
        if self.disturb:
            logits = self.disturb("decode", len(token_ids), state, logits)
        state.steps += 1
        return logits

    def describe(self):
        return SimpleNamespace(name=self.name)

    def close(self):
        pass

    def _take(self, state, row, token):
        assert state.lengths[row] < state.capacity, "state is full"
        state.hidden[row] = np.tanh(0.8 * state.hidden[row] + self.embedding[token])
        state.lengths[row] += 1
        return (state.hidden[row] @ self.head).astype(np.float32)


def reference_of(runtime, prompts=3, length=5, new_tokens=8, decode_steps=4):
    """What `compute_reference` would give for this fake."""
    random = np.random.default_rng(7)
    ids = [random.integers(0, runtime.vocab_size, length) for _ in range(prompts)]
    logits, greedy, margins, decoded = [], [], [], []
    for prompt in ids:
        state = runtime.new_state(1, length + new_tokens)
        rows = runtime.prefill(state, 0, prompt)
        logits.append(rows)
        line, tokens, lead, steps = rows[-1], [], [], []
        for _ in range(new_tokens):
            top = np.sort(line)
            lead.append(top[-1] - top[-2])
            tokens.append(int(line.argmax()))
            line = runtime.decode(state, np.array([tokens[-1]]))[0]
            steps.append(line)
        greedy.append(tokens)
        margins.append(lead)
        decoded.append(steps[:decode_steps])
    return SimpleNamespace(
        prompts=tuple(ids),
        logits=np.array(logits, dtype=np.float32),
        greedy=np.array(greedy, dtype=np.int64),
        decode_logits=np.array(decoded, dtype=np.float32).reshape(prompts, decode_steps, runtime.vocab_size),
        greedy_margin=np.array(margins, dtype=np.float32),
    )


@pytest.fixture
def fake_runtime():
    return FakeRuntime


@pytest.fixture(name="reference_of")
def reference_of_fixture():
    return reference_of
