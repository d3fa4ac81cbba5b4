"""Rounding a model's linears one after another, each on the inputs that the ones before it leave.

Two copies of the hidden states walk through the blocks: as the checkpoint computes them, and as the rounded linears do.
When a linear is asked for, the latter are run up to it, and the second moments of what it reads from either say how to
round it (`losa_export.compensate`). So its rounding makes up for what earlier ones did. The activations of one block
are in memory beside the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from losa_export.compensate import InputMoments, compensated_int4, compensated_int8
from losa_export.errors import CheckpointError
from losa_export.layout import layout_of
from losa_export.quantise import Bool, Float32, Rounded
from losa_export.reference import load_model
from losa_export.training.calibration import BlockBatch, capture_block_inputs, run_block

_WINDOWS_AT_ONCE = 8


class CalibratedRounding:
    """Rounds what an exporter asks for, if it asks in the order in which a token meets the linears.

    Args:
        model: a causal language model in float32; its linears are replaced by their rounded selves as they come.
        windows: (n, tokens) int64 token ids.
        values: type to round to.
        group: columns that share a scale.
        on_rounded: called with the number of weights after each linear, for progress.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Tensor,
        values: Literal["int8", "int4"],
        group: int,
        on_rounded: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._on_rounded = on_rounded
        self._values = values
        self._group = group
        self._layout = layout_of(model)
        self._blocks = tuple(model.get_submodule(self._layout.blocks).children())
        self._checkpoint = capture_block_inputs(model, self._blocks, windows, _WINDOWS_AT_ONCE)
        self._rounded = [BlockBatch(batch.hidden, batch.keyword_arguments) for batch in self._checkpoint]
        self._index = -1
        self._enter(0)

    def __call__(self, names: Sequence[str], weight: Float32, keep: Bool) -> Rounded:
        """Round linears that read the same inputs.

        Args:
            names: modules, for example ("model.layers.0.self_attn.o_proj",).
            weight: (N, K) float32, their rows below each other.
            keep: (N, K) bool, True = kept.

        Raises: FormatError if the type cannot hold a weight; CheckpointError if activations are not finite.
        """
        places = [self._layout.place(name) for name in names]
        index, paths = places[0][0], [path for _, path in places]
        while self._index < index:
            self._leave()
        moments = self._moments_of(self._layout.first_reader(paths[0]))
        rounded: Rounded
        if self._values == "int8":
            rounded = compensated_int8(weight, keep, self._group, moments)
            restored = rounded.dequantise()
        else:
            rounded = compensated_int4(weight, keep, self._group, moments)
            restored = rounded.dequantise(keep)
        first = 0
        for path in paths:
            linear = cast(nn.Linear, self._blocks[index].get_submodule(path))
            linear.weight.data = torch.from_numpy(restored[first : first + linear.out_features])
            first += linear.out_features
        self._on_rounded(weight.size)
        return rounded

    def _enter(self, index: int) -> None:
        """Before anything in block `index` is rounded: keep what the checkpoint reads there, and hand on its states."""
        self._index = index
        self._moments: dict[str, InputMoments] = {}
        self._exact_inputs: dict[str, list[Tensor]] = {group[0]: [] for group in self._layout.inputs}

        def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, inputs: self._exact_inputs[path].append(_by_token(inputs))

        block = self._blocks[index]
        with contextlib.ExitStack() as hooks:
            for path in self._exact_inputs:
                hooks.callback(block.get_submodule(path).register_forward_pre_hook(watch(path)).remove)
            for batch in self._checkpoint:
                batch.hidden = run_block(block, index, batch)

    def _leave(self) -> None:
        """Hand the rounded hidden states on to the next block."""
        for batch in self._rounded:
            batch.hidden = run_block(self._blocks[self._index], self._index, batch)
        self._enter(self._index + 1)

    def _moments_of(self, path: str) -> InputMoments:
        """Moments of what linear `path` of the current block reads, computed when it is first asked for."""
        if path not in self._moments:
            size = cast(nn.Linear, self._blocks[self._index].get_submodule(path)).in_features
            tokens, gram, cross = 0, torch.zeros(size, size), torch.zeros(size, size)
            for exact, batch in zip(self._exact_inputs.pop(path), self._rounded, strict=True):
                inputs = _inputs_of(self._blocks[self._index], self._index, path, batch)
                gram += inputs.T @ inputs
                cross += inputs.T @ exact
                tokens += len(inputs)
            if not bool(torch.isfinite(gram).all() & torch.isfinite(cross).all()):
                raise CheckpointError(
                    f"block {self._index} gives '{path}' inputs that are not finite on the calibration text; mend the "
                    "checkpoint, or export without --calibration",
                    block=self._index,
                )
            self._moments[path] = InputMoments((gram / tokens).numpy(), (cross / tokens).numpy())
        return self._moments[path]


def load_rounding(
    checkpoint: Path,
    windows: NDArray[np.int64],
    values: Literal["int8", "int4"],
    group: int,
    on_rounded: Callable[[int], None],
) -> CalibratedRounding:
    """Load a checkpoint to be rounded; arguments as `CalibratedRounding` takes them.

    Raises: CheckpointError if transformers cannot load it.
    """
    model = load_model(checkpoint, attention="sdpa")
    return CalibratedRounding(model, torch.from_numpy(windows), values, group, on_rounded)


class _ReachedError(Exception):
    """Thrown out of a block once its inputs are known."""


@torch.no_grad()
def _inputs_of(block: nn.Module, index: int, path: str, batch: BlockBatch) -> Tensor:
    """What linear `path` of a block reads: (tokens, K) float32. The block runs no further."""
    found: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(_by_token(inputs))
        raise _ReachedError

    handle = block.get_submodule(path).register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_ReachedError):
            run_block(block, index, batch)
    finally:
        handle.remove()
    return found[0]


def _by_token(inputs: tuple[Any, ...]) -> Tensor:
    """What a linear is called with: (tokens, K) float32."""
    read: Tensor = inputs[0].flatten(0, -2).float()
    return read
