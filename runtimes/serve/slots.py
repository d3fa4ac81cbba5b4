"""The keys and values of all requests in one preallocated pool, and the prompts that requests share.

The pool is the runtime's shared cache of `slots` rows. Rows [0, decoding) take part in each decoding step, which
needs them side by side; behind them stand the row whose prompt is being read, and idle rows, which keep the prompt
of the request they last served: a later prompt that begins alike starts from a copy of that.

Only keys and values that were read as a *prompt* are shared. A token that was decoded has passed through other
instructions, whose last bits differ, and then the answer to a request would depend on who came before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import InputError
from losa_export.runtimes.ort import OrtRuntime, SharedState

Int64 = NDArray[np.int64]

# A copy of fewer tokens than this saves less than it costs to look for.
LEAST_SHARED = 8
# One token alone is computed as in decoding, with other last bits: so a piece of a prompt has two at least.
LEAST_PIECE = 2
# From here on it is faster to read all but two tokens without their logits, and these two apart, than all with them.
LEAST_ABSORBED = 62


@dataclass
class Row:
    """What one row of the pool holds.

    Attributes:
        prompt: (n,) tokens at its start that were read as a prompt, and may be shared.
        last_used: a counter that grows with each request.
    """

    prompt: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    last_used: int = 0


class SlotPool:
    """Rows of keys and values.

    Args:
        runtime: with a shared cache.
        slots: rows.
        context_tokens: tokens of a row.
        share_prefixes: keep prompts of finished requests for those that begin alike.

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
        self._rows = [Row() for _ in range(slots)]
        self._clock = 0
        self.decoding = 0
        self.slots, self.context_tokens = slots, context_tokens

    @property
    def used_tokens(self) -> int:
        """Tokens whose keys and values are in use by running requests."""
        return int(self._state.lengths[: self.decoding].sum())

    def claim(self, prompt: Int64) -> tuple[int, int]:
        """An idle row for a prompt, with as much of it as another prompt already brought.

        Returns: the row, and how many tokens of the prompt it holds. At least LEAST_PIECE are left to be read.
        """
        source, shared = self._longest_shared(prompt)
        idle = range(self.decoding, self.slots)
        row = min(idle, key=lambda index: self._rows[index].last_used)
        if shared and source >= self.decoding and shared == self._rows[source].prompt.size:
            row = source  # a conversation that goes on: nothing of the old prompt is lost
        if shared and row != source:
            for buffer in self._state.buffers:
                buffer[row, :, :shared] = buffer[source, :, :shared]
        self._clock += 1
        self._rows[row] = Row(prompt[:shared].copy(), self._clock)
        self._state.lengths[row] = shared
        return row, shared

    def read(self, row: int, tokens: Int64, *, last: bool = True) -> NDArray[np.float32] | None:
        """Read a piece of a prompt into its row.

        Returns: (V,) logits after its last token; None unless this is the last piece.
        """
        absorbed = tokens.size - LEAST_PIECE if last else tokens.size
        if not self._absorbs or (last and absorbed < LEAST_ABSORBED):
            absorbed = 0
        if absorbed:
            self._runtime.absorb(self._state, row, tokens[:absorbed])
        logits: NDArray[np.float32] | None = None
        if absorbed < tokens.size:
            call = self._runtime.extend if self._state.lengths[row] else self._runtime.prefill
            logits = call(self._state, row, tokens[absorbed:])[-1]
        known = self._rows[row]
        known.prompt = np.concatenate([known.prompt, tokens])
        return logits if last else None

    def join(self, row: int) -> int:
        """Let a row whose prompt is read take part in decoding. Returns: the row where it stands now."""
        joined = self.decoding
        self._swap(row, joined)
        self.decoding += 1
        return joined

    def leave(self, row: int) -> int:
        """End a row's part in decoding. Returns: the row, of those that go on, that now stands in its place."""
        last = self.decoding - 1
        self.release(row)
        self._swap(row, last)
        self.decoding = last
        return last

    def release(self, row: int) -> None:
        """Keep of a row only its prompt, for others to share."""
        known = self._rows[row]
        if not self._share:
            known.prompt = known.prompt[:0]
        self._state.lengths[row] = known.prompt.size

    def decode(self, tokens: Int64) -> NDArray[np.float32]:
        """Append one token to each decoding row; (decoding, V) logits."""
        return self._runtime.decode(self._first[self.decoding - 1], tokens)

    def _longest_shared(self, prompt: Int64) -> tuple[int, int]:
        """The row whose prompt has most in common with this one, and how much of it may be taken."""
        best, most = 0, 0
        for index, row in enumerate(self._rows if self._share else ()):
            count = min(row.prompt.size, prompt.size - LEAST_PIECE)
            if count <= most:
                continue
            differing = np.flatnonzero(row.prompt[:count] != prompt[:count])
            count = int(differing[0]) if differing.size else count
            if count > most:
                best, most = index, count
        return (best, most) if most >= LEAST_SHARED else (0, 0)

    def _swap(self, one: int, other: int) -> None:
        """Exchange two rows: keys, values, lengths and what is known of them."""
        if one == other:
            return
        lengths = self._state.lengths
        first, second = int(lengths[one]), int(lengths[other])
        for buffer in self._state.buffers:
            kept = buffer[one, :, :first].copy()
            buffer[one, :, :second] = buffer[other, :, :second]
            buffer[other, :, :first] = kept
        lengths[one], lengths[other] = second, first
        self._rows[one], self._rows[other] = self._rows[other], self._rows[one]


def pieces(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Cut tokens [start, stop) into pieces of about `size`, none of one token unless that is all there is."""
    found = []
    while start < stop:
        end = min(start + size, stop)
        if stop - end == 1:
            end = stop  # rather one longer piece than a last one of a single token
        found.append((start, end))
        start = end
    return found
