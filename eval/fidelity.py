"""How near one model's predictions are to another's on text: loss, divergence and top-1 agreement, window by window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from losa_export.eval.perplexity import token_nll
from losa_export.progress import Progress

if TYPE_CHECKING:
    from losa_export.runtimes.base import Runtime

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# Rows that are compared at once: a whole window of a large vocabulary would take several copies of its logits.
_CHUNK_ROWS = 128

# Divergence, in nats, of which rounding does not make a little more or less: the token was on an edge, and fell.
TIPPED_KL = 0.3


@dataclass(frozen=True)
class Fidelity:
    """One model on some windows, beside an exact one; every field (windows,) float64, a mean over scored tokens.

    Attributes:
        nll: negative log-likelihood, nats.
        kl_divergence: KL(exact ‖ this), nats.
        agreement: share of tokens where both have the same most likely next one.
        tipped: share of tokens with a divergence above `TIPPED_KL`.
    """

    nll: Float64
    kl_divergence: Float64
    agreement: Float64
    tipped: Float64


def fidelity(runtimes: Sequence[Runtime], windows: NDArray[np.int64], *, show_progress: bool = True) -> list[Fidelity]:
    """Hold runtimes against the first of them, which is the exact one.

    Args:
        runtimes: of one vocabulary.
        windows: (n, tokens) int64 token ids; each is one prefill into an empty state, its first token unscored.
        show_progress: False for silence on stderr.
    Returns: one for each runtime, in order; of the first, divergences are 0 and agreement is 1.
    """
    found = np.zeros((len(runtimes), 4, len(windows)))
    with Progress("comparing", len(windows), "windows", enabled=show_progress) as progress:
        for place, ids in enumerate(windows):
            exact: Float32 | None = None
            for number, runtime in enumerate(runtimes):
                logits = runtime.prefill(runtime.new_state(1, len(ids)), 0, ids)[:-1]
                exact = logits if exact is None else exact
                found[number, 0, place] = token_nll(logits, ids[1:]).mean()
                found[number, 1:, place] = _compare(exact, logits)
            progress.advance(1)
    return [Fidelity(*fields) for fields in found]


def _compare(exact: Float32, other: Float32) -> tuple[float, float, float]:
    """Mean KL(exact ‖ other) over rows, share with the same largest value, share that tipped; both (P, V) logits."""
    lost = divergences(exact, other)
    same = exact.argmax(axis=1) == other.argmax(axis=1)
    return float(lost.mean()), float(same.mean()), float((lost > TIPPED_KL).mean())


def divergences(exact: Float32, other: Float32) -> Float64:
    """KL(exact ‖ other) of each row of logits (P, V), nats: (P,) float64."""
    found = np.empty(len(exact))
    for start in range(0, len(exact), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        ours, theirs = log_softmax(exact[part]), log_softmax(other[part])
        found[part] = (np.exp(ours) * (ours - theirs)).sum(axis=1, dtype=np.float64)
    return found


def kl_divergence(exact: NDArray[np.floating[Any]], other: Float32) -> float:
    """Mean over rows of KL(exact ‖ other), nats; both (P, V) log-probabilities."""
    wide = exact.astype(np.float32)
    return float((np.exp(wide) * (wide - other)).sum(axis=1, dtype=np.float64).mean())


def log_softmax(logits: Float32) -> Float32:
    """Log-probabilities, (P, V) float32."""
    shifted: Float32 = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
