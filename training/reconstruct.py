"""Block-wise reconstruction: after a block is pruned, its kept weights are fitted to what the dense block answers.

Blocks are done in order. Each reads what the blocks before it, pruned and fitted, hand on; so its fit also makes up for
them if its targets are the hidden states of the dense model. One block's weights, gradients and moments are
held at a time; activations wait on the CPU.

Source: Guo et al. 2024, "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs", arXiv:2402.12419; shown to make
up for most of pruning's loss, whatever the criterion, in "A Free Lunch in LLM Compression", arXiv:2510.14444.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from losa_export.training.adapter import MaskedLoRALinear
from losa_export.training.calibration import BlockBatch, run_block

ReconstructTarget = Literal["local", "dense"]

# A target of nothing but zeros has no scale to divide by.
_TINY = 1e-30


@dataclass(frozen=True)
class ReconstructSettings:
    """How a block is fitted.

    Attributes:
        epochs: passes over the calibration windows.
        learning_rate: peak of a cosine that ends at zero, as a fraction of the root mean square of what is
            fitted: of a linear's kept weights, or of a norm's. So one value suits models of any scale.
        target: what the fit aims at. "local": the dense block's answers to the inputs that the sparse model
            gives it. "dense": the hidden states of the dense model, which corrects earlier blocks' errors too.
        norms: fit the block's norm weights as well.
    """

    epochs: int
    learning_rate: float = 0.01
    target: ReconstructTarget = "dense"
    norms: bool = False


@dataclass(frozen=True)
class Reconstruction:
    """What the fit of a block achieved.

    Attributes:
        error_before: ‖O − T‖² / ‖T‖² over all calibration tokens, O the pruned block's output and T its target.
        error_after: the same after the fit, with the weights as they are stored; never more.
    """

    error_before: float
    error_after: float


class Reconstructor:
    """Fits the blocks of one pruning pass, first to last.

    Args:
        settings: how.
        dense_weight: reads a tensor of the dense checkpoint by name, float32.
        seed: of the order of batches; the block's index is added to it.
    """

    def __init__(
        self, settings: ReconstructSettings, dense_weight: Callable[[str], Tensor], seed: Sequence[int]
    ) -> None:
        self.settings = settings
        self.results: list[Reconstruction] = []
        self._dense_weight = dense_weight
        self._seed = tuple(seed)
        self._dense: list[BlockBatch] | None = None

    def start(self, batches: Sequence[BlockBatch]) -> None:
        """Take note of what enters the first block."""
        self._dense = [BlockBatch(batch.hidden, batch.keyword_arguments) for batch in batches]

    def fit(
        self, block: nn.Module, index: int, layers: Mapping[str, MaskedLoRALinear], batches: Sequence[BlockBatch]
    ) -> None:
        """Fit the next block, whose new masks are set; `batches` hold what the sparse model hands it."""
        assert self._dense is not None  # start() comes first
        norms = norms_of(block, index) if self.settings.norms else {}
        paths = self._dense if self.settings.target == "dense" else batches
        with dense_block(layers, norms, self._dense_weight, batches[0].hidden.dtype):
            targets = [run_block(block, index, batch) for batch in paths]
        order = (*self._seed, index)
        self.results.append(reconstruct_block(block, index, layers, norms, batches, targets, self.settings, order))
        if self.settings.target == "dense":
            for batch, hidden in zip(self._dense, targets, strict=True):
                batch.hidden = hidden


def reconstruct_block(
    block: nn.Module,
    index: int,
    layers: Mapping[str, MaskedLoRALinear],
    norms: Mapping[str, nn.Parameter],
    batches: Sequence[BlockBatch],
    targets: Sequence[Tensor],
    settings: ReconstructSettings,
    seed: Sequence[int],
) -> Reconstruction:
    """Fit a pruned block's kept weights to `targets` by Adam on the mean squared error, in place.

    The effective weights (W + s·BA)⊙M move, in float32; W takes the difference where M keeps, and stays where it
    prunes. Adapters stay. If the stored result were no better than the start, the start comes back.

    Args:
        block: the decoder block.
        index: its place.
        layers: name to linear inside `block`, with masks; their base weights change.
        norms: name to norm weight, to be fitted too.
        batches: what enters the block; each is a step's minibatch.
        targets: for each batch, what should leave it: (windows, tokens, hidden).
        settings: how.
        seed: of the order of the batches.
    """
    before, energy = _errors(block, index, layers, batches, targets)
    if before == 0.0:
        return Reconstruction(0.0, 0.0)
    moving = [*(layer.weight for layer in layers.values()), *norms.values()]
    stored = [parameter.detach().clone() for parameter in moving]
    _descend(block, index, layers, norms, batches, targets, settings, seed, len(batches) / before)
    after, _ = _errors(block, index, layers, batches, targets)
    if not after < before:
        for parameter, value in zip(moving, stored, strict=True):
            parameter.data.copy_(value)
        after = before
    return Reconstruction(before / max(energy, _TINY), after / max(energy, _TINY))


def norms_of(block: nn.Module, index: int) -> dict[str, nn.Parameter]:
    """Checkpoint name to weight of every norm of block `index`: what is not part of its linears."""
    linears = {name for name, module in block.named_modules() if isinstance(module, MaskedLoRALinear)}
    return {
        f"model.layers.{index}.{name}": parameter
        for name, parameter in block.named_parameters()
        if name.rpartition(".")[0] not in linears
    }


def _descend(
    block: nn.Module,
    index: int,
    layers: Mapping[str, MaskedLoRALinear],
    norms: Mapping[str, nn.Parameter],
    batches: Sequence[BlockBatch],
    targets: Sequence[Tensor],
    settings: ReconstructSettings,
    seed: Sequence[int],
    unit: float,
) -> None:
    """All Adam steps, and the result written to layers and norms. `unit` brings a batch's squared error to about 1."""
    device = next(block.parameters()).device
    starts = [layer.merged() for layer in layers.values()]
    weights = [start.clone().requires_grad_() for start in starts]
    scales = [norm.detach().float().clone().requires_grad_() for norm in norms.values()]
    masks = [layer.mask for layer in layers.values()]
    peaks = [
        *(settings.learning_rate * _root_mean_square(w, int(m.sum())) for w, m in zip(weights, masks, strict=True)),
        *(settings.learning_rate * _root_mean_square(scale, scale.numel()) for scale in scales),
    ]
    variables = [*weights, *scales]
    adam = torch.optim.Adam([{"params": [variable]} for variable in variables])
    places = {name.removeprefix(f"model.layers.{index}."): norm.dtype for name, norm in norms.items()}
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(len(batches)) for _ in range(settings.epochs)])
    with contextlib.ExitStack() as stack:
        for layer, weight in zip(layers.values(), weights, strict=True):
            stack.enter_context(layer.computing_with(weight))
        for step, number in enumerate(order):
            batch = batches[number]
            put = {name: scale.to(dtype) for (name, dtype), scale in zip(places.items(), scales, strict=True)}
            arguments = (batch.hidden.to(device),), dict(batch.keyword_arguments[index])
            output = torch.func.functional_call(block, put, *arguments)
            hidden = output[0] if isinstance(output, tuple) else output
            error = (hidden.float() - targets[number].to(device).float()).square().sum() * unit
            gradients = torch.autograd.grad(error, variables)
            for gradient, mask in zip(gradients, masks, strict=False):
                # A pruned weight is zero and sees no gradient, so Adam leaves it at exactly zero.
                gradient.mul_(mask)
            factor = 0.5 * (1.0 + math.cos(math.pi * step / len(order)))
            for group, variable, gradient, peak in zip(adam.param_groups, variables, gradients, peaks, strict=True):
                variable.grad = gradient
                group["lr"] = peak * factor
            adam.step()
    with torch.no_grad():
        for layer, weight, start in zip(layers.values(), weights, starts, strict=True):
            layer.weight.copy_(layer.weight.float() + (weight - start))
        for norm, scale in zip(norms.values(), scales, strict=True):
            norm.copy_(scale)


