"""The dense peer: a Hugging Face checkpoint on PyTorch through transformers, on the CPU, in float32.

It is the reference that exported graphs are compared with, and a baseline to time against. It needs the extra
'train'; no other runtime imports torch, and this one only when it loads.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import CheckpointError, InputError, MissingDependencyError, RuntimeFailureError
from losa_export.onnx_file import MODEL_FILE
from losa_export.runtimes.base import (
    DecodeState,
    RuntimeDescription,
    check_extension,
    check_next_tokens,
    check_open,
    check_prompt,
    check_state_size,
    check_truncation,
    file_sizes,
)
from losa_export.runtimes.threads import resolve_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    Layer = tuple[torch.Tensor, torch.Tensor]  # keys and values, each (rows, kv_heads, tokens, head_dim)


class TorchState:
    """The cache of a batch: one piece per row after prefill, one padded on the left while decoding."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.lengths: NDArray[np.int64] = np.zeros(batch, np.int64)
        self.capacity = capacity
        self.rows: list[list[Layer] | None] = [None] * batch
        self.batched: Any = None  # a transformers Cache while decoding, and then `rows` is stale

    def reset(self, row: int) -> None:
        """Empty one row."""
        self.split()
        self.rows[row] = None
        self.lengths[row] = 0

    def split(self) -> None:
        """Take the batched cache apart into rows, without their padding."""
        if self.batched is None:
            return
        for row, length in enumerate(self.lengths.tolist()):
            self.rows[row] = (
                [
                    (layer.keys[row : row + 1, :, -length:], layer.values[row : row + 1, :, -length:])
                    for layer in self.batched.layers
                ]
                if length
                else None
            )
        self.batched = None


