"""N:M patterns: of every M consecutive input columns of a row, N weights are kept.

N counts what is *kept*. Some published code counts what is pruned, which is the same for 2:4 and 4:8 and the
opposite for 2:8.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import ConfigError

FloatVector = NDArray[np.float64]
IntVector = NDArray[np.int64]

_MIXED = "mixed"
# Sums of a few float64 terms; far below half a weight.
_TOLERANCE = 1e-9
# A third cannot be written as a decimal fraction; 1:3 is asked for by 0.667.
_SPARSITY_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Pattern:
    """A pattern that a run ends with.

    Attributes:
        kept: N, the weights kept of each group in every block at the end; None lets each block have its own N,
            from its sparsity target.
        width: M, the columns of a group.
    """

    kept: int | None
    width: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern spelt '2:4', or 'mixed:8' for a number of each block's own. Raises: ConfigError."""
        match = re.fullmatch(rf"(\d+|{_MIXED}):(\d+)", text)
        kept = None if match is None or match[1] == _MIXED else int(match[1])
        width = 0 if match is None else int(match[2])
        if width < 2 or (kept is not None and not 1 <= kept < width):
            raise ConfigError(
                f"pattern is {text!r}; write N:M with 0 < N < M for N weights kept of M, such as 2:4, or "
                f"{_MIXED}:8 for a number that each block has of its own",
                field="pattern",
            )
        return cls(kept, width)

    def check_sparsity(self, sparsity_fraction: float) -> None:
        """Hold a run's final sparsity against the pattern. Raises: ConfigError if they contradict each other."""
        if self.kept is None:
            return
        implied = 1.0 - self.kept / self.width
        if abs(sparsity_fraction - implied) > _SPARSITY_TOLERANCE:
            raise ConfigError(
                f"sparsity_fraction is {sparsity_fraction:g}, but pattern {self.kept}:{self.width} keeps {self.kept} "
                f"of {self.width}; set sparsity_fraction to {implied:.4g}, or pattern to "
                f"{_MIXED}:{self.width}",
                field="pattern",
            )

    def check_columns(self, name: str, columns: int) -> None:
        """Hold a weight's input columns against the groups. Raises: ConfigError if they do not divide evenly."""
        if columns % self.width:
            raise ConfigError(
                f"'{name}' has {columns} input columns, which groups of {self.width} do not divide; use a pattern "
                "whose groups do",
                field="pattern",
            )

    def kept_per_group(self, targets: FloatVector, weights: FloatVector, before: IntVector) -> IntVector:
        """N of each block for a round's targets.

        M·(1 − p_i) is rounded down, and what that takes away is handed out by largest fraction (ties: lower
        block), until the weighted mean of N is as near to M·(1 − p) as whole numbers allow. A block never gets
        more than before, since a pruned weight stays pruned, nor less than the pattern keeps.

        Args:
            targets: (L,) sparsity of each block.
            weights: (L,) prunable weights of each block.
            before: (L,) N of the round before; M in the first.
        Returns: (L,) int64.
        """
        lower = np.full(before.shape, self.kept if self.kept is not None else 0, dtype=np.int64)
        exact = self.width * (1.0 - targets)
        ideal = np.clip(exact, lower, before)
        kept = np.floor(ideal + _TOLERANCE).astype(np.int64)
        owed = float(weights @ (exact - kept))
        order = np.argsort(-(ideal - kept), kind="stable")
        # At most M passes: each gives a block one weight of each group more, or one less.
        for _ in range(self.width):
            for block in order:
                if owed >= weights[block] / 2.0 - _TOLERANCE and kept[block] < before[block]:
                    kept[block] += 1
                    owed -= float(weights[block])
            for block in order[::-1]:
                if owed < -weights[block] / 2.0 - _TOLERANCE and kept[block] > lower[block]:
                    kept[block] -= 1
                    owed += float(weights[block])
        return kept
