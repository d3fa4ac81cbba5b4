"""The fine-tuning loop, and the only place that steps an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losa_export.training.adapter import MaskedLoRALinear
from losa_export.training.config import TrainConfig
from losa_export.training.loss import CausalLoss
from losa_export.training.model import AdaptedModel

_MOMENTS = ("exp_avg", "exp_avg_sq")


class TuningData:
    """Tuning windows in an order that depends on the seed and the place alone, without end.

    Args:
        windows: (n, tokens) int64.
        batch_size: windows in a batch.
        seed: of the shuffles, a new one for every pass over the windows.
    """

    def __init__(self, windows: NDArray[np.int64], batch_size: int, seed: int) -> None:
        self._windows = windows
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle: tuple[int, NDArray[np.int64]] | None = None

    def batch(self, number: int) -> NDArray[np.int64]:
        """Batch `number`, (batch_size, tokens), counted from 0 over the whole run."""
        first = number * self._batch_size
        return np.stack([self._window(place) for place in range(first, first + self._batch_size)])

    def _window(self, place: int) -> NDArray[np.int64]:
        epoch, offset = divmod(place, len(self._windows))
        if self._shuffle is None or self._shuffle[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._windows))
            self._shuffle = epoch, order
        row: NDArray[np.int64] = self._windows[self._shuffle[1][offset]]
        return row


class Tuner:
    """Adapters, their optimizer, and the step that moves them. One optimizer state serves all rounds.

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
        self._parameters = [
            parameter for layer in adapted.layers.values() for parameter in (layer.lora_A, layer.lora_B)
        ]
        # Decay is applied below, to the active slices only; the optimizer's own would shrink the others too.
        self._adamw = torch.optim.AdamW(self._parameters, lr=config.learning_rate, weight_decay=0.0)
        self._module, self._optimizer = accelerator.prepare(CausalLoss(adapted.model), self._adamw)

    def step(self, number: int, rate: float) -> float:
        """One optimizer step on batch `number` at learning rate `rate`. Returns: the loss before it."""
        batch = torch.from_numpy(self._data.batch(number))
        mine = batch[self._accelerator.process_index :: self._accelerator.num_processes]
        loss = self._module(mine.to(self._accelerator.device))
        self._accelerator.backward(loss)
        if self._config.gradient_clip > 0.0:
            self._accelerator.clip_grad_norm_(self._parameters, self._config.gradient_clip)
        decay_active(self._adapted.layers.values(), rate * self._config.weight_decay)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(self._accelerator.reduce(loss.detach(), reduction="mean"))

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Give each layer its active rank, and forget the moments of slices that sleep.

        With zero gradients and zero moments Adam leaves a sleeping slice exactly where it is.
        """
        for name, layer in self._adapted.layers.items():
            layer.set_rank(ranks[name])
            for moment in _MOMENTS:
                if moment in self._adamw.state[layer.lora_A]:
                    self._adamw.state[layer.lora_A][moment][layer.rank :].zero_()
                    self._adamw.state[layer.lora_B][moment][:, layer.rank :].zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Adapters and optimizer moments, by name, for saving."""
        saved = {}
        for name, layer in self._adapted.layers.items():
            for side, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
                saved[f"{side}:{name}"] = parameter.detach()
                for moment in _MOMENTS:
                    if moment in self._adamw.state[parameter]:
                        saved[f"{moment}:{side}:{name}"] = self._adamw.state[parameter][moment]
        return saved

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take over adapters and moments as `tensors` returned them, after `steps` optimizer steps."""
        for name, layer in self._adapted.layers.items():
            for side, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
                with torch.no_grad():
                    parameter.copy_(tensors[f"{side}:{name}"])
                key = f"{side}:{name}"
                if steps > 0:
                    self._adamw.state[parameter] = {
                        "step": torch.tensor(float(steps), dtype=torch.float32),
                        **{m: tensors[f"{m}:{key}"].to(parameter.device).clone() for m in _MOMENTS},
                    }


@torch.no_grad()
def decay_active(layers: Iterable[MaskedLoRALinear], amount: float) -> None:
    """Shrink the active slices of A and B by the factor 1 − `amount`, as AdamW's decoupled decay does."""
    if amount > 0.0:
        for layer in layers:
            for active in layer.active():
                active.mul_(1.0 - amount)
