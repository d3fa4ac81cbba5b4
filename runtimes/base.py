"""What every engine offers: load, prefill one row, decode all rows, describe, close.

Eval and the token generator are written against these protocols only, so an engine is judged by its answers
and its clock, never by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import InputError

RuntimeName = Literal["ort", "ort-stock", "genai", "torch", "deepsparse", "openvino", "optimum", "llamacpp"]
RUNTIME_NAMES: tuple[RuntimeName, ...] = get_args(RuntimeName)


@dataclass(frozen=True)
class RuntimeDescription:
    """What answered, for the record beside a measurement.

    Attributes:
        name: as in RUNTIME_NAMES.
        engine: the package that computes, such as 'onnxruntime'.
        version: the version of that package.
        threads: compute threads within one operation.
        kernel_row: the row of our own kernel table that was chosen; None when none of our kernels runs.
        model_files: file name → bytes of what was loaded.
        details: further facts, such as providers and cache layout.
    """

    name: str
    engine: str
    version: str
    threads: int
    kernel_row: str | None
    model_files: Mapping[str, int]
    details: Mapping[str, object] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """The same as plain values that JSON can hold."""
        return asdict(self)


@runtime_checkable
class DecodeState(Protocol):
    """The key/value cache of a batch, and how far each row has come.

    Attributes:
        lengths: (batch,) int64, tokens cached in each row.
        capacity: tokens that a row can hold.
    """

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(batch,) int64."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens per row."""
        ...

    def reset(self, row: int) -> None:
        """Empty one row, so that another sequence can be prefilled there."""
        ...