class TorchRuntime:
    """A causal language model of transformers; see `losa_export.runtimes.base.Runtime`."""

    name = "torch"

    def __init__(self, model: Any, folder: Path, threads: int) -> None:
        self._model = model
        self._folder = folder
        self._threads = threads
        self.vocab_size = int(model.config.vocab_size)
        self.max_positions = int(model.config.max_position_embeddings)

    @classmethod
    def load(cls, folder: Path, *, threads: int | None = None) -> TorchRuntime:
        """Load a checkpoint folder in float32.

        Sets the number of threads of PyTorch for the whole process, which is the only way it offers.

        Raises: MissingDependencyError, CheckpointError, RuntimeFailureError.
        """
        threads = resolve_threads(threads)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"'{folder}' has no config.json, so it is not a Hugging Face checkpoint; "
                "the runtime 'torch' loads a merged/ folder, not an exported one",
                path=folder,
            )
        if (folder / MODEL_FILE).is_file() and not any(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"'{folder}' is an exported folder; the runtime 'torch' loads the merged/ folder it came from",
                path=folder,
            )
        try:
            import torch
            import transformers
        except ImportError as error:
            raise MissingDependencyError.for_extra(error.name or "torch", "train", "the runtime 'torch'") from error
        torch.set_num_threads(threads)
        try:
            with _quiet(transformers):
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    str(folder), dtype=torch.float32, local_files_only=True
                )
        except Exception as error:  # transformers raises OSError, ValueError, safetensors' own and others
            raise RuntimeFailureError(
                f"transformers cannot load '{folder}': {error}; check the folder with: losa doctor", path=folder
            ) from error
        model.eval()
        return cls(model, folder, threads)

    def new_state(self, batch: int, capacity: int) -> TorchState:
        """An empty cache; it grows token by token up to `capacity`."""
        self._check_open()
        check_state_size(batch, capacity, self.max_positions)
        return TorchState(batch, capacity)

    def prefill(
        self, state: DecodeState, row: int, token_ids: NDArray[np.int64], *, last_only: bool = False
    ) -> NDArray[np.float32]:
        """Read a prompt into one empty row; (S, V) float32, or (1, V)."""
        self._check_open()
        state = _own(state)
        prompt = check_prompt(state, row, token_ids, self.vocab_size)
        state.split()
        cache = self._cache([])
        logits = self._forward(prompt[None], np.arange(prompt.size)[None], cache, None, last_only=last_only)
        state.rows[row] = [(layer.keys, layer.values) for layer in cache.layers]
        state.lengths[row] = prompt.size
        only_row: NDArray[np.float32] = logits[0]
        return only_row

    def extend(self, state: DecodeState, row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append several tokens to one row; (S, V) float32."""
        self._check_open()
        state = _own(state)
        tokens = check_extension(state, row, token_ids, self.vocab_size)
        state.split()
        first = int(state.lengths[row])
        cache = self._cache(state.rows[row] or [])
        logits = self._forward(tokens[None], np.arange(first, first + tokens.size)[None], cache, None)
        state.rows[row] = [(layer.keys, layer.values) for layer in cache.layers]
        state.lengths[row] = first + tokens.size
        only_row: NDArray[np.float32] = logits[0]
        return only_row

    def truncate(self, state: DecodeState, row: int, length: int) -> None:
        """Forget all but the first tokens of a row."""
        self._check_open()
        state = _own(state)
        check_truncation(state, row, length)
        state.split()
        state.rows[row] = [(keys[:, :, :length], values[:, :, :length]) for keys, values in state.rows[row] or []]
        state.lengths[row] = length

    def decode(self, state: DecodeState, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token to each row; (batch, V) float32."""
        self._check_open()
        state = _own(state)
        tokens = check_next_tokens(state, token_ids, self.vocab_size)
        if state.batched is None:
            state.batched = self._cache(_padded(state, self._layer_template()))
        longest = int(state.lengths.max())
        # Rows of different lengths are padded on the left; without padding no mask is passed, which is faster.
        mask = None
        if (state.lengths != longest).any():
            mask = (np.arange(longest + 1) >= longest - state.lengths[:, None]).astype(np.int64)
        logits = self._forward(tokens[:, None], state.lengths[:, None], state.batched, mask)
        state.lengths += 1
        return logits[:, 0]

    def describe(self) -> RuntimeDescription:
        """PyTorch, its threads and the weight files."""
        import torch
        import transformers

        return RuntimeDescription(
            name=self.name,
            engine="torch",
            version=torch.__version__,
            threads=self._threads,
            kernel_row=None,
            model_files=file_sizes(self._folder, "*.safetensors"),
            details={
                "transformers": transformers.__version__,
                "dtype": "float32",
                "attention": self._model.config._attn_implementation if self._model is not None else None,
                "cache": "grows by concatenation",
            },
        )

    def close(self) -> None:
        """Drop the model."""
        self._model = None

    def _check_open(self) -> None:
        check_open(self._model is None, self.name)

    def _forward(
        self,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        cache: Any,
        mask: NDArray[np.int64] | None,
        *,
        last_only: bool = False,
    ) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            output = self._model(
                input_ids=torch.from_numpy(ids),
                position_ids=torch.from_numpy(np.array(positions, np.int64)),
                attention_mask=None if mask is None else torch.from_numpy(mask),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=int(last_only),  # 0: all
            )
        logits: NDArray[np.float32] = output.logits.float().numpy()
        return logits

    def _cache(self, layers: list[Layer]) -> Any:
        import transformers

        cache = transformers.DynamicCache()
        for index, (keys, values) in enumerate(layers):
            cache.update(keys, values, index)
        return cache

    def _layer_template(self) -> list[Layer]:
        """An empty piece of cache per block, for a row that was never prefilled."""
        import torch

        config = self._model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        empty = torch.zeros(1, kv_heads, 0, head_dim)
        return [(empty, empty)] * int(config.num_hidden_layers)


def _padded(state: TorchState, empty: list[Layer]) -> list[Layer]:
    """The rows as one batch per block, padded on the left to the longest; [] when nothing is cached yet."""
    import torch

    longest = int(state.lengths.max())
    if longest == 0:
        return []
    pieces = [row if row is not None else empty for row in state.rows]

    def join(block: int, part: int) -> torch.Tensor:
        parts = [piece[block][part] for piece in pieces]
        return torch.cat([torch.nn.functional.pad(p, (0, 0, longest - p.shape[2], 0)) for p in parts])

    return [(join(block, 0), join(block, 1)) for block in range(len(empty))]


def _own(state: DecodeState) -> TorchState:
    if not isinstance(state, TorchState):
        raise InputError("this state was made by another runtime; make it with new_state() of this one")
    return state


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the progress bar and log lines of loading, and put both back as they were."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
