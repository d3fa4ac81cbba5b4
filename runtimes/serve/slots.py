"""The keys and values of all requests in one preallocated pool, and the beginnings that requests share.

The pool is the runtime's shared cache of `slots` rows. Rows [0, decoding) take part in each decoding step, which
needs them side by side; behind them stand the row whose prompt is being read, and idle rows, which keep the tokens
of the request they last served: a later prompt that begins alike starts from a copy of those, so a conversation that
goes on reads only what is new.

A token leaves the same keys and values whether it was read or generated, and whoever stood beside it: to the bit where
weights are int8 or int4, to rounding elsewhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import InputError
from losa_export.runtimes.ort import OrtRuntime, SharedState

Int64 = NDArray[np.int64]

# A copy of fewer tokens than this saves less than it costs to look for.
LEAST_SHARED = 8


class SlotPool:
    """Rows of keys and values.

    Args:
        runtime: with a shared cache.
        slots: rows.
        context_tokens: tokens of a row.
        share_prefixes: keep the tokens of finished requests for those that begin alike.

    Attributes:
        decoding: rows 0 to decoding − 1 take part in `decode`.

    Raises: InputError when the runtime's cache is not a shared buffer.
    """

    def __init__(self, runtime: OrtRuntime, slots: int, context_tokens: int, *, share_prefixes: bool = True) -> None:
        state = runtime.new_state(slots, context_tokens)
        if not isinstance(state, SharedState):
            raise InputError(
                "this export's cache grows with each token, so requests cannot share a pool; export it with: "
                "losa export --profile ort"
            )
        # Dense matrices would be packed a second time for the second session.
        self._absorbs = runtime.kernel_row is not None
        if self._absorbs:
            runtime.open_reader()
        self._runtime, self._state, self._share = runtime, state, share_prefixes
        for buffer in state.buffers:
            buffer.fill(0.0)  # touches each page: what does not fit fails now, not in the middle of an answer
        self._first = [state.first(rows) for rows in range(1, slots + 1)]
        # Whose keys and values each row holds: its first `lengths`.
        self._tokens = np.zeros((slots, context_tokens), np.int64)
        self._last_used = np.zeros(slots, np.int64)  # a counter that grows with each request
        self.decoding = 0
        self.slots, self.context_tokens = slots, context_tokens

    @property
    def used_tokens(self) -> int:
        """Tokens whose keys and values are in use by running requests."""
        return int(self._state.lengths[: self.decoding].sum())

    def claim(self, prompt: Int64) -> tuple[int, int]:
        """An idle row for a prompt, with as much of it as another request already brought.

        Returns: the row, and how many tokens of the prompt it holds; never all, since the last one is decoded.
        """
        source, shared = self._longest_shared(prompt)
        row = self.decoding + int(self._last_used[self.decoding :].argmin())
        if shared and source >= self.decoding and shared == self._state.lengths[source]:
            row = source  # a conversation that goes on: nothing of the old one is lost
        if shared and row != source:
            for buffer in self._state.buffers:
                buffer[row, :, :shared] = buffer[source, :, :shared]
            self._tokens[row, :shared] = prompt[:shared]
        self._last_used[row] = self._last_used.max() + 1
        self._state.lengths[row] = shared
        return row, shared

    def read(self, row: int, tokens: Int64) -> None:
        """Read a piece of a prompt into its row; of all pieces together, the prompt's last token is left out."""
        first = int(self._state.lengths[row])
        if self._absorbs:
            self._runtime.absorb(self._state, row, tokens)
        else:
            (self._runtime.extend if first else self._runtime.prefill)(self._state, row, tokens)
        self._tokens[row, first : first + tokens.size] = tokens

    def join(self, row: int) -> int:
        """Let a row whose prompt is read take part in decoding. Returns: the row where it stands now."""
        joined = self.decoding
        self._swap(row, joined)
        self.decoding += 1
        return joined

    def leave(self, row: int, *, keep: bool = True) -> int:
        """End a row's part in decoding. Returns: the row, of those that go on, that now stands in its place."""
        last = self.decoding - 1
        self.release(row, keep=keep)
        self._swap(row, last)
        self.decoding = last
        return last

    def release(self, row: int, *, keep: bool = True) -> None:
        """End the use of a row; what it holds is there for others to share, unless it is not to be kept."""
        if not (keep and self._share):
            self._state.lengths[row] = 0

    def decode(self, tokens: Int64) -> NDArray[np.float32]:
        """Append one token to each decoding row; (decoding, V) logits."""
        rows = np.arange(self.decoding)
        places = self._state.lengths[: self.decoding].copy()
        logits = self._runtime.decode(self._first[self.decoding - 1], tokens)
        self._tokens[rows, places] = tokens
        return logits

    def _longest_shared(self, prompt: Int64) -> tuple[int, int]:
        """The row whose tokens have most in common with this prompt, and how much of it may be taken."""
        best, most = 0, 0
        for row in range(self.slots if self._share else 0):
            count = min(int(self._state.lengths[row]), prompt.size - 1)
            if count <= most:
                continue
            differing = np.flatnonzero(self._tokens[row, :count] != prompt[:count])
            count = int(differing[0]) if differing.size else count
            if count > most:
                best, most = row, count
        return (best, most) if most >= LEAST_SHARED else (0, 0)

    def _swap(self, one: int, other: int) -> None:
        """Exchange two rows: keys, values, tokens and what else is known of them."""
        if one == other:
            return
        pair, crossed = [one, other], [other, one]
        first, second = (int(self._state.lengths[row]) for row in pair)
        for buffer in self._state.buffers:
            kept = buffer[one, :, :first].copy()
            buffer[one, :, :second] = buffer[other, :, :second]
            buffer[other, :, :first] = kept
        for facts in (self._state.lengths, self._tokens, self._last_used):
            facts[pair] = facts[crossed]


def pieces(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Cut tokens [start, stop) into pieces of at most `size`."""
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]
