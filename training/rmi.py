"""Representation mutual information: how much the inputs of two blocks say the same about a text.

Measured as normalised HSIC with linear kernels, which is linear CKA. Each window is one example and its hidden states,
all tokens in a row, are its features; only the Gram matrix of each block's input is kept.

Source: Huang et al. 2025, "Dynamic Low-Rank Sparse Adaptation", arXiv:2502.14816, as released; Kornblith et al. 2019,
"Similarity of Neural Network Representations Revisited", arXiv:1905.00414; the unbiased form from Song et al. 2012,
"Feature Selection via Dependence Maximization", JMLR 13.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losa_export.errors import ConfigError
from losa_export.training.allocation import MIN_WINDOWS, MIN_WINDOWS_DEBIASED

FloatMatrix = NDArray[np.float64]

# Elements of the features alive at once: 64 MB in float32.
_CHUNK_ELEMENTS = 1 << 24


@torch.no_grad()
def gram_matrix(hidden: Sequence[Tensor], *, normalise: bool = False) -> FloatMatrix:
    """Inner products between the centred features of all windows.

    Features are centred before they are multiplied. That changes neither estimator below, and keeps a common offset,
    which may be a thousand times what differs, from using up float32's digits. Products are float32 or better and
    are added up over chunks of tokens in float64.

    Args:
        hidden: batches of (windows, tokens, hidden), in order, on any device.
        normalise: divide each token's features by their root mean square first, so that a few massive channels do
            not decide.
    Returns: (n, n) float64, n the number of windows.
    """
    windows = sum(part.shape[0] for part in hidden)
    _, tokens, width = hidden[0].shape
    step = max(1, _CHUNK_ELEMENTS // (windows * width))
    gram = np.zeros((windows, windows), dtype=np.float64)
    for start in range(0, tokens, step):
        features = torch.cat([part[:, start : start + step] for part in hidden])
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        if normalise:
            size = features.square().mean(dim=-1, keepdim=True).sqrt()
            features = features / size.clamp_min(torch.finfo(features.dtype).tiny)
        flat = features.reshape(windows, -1)
        flat = flat - flat.mean(dim=0, dtype=torch.float64).to(flat.dtype)
        gram += (flat @ flat.T).double().cpu().numpy()
    return gram


def mutual_information(grams: Sequence[FloatMatrix], *, debiased: bool = False) -> FloatMatrix:
    """Normalised HSIC between blocks.

    A block whose input is the same for all windows depends on nothing: its values are 0, but for the diagonal.

    Args:
        grams: for each of L blocks the (n, n) Gram matrix of its input.
        debiased: HSIC_u, whose expectation is 0 for independent features however many there are; clipped at 0. The
            biased form nears 1 when there are far more features than windows.
    Returns: (L, L) float64, symmetric, in [0, 1], 1 on the diagonal.
    Raises: ConfigError with fewer than 2 windows, or 4 if `debiased`, or for values that are not finite.
    """
    windows = grams[0].shape[0]
    needed = MIN_WINDOWS_DEBIASED if debiased else MIN_WINDOWS
    if windows < needed:
        raise ConfigError(
            f"{'debiased ' if debiased else ''}mutual information of {windows} window is undefined; "
            f"measure it on at least {needed}",
            windows=windows,
        )
    for block, gram in enumerate(grams):
        if not bool(np.isfinite(gram).all()):
            raise ConfigError(
                f"the input of block {block} is not finite, so its mutual information is undefined; "
                "compute in fp32, and look for damaged weights if that does not help",
                block=block,
            )
    centre = _u_centred if debiased else _centred
    rows = np.stack([centre(gram).reshape(-1) for gram in grams])
    norms = np.sqrt((rows * rows).sum(axis=1))
    # What rounding leaves of a constant input is no signal: its size is judged by the uncentred matrix.
    sizes = np.array([float(np.abs(gram).max()) for gram in grams])
    lively = norms > 1e-12 * windows * sizes
    units = np.divide(rows, norms[:, None], out=np.zeros_like(rows), where=lively[:, None])
    rmi = np.clip(units @ units.T, 0.0, 1.0)
    np.fill_diagonal(rmi, 1.0)
    return np.asarray(0.5 * (rmi + rmi.T), dtype=np.float64)


def _centred(gram: FloatMatrix) -> FloatMatrix:
    """HKH with H = I − 11ᵀ/n: inner products of these are the biased HSIC, up to a factor."""
    return np.asarray(gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean(), dtype=np.float64)


def _u_centred(gram: FloatMatrix) -> FloatMatrix:
    """Off-diagonal centring: inner products of these are n(n − 3) times HSIC_u."""
    n = gram.shape[0]
    hollow = gram - np.diag(np.diagonal(gram))
    sums = hollow.sum(axis=0)
    centred = hollow - (sums + sums[:, None]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0.0)
    return np.asarray(centred, dtype=np.float64)
