"""Tensors whose rows are shared out over the processes of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Shares:
    """One process's rows of what a linear has of its own.

    Attributes:
        weight: (out, in), the frozen weight.
        mask: (out, in) uint8, 1 = keep.
        dense: (out, in), the dense checkpoint's weight where `weight` is another; else None.
    """

    weight: DTensor
    mask: DTensor
    dense: DTensor | None = None


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor that is shared out, for which every process must ask at once; any other comes back as is."""
    gather = getattr(tensor, "full_tensor", None)
    gathered: Tensor = tensor if gather is None else gather()
    return gathered


def share_rows(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """Share the rows of the first process's `tensor` out over `mesh`. Every process must do so at once."""
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor, mesh, [Shard(0)])


def overwrite_rows(shared: DTensor, tensor: Tensor) -> None:
    """Put the rows of the first process's `tensor` into what is shared out. Every process must do so at once."""
    shared.to_local().copy_(share_rows(tensor, shared.device_mesh).to_local())
