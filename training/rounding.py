"""Rounding a model's linears one after another, each on the inputs that the ones before it leave; then its head.

Two copies of the hidden states walk through the blocks: as the checkpoint computes them, and as the rounded linears do.
When a linear is asked for, the latter are run up to it, and the second moments of what it reads from either say how to
round it (`losa_export.compensate`). So its rounding makes up for what earlier ones did. The activations of one block
are in memory beside the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from losa_export.compensate import InputMoments, compensated_int4, compensated_int8
from losa_export.errors import CheckpointError
from losa_export.layout import layout_of
from losa_export.quantise import Bool, Float32, Int4Weight, Rounded
from losa_export.reference import load_model
from losa_export.training.calibration import (
    BlockBatch,
    by_token,
    capture_block_inputs,
    head_inputs,
    inputs_of,
    run_block,
)

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
        self._model = model
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
            self._advance()
            self._enter(self._index + 1)
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

    def head(self, weight: Float32) -> Int4Weight:
        """Round the head to int4, when all linears are rounded.

        Args:
            weight: (N, K) float32.

        Raises: as calling it does.
        """
        self._advance()
        sums = _MomentSums(weight.shape[1])
        for exact, batch in zip(self._checkpoint, self._rounded, strict=True):
            sums.add(*(head_inputs(self._model, self._blocks, one) for one in (batch, exact)))
        moments = sums.moments("the last block gives the head")
        rounded = compensated_int4(weight, np.ones(weight.shape, dtype=np.bool_), self._group, moments)
        self._on_rounded(weight.size)
        return rounded

    def _enter(self, index: int) -> None:
        """Before anything in block `index` is rounded: keep what the checkpoint reads there, and hand on its states."""
        self._index = index
        self._moments: dict[str, InputMoments] = {}
        self._exact_inputs: dict[str, list[Tensor]] = {group[0]: [] for group in self._layout.inputs}

        def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, inputs: self._exact_inputs[path].append(by_token(inputs))

        block = self._blocks[index]
        with contextlib.ExitStack() as hooks:
            for path in self._exact_inputs:
                hooks.callback(block.get_submodule(path).register_forward_pre_hook(watch(path)).remove)
            for batch in self._checkpoint:
                batch.hidden = run_block(block, index, batch)

    def _advance(self) -> None:
        """Hand the rounded hidden states on to the next block, or to the head."""
        for batch in self._rounded:
            batch.hidden = run_block(self._blocks[self._index], self._index, batch)

    def _moments_of(self, path: str) -> InputMoments:
        """Moments of what linear `path` of the current block reads, computed when it is first asked for."""
        if path not in self._moments:
            index, block = self._index, self._blocks[self._index]
            linear = cast(nn.Linear, block.get_submodule(path))
            sums = _MomentSums(linear.in_features)
            for exact, batch in zip(self._exact_inputs.pop(path), self._rounded, strict=True):
                sums.add(inputs_of(partial(run_block, block, index, batch), linear), exact)
            self._moments[path] = sums.moments(f"block {index} gives '{path}'", block=index)
        return self._moments[path]


def load_rounding(
    checkpoint: Path,
    windows: NDArray[np.int64],
    values: Literal["int8", "int4"],
    group: int,
    on_rounded: Callable[[int], None],
    scales: Mapping[str, Float32],
) -> CalibratedRounding:
    """Load a checkpoint to be rounded; arguments as `CalibratedRounding` takes them, and `scales`, by which the last
    axis of parameters is multiplied first (`losa_export.smoothing`).

    Raises: CheckpointError if transformers cannot load it.
    """
    model = load_model(checkpoint, attention="sdpa")
    with torch.no_grad():
        for name, scale in scales.items():
            model.get_parameter(name).mul_(torch.from_numpy(scale))
    return CalibratedRounding(model, torch.from_numpy(windows), values, group, on_rounded)


class _MomentSums:
    """`InputMoments` of inputs that come batch by batch."""

    def __init__(self, size: int) -> None:
        self._tokens = 0
        self._gram, self._cross = torch.zeros(size, size), torch.zeros(size, size)

    def add(self, rounded: Tensor, exact: Tensor) -> None:
        """Some tokens: (tokens, K) float32 as rounded linears give them, and as the checkpoint does."""
        self._gram += rounded.T @ rounded
        self._cross += rounded.T @ exact
        self._tokens += len(rounded)

    def moments(self, whose: str, **facts: object) -> InputMoments:
        """Of all tokens so far. Raises: CheckpointError with these facts, which says `whose` inputs are not finite."""
        if not bool(torch.isfinite(self._gram).all() & torch.isfinite(self._cross).all()):
            raise CheckpointError(
                f"{whose} inputs that are not finite on the calibration text; mend the checkpoint, or export without "
                "--calibration",
                **facts,
            )
        return InputMoments((self._gram / self._tokens).numpy(), (self._cross / self._tokens).numpy())
