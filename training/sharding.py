"""Frozen weights shared out over the processes of a run.

A process holds some rows of each linear's weight and mask, beside all adapters and all masks' bits, which are small.
While a linear computes, forward or backward, all of its rows meet; while a block is pruned, all of the block's do.
PyTorch's FSDP would do so for modules, but owns what it shares out, and pruning replaces it between two steps.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from losa_export.training.adapter import MaskedLoRALinear
from losa_export.training.model import AdaptedModel
from losa_export.training.shares import Shares, overwrite_rows, share_rows, whole


def share_out(adapted: AdaptedModel, processes: int) -> AdaptedModel:
    """Leave to each process its rows of all block linears. Every process must do so at once.

    Args:
        adapted: a model whose linears are parked, on the device where it shall compute.
        processes: how many there are.
    Returns: the same model with another store. One linear at a time has been in memory.
    Raises: CheckpointError if a weight cannot be read or is not finite.
    """
    from torch.distributed.device_mesh import init_device_mesh

    device = next(adapted.model.parameters()).device
    mesh = init_device_mesh(device.type, (processes,))
    for name, layer in adapted.layers.items():
        with adapted.at_work({name: layer}):
            shares = Shares(share_rows(layer.weight.detach(), mesh), share_rows(layer.mask, mesh))
        layer.share(shares)
    return replace(adapted, store=SharedStore())


class SharedStore:
    """Makes layers whole, and shares them out again. Every process must do so at once, and in the same order."""

    def fetch(self, _: str, layer: MaskedLoRALinear) -> None:
        """Bring all rows of a layer's weights here."""
        shares = layer.shares
        if shares.dense is None:
            layer.unpark(whole(shares.weight))
        else:
            layer.unpark(whole(shares.dense), whole(shares.weight))

    def put_away(self, _: str, layer: MaskedLoRALinear) -> None:
        """Keep this process's rows of a layer, of the first process's mask and changed weight."""
        shares = layer.shares
        overwrite_rows(shares.mask, layer.mask)
        if layer.weight_changed and shares.dense is None:
            weight = share_rows(layer.weight.detach(), shares.weight.device_mesh)
            shares = replace(shares, weight=weight, dense=shares.weight)
        elif layer.weight_changed:
            overwrite_rows(shares.weight, layer.weight.detach())
        layer.share(shares)

    def changed(self, _: str, layer: MaskedLoRALinear) -> Tensor:
        """All rows of a changed weight, on the CPU."""
        return whole(layer.shares.weight).cpu()

    def clear(self) -> None:
        """Nothing lies anywhere else."""
