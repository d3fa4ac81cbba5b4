"""Exported graphs on ONNX Runtime, with our kernels ('ort') or the same file without them ('ort-stock').

A graph keeps its cache in one of two ways. *Shared* (profile `ort`): one buffer per block and part, allocated once
and bound as past and present alike, in which GroupQueryAttention writes new tokens in place; rows may have
different lengths. *Growing* (profile `standard`): it comes back longer after each call, and rows of different
lengths are padded on the left. Profile `deepsparse` grows too, and is told who sees whom (`causal_mask`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from losa_export.errors import CheckpointError, InputError
from losa_export.onnx_logits import FIRST_LOGIT
from losa_export.runtimes.base import (
    DecodeState,
    RuntimeDescription,
    causal_mask,
    check_extension,
    check_next_tokens,
    check_open,
    check_prompt,
    check_state_size,
    check_truncation,
    file_sizes,
)
from losa_export.runtimes.ort_session import OpenSession, SessionOptions, open_session, run_failed
from losa_export.runtimes.threads import resolve_threads

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_PRESENT = "present."


@dataclass(frozen=True)
class CacheLayout:
    """How the graph keeps keys and values.

    Attributes:
        inputs: names of past keys and values, in the order of `outputs`.
        outputs: names of present keys and values.
        kv_heads: heads of keys and values.
        head_dim: length of one key.
        shared: one buffer for past and present; else the cache grows.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kv_heads: int
    head_dim: int
    shared: bool


class SharedState:
    """Preallocated buffers (batch, kv_heads, capacity, head_dim), one per past input."""

    def __init__(self, session: Any, layout: CacheLayout, buffers: list[Float32], lengths: Int64) -> None:
        self.lengths = lengths
        self.capacity = buffers[0].shape[2]
        self.buffers = buffers
        self.ones = np.ones((1, self.capacity), np.int64)
        self.binding = session.io_binding()
        self.bound: dict[str, Any] = {}
        bind_shared(self.binding, layout, buffers)
        self._session, self._layout = session, layout

    @classmethod
    def allocate(cls, session: Any, layout: CacheLayout, batch: int, capacity: int) -> SharedState:
        """All rows empty. Pages of zeros cost nothing until a token is written there."""
        shape = (batch, layout.kv_heads, capacity, layout.head_dim)
        return cls(session, layout, [np.zeros(shape, np.float32) for _ in layout.inputs], np.zeros(batch, np.int64))

    def first(self, rows: int) -> SharedState:
        """The first rows as a state of their own in the same memory, lengths included."""
        buffers = [buffer[:rows] for buffer in self.buffers]
        return SharedState(self._session, self._layout, buffers, self.lengths[:rows])

    def reset(self, row: int) -> None:
        """Empty one row; what it held is overwritten before it is read again."""
        self.lengths[row] = 0


class GrowingState:
    """The cache as the graph last returned it: per row after prefill, one left-padded batch while decoding."""

    def __init__(self, layout: CacheLayout, batch: int, capacity: int) -> None:
        self.lengths: Int64 = np.zeros(batch, np.int64)
        self.capacity = capacity
        self._empty = np.zeros((1, layout.kv_heads, 0, layout.head_dim), np.float32)
        self._count = len(layout.inputs)
        self.rows = [self.no_past() for _ in range(batch)]
        self.batched: list[Any] | None = None  # OrtValues while decoding, and then `rows` is stale

    def no_past(self) -> list[Float32]:
        """A past of no tokens for one row."""
        return [self._empty] * self._count

    def reset(self, row: int) -> None:
        """Empty one row."""
        self.split()
        self.rows[row] = self.no_past()
        self.lengths[row] = 0

    def split(self) -> None:
        """Take the batched cache apart into rows, without their padding."""
        if self.batched is None:
            return
        arrays = [value.numpy() for value in self.batched]
        for row, length in enumerate(self.lengths.tolist()):
            first = arrays[0].shape[2] - length
            self.rows[row] = [array[row : row + 1, :, first:] for array in arrays]
        self.batched = None

    def join(self) -> list[Any]:
        """The rows as one batch, padded on the left to the longest."""
        if self.batched is None:
            longest = int(self.lengths.max())
            self.batched = [
                ort.OrtValue.ortvalue_from_numpy(
                    np.concatenate(
                        [np.pad(row[i], ((0, 0), (0, 0), (longest - row[i].shape[2], 0), (0, 0))) for row in self.rows]
                    )
                )
                for i in range(self._count)
            ]
        return self.batched


