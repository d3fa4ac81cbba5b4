"""How far a pruned block answers from the dense one: what ranks are shared out by."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_export.training.config import ErrorKind as ErrorKind


class ChannelErrors:
    """Relative squared error of a block's output, channel by channel, added up over batches of tokens.

    Only two sums per channel are kept: differences and squares are float32 or better, sums float64, whatever the
    model computes in.
    """

    def __init__(self) -> None:
        self._difference: Tensor | None = None
        self._reference: Tensor | None = None

    @torch.no_grad()
    def add(self, dense: Tensor, sparse: Tensor) -> None:
        """Take in a batch: outputs (…, channels) of the dense block and of the pruned one, for the same tokens."""
        precise = torch.promote_types(dense.dtype, torch.float32)
        wanted = dense.reshape(-1, dense.shape[-1]).to(precise)
        given = sparse.reshape(-1, sparse.shape[-1]).to(precise)
        difference = (wanted - given).double().square().sum(dim=0)
        reference = wanted.double().square().sum(dim=0)
        self._difference = difference if self._difference is None else self._difference + difference
        self._reference = reference if self._reference is None else self._reference + reference

    def error(self) -> float:
        """Mean over channels of ‖D_c − O_c‖² / ‖D_c‖², D dense and O sparse.

        Channels in which the dense block answers zero for every token have no scale to be measured by, and are
        left out; without any other the error is 0. Not finite if an output is not.
        Source: Huang et al. 2025, "Dynamic Low-Rank Sparse Adaptation", arXiv:2502.14816, as released.
        """
        if self._difference is None or self._reference is None:
            return 0.0
        alive = self._reference != 0.0
        if not bool(alive.any()):
            return 0.0
        return float((self._difference[alive] / self._reference[alive]).mean())
