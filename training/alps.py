"""Mask and weights together: ADMM on the layer's output error, then least squares on the mask it finds.

min ‖X(W − Ŵ)ᵀ‖²  over W with the zeros asked for
"""

from __future__ import annotations

import torch
from torch import Tensor

from losa_export.training.gram import Gram
from losa_export.training.scores import Amount

# The penalty begins low, so that the mask can still move, and grows the faster the more of it moves.
_FIRST_PENALTY = 0.1
_CHECK_EVERY = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
_MAX_ITERATIONS = 300
_REFINEMENTS = 10


def alps(weight: Tensor, gram: Gram, amount: Amount, kept_before: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Find mask and weights that keep the layer's answers on the calibration data, starting from neither.

    Two copies of the weight, one that answers well and one that has the zeros, are drawn together by a growing
    penalty until the zeros stay where they are; conjugate gradients then fit the kept weights. Inputs are
    scaled to equal energy first. One eigendecomposition of the Gram matrix serves all iterations, and all
    linears that read the same input. Weights of all rows compete with each other; a pattern compares within its
    groups. What was pruned stays pruned. Weights of inputs that were never active go first; those that stay are left
    as they are.

    Args:
        weight: (out, in) effective weight Ŵ, zero where pruned; computed in float32, or float64 if it is that.
        gram: second moments of its inputs.
        amount: how much is to be pruned in all.
        kept_before: (out, in) bool, the mask so far.
        damping: part of the Gram matrix's mean diagonal that is added to it.
    Returns: (out, in) bool mask, True = keep, and (out, in) weight, zero where pruned.
    Source: Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
        Models", arXiv:2406.07831.
    """
    precise = weight.dtype if weight.dtype == torch.float64 else torch.float32
    scale, values, vectors = (part.to(precise) for part in gram.normalised(damping))
    moments = (vectors * values) @ vectors.T
    # What an input that was never active is multiplied by makes no difference, so it is the first to go.
    dense = (weight.to(precise) * scale).masked_fill(gram.dead, 0.0)
    pulled = dense @ moments
    kept = amount.select(dense.square(), kept_before, jointly=True)
    sparse, dual = dense * kept, torch.zeros_like(dense)
    penalty, checked = _FIRST_PENALTY, kept
    solve = _shifted_inverse(values, vectors, penalty)
    for iteration in range(1, _MAX_ITERATIONS + 1):
        answering = (pulled - dual).add_(sparse, alpha=penalty) @ solve
        shifted = torch.add(answering, dual, alpha=1.0 / penalty)
        kept = amount.select(shifted.square(), kept_before, jointly=True)
        sparse = shifted.mul_(kept)
        dual.add_(answering, alpha=penalty).sub_(sparse, alpha=penalty)
        if iteration % _CHECK_EVERY == 0:
            moved = int((kept != checked).sum()) / max(1, int(kept.sum()))
            if moved == 0.0:
                break
            penalty *= next(growth for least, growth in _GROWTH if moved > least)
            solve, checked = _shifted_inverse(values, vectors, penalty), kept
    fitted = refine(sparse, dense, moments, kept).div_(scale)
    return kept, torch.where(kept & gram.dead, weight.to(precise), fitted)


def refine(start: Tensor, dense: Tensor, moments: Tensor, kept: Tensor, iterations: int = _REFINEMENTS) -> Tensor:
    """Move kept weights towards the least of ‖X(W − Ŵ)ᵀ‖², by conjugate gradients for each row apart.

    The error never grows. Where the diagonal of the moments is equal, as here after scaling, it is its own
    preconditioner.

    Args:
        start: (out, in) first W; zero where pruned.
        dense: (out, in) Ŵ.
        moments: (in, in) XᵀX, positive semidefinite.
        kept: (out, in) bool, True = keep.
        iterations: steps; each costs one product with the moments.
    Returns: (out, in), zero where pruned.
    """
    weight = start.clone()
    residual = ((dense - weight) @ moments).mul_(kept)
    direction, energy = residual.clone(), residual.square().sum(dim=1, keepdim=True)
    for _ in range(iterations):
        image = (direction @ moments).mul_(kept)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        # A row that has converged has no direction left.
        length = torch.where(curvature > 0, energy / curvature, 0.0)
        weight.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1.0)
        before, energy = energy, residual.square().sum(dim=1, keepdim=True)
        direction = residual + torch.where(before > 0, energy / before, 0.0) * direction
    return weight


def _shifted_inverse(values: Tensor, vectors: Tensor, shift: float) -> Tensor:
    """(Q·Λ·Qᵀ + shift·I)⁻¹."""
    return (vectors / (values + shift)) @ vectors.T