@runtime_checkable
class Runtime(Protocol):
    """A loaded decoder on one engine.

    Attributes:
        name: as in RUNTIME_NAMES.
        vocab_size: V, the length of a row of logits.
        max_positions: the longest sequence that the model's rotary embedding covers.
    """

    @property
    def name(self) -> str:
        """As in RUNTIME_NAMES."""
        ...

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def max_positions(self) -> int:
        """Tokens."""
        ...

    def new_state(self, batch: int, capacity: int) -> DecodeState:
        """An empty cache of `batch` rows of up to `capacity` tokens.

        Raises: InputError when either is below 1, or capacity is beyond max_positions.
        """
        ...

    def prefill(
        self, state: DecodeState, row: int, token_ids: NDArray[np.int64], *, last_only: bool = False
    ) -> NDArray[np.float32]:
        """Read a prompt into one empty row.

        Args:
            state: a cache made by new_state of this runtime.
            row: which of its rows.
            token_ids: (S,) integers in [0, V), S ≥ 1.
            last_only: logits after the last token alone, which engines that can compute them so get sooner.
        Returns: (S, V) float32 logits, one row after each token; (1, V) if last_only.
        Raises: InputError for an empty prompt, ids out of range, a row in use, or S beyond the capacity.
        """
        ...

    def decode(self, state: DecodeState, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token to each row; the rows may have different lengths.

        Args:
            state: a cache made by new_state of this runtime.
            token_ids: (batch,) integers in [0, V).
        Returns: (batch, V) float32 logits after those tokens.
        Raises: InputError for ids out of range, a wrong count, or a row that is full.
        """
        ...

    def describe(self) -> RuntimeDescription:
        """Engine, version, threads, kernel and files, for the record."""
        ...

    def close(self) -> None:
        """Release the model; the runtime cannot be used afterwards. Closing twice is harmless."""
        ...


@runtime_checkable
class ExtendingRuntime(Runtime, Protocol):
    """A runtime that can go on from a prompt in several ways: what many questions about one text need."""

    def extend(self, state: DecodeState, row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append several tokens to one row that is not empty.

        Args:
            state: a cache made by new_state of this runtime.
            row: which of its rows.
            token_ids: (S,) integers in [0, V), S ≥ 1.
        Returns: (S, V) float32 logits, one row after each token.
        Raises: InputError for no tokens, ids out of range, an empty row, or one that would become too long.
        """
        ...

    def truncate(self, state: DecodeState, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of a row. Raises: InputError if it has fewer, or none would stay."""
        ...


def check_state_size(batch: int, capacity: int, max_positions: int) -> None:
    """Raise InputError unless a cache of this size can be made for the model."""
    if batch < 1 or capacity < 1:
        raise InputError(
            f"a cache of {batch} row(s) of {capacity} token(s) was asked for; both must be at least 1",
            batch=batch,
            capacity=capacity,
        )
    if capacity > max_positions:
        raise InputError(
            f"a cache of {capacity} tokens was asked for, but the model knows only {max_positions} positions; "
            "shorten the prompt or ask for fewer new tokens",
            capacity=capacity,
            max_positions=max_positions,
        )


def check_prompt(state: DecodeState, row: int, token_ids: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
    """The prompt as contiguous int64, if it can be prefilled into `row`; else InputError."""
    _check_row(state, row)
    prompt = _as_ids(token_ids)
    if prompt.size == 0:
        raise InputError("the prompt is empty: give at least one token", row=row)
    _check_range(prompt, vocab_size, "prompt token")
    if state.lengths[row] != 0:
        raise InputError(
            f"row {row} of the cache already holds {int(state.lengths[row])} tokens; "
            "call reset(row) before another prompt is read into it",
            row=row,
        )
    if prompt.size > state.capacity:
        raise InputError(
            f"the prompt has {prompt.size} tokens, but the cache holds {state.capacity} per row; "
            "make the state with a larger capacity",
            row=row,
            capacity=state.capacity,
        )
    return prompt


def check_extension(state: DecodeState, row: int, token_ids: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
    """More tokens of `row` as contiguous int64, if it has some already and room for these; else InputError."""
    _check_row(state, row)
    tokens, length = _as_ids(token_ids), int(state.lengths[row])
    if tokens.size == 0 or length == 0:
        raise InputError(f"{tokens.size} tokens for row {row}, which holds {length}: it needs some of both", row=row)
    _check_range(tokens, vocab_size, "token")
    if length + tokens.size > state.capacity:
        raise InputError(
            f"row {row} of the cache would hold {length + tokens.size} tokens of {state.capacity}; "
            "make the state with a larger capacity",
            row=row,
            capacity=state.capacity,
        )
    return tokens


def check_truncation(state: DecodeState, row: int, length: int) -> None:
    """Raise InputError unless `row` has `length` ≥ 1 tokens or more."""
    _check_row(state, row)
    if not 1 <= length <= state.lengths[row]:
        raise InputError(f"row {row} holds {int(state.lengths[row])} tokens and cannot be cut to {length}", row=row)


def check_next_tokens(state: DecodeState, token_ids: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
    """One token per row as contiguous int64, if each row has room for it; else InputError."""
    rows = len(state.lengths)
    tokens = _as_ids(token_ids)
    if tokens.size != rows:
        raise InputError(f"{tokens.size} next tokens were given for a cache of {rows} rows: give one per row")
    _check_range(tokens, vocab_size, "next token of row")
    longest = int(state.lengths.max())
    if longest >= state.capacity:
        row = int(state.lengths.argmax())
        raise InputError(
            f"row {row} of the cache is full: it holds {longest} tokens of {state.capacity}; "
            "make the state with a larger capacity",
            row=row,
            capacity=state.capacity,
        )
    return tokens


def causal_mask(mask: NDArray[np.int64], sequence: int) -> NDArray[np.int64]:
    """(batch, 1, sequence, total): 1 where one of the last `sequence` tokens sees a token, itself always.

    Args:
        mask: (batch, total), 1 where a token stands and not padding.
        sequence: new tokens, which are the last ones.
    """
    total = mask.shape[1]
    places = np.arange(total)
    queries = places[total - sequence :, None]
    visible = (places <= queries) & mask[:, None, None, :].astype(bool)
    seen: NDArray[np.int64] = (visible | (places == queries)).astype(np.int64)
    return seen


def check_open(closed: bool, name: str) -> None:
    """Raise InputError when a runtime is used after close()."""
    if closed:
        raise InputError(f"the runtime '{name}' is closed; load the folder again to use it")


def file_sizes(folder: Path, pattern: str = "*") -> dict[str, int]:
    """File name → bytes for the plain files of `folder` that match, sorted by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob(pattern)) if path.is_file()}


def _check_row(state: DecodeState, row: int) -> None:
    rows = len(state.lengths)
    if not 0 <= row < rows:
        raise InputError(f"row {row} of the cache was asked for, but it has rows 0 to {rows - 1}", row=row)


def _as_ids(token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InputError(
            f"token ids must be one row of integers, but are {ids.dtype} of shape {ids.shape}; "
            "pass one sequence at a time"
        )
    return np.ascontiguousarray(ids, dtype=np.int64)


def _check_range(ids: NDArray[np.int64], vocab_size: int, what: str) -> None:
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if outside.size:
        index = int(outside[0])
        raise InputError(
            f"{what} {index} is id {int(ids[index])}, but the model's vocabulary has ids 0 to {vocab_size - 1}; "
            "use the tokenizer that came with the model",
            index=index,
            token_id=int(ids[index]),
        )
