"""Perplexity of a runtime on text, by the protocol that GPTQ, SparseGPT and Wanda share.

One stream of tokens without special tokens is cut into windows without overlap; each window is scored on
its own from an empty cache, its first token unscored; perplexity is the exponential of the mean negative
log-likelihood per scored token. All windows being equally long, that equals the mean of window means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import ConfigError, RuntimeFailureError, TextError
from losa_export.progress import Progress

if TYPE_CHECKING:
    from losa_export.runtimes.base import Runtime

# Values of float64 scratch for one chunk of logits: 4 Mi values are 32 MiB, 85 positions of a
# vocabulary of 49,152. A whole window of 2,048 would take 1.5 GiB for two float64 copies.
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class PerplexityReport:
    """Outcome over `windows` windows of `window` tokens.

    Attributes:
        ppl: exp(mean_nll).
        mean_nll: nats per scored token.
        standard_error: of mean_nll, over windows (nats); nan for one window.
        tokens: scored tokens, windows x (window - 1).
        window_nll: mean NLL of each window, in order, so that two models can be paired.
    """

    ppl: float
    mean_nll: float
    standard_error: float
    tokens: int
    windows: int
    window: int
    runtime: str
    window_nll: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values (a standard error that does not exist is null)."""
        fields = asdict(self)
        fields["window_nll"] = list(self.window_nll)
        if math.isnan(self.standard_error):
            fields["standard_error"] = None
        return fields


def wikitext_document(text: str) -> str:
    """A WikiText file as the one string that the usual protocol tokenises.

    Lines that are only white space become empty, other lines keep their newline, and all are joined by
    two newlines. Source: the data sets' row form ("wikitext-2-raw-v1") joined as GPTQ's loader does.
    """
    lines = text.split("\n")
    if lines[-1] == "":  # what follows the last newline is no line
        lines.pop()
    return "\n\n".join("" if not line.strip() else f"{line}\n" for line in lines)


def read_wikitext(path: Path) -> str:
    """`wikitext_document` of a UTF-8 file.

    Raises:
        TextError: the file is missing or is not UTF-8.
    """
    try:
        return wikitext_document(path.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"'{path}' cannot be read as UTF-8 text ({error}); check the path", path=path) from error


def cut_windows(
    tokens: Sequence[int] | NDArray[np.integer[Any]], window: int, count: int | None, stride: int | None = None
) -> NDArray[np.int64]:
    """The first `count` windows (None: all) of `window` tokens; the tail is dropped.

    Args:
        tokens: a text's.
        window: tokens in each.
        count: how many.
        stride: tokens from the beginning of one to that of the next; None is `window`, so that none overlap.

    Returns: (count, window) int64.

    Raises:
        ConfigError: window below 2 (nothing to score), count below 1, or a stride that is not in 1 … window.
        TextError: the text fills fewer windows than asked for.
    """
    if window < 2:
        raise ConfigError(f"window is {window}, but the first token is never scored; give at least 2", field="window")
    if count is not None and count < 1:
        raise ConfigError(f"count is {count}; give at least 1 window, or leave it out for all", field="count")
    step = window if stride is None else stride
    if not 1 <= step <= window:
        raise ConfigError(f"stride is {step}; give 1 … {window}, the window's own length", field="stride")
    stream = np.asarray(tokens, dtype=np.int64)
    whole = max(0, (stream.size - window) // step + 1)
    if whole < (count or 1):
        raise TextError(
            f"the text has {stream.size} tokens, which fill {whole} windows of {window}; {count or 1} are needed: "
            "give more text, or a shorter or smaller --window and --count",
            tokens=int(stream.size),
            window=window,
        )
    taken = whole if count is None else count
    return np.stack([stream[first : first + window] for first in range(0, taken * step, step)])


def token_nll(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log-likelihood of each target, in nats.

    Args:
        logits: (P, V) float32.
        targets: (P,) int64 ids.

    Returns: (P,) float64, computed in float64, a few rows at a time.
    """
    rows = max(1, _CHUNK_VALUES // logits.shape[1])
    nll = np.empty(len(targets))
    for start in range(0, len(targets), rows):
        chunk = logits[start : start + rows].astype(np.float64)
        chosen = np.take_along_axis(chunk, targets[start : start + rows, None], axis=1)[:, 0]
        top = chunk.max(axis=1)
        chunk -= top[:, None]
        np.exp(chunk, out=chunk)
        nll[start : start + rows] = np.log(chunk.sum(axis=1)) + top - chosen
    return nll


def perplexity(runtime: Runtime, windows: NDArray[np.int64], *, show_progress: bool = True) -> PerplexityReport:
    """Measure `runtime` on windows of token ids.

    Args:
        runtime: any loaded runtime; each window is one prefill into an empty state.
        windows: (W, window) int64, as `cut_windows` gives.
        show_progress: False for silence on stderr.

    Raises:
        ConfigError: windows longer than the model's positions, or ids outside its vocabulary.
        RuntimeFailureError: the runtime gives logits of another shape, or values that are not finite.
    """
    count, window = windows.shape
    if window > runtime.max_positions:
        raise ConfigError(
            f"windows of {window} tokens exceed the model's {runtime.max_positions} positions; give a shorter window",
            field="window",
        )
    if count == 0 or window < 2 or windows.min() < 0 or windows.max() >= runtime.vocab_size:
        raise ConfigError(
            f"windows of shape {windows.shape} hold nothing to score, or ids outside 0 … {runtime.vocab_size - 1}; "
            "use the tokenizer that belongs to the model",
            field="windows",
        )
    means: list[float] = []
    with Progress("perplexity", count, "windows", enabled=show_progress) as progress:
        for index, ids in enumerate(windows):
            logits = runtime.prefill(runtime.new_state(1, window), 0, ids)
            if logits.shape != (window, runtime.vocab_size):
                raise RuntimeFailureError(
                    f"runtime '{runtime.name}' gave logits of shape {logits.shape} for a window of {window} tokens, "
                    f"expected {(window, runtime.vocab_size)}; export the model again",
                    shape=logits.shape,
                )
            nll = token_nll(logits[:-1], ids[1:])
            if not np.isfinite(nll).all():
                raise RuntimeFailureError(
                    f"runtime '{runtime.name}' gave NaN or infinite logits in window {index}, "
                    f"position {int(np.argmax(~np.isfinite(nll)))}; the model or a kernel is broken",
                    window=index,
                )
            means.append(float(nll.mean()))
            progress.advance(1, ppl=f"{_exp(float(np.mean(means))):.2f}")
    mean = math.fsum(means) / count
    error = float(np.std(means, ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    return PerplexityReport(
        ppl=_exp(mean),
        mean_nll=mean,
        standard_error=error,
        tokens=count * (window - 1),
        windows=count,
        window=window,
        runtime=runtime.name,
        window_nll=tuple(means),
    )


def _exp(nll: float) -> float:
    """exp, infinite where it overflows: a ruined model still gets a number."""
    return math.exp(nll) if nll < 709 else math.inf
