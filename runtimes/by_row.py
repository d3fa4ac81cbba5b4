"""For engines that decode one sequence at a time: a cache for each row, and rows one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import InputError
from losa_export.runtimes.base import (
    DecodeState,
    RuntimeDescription,
    check_next_tokens,
    check_open,
    check_prompt,
    check_state_size,
)

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


@dataclass
class Row:
    """One sequence: `handle` is the engine's business; `length` of `capacity` tokens are there."""

    handle: Any
    capacity: int
    length: int = 0


class RowState:
    """A `Row` for each row of the batch; `rows[i]` is None until a prompt is read into it."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.lengths: Int64 = np.zeros(batch, np.int64)
        self.capacity = capacity
        self.rows: list[Row | None] = [None] * batch

    def reset(self, row: int) -> None:
        """Empty one row."""
        self.rows[row] = None
        self.lengths[row] = 0


class RowRuntime(ABC):
    """Everything of `losa_export.runtimes.base.Runtime` but what the engine does to one row."""

    name: ClassVar[str]

    def __init__(self, vocab_size: int, max_positions: int) -> None:
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self._closed = False

    def new_state(self, batch: int, capacity: int) -> RowState:
        """An empty cache."""
        check_open(self._closed, self.name)
        check_state_size(batch, capacity, self.max_positions)
        return RowState(batch, capacity)

    def prefill(self, state: DecodeState, row: int, token_ids: Int64, *, last_only: bool = False) -> Float32:
        """Read a prompt into one empty row; (S, V) float32, or (1, V)."""
        check_open(self._closed, self.name)
        prompt = check_prompt(state, row, token_ids, self.vocab_size)
        if not isinstance(state, RowState):
            raise _foreign_state()
        sequence = Row(None, state.capacity)
        self.begin(sequence)
        logits = self.append_for_last(sequence, prompt) if last_only else self.append(sequence, prompt)
        # Not before: an engine that fails leaves the row empty.
        state.rows[row] = sequence
        state.lengths[row] = sequence.length = prompt.size
        return logits

    def decode(self, state: DecodeState, token_ids: Int64) -> Float32:
        """Append one token to each row; (batch, V) float32."""
        check_open(self._closed, self.name)
        tokens = check_next_tokens(state, token_ids, self.vocab_size)
        if not isinstance(state, RowState):
            raise _foreign_state()
        logits = []
        for place, row in enumerate(state.rows):
            if row is None:
                raise InputError(f"row {place} of the cache is empty; read a prompt into each row first", row=place)
            logits.append(self.append(row, tokens[place : place + 1]))
            row.length += 1
            state.lengths[place] += 1
        return np.concatenate(logits)

    def close(self) -> None:
        """Release the model; closing twice is harmless."""
        self._closed = True

    @abstractmethod
    def describe(self) -> RuntimeDescription:
        """Engine, version, threads, kernel and files, for the record."""

    @abstractmethod
    def begin(self, row: Row) -> None:
        """Set the handle of an empty row."""

    @abstractmethod
    def append(self, row: Row, ids: Int64) -> Float32:
        """Logits (S, V) of the tokens `ids` behind those of a row, which they join; the caller counts them."""

    def append_for_last(self, row: Row, ids: Int64) -> Float32:
        """As `append`, but the last token's logits (1, V) alone; for engines that get at them sooner so."""
        return self.append(row, ids)[-1:]


def _foreign_state() -> InputError:
    return InputError("this state was made by another runtime; make it with new_state() of this one")
