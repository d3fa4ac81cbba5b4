"""Changing an adapter's active rank between rounds, and what the optimizer remembers of it."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from losa_export.training.adapter import MaskedLoRALinear

MOMENTS = ("exp_avg", "exp_avg_sq")

# Singular values of float32 factors that are smaller beside the largest are rounding.
_NOTHING = 1e-7

# What Adam keeps for each parameter: its step count and moments. Empty before the first step.
OptimizerStates = MutableMapping[Tensor, dict[str, Any]]


@torch.no_grad()
def best_factors(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation to BA of rank `rank`, singular values split evenly between them.

    QR of B and of Aᵀ leaves a small core, whose SVD is that of BA; float64 throughout. Where BA has less than `rank`
    directions, the rest get a zero in B and a row in A of the size of the others: with zeros in both, neither would
    ever see a gradient.

    Args:
        a: (r, in).
        b: (out, r).
        rank: at most r.
    Returns: A' (rank, in) and B' (out, rank), in the dtypes of `a` and `b`. ‖BA − B'A'‖ in the Frobenius norm
        is that of the singular values left out.
    Source: Eckart and Young 1936, "The approximation of one matrix by another of lower rank", Psychometrika 1.
    """
    if not bool(b.any()):
        return a[:rank].clone(), b[:, :rank].clone()
    left, left_core = torch.linalg.qr(b.double())
    right, right_core = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(left_core @ right_core.T)
    found = s[:rank] > _NOTHING * s[0]
    root = s[:rank].sqrt()
    usual = a.double().norm() / a.shape[0] ** 0.5
    new_a = torch.where(found, root, usual)[:, None] * (vh[:rank] @ right.T)
    new_b = (left @ u[:, :rank]) * torch.where(found, root, 0.0)
    return new_a.to(a.dtype), new_b.to(b.dtype)


@torch.no_grad()
def resize(layer: MaskedLoRALinear, rank: int, states: OptimizerStates) -> None:
    """Give a layer another active rank.

    Growing changes no output: the columns of B that join are zero. What the optimizer knows of the others stays. A
    column that joins has no first moment; its second moment starts as the mean of the others', since beside the
    step count of the whole parameter a zero would make its first steps several times too long.

    Shrinking refactors BA to its best approximation, so what is lost is as little as the rank allows. Each new slice
    mixes all the old ones, and Adam's element-wise moments describe none of the mixtures: they are forgotten with
    the step count, as if the parameter were new. B's columns beyond the rank become zero, for the next growth. A's
    rows there keep their values: any start will do beside a zero in B.

    Args:
        layer: its active A, B and rank change.
        rank: from 1 to the layer's `max_rank`.
        states: the optimizer's, of which those of this layer's A and B change.
    Raises: ConfigError if the layer cannot have the rank.
    """
    before = layer.rank
    layer.set_rank(rank)
    if rank > before:
        layer.lora_B[:, before:rank].zero_()
        _start(states.get(layer.lora_A, {}), before, rank)
        _start({name: value.T for name, value in states.get(layer.lora_B, {}).items() if name in MOMENTS}, before, rank)
    elif rank < before:
        a, b = best_factors(layer.lora_A[:before], layer.lora_B[:, :before], rank)
        layer.lora_A[:rank] = a
        layer.lora_B[:, :rank] = b
        layer.lora_B[:, rank:].zero_()
        for parameter in (layer.lora_A, layer.lora_B):
            for value in states.get(parameter, {}).values():
                value.zero_()


def _start(moments: dict[str, Any], before: int, rank: int) -> None:
    """Set the moments of slices `before` to `rank`, rows of each moment here."""
    if moments:
        moments["exp_avg"][before:rank].zero_()
        moments["exp_avg_sq"][before:rank] = moments["exp_avg_sq"][:before].mean(dim=0)
