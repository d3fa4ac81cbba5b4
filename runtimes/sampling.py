"""From logits to the next token: greedy, temperature and top-p, as pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import ConfigError, RuntimeFailureError


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and draws nothing.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least this.

    Raises: ConfigError naming the field.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature >= 0.0):
            raise ConfigError(
                f"temperature is {self.temperature!r}, but must be a finite number of at least 0 "
                "(0 takes the most likely token)",
                field="temperature",
            )
        if not (_is_number(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise ConfigError(
                f"top_p is {self.top_p!r}, but must be greater than 0 and at most 1 (1 keeps every token)",
                field="top_p",
            )


def choose_token(logits: NDArray[np.float32], config: SamplingConfig, generator: np.random.Generator) -> int:
    """The next token for one row of logits.

    Args:
        logits: (V,) any float dtype; computed in float64.
        config: temperature and top-p.
        generator: drawn from once unless the temperature is 0.
    Returns: an index into `logits`. Equal logits: the lowest index wins under greedy.
    Raises: RuntimeFailureError when a logit is NaN or +inf, or when all are -inf.
    """
    values = np.asarray(logits, dtype=np.float64)
    top = values.max(initial=-np.inf)  # a NaN anywhere comes out of max as NaN
    if not np.isfinite(top):
        raise RuntimeFailureError(
            f"the model answered with logits whose maximum is {top}, so no token can be chosen; "
            "check the weights with: losa export --overwrite (its gate compares every logit)"
        )
    if config.temperature == 0.0:
        return int(values.argmax())
    probabilities = top_p_filter(softmax(values, config.temperature), config.top_p)
    # Drawing by the cumulative sum costs one uniform number per token whatever the vocabulary,
    # so one seed gives the same text on every runtime whose logits agree.
    cumulative = probabilities.cumsum()
    draw = generator.random() * cumulative[-1]
    index = int(np.searchsorted(cumulative, draw, side="right"))
    # Rounding may bring the draw up to the whole sum, behind every token.
    return index if index < cumulative.size else int(np.flatnonzero(probabilities)[-1])


def softmax(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """exp(logits / temperature), normalised; (V,) float64, each to within a relative 1e-6.

    The maximum is subtracted before the division, so that a tiny temperature cannot overflow. Exponentials are
    taken in float32, twenty times faster over a vocabulary; their sum is in float64.
    """
    with np.errstate(under="ignore", over="ignore"):
        # over: (a - max) / tiny may reach -inf, whose exponential is the right 0
        scaled = (logits - logits.max()) / temperature
        weights = np.exp(scaled.astype(np.float32)).astype(np.float64)
        result: NDArray[np.float64] = weights / weights.sum()
    return result


def top_p_filter(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Zero all but the smallest set of most likely tokens that holds at least `top_p`, and normalise.

    Args:
        probabilities: (V,) float64, sum 1.
        top_p: in (0, 1].
    Returns: (V,) float64, sum 1; at least the most likely token is kept, ties by lower index.
    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", arXiv:1904.09751 (nucleus).
    """
    if top_p >= 1.0:
        return probabilities
    # All tokens below this hold less than 1 − top_p together, so none is needed, and few are left to sort.
    likely = np.flatnonzero(probabilities >= (1.0 - top_p) / probabilities.size)
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    mass = probabilities[order].cumsum()
    count = int(np.searchsorted(mass, top_p, side="left")) + 1
    kept = np.zeros_like(probabilities)
    kept[order[:count]] = probabilities[order[:count]]
    result: NDArray[np.float64] = kept / kept.sum()
    return result


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
