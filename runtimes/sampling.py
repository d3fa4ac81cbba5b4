"""From logits to the next token: greedy, temperature, top-k, top-p and min-p, as pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import ConfigError, RuntimeFailureError


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn; the filters act in the order of the fields, each on what the one before kept.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and draws nothing.
        top_k: keep that many most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least this.
        min_p: keep tokens at least this times as likely as the most likely one.

    Raises: ConfigError naming the field.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

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
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ConfigError(
                f"top_k is {self.top_k!r}, but must be a whole number of at least 0 (0 keeps every token)",
                field="top_k",
            )
        if not (_is_number(self.min_p) and 0.0 <= self.min_p <= 1.0):
            raise ConfigError(
                f"min_p is {self.min_p!r}, but must be from 0 to 1 (0 keeps every token)",
                field="min_p",
            )


def choose_token(logits: NDArray[np.float32], config: SamplingConfig, generator: np.random.Generator) -> int:
    """The next token for one row of logits.

    Args:
        logits: (V,) any float dtype; computed in float64.
        config: temperature and filters.
        generator: drawn from once unless the temperature is 0.
    Returns: an index into `logits`. Equal logits: the lowest index wins under greedy.
    Raises: RuntimeFailureError when a logit is NaN or +inf, or when all are -inf.
    """
    best = int(np.argmax(logits))  # a NaN anywhere wins
    top = logits[best]
    if not np.isfinite(top):
        raise RuntimeFailureError(
            f"the model answered with logits whose maximum is {top}, so no token can be chosen; "
            "check the weights with: losa export --overwrite (its gate compares every logit)"
        )
    if config.temperature == 0.0:
        return best
    probabilities = softmax(np.asarray(logits, dtype=np.float64), config.temperature)
    probabilities = min_p_filter(top_p_filter(top_k_filter(probabilities, config.top_k), config.top_p), config.min_p)
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


def top_k_filter(probabilities: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """Zero all but the `top_k` most likely tokens, and normalise.

    Args:
        probabilities: (V,) float64, sum 1.
        top_k: how many to keep, ties by lower index; 0 keeps all.
    Returns: (V,) float64, sum 1.
    Source: Fan et al. 2018, "Hierarchical Neural Story Generation", arXiv:1805.04833, section 5.1.
    """
    if not 0 < top_k < probabilities.size:
        return probabilities
    least = np.partition(probabilities, -top_k)[-top_k]
    above, ties = np.flatnonzero(probabilities > least), np.flatnonzero(probabilities == least)
    return _keep(probabilities, np.concatenate([above, ties[: top_k - above.size]]))


def min_p_filter(probabilities: NDArray[np.float64], min_p: float) -> NDArray[np.float64]:
    """Zero all tokens less than `min_p` times as likely as the most likely one, and normalise.

    Args:
        probabilities: (V,) float64, sum 1.
        min_p: in [0, 1]; 0 keeps all.
    Returns: (V,) float64, sum 1.
    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", arXiv:2407.01082.
    """
    if min_p == 0.0:
        return probabilities
    return _keep(probabilities, np.flatnonzero(probabilities >= min_p * probabilities.max()))


def log_probability(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Natural logarithm of the probability of some tokens under the unchanged distribution (temperature 1).

    Args:
        logits: (V,) any float dtype; exponentials in float32, their sum in float64.
        tokens: (n,) indices into `logits`.
    Returns: (n,) float64.
    """
    top = logits.max()
    with np.errstate(under="ignore"):
        total = np.exp(logits - top).sum(dtype=np.float64)
    return logits[tokens].astype(np.float64) - float(top) - float(np.log(total))


def most_likely(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """(count,) indices of the largest logits, largest first; ties by lower index."""
    count = min(count, logits.size)
    if count == 0:
        return np.zeros(0, np.int64)
    least = np.partition(logits, -count)[-count]
    candidates = np.flatnonzero(logits >= least)
    order = np.argsort(-logits[candidates], kind="stable")
    best: NDArray[np.int64] = candidates[order[:count]].astype(np.int64)
    return best


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
    return _keep(probabilities, order[:count])


def _keep(probabilities: NDArray[np.float64], tokens: NDArray[np.intp]) -> NDArray[np.float64]:
    """Only these tokens, with a sum of 1."""
    kept = np.zeros_like(probabilities)
    kept[tokens] = probabilities[tokens]
    result: NDArray[np.float64] = kept / kept.sum()
    return result


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
