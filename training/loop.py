"""The fine-tuning loop, and the only place that steps the adapters' optimizer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losa_export.training.adapter import MaskedLoRALinear
from losa_export.training.config import TrainConfig
from losa_export.training.loss import CausalLoss, Losses, Objective
from losa_export.training.model import AdaptedModel
from losa_export.training.processes import Processes
from losa_export.training.rank import MOMENTS, resize

# Examples of like length are put together within so many batches, which the shuffle has brought together.
_BATCHES_SORTED = 50
# Under padding nothing is learnt and nothing read, so any token that has an embedding will do.
_PADDING = 0


Windows = NDArray[np.int64] | Sequence[NDArray[np.int64]]


class TuningData:
    """Tuning windows in an order that depends on the seed and the place alone, without end.

    Windows of unequal lengths are padded at their ends, and batched with others of like length.

    Args:
        windows: (n, tokens) int64, or n windows of their own lengths.
        batch_size: windows in a batch.
        seed: of the shuffles, a new one for every pass over the windows.
    """

    def __init__(self, windows: Windows, batch_size: int, seed: int) -> None:
        self._windows = windows
        self._batch_size = batch_size
        self._seed = seed
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self._sizes = np.array([window.size for window in windows])
        self._ragged = bool((self._sizes != self._sizes[0]).any())

    def batch(self, number: int) -> NDArray[np.int64]:
        """Batch `number`, (batch_size, tokens), counted from 0 over the whole run."""
        rows = [self._windows[index] for index in self._members(number)]
        batch = np.full((len(rows), max(row.size for row in rows)), _PADDING, dtype=np.int64)
        for place, row in enumerate(rows):
            batch[place, : row.size] = row
        return batch

    def lengths(self, number: int) -> NDArray[np.int64] | None:
        """(batch_size,) tokens of each window of a batch that are no padding; None if windows are all alike."""
        return self._sizes[self._members(number)].astype(np.int64) if self._ragged else None

    def tokens(self, number: int) -> int:
        """Tokens of a batch, without padding."""
        return int(self._sizes[self._members(number)].sum())

    def _members(self, number: int) -> list[int]:
        first = number * self._batch_size
        return [self._member(place) for place in range(first, first + self._batch_size)]

    def _member(self, place: int) -> int:
        epoch, offset = divmod(place, len(self._windows))
        if self._order is None or self._order[0] != epoch:
            random = np.random.default_rng([self._seed, epoch])
            order = random.permutation(len(self._windows))
            self._order = epoch, self._by_length(order, random) if self._ragged else order
        return int(self._order[1][offset])

    def _by_length(self, order: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """The same windows with those of like length side by side, in batches that come in random order."""
        pool = self._batch_size * _BATCHES_SORTED
        pools = (order[start : start + pool] for start in range(0, order.size, pool))
        ordered = np.concatenate([part[np.argsort(-self._sizes[part], kind="stable")] for part in pools])
        whole = ordered.size // self._batch_size * self._batch_size
        batches = random.permutation(ordered[:whole].reshape(-1, self._batch_size))
        return np.concatenate([batches.reshape(-1), ordered[whole:]])


class Tuner:
    """Adapters, their optimizer, and the step that moves them.

    One optimizer state serves all rounds, unless somebody calls `forget_moments` between them.

    Args:
        adapted: the model, already on its device.
        data: where batches come from.
        config: the run's configuration.
        accelerator: accelerate's Accelerator: placement, backward, clipping, several processes.
    """

    def __init__(self, adapted: AdaptedModel, data: TuningData, config: TrainConfig, accelerator: Any) -> None:
        self._adapted = adapted
        self._data = data
        self._config = config
        self._accelerator = accelerator
        self._processes = Processes(accelerator)
        self._parameters = [
            parameter for layer in adapted.layers.values() for parameter in (layer.lora_A, layer.lora_B)
        ]
        # Decay is applied below, to the active slices only; the optimizer's own would shrink the others too.
        self._adamw = torch.optim.AdamW(self._parameters, lr=config.learning_rate, weight_decay=0.0)
        module = CausalLoss(
            adapted.model,
            Objective(config.kl_weight, config.squarehead_weight, config.gradient_checkpointing),
            self._processes.mean,
        )
        with warnings.catch_warnings():
            # accelerate still calls one of PyTorch's options by its former name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._module, self._optimizer = accelerator.prepare(module, self._adamw)

    def step(self, number: int, rate: float) -> Losses[float]:
        """One optimizer step on batch `number` at learning rate `rate`. Returns: the losses before it.

        Each process takes every so many'th window; losses and gradients are those of the whole batch.
        """
        mine = slice(self._accelerator.process_index, None, self._accelerator.num_processes)
        batch, lengths = self._data.batch(number)[mine], self._data.lengths(number)
        device = self._accelerator.device
        with self._dropping(number):
            if lengths is None:
                losses = self._module(torch.from_numpy(batch).to(device))
            else:
                losses = self._module(torch.from_numpy(batch).to(device), torch.from_numpy(lengths[mine]).to(device))
            self._accelerator.backward(losses.total)
        if self._config.gradient_clip > 0.0:
            self._accelerator.clip_grad_norm_(self._parameters, self._config.gradient_clip)
        decay_active(self._adapted.layers.values(), rate * self._config.weight_decay)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return Losses(*self._processes.mean(torch.stack([value.detach() for value in losses])).tolist())

    def tokens(self, number: int) -> int:
        """Tokens that step `number` trains on."""
        return self._data.tokens(number)

    @contextlib.contextmanager
    def _dropping(self, number: int) -> Iterator[None]:
        """Within the block adapters drop inputs, if they shall: which ones depends on seed, step and process alone."""
        if self._config.adapter_dropout == 0.0:
            yield
            return
        device, layers = self._accelerator.device, self._adapted.layers.values()
        place = [self._config.seed, number, self._accelerator.process_index]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
            for layer in layers:
                layer.train()
            try:
                yield
            finally:
                for layer in layers:
                    layer.eval()

    def forget_moments(self) -> None:
        """Let the optimizer begin anew, as after its construction."""
        self._adamw.state.clear()

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Give each layer its active rank, and forget the moments of slices that sleep.

        With zero gradients and zero moments Adam leaves a sleeping slice exactly where it is.
        """
        for name, layer in self._adapted.layers.items():
            layer.set_rank(ranks[name])
            for moment in MOMENTS:
                if moment in self._adamw.state[layer.lora_A]:
                    self._adamw.state[layer.lora_A][moment][layer.rank :].zero_()
                    self._adamw.state[layer.lora_B][moment][:, layer.rank :].zero_()

    def resize(self, ranks: Mapping[str, int], *, absorb: bool = False) -> None:
        """Give each layer another rank, as `rank.resize` does: little or nothing of what was learnt is lost.

        Args:
            ranks: of each layer.
            absorb: let a frozen weight that is no longer the checkpoint's take up what a smaller rank loses, so that
                the effective weight stays, but for its rounding.
        """
        for name, layer in self._adapted.layers.items():
            loses = ranks[name] < layer.rank and bool(layer.lora_B.any())
            if not (absorb and loses and layer.weight_changed):
                resize(layer, ranks[name], self._adamw.state)
                continue
            with self._adapted.at_work({name: layer}):
                effective = layer.merged()
                resize(layer, ranks[name], self._adamw.state)
                layer.set_effective_weight(effective)

    def tensors(self) -> dict[str, Tensor]:
        """Adapters and optimizer moments, by name, for saving."""
        saved = {}
        for name, layer in self._adapted.layers.items():
            for side, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
                saved[f"{side}:{name}"] = parameter.detach()
                for kept in (*MOMENTS, "step"):
                    if kept in self._adamw.state[parameter]:
                        saved[f"{kept}:{side}:{name}"] = self._adamw.state[parameter][kept]
        return saved

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take over adapters and moments as `tensors` returned them, `steps` steps after the optimizer's start."""
        for name, layer in self._adapted.layers.items():
            for side, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
                with torch.no_grad():
                    parameter.copy_(tensors[f"{side}:{name}"])
                key = f"{side}:{name}"
                if steps > 0:
                    self._adamw.state[parameter] = {
                        "step": tensors[f"step:{key}"].clone(),
                        **{m: tensors[f"{m}:{key}"].to(parameter.device).clone() for m in MOMENTS},
                    }


@torch.no_grad()
def decay_active(layers: Iterable[MaskedLoRALinear], amount: float) -> None:
    """Shrink the active slices of A and B by the factor 1 − `amount`, as AdamW's decoupled decay does."""
    if amount > 0.0:
        for layer in layers:
            for active in layer.active():
                active.mul_(1.0 - amount)
