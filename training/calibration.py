"""Activations of the model block by block: what enters a block, and what its linears see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losa_export.training.gram import Gram

# Called with a linear and its inputs, before it computes.
_Hook = Callable[[nn.Module, tuple[Any, ...]], None]


@dataclass
class BlockBatch:
    """One batch of calibration windows on its way through the blocks.

    Attributes:
        hidden: (windows, tokens, hidden) input of the next block, on the CPU between blocks.
        keyword_arguments: for each block, everything but the hidden states that the model passes to it.
    """

    hidden: Tensor
    keyword_arguments: Sequence[Mapping[str, Any]]


@torch.no_grad()
def capture_block_inputs(
    model: nn.Module, blocks: Sequence[nn.Module], windows: Tensor, batch_size: int
) -> list[BlockBatch]:
    """What enters the first block for each batch of windows, and how the model calls every block.

    All keyword arguments are taken as they come (rotary embeddings, masks, positions, whatever a later release
    adds), for each block apart, since some models mix attention kinds. The blocks themselves do not run.

    Args:
        model: the causal language model.
        blocks: those blocks.
        windows: (n, tokens) int64.
        batch_size: windows run together.
    """
    device = next(model.parameters()).device
    batches = []
    for part in torch.split(windows, batch_size):
        calls: list[tuple[Tensor, dict[str, Any]]] = []
        with _stubbed(blocks, _collecting(calls)):
            model.get_submodule("model")(input_ids=part.to(device), use_cache=False)
        batches.append(BlockBatch(calls[0][0].cpu(), [arguments for _, arguments in calls]))
    return batches


def _collecting(calls: list[tuple[Tensor, dict[str, Any]]]) -> Callable[..., Tensor]:
    """A stub of a block that hands its input on unchanged; `calls` collects how it was called."""

    def stub(*arguments: Any, **keywords: Any) -> Tensor:
        hidden: Tensor = keywords.pop("hidden_states") if "hidden_states" in keywords else arguments[0]
        calls.append((hidden, keywords))
        return hidden

    return stub


@contextlib.contextmanager
def _stubbed(blocks: Sequence[nn.Module], stub: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block, `stub` stands for each decoder block."""
    for block in blocks:
        block.forward = stub  # shadows the class's method for a while
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@torch.no_grad()
def run_block(block: nn.Module, index: int, batch: BlockBatch) -> Tensor:
    """Output of block `index` for its input `batch.hidden`: (windows, tokens, hidden), on the CPU.

    Blocks return a tensor or, in older releases of transformers, a tuple that begins with it.
    """
    device = next(block.parameters()).device
    output = block(batch.hidden.to(device), **batch.keyword_arguments[index])
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden.cpu()


class _ReachedError(Exception):
    """Thrown out of a model once what was looked for is known."""


@torch.no_grad()
def inputs_of(run: Callable[[], object], module: nn.Module) -> Tensor:
    """What `module` reads while `run` computes, which goes no further: (tokens, K) float32."""
    found: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(by_token(inputs))
        raise _ReachedError

    handle = module.register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_ReachedError):
            run()
    finally:
        handle.remove()
    return found[0]


def head_inputs(model: nn.Module, blocks: Sequence[nn.Module], batch: BlockBatch) -> Tensor:
    """What the head reads where the last block left `batch.hidden`: (tokens, K) float32.

    Args:
        model: the causal language model of transformers.
        blocks: its decoder blocks, which do not run.
        batch: of some windows.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    ids = torch.zeros(batch.hidden.shape[:2], dtype=torch.int64)
    with _stubbed(blocks, lambda *_, **__: batch.hidden):
        return inputs_of(lambda: model(input_ids=ids, use_cache=False), head)


def by_token(inputs: tuple[Any, ...]) -> Tensor:
    """What a linear is called with: (tokens, K) float32."""
    read: Tensor = inputs[0].flatten(0, -2).float()
    return read


@torch.no_grad()
def input_square_sums(
    block: nn.Module, index: int, linears: Mapping[str, nn.Module], batches: Sequence[BlockBatch]
) -> dict[str, Tensor]:
    """Sum of squares of every input feature of a block's linears over all calibration tokens.

    Squares are taken in float32 whatever the activations are, and batches are added up in float64.

    Args:
        block: the decoder block, which computes as it is (old masks).
        index: its place.
        linears: name to module inside `block`.
        batches: the block's inputs.
    Returns: name → (in,) float32, on the device of the block.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> _Hook:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            features = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            part = features.square().sum(dim=0).double()
            sums[name] = sums[name] + part if name in sums else part

        return add

    with _watched(linears, watch):
        for batch in batches:
            run_block(block, index, batch)
    return {name: total.float() for name, total in sums.items()}


@torch.no_grad()
def input_grams(
    block: nn.Module, index: int, linears: Mapping[str, nn.Module], batches: Sequence[BlockBatch]
) -> dict[str, Gram]:
    """Second moments of the inputs of a block's linears over all calibration tokens.

    Products are taken in float32 (float64 if the activations are that), and batches are added up in float64.
    Linears that are handed the same tensor, such as the query, key and value projections, share one matrix.

    Args:
        block: the decoder block, which computes as it is (old masks).
        index: its place.
        linears: name to module inside `block`.
        batches: the block's inputs.
    Returns: name → moments, on the device of the block.
    """
    sums: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    met: list[tuple[Tensor, str]] = []

    def watch(name: str) -> _Hook:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if name not in source:
                source[name] = next((first for tensor, first in met if tensor is inputs[0]), name)
                met.append((inputs[0], name))
            if source[name] != name:
                return
            features = inputs[0].reshape(-1, inputs[0].shape[-1])
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            part = (features.T @ features).double()
            sums[name] = sums[name].add_(part) if name in sums else part

        return add

    with _watched(linears, watch):
        for batch in batches:
            run_block(block, index, batch)
            met.clear()
    grams = {name: Gram(total) for name, total in sums.items()}
    return {name: grams[source[name]] for name in linears}


@contextlib.contextmanager
def _watched(linears: Mapping[str, nn.Module], watch: Callable[[str], _Hook]) -> Iterator[None]:
    """Within the block, each linear is preceded by the hook that `watch` makes for its name."""
    with contextlib.ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_pre_hook(watch(name)).remove)
        yield
