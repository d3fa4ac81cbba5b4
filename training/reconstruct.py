"""Block-wise reconstruction: after a block is pruned, its kept weights are fitted to what the dense block answers.

Blocks are done in order. Each reads what the blocks before it, pruned and fitted, hand on; so its fit also makes up for
them if its targets are the hidden states of the dense model. One block's weights, gradients and moments are
held at a time; activations wait on the CPU.

Source: Guo et al. 2024, "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs", arXiv:2402.12419; "A Free Lunch
in LLM Compression", arXiv:2510.14444, finds it as good as tuning adapters after pruning, for far less data.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from losa_export.layout import INPUT_GROUPS, by_inputs
from losa_export.training.adapter import MaskedLoRALinear, all_folded
from losa_export.training.alps import refine
from losa_export.training.calibration import BlockBatch, input_grams, run_block
from losa_export.training.reconstruction_error import ErrorKind

# Conjugate gradients for a linear: the error hardly falls beyond.
_LEAST_SQUARES_STEPS = 30

# A target of nothing but zeros has no size to divide by.
_TINY = 1e-30


@dataclass(frozen=True)
class ReconstructSettings:
    """How a block is fitted.

    Attributes:
        epochs: passes over the calibration windows.
        learning_rate: peak of a cosine that ends at zero, as a fraction of the root mean square of a linear's kept
            weights, so that one value suits models of any scale.
        target: what the fit aims at. "local": the dense block's answers to the inputs that the sparse model
            gives it. "accumulated": the hidden states of the dense model, which corrects earlier blocks' errors too.
        least_squares: first bring each linear's answers, one after another, as near to those of the dense weight as its
            zeros allow, both reading what the sparse model gives them. Costs a few passes, and no gradients.
        damping: part of the Gram matrix's mean diagonal that is added to it there.
    """

    epochs: int
    learning_rate: float = 0.01
    target: ErrorKind = "accumulated"
    least_squares: bool = False
    damping: float = 0.01

    @property
    def passes(self) -> int:
        """What the fit costs, in forward passes of the block over the calibration windows; a backward pass is two.

        Two for the targets and the error before, three for each epoch, one for each group of linears that share
        inputs, and one for the error after each step.
        """
        solving = INPUT_GROUPS + 1 if self.least_squares else 0
        return 2 + solving + (3 * self.epochs + 1 if self.epochs else 0)


@dataclass(frozen=True)
class Reconstruction:
    """What the fit of a block achieved.

    Attributes:
        error_before: mean over all calibration tokens of ‖o − t‖² / ‖t‖², o the pruned block's output and t its target.
        error_after: the same after the fit, with the weights as they are stored; never more.
    """

    error_before: float
    error_after: float

    def __str__(self) -> str:
        """Both, short."""
        return f"{self.error_before:.2g} → {self.error_after:.2g}"


class Reconstructor:
    """Fits the blocks of one pruning pass and keeps account of it.

    Args:
        settings: how.
        seed: of the order of batches; the block's index is added to it.

    Attributes:
        results: of the blocks fitted so far.
    """

    def __init__(self, settings: ReconstructSettings, seed: Sequence[int]) -> None:
        self.settings = settings
        self.results: list[Reconstruction] = []
        self._seed = tuple(seed)

    def fit(
        self,
        block: nn.Module,
        index: int,
        layers: Mapping[str, MaskedLoRALinear],
        batches: Sequence[BlockBatch],
        targets: Sequence[Tensor],
    ) -> None:
        """Fit a block whose new masks are set, as `reconstruct_block` does."""
        order = (*self._seed, index)
        self.results.append(reconstruct_block(block, index, layers, batches, targets, self.settings, order))


def reconstruct_block(
    block: nn.Module,
    index: int,
    layers: Mapping[str, MaskedLoRALinear],
    batches: Sequence[BlockBatch],
    targets: Sequence[Tensor],
    settings: ReconstructSettings,
    seed: Sequence[int],
) -> Reconstruction:
    """Fit a pruned block's kept weights to `targets`, by least squares of each linear, Adam on the whole, or both.

    The effective weights (W + s·BA)⊙M move, in float32; W takes the difference where M keeps, and stays where it
    prunes. Adapters stay. Where what is stored after either step is no better than before it, that comes back.

    Args:
        block: the decoder block.
        index: its place.
        layers: name to linear inside `block`, with masks; their base weights change.
        batches: what enters the block; each is a step's minibatch.
        targets: for each batch, what should leave it: (windows, tokens, hidden).
        settings: how.
        seed: of the order of the batches.
    """
    before = _error(block, index, layers, batches, targets)
    if before == 0.0:
        return Reconstruction(0.0, 0.0)
    steps: list[Callable[[], None]] = []
    if settings.least_squares:
        steps.append(lambda: _solve_linears(block, index, layers, batches, settings.damping))
    if settings.epochs > 0:
        steps.append(lambda: _descend(block, index, layers, batches, targets, settings, seed, 1.0 / before))
    best = before
    for step in steps:
        stored = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        step()
        after = _error(block, index, layers, batches, targets)
        if after < best:
            best = after
        else:
            for name, layer in layers.items():
                layer.set_weight(stored[name])
    return Reconstruction(before, best)


@torch.no_grad()
def _solve_linears(
    block: nn.Module,
    index: int,
    layers: Mapping[str, MaskedLoRALinear],
    batches: Sequence[BlockBatch],
    damping: float,
) -> None:
    """Least squares for each linear alone, in the order in which a token meets them, on what those before leave."""
    for names in by_inputs(layers):
        group = {name: layers[name] for name in names}
        with all_folded(layers):
            gram = next(iter(input_grams(block, index, group, batches).values()))
        moments = gram.damped(damping).float()
        # With equal diagonals the conjugate gradients need no preconditioner.
        scale = moments.diagonal().sqrt()
        moments /= torch.outer(scale, scale)
        for layer in group.values():
            start = layer.merged()
            dense = layer.dense_weight.float()
            fitted = refine(start * scale, dense * scale, moments, layer.kept, _LEAST_SQUARES_STEPS).div_(scale)
            layer.set_weight(layer.weight.float() + (fitted - start))


def _descend(
    block: nn.Module,
    index: int,
    layers: Mapping[str, MaskedLoRALinear],
    batches: Sequence[BlockBatch],
    targets: Sequence[Tensor],
    settings: ReconstructSettings,
    seed: Sequence[int],
    unit: float,
) -> None:
    """All Adam steps, and the result written to the layers. `unit` brings a batch's error to about 1."""
    device = next(block.parameters()).device
    starts = [layer.merged() for layer in layers.values()]
    weights = [start.clone().requires_grad_() for start in starts]
    masks = [layer.mask for layer in layers.values()]
    peaks = [settings.learning_rate * _root_mean_square(*pair) for pair in zip(starts, masks, strict=True)]
    adam = torch.optim.Adam([{"params": [weight]} for weight in weights])
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(len(batches)) for _ in range(settings.epochs)])
    with contextlib.ExitStack() as stack:
        for layer, weight in zip(layers.values(), weights, strict=True):
            stack.enter_context(layer.computing_with(weight))
        for step, number in enumerate(order):
            batch = batches[number]
            output = block(batch.hidden.to(device), **batch.keyword_arguments[index])
            hidden = output[0] if isinstance(output, tuple) else output
            error = _token_errors(hidden.float(), targets[number].to(device).float()).mean() * unit
            factor = 0.5 * (1.0 + math.cos(math.pi * step / len(order)))
            gradients = torch.autograd.grad(error, weights)
            for group, weight, gradient, mask, peak in zip(
                adam.param_groups, weights, gradients, masks, peaks, strict=True
            ):
                # A pruned weight is zero and sees no gradient, so Adam leaves it at exactly zero.
                weight.grad = gradient.mul_(mask)
                group["lr"] = peak * factor
            adam.step()
    with torch.no_grad():
        for layer, weight, start in zip(layers.values(), weights, starts, strict=True):
            layer.set_weight(layer.weight.float() + (weight - start))


def _error(
    block: nn.Module,
    index: int,
    layers: Mapping[str, MaskedLoRALinear],
    batches: Sequence[BlockBatch],
    targets: Sequence[Tensor],
) -> float:
    """Mean over all tokens of their relative squared errors. Added up in float64."""
    error = tokens = 0.0
    with all_folded(layers):
        for batch, target in zip(batches, targets, strict=True):
            errors = _token_errors(run_block(block, index, batch).double(), target.double())
            error += float(errors.sum())
            tokens += errors.numel()
    return error / tokens


def _token_errors(output: Tensor, target: Tensor) -> Tensor:
    """(windows, tokens) ‖o − t‖² / ‖t‖² for every token of (windows, tokens, hidden) output and target.

    Each token counts alike, as it does behind the norm that reads it. Summed over all tokens the first one of a window
    would be the only one: models park attention there, in hidden states thousands of times as large.
    """
    return (output - target).square().sum(dim=-1) / target.square().sum(dim=-1).clamp_min(_TINY)


def _root_mean_square(weight: Tensor, mask: Tensor) -> float:
    """Over the kept positions; pruned ones are zero."""
    return math.sqrt(float(weight.double().square().sum()) / max(1, int(mask.sum())))
