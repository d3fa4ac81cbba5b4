"""llama.cpp on a GGUF file, through the low-level half of llama-cpp-python.

It runs in an environment of its own (`losa_export.runtimes.isolated`), where it was built for this very processor, so
this module needs nothing beside it but numpy. `python -m losa_export.eval.gguf_peer` makes the folder. All is left as
llama.cpp has it by itself, since that is what its users get: weights repacked at load, keys and values in float16,
flash attention where it thinks so, rows of a batch decoded together.
"""

from __future__ import annotations

import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import CheckpointError, InputError, RuntimeFailureError
from losa_export.runtimes.base import (
    DecodeState,
    RuntimeDescription,
    check_next_tokens,
    check_open,
    check_prompt,
    check_state_size,
    file_sizes,
)
from losa_export.runtimes.isolated import not_importable
from losa_export.runtimes.threads import resolve_threads

GGUF_FILE = "model.gguf"
# A prompt goes through in pieces of so many tokens; llama.cpp's own default.
_PIECE = 512

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


class LlamaCppState:
    """A context of llama.cpp with one sequence for each row."""

    def __init__(self, library: Any, context: Any, batch: int, capacity: int) -> None:
        self.lengths: Int64 = np.zeros(batch, np.int64)
        self.capacity = capacity
        self.context = context
        self._library = library
        self.free = weakref.finalize(self, library.llama_free, context)

    def reset(self, row: int) -> None:
        """Empty one row."""
        self._library.llama_memory_seq_rm(self._library.llama_get_memory(self.context), row, -1, -1)
        self.lengths[row] = 0


class LlamaCppRuntime:
    """A GGUF model on llama.cpp; see `losa_export.runtimes.base.Runtime`."""

    name = "llamacpp"

    def __init__(self, library: Any, model: Any, version: str, folder: Path, threads: int) -> None:
        self._library, self._model = library, model
        self._version, self._folder, self._threads = version, folder, threads
        self.vocab_size = int(library.llama_vocab_n_tokens(library.llama_model_get_vocab(model)))
        self.max_positions = int(library.llama_model_n_ctx_train(model))
        # Contexts must go before the model does.
        self._states: weakref.WeakSet[LlamaCppState] = weakref.WeakSet()

    @classmethod
    def load(cls, folder: Path, *, threads: int | None = None) -> LlamaCppRuntime:
        """Open `folder`, which holds a model.gguf.

        Raises:
            EngineUnavailableError: this interpreter has no llama-cpp-python.
            CheckpointError: the folder holds no model.gguf.
            RuntimeFailureError: llama.cpp refuses the file.
        """
        try:
            library = import_module("llama_cpp.llama_cpp")
            version = str(import_module("llama_cpp").__version__)
        except ImportError as error:
            raise not_importable("llama.cpp", "llamacpp", error) from error
        if not (folder / GGUF_FILE).is_file():
            raise CheckpointError(
                f"'{folder}' has no {GGUF_FILE}; make it with: python -m losa_export.eval.gguf_peer", path=folder
            )
        count = resolve_threads(threads)
        library.llama_backend_init()
        settings = library.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = library.llama_model_load_from_file(str(folder / GGUF_FILE).encode(), settings)
        if not model:
            raise RuntimeFailureError(
                f"llama.cpp refused '{folder / GGUF_FILE}'; make it again with: python -m losa_export.eval.gguf_peer",
                path=folder,
            )
        return cls(library, model, version, folder, count)

    def new_state(self, batch: int, capacity: int) -> LlamaCppState:
        """An empty cache of `batch` sequences."""
        check_open(self._model is None, self.name)
        check_state_size(batch, capacity, self.max_positions)
        settings = self._library.llama_context_default_params()
        settings.n_ctx = batch * capacity  # which llama.cpp rounds up
        settings.n_seq_max = batch
        settings.n_batch = max(capacity, batch)
        settings.n_ubatch = min(_PIECE, settings.n_batch)
        settings.n_threads = settings.n_threads_batch = self._threads
        context = self._library.llama_init_from_model(self._model, settings)
        if not context:
            raise RuntimeFailureError(
                f"llama.cpp cannot make a cache of {batch} row(s) of {capacity} tokens; it may lack memory",
                batch=batch,
                capacity=capacity,
            )
        state = LlamaCppState(self._library, context, batch, capacity)
        self._states.add(state)
        return state

    def prefill(self, state: DecodeState, row: int, token_ids: Int64, *, last_only: bool = False) -> Float32:
        """Read a prompt into one empty row; (S, V) float32, or (1, V)."""
        check_open(self._model is None, self.name)
        prompt = check_prompt(state, row, token_ids, self.vocab_size)
        places = np.arange(prompt.size)
        wanted = places >= (prompt.size - 1 if last_only else 0)
        logits = self._append(state, prompt, places, np.full(prompt.size, row), wanted)
        state.lengths[row] = prompt.size
        return logits

    def decode(self, state: DecodeState, token_ids: Int64) -> Float32:
        """Append one token to each row, all in one call; (batch, V) float32."""
        check_open(self._model is None, self.name)
        tokens = check_next_tokens(state, token_ids, self.vocab_size)
        logits = self._append(state, tokens, state.lengths, np.arange(tokens.size), np.ones(tokens.size, np.bool_))
        state.lengths[:] += 1
        return logits

    def _append(
        self, state: DecodeState, ids: Int64, positions: Int64, rows: Int64, wanted: NDArray[np.bool_]
    ) -> Float32:
        """Logits (…, V) of those tokens for which they are wanted; each token has its position of its row."""
        if not isinstance(state, LlamaCppState):
            raise InputError("this state was made by another runtime; make it with new_state() of this one")
        count = ids.size
        batch = self._library.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            given = ((batch.token, ids), (batch.pos, positions), (batch.n_seq_id, 1), (batch.logits, wanted))
            for pointer, values in given:
                np.ctypeslib.as_array(pointer, (count,))[:] = values
            for place, row in enumerate(rows.tolist()):
                batch.seq_id[place][0] = row
            code = self._library.llama_decode(state.context, batch)
        finally:
            self._library.llama_batch_free(batch)
        if code != 0:
            raise RuntimeFailureError(f"llama.cpp failed while running the model (code {code})", code=code)
        logits = self._library.llama_get_logits(state.context)
        # llama.cpp uses the memory of its answer again.
        return np.array(np.ctypeslib.as_array(logits, (int(wanted.sum()), self.vocab_size)), dtype=np.float32)

    def describe(self) -> RuntimeDescription:
        """The binding's version, what the build uses of this processor, and the files."""
        features = self._library.llama_print_system_info().decode(errors="replace")
        return RuntimeDescription(
            name=self.name,
            engine="llama.cpp (llama-cpp-python)",
            version=self._version,
            threads=self._threads,
            kernel_row=None,
            model_files=file_sizes(self._folder, GGUF_FILE),
            details={"cache": "float16", "features": features.strip()},
        )

    def close(self) -> None:
        """Free the contexts and the model; closing twice is harmless."""
        for state in list(self._states):
            state.free()
        if self._model is not None:
            self._library.llama_model_free(self._model)
        self._model = None
