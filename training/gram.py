"""XᵀX of a linear's inputs, and the factorisations that second-order criteria take of it, each made once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from losa_export.errors import ConfigError


class Gram:
    """Second moments of the inputs of one linear, or of several that read the same tensor.

    Args:
        matrix: (in, in) float64, symmetric: the sum of x·xᵀ over calibration tokens. A common factor changes
            nothing.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._made: dict[tuple[str, float], tuple[Tensor, ...]] = {}

    @property
    def dead(self) -> Tensor:
        """(in,) bool, True for an input that was zero at every token."""
        return self.matrix.diagonal() == 0

    def damped(self, damping: float) -> Tensor:
        """(in, in) float64: `damping` times the mean of the diagonal is added to it.

        A dead input gets that mean for a diagonal first (1 if all are dead), so that the matrix can be inverted;
        having no other entries, it does not touch the other inputs whatever the number is.
        """
        damped, dead = self.matrix.clone(), self.dead
        diagonal = damped.diagonal()
        mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
        diagonal[dead] = mean
        diagonal += damping * mean
        return damped

    def inverse_factor(self, damping: float) -> Tensor:
        """U, (in, in) float64, upper triangular, with UᵀU the inverse of `damped`. Raises: ConfigError."""

        def make() -> tuple[Tensor, ...]:
            return (_cholesky(torch.cholesky_inverse(_cholesky(self.damped(damping)))).mT.contiguous(),)

        return self._once("inverse_factor", damping, make)[0]

    def normalised(self, damping: float) -> tuple[Tensor, Tensor, Tensor]:
        """`damped` with its diagonal scaled to 1, and its eigendecomposition.

        Returns: d (in,), the roots of the diagonal; λ (in,) and Q (in, in) with D⁻¹·damped·D⁻¹ = Q·Λ·Qᵀ for
            D = diag(d). All float64.
        """

        def make() -> tuple[Tensor, ...]:
            damped = self.damped(damping)
            scale = damped.diagonal().sqrt()
            values, vectors = torch.linalg.eigh(damped / scale / scale.unsqueeze(1))
            return scale, values.clamp_min(0.0), vectors

        scale, values, vectors = self._once("normalised", damping, make)
        return scale, values, vectors

    def _once(self, name: str, damping: float, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        key = (name, damping)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, fault = torch.linalg.cholesky_ex(matrix)
    if int(fault):
        raise ConfigError(
            "the second moments of a linear's inputs cannot be inverted: they are not positive definite at "
            "this damping; raise damping, or calibrate on more windows",
            field="damping",
        )
    return factor