class OrtRuntime:
    """A decoder graph on ONNX Runtime; see `losa_export.runtimes.base.Runtime`.

    Attributes:
        kernel_row: row of our kernel table that computes the graph's sparse nodes; None if none of them does.
        layout: of the cache.
        chooses_logits: the head reads no other tokens than those whose logits are wanted; else it reads all.
    """

    def __init__(self, opened: OpenSession, folder: Path, options: SessionOptions) -> None:
        self.name = "ort" if options.custom_op else "ort-stock"
        self._folder = folder
        self._options = options
        self.kernel_row = opened.kernel_row
        self._session: Any = opened.session
        self._reader: Any = None  # the same graph without logits, opened when it is first needed
        self._input_types = {item.name: _dtype(item.type) for item in opened.session.get_inputs()}
        self.chooses_logits = FIRST_LOGIT in self._input_types
        self.layout = read_layout(opened, folder)
        self.vocab_size, self.max_positions = read_sizes(opened, folder)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        threads: int | None = None,
        custom_op: bool = True,
        prepack: bool = True,
        stop_spinning: bool = False,
    ) -> OrtRuntime:
        """Open `folder`.

        Args:
            folder: with model.onnx and its data.
            threads: within one operation; None takes what the machine offers.
            custom_op: register our kernels (runtime 'ort'), or run the file as it is ('ort-stock').
            prepack: see SessionOptions; off saves memory where speed does not matter.
            stop_spinning: see SessionOptions; `absorb` wants it.
        Raises: ConfigError for an impossible number of threads, and what open_session raises.
        """
        options = SessionOptions(resolve_threads(threads), custom_op, prepack, stop_spinning, choose_logits=True)
        return cls(open_session(folder, options), folder, options)

    def new_state(self, batch: int, capacity: int) -> SharedState | GrowingState:
        """An empty cache; its memory is 2 · blocks · batch · kv_heads · capacity · head_dim · 4 bytes once full."""
        self._check_open()
        check_state_size(batch, capacity, self.max_positions)
        if self.layout.shared:
            return SharedState.allocate(self._session, self.layout, batch, capacity)
        return GrowingState(self.layout, batch, capacity)

    def prefill(self, state: DecodeState, row: int, token_ids: Int64, *, last_only: bool = False) -> Float32:
        """Read a prompt into one empty row; (S, V) float32, or (1, V).

        One row at a time, because GroupQueryAttention on the CPU takes no batch of prompts beside a past.
        """
        self._check_open()
        prompt = check_prompt(state, row, token_ids, self.vocab_size)
        ids, positions = prompt[None], np.arange(prompt.size, dtype=np.int64)[None]
        first = prompt.size - 1 if last_only else 0
        if isinstance(state, SharedState):
            # A row of a contiguous buffer is contiguous: the graph writes straight into it.
            binding = self._session.io_binding()
            bind_shared(binding, self.layout, [buffer[row : row + 1] for buffer in state.buffers])
            logits = self._run(binding, ids, positions, state.ones[:, : prompt.size], "prefill", first)
        elif isinstance(state, GrowingState):
            state.split()
            past = [ort.OrtValue.ortvalue_from_numpy(array) for array in state.no_past()]
            logits, present = self._run_growing(past, ids, positions, np.ones_like(ids), "prefill", first)
            state.rows[row] = [value.numpy() for value in present]
        else:
            raise _foreign_state()
        state.lengths[row] = prompt.size
        only_row: Float32 = logits[0]
        return only_row

    def extend(self, state: DecodeState, row: int, token_ids: Int64) -> Float32:
        """Append several tokens to one row; (S, V) float32."""
        self._check_open()
        tokens = check_extension(state, row, token_ids, self.vocab_size)
        first = int(state.lengths[row])
        total = first + tokens.size
        ids, positions = tokens[None], np.arange(first, total, dtype=np.int64)[None]
        if isinstance(state, SharedState):
            binding = self._session.io_binding()
            bind_shared(binding, self.layout, [buffer[row : row + 1] for buffer in state.buffers])
            logits = self._run(binding, ids, positions, state.ones[:, :total], "extend")
        elif isinstance(state, GrowingState):
            state.split()
            past = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in state.rows[row]]
            logits, present = self._run_growing(past, ids, positions, np.ones((1, total), np.int64), "extend")
            state.rows[row] = [value.numpy() for value in present]
        else:
            raise _foreign_state()
        state.lengths[row] = total
        only_row: Float32 = logits[0]
        return only_row

    def absorb(self, state: SharedState, row: int, token_ids: Int64) -> None:
        """Append tokens to one row, empty or not, without computing logits: the head is left out.

        Done by a second session, as `open_reader` has it; the first call opens it.

        Args:
            state: a shared cache made by new_state of this runtime.
            row: which of its rows.
            token_ids: (S,) integers in [0, V), S ≥ 1.
        Raises: InputError as `prefill` and `extend`; FormatError for a graph that cannot do without its logits.
        """
        self._check_open()
        filled = 0 <= row < len(state.lengths) and state.lengths[row] > 0
        tokens = (check_extension if filled else check_prompt)(state, row, token_ids, self.vocab_size)
        self.open_reader()
        first = int(state.lengths[row])
        total = first + tokens.size
        binding = self._reader.io_binding()
        bind_shared(binding, self.layout, [buffer[row : row + 1] for buffer in state.buffers])
        positions = np.arange(first, total, dtype=np.int64)[None]
        bound: dict[str, Any] = {}
        self._bind_tokens(binding, bound, tokens[None], positions, state.ones[:, :total])
        try:
            self._reader.run_with_iobinding(binding)
        except Exception as error:  # as in _run
            raise run_failed(error, self.name, "absorb") from error
        state.lengths[row] = total

    def open_reader(self) -> None:
        """Open the session of `absorb`: the same graph without logits, its weights mapped from the same file.

        Raises: FormatError for a graph that cannot do without its logits, and what open_session raises.
        """
        if self._reader is None:
            options = replace(self._options, outputs=_PRESENT, choose_logits=False)
            self._reader = open_session(self._folder, options).session

    def truncate(self, state: DecodeState, row: int, length: int) -> None:
        """Forget all but the first tokens of a row; a shared buffer is overwritten before it is read again."""
        self._check_open()
        check_truncation(state, row, length)
        if isinstance(state, GrowingState):
            state.split()
            state.rows[row] = [array[:, :, :length] for array in state.rows[row]]
        elif not isinstance(state, SharedState):
            raise _foreign_state()
        state.lengths[row] = length

    def decode(self, state: DecodeState, token_ids: Int64) -> Float32:
        """Append one token to each row; (batch, V) float32."""
        self._check_open()
        tokens = check_next_tokens(state, token_ids, self.vocab_size)
        ids, positions = tokens[:, None], state.lengths[:, None].copy()
        longest = int(state.lengths.max()) + 1
        if isinstance(state, SharedState):
            # padded on the right: a row's tokens come first, the new one last among them
            mask = (np.arange(longest) <= positions).astype(np.int64)
            logits = self._run(state.binding, ids, positions, mask, "decode", bound=state.bound)
        elif isinstance(state, GrowingState):
            # padded on the left: a row's tokens come last, the new one last of all
            mask = (np.arange(longest) >= longest - 1 - positions).astype(np.int64)
            logits, state.batched = self._run_growing(state.join(), ids, positions, mask, "decode")
        else:
            raise _foreign_state()
        state.lengths[:] += 1
        return logits[:, 0]

    def describe(self) -> RuntimeDescription:
        """ONNX Runtime, its threads, our kernel row, and the files."""
        return RuntimeDescription(
            name=self.name,
            engine="onnxruntime",
            version=ort.__version__,
            threads=self._options.threads,
            kernel_row=self.kernel_row,
            model_files=file_sizes(self._folder, "model.onnx*"),
            details={
                "providers": ["CPUExecutionProvider"],
                "custom_op": self._options.custom_op,
                "prepacking": self._options.prepack,
                "cache": "shared buffer, written in place" if self.layout.shared else "grows by concatenation",
            },
        )

    def close(self) -> None:
        """Drop the session; its memory is free once no state of it is left."""
        self._session = self._reader = None

    def _check_open(self) -> None:
        check_open(self._session is None, self.name)

    def _bind_tokens(self, binding: Any, bound: dict[str, Any], ids: Int64, positions: Int64, mask: Int64) -> None:
        """Bind the inputs that change at each call; `bound` has to live until the call is over."""
        given = {"input_ids": ids, "position_ids": positions, "positions": positions, "attention_mask": mask}
        if "causal_mask" in self._input_types:
            given["causal_mask"] = causal_mask(mask, ids.shape[1])
        for name, array in given.items():
            if name in self._input_types:
                self._bind(binding, bound, name, array)

    def _bind(self, binding: Any, bound: dict[str, Any], name: str, array: Int64) -> None:
        """Bind one input. `bound` keeps the memory that each is read from: an input of the same shape as before is
        written there, which takes a tenth of the time.
        """
        if name in bound and bound[name].shape == array.shape:
            bound[name][...] = array
            return
        typed = bound[name] = np.array(array, dtype=self._input_types[name], order="C")
        binding.bind_input(name, "cpu", 0, typed.dtype.type, typed.shape, typed.ctypes.data)

    def _run(
        self,
        binding: Any,
        ids: Int64,
        positions: Int64,
        mask: Int64,
        what: str,
        first: int = 0,
        bound: dict[str, Any] | None = None,
    ) -> Float32:
        """Run with the cache already bound. Returns: logits from token `first` on, in an array of their own."""
        bound = {} if bound is None else bound
        self._bind_tokens(binding, bound, ids, positions, mask)
        if self.chooses_logits:
            self._bind(binding, bound, FIRST_LOGIT, np.array([first]))
        logits = np.empty((len(ids), ids.shape[1] - (first if self.chooses_logits else 0), self.vocab_size), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # the binding's exception classes share no base of their own
            raise run_failed(error, self.name, what) from error
        return logits if self.chooses_logits else logits[:, first:]

    def _run_growing(
        self, past: list[Any], ids: Int64, positions: Int64, mask: Int64, what: str, first: int = 0
    ) -> tuple[Float32, list[Any]]:
        binding = self._session.io_binding()
        for name, value in zip(self.layout.inputs, past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self.layout.outputs:
            binding.bind_output(name, "cpu")
        logits = self._run(binding, ids, positions, mask, what, first)
        # Outputs come in the order in which they were bound, with the logits last.
        return logits, list(binding.get_outputs()[: len(self.layout.outputs)])


def bind_shared(binding: Any, layout: CacheLayout, buffers: list[Float32]) -> None:
    """Bind each buffer as past and as present: the graph then appends in place."""
    for past, present, buffer in zip(layout.inputs, layout.outputs, buffers, strict=True):
        binding.bind_input(past, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
        binding.bind_output(present, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)


def read_layout(opened: OpenSession, folder: Path) -> CacheLayout:
    """The cache of a graph with Hugging Face names.

    Raises: CheckpointError when past and present do not pair up, or their shapes are unknown.
    """
    inputs = {item.name: item for item in opened.session.get_inputs()}
    outputs = {item.name for item in opened.session.get_outputs()}
    past = [name for name in inputs if name.startswith("past_key_values.")]
    present = [name.replace("past_key_values.", _PRESENT, 1) for name in past]
    missing = [name for name in ("input_ids",) if name not in inputs]
    missing += [name for name in ("logits", *present) if name not in outputs]
    if missing or not past:
        raise CheckpointError(
            f"the graph in '{folder}' lacks {', '.join(missing) or 'past_key_values.0.key'}, so it is not a decoder "
            "with a cache; export it with: losa export",
            path=folder,
        )
    _, kv_heads, _, head_dim = inputs[past[0]].shape
    if not isinstance(kv_heads, int) or not isinstance(head_dim, int):
        raise CheckpointError(
            f"the graph in '{folder}' does not fix the heads and head size of its cache ({inputs[past[0]].shape}); "
            "export it with: losa export",
            path=folder,
        )
    profile = opened.session.get_modelmeta().custom_metadata_map.get("losa.profile")
    # A graph made elsewhere names no profile of ours; then its settings tell.
    shared = profile == "ort" if profile else bool(_section(opened, "search").get("past_present_share_buffer", False))
    return CacheLayout(tuple(past), tuple(present), kv_heads, head_dim, shared)


def read_sizes(opened: OpenSession, folder: Path) -> tuple[int, int]:
    """Vocabulary size and number of positions.

    Raises: CheckpointError when neither the graph nor genai_config.json tells.
    """
    model = _section(opened, "model")
    logits = next(item for item in opened.session.get_outputs() if item.name == "logits")
    vocab_size = logits.shape[-1] if isinstance(logits.shape[-1], int) else model.get("vocab_size")
    positions = model.get("context_length")
    if not isinstance(vocab_size, int) or not isinstance(positions, int):
        raise CheckpointError(
            f"'{folder}' does not tell its vocabulary size and context length; genai_config.json is missing or "
            "incomplete: export the model again",
            path=folder,
        )
    return vocab_size, positions


def _section(opened: OpenSession, name: str) -> Mapping[str, Any]:
    section = opened.settings.get(name)
    return section if isinstance(section, dict) else {}


def _foreign_state() -> InputError:
    return InputError("this state was made by another runtime; make it with new_state() of this one")


def _dtype(name: str) -> type[np.generic]:
    types: dict[str, type[np.generic]] = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
    return types.get(name, np.float32)