def _errors(
    block: nn.Module,
    index: int,
    layers: Mapping[str, MaskedLoRALinear],
    batches: Sequence[BlockBatch],
    targets: Sequence[Tensor],
) -> tuple[float, float]:
    """Summed squares of output minus target, and of the target, over all batches. Added up in float64."""
    error = energy = 0.0
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.folded())
        for batch, target in zip(batches, targets, strict=True):
            wanted = target.double()
            error += float((run_block(block, index, batch).double() - wanted).square().sum())
            energy += float(wanted.square().sum())
    return error, energy


@contextlib.contextmanager
def dense_block(
    layers: Mapping[str, MaskedLoRALinear],
    norms: Mapping[str, nn.Parameter],
    dense_weight: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> Iterator[None]:
    """Within the block, its linears and the named norms compute as in the dense checkpoint."""
    fitted = {name: norm.detach().clone() for name, norm in norms.items()}
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            weight = dense_weight(name).to(layer.weight.device, dtype)
            stack.enter_context(layer.computing_with(weight))
        for name, norm in norms.items():
            norm.data.copy_(dense_weight(name))
        try:
            yield
        finally:
            for name, norm in norms.items():
                norm.data.copy_(fitted[name])


def _root_mean_square(values: Tensor, count: int) -> float:
    return math.sqrt(float(values.detach().double().square().sum()) / max(1, count))
