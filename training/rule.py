"""How the linears of a run are pruned: the criterion, its pattern, and what it measures first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from losa_export.training.adapter import MaskedLoRALinear
from losa_export.training.calibration import BlockBatch, input_grams, input_square_sums
from losa_export.training.config import TrainConfig
from losa_export.training.criteria import CRITERIA, InputStatistics
from losa_export.training.model import AdaptedModel
from losa_export.training.pattern import FloatVector, Pattern
from losa_export.training.scores import Amount


@dataclass(frozen=True)
class PruneRule:
    """How linears are pruned.

    Attributes:
        criterion: name in `CRITERIA`.
        pattern: an N:M pattern; None prunes without structure.
        damping: of the criteria that need a Gram matrix, as part of its mean diagonal.
    """

    criterion: str = "wanda"
    pattern: Pattern | None = None
    damping: float = 0.01

    @classmethod
    def of(cls, config: TrainConfig) -> PruneRule:
        """The rule that a configuration asks for."""
        pattern = None if config.pattern is None else Pattern.parse(config.pattern)
        return cls(config.criterion, pattern, config.damping)

    def amounts(self, adapted: AdaptedModel, targets: FloatVector) -> list[Amount]:
        """How much is to be pruned of the linears of each block, for (L,) sparsity targets.

        Raises: ConfigError if a linear's inputs cannot be cut into groups of M.
        """
        if self.pattern is None:
            return [Amount(float(target)) for target in targets]
        width = self.pattern.width
        before = np.full(len(adapted.blocks), 0, dtype=np.int64)
        for block in range(len(adapted.blocks)):
            for name, layer in adapted.layers_of(block).items():
                self.pattern.check_columns(name, layer.in_features)
                most = int(layer.kept.reshape(-1, width).sum(dim=1, dtype=torch.int64).max())
                before[block] = max(before[block], most)
        kept = self.pattern.kept_per_group(targets, adapted.parameter_counts(), before)
        return [Amount(1.0 - int(number) / width, int(number), width) for number in kept]

    def measure(
        self, block: nn.Module, index: int, layers: Mapping[str, MaskedLoRALinear], batches: Sequence[BlockBatch]
    ) -> dict[str, InputStatistics]:
        """What the criterion must know of the inputs of a block's linears, from one pass of the block as it is."""
        statistic = CRITERIA[self.criterion].statistic
        if statistic == "squares":
            sums = input_square_sums(block, index, layers, batches)
            return {name: InputStatistics(squares=sums[name]) for name in layers}
        if statistic == "gram":
            grams = input_grams(block, index, layers, batches)
            return {name: InputStatistics(gram=grams[name]) for name in layers}
        return {name: InputStatistics() for name in layers}
