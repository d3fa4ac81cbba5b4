"""Outliers of activations, moved into the weights that read them, before either is rounded.

A few channels of what a norm gives are far larger than the others: rounded to 8 bits, they leave few levels to the rest
of their group. Dividing such a channel by s in the norm's own weight, and multiplying by s the column of each linear
that reads it, changes no answer (SmoothQuant, Xiao et al. 2023, equations 3 and 4). It serves the weights, too: columns
that meet large activations get finer levels, as in AWQ. Here s is a power of two, so even the bits of a product stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from losa_export.architecture import DecoderSpec
from losa_export.graph.sparsity import TensorReader
from losa_export.quantise import Float32

# Of the way from even weights to even activations; docs/decisions/0007-outliers-move-into-weights.md has others.
DEFAULT_STRENGTH = 0.7

_LARGEST_EXPONENT = 7


@dataclass(frozen=True)
class ChannelMaxima:
    """What one norm gives, and who reads it.

    Attributes:
        activations: (K,) float32, the largest magnitude of each channel on some text.
        weights: (K,) float32, likewise of the columns of all linears that read it.
    """

    activations: Float32
    weights: Float32


def smoothing_factors(maxima: ChannelMaxima, strength: float) -> Float32:
    """By what each channel is divided: (K,) float32 powers of two, around 1.

    Args:
        maxima: of the channels; finite. Those of which nothing is known, with a maximum of zero, stay as they are.
        strength: 0 to 1; at 1 all channels end with nearly equal maxima.
    """
    known = (maxima.activations > 0) & (maxima.weights > 0)
    factors = np.ones(known.shape, dtype=np.float32)
    if not known.any():
        return factors
    logarithms = strength * np.log2(maxima.activations[known]) - (1 - strength) * np.log2(maxima.weights[known])
    exponents = np.rint(logarithms - np.median(logarithms)).astype(np.int32)
    factors[known] = np.ldexp(np.float32(1), np.clip(exponents, -_LARGEST_EXPONENT, _LARGEST_EXPONENT))
    return factors


def differ_by_powers_of_two(before: Float32, after: Float32) -> bool:
    """Whether smoothing can have made one tensor of another: elements are powers of two times what they were."""
    if before.shape != after.shape or not np.array_equal(before == 0, after == 0):
        return False
    ratios = after[after != 0] / before[before != 0]
    return bool(np.all(np.frexp(ratios)[0] == 0.5))


def smoothing_scales(spec: DecoderSpec, maxima: Mapping[str, ChannelMaxima], strength: float) -> dict[str, Float32]:
    """By what the last axis of tensors is multiplied: name → (K,) float32 powers of two.

    Args:
        spec: a decoder that `can_smooth`.
        maxima: of its norms, by their modules' names.
        strength: as `smoothing_factors` takes it.
    """
    scales: dict[str, Float32] = {}
    for block in range(spec.num_layers):
        for norm, linears in norm_readers(spec, block).items():
            factors = smoothing_factors(maxima[norm], strength)
            scales[f"{norm}.weight"] = np.reciprocal(factors)
            if spec.opt is not None:
                scales[f"{norm}.bias"] = np.reciprocal(factors)
            scales |= {f"{linear}.weight": factors for linear in linears}
    return scales


def can_smooth(spec: DecoderSpec) -> bool:
    """Whether linears alone read the norms; behind additions, as in OPT-350m, the next addition does, too."""
    return spec.opt is None or spec.opt.norm_first


def norm_readers(spec: DecoderSpec, block: int) -> dict[str, tuple[str, ...]]:
    """Module of each norm of a block → the linears that read it."""
    prefix, (attention, mlp) = spec.layout.prefix(block), spec.layout.norms
    readers = {attention: spec.layout.inputs[0], mlp: spec.layout.inputs[2]}
    return {f"{prefix}{norm}": tuple(f"{prefix}{linear}" for linear in linears) for norm, linears in readers.items()}


@dataclass(frozen=True)
class SmoothedReader:
    """A checkpoint's tensors, some of them scaled.

    Attributes:
        source: of the tensors.
        scales: as `smoothing_scales` gives them.
    """

    source: TensorReader
    scales: Mapping[str, Float32]

    def read(self, name: str) -> Float32:
        """Read a tensor. Raises: as the source does."""
        tensor = self.source.read(name)
        return tensor * self.scales[name] if name in self.scales else tensor
