"""What allocators want to know of the model before a round prunes it: one pass, block after block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losa_export.training.adapter import all_folded
from losa_export.training.allocation import FloatVector
from losa_export.training.calibration import capture_block_inputs, input_square_sums
from losa_export.training.model import AdaptedModel
from losa_export.training.prune import advance
from losa_export.training.rmi import gram_matrix, mutual_information
from losa_export.training.scores import wanda_scores


@dataclass(frozen=True)
class Measurements:
    """What a pass measured. L blocks.

    Attributes:
        rmi: (L, L) representation mutual information between block inputs; None if not asked for.
        outliers: (L,) share of each block's scores that are outliers; None if not asked for.
    """

    rmi: FloatVector | None = None
    outliers: FloatVector | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was asked for."""
        return self.rmi is None and self.outliers is None


def measure_blocks(
    adapted: AdaptedModel,
    windows: Tensor,
    *,
    batch_size: int,
    rmi: bool,
    debiased: bool = False,
    normalise: bool = False,
    outlier_factor: float | None = None,
    on_block: Callable[[int], None] = lambda _: None,
) -> Measurements:
    """Run calibration windows through the model as it is, masks and adapters included.

    Args:
        adapted: the model, unchanged.
        windows: (n, tokens) int64.
        batch_size: windows run together.
        rmi: measure mutual information between the inputs of blocks.
        debiased: as in `mutual_information`.
        normalise: as in `gram_matrix`.
        outlier_factor: measure the share of weights whose Wanda score exceeds this many times the mean score of
            their block; None does not.
        on_block: told the number of each block when it is done; may raise to stop between blocks.
    Raises: ConfigError if mutual information is undefined for so few windows.
    """
    batches = capture_block_inputs(adapted.model, adapted.blocks, windows, batch_size)
    grams, outliers = [], []
    for index, block in enumerate(adapted.blocks):
        layers = adapted.layers_of(index)
        if rmi:
            grams.append(gram_matrix([batch.hidden for batch in batches], normalise=normalise))
        with adapted.at_work(layers), all_folded(layers, adapted.compute_dtype):
            if outlier_factor is not None:
                sums = input_square_sums(block, index, layers, batches)
                scores = [wanda_scores(layer.merged(), sums[name]) for name, layer in layers.items()]
                outliers.append(outlier_share(scores, outlier_factor))
            if index + 1 < len(adapted.blocks):
                advance(block, index, batches)
        on_block(index)
    return Measurements(
        mutual_information(grams, debiased=debiased) if rmi else None,
        np.array(outliers, dtype=np.float64) if outlier_factor is not None else None,
    )


def outlier_share(scores: list[Tensor], factor: float) -> float:
    """Share of a block's scores that exceed `factor` times their mean, over all its linears together.

    Source: Yin et al. 2023, "Outlier Weighed Layerwise Sparsity", arXiv:2310.05175.
    """
    count = sum(part.numel() for part in scores)
    mean = sum(float(part.sum(dtype=torch.float64)) for part in scores) / count
    return sum(int((part > factor * mean).sum()) for part in scores) / count
