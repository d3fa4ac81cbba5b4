"""Where linears' weights lie while their block is not at work: the checkpoint's files, and a folder of changed ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from losa_export.checkpoint import Checkpoint
from losa_export.files import disk_errors
from losa_export.training.adapter import MaskedLoRALinear
from losa_export.training.tensors import write_tensors

_TENSOR = "weight"


class WeightStore:
    """Parks linears, and brings them back as they were, bit for bit.

    Args:
        checkpoint: the dense checkpoint.
        convert: makes of a stored weight, given its name, the frozen one that a model held in memory has.
        folder: for weights that pruning or reconstruction changed; emptied now, made when there is one.
    """

    def __init__(self, checkpoint: Checkpoint, convert: Callable[[str, Tensor], Tensor], folder: Path) -> None:
        self._checkpoint, self._convert, self._folder = checkpoint, convert, folder
        self.clear()

    def fetch(self, name: str, layer: MaskedLoRALinear) -> None:
        """Bring the weight and mask of a parked layer back, onto the device of its adapter.

        Raises: CheckpointError if the checkpoint cannot be read.
        """
        device = layer.lora_A.device
        # A copy: nobody may write to a mapped file, and the place of a factor may change a product's last bit.
        dense = self._convert(name, self._checkpoint.mapped(name)).to(device, copy=True)
        layer.unpark(dense, self.changed(name, layer).to(device, copy=True) if layer.weight_changed else None)

    def put_away(self, name: str, layer: MaskedLoRALinear) -> None:
        """Park a layer; a weight that is not the checkpoint's goes to the folder.

        Raises: OutputError if the disk is full or the folder cannot be written.
        """
        if layer.weight_changed:
            self._write(name, layer.weight.detach())
        layer.park()

    def changed(self, name: str, _: MaskedLoRALinear) -> Tensor:
        """The changed weight of a parked layer, mapped from its file: do not write to it."""
        from safetensors import safe_open

        with safe_open(self._path(name), framework="pt") as file:
            tensor: Tensor = file.get_tensor(_TENSOR)
        return tensor

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str, weight: Tensor) -> None:
        path = self._path(name)
        partial = path.with_suffix(".partial")
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_tensors(partial, {_TENSOR: weight.cpu().contiguous()}, {"format": "pt"})
            # Under another name first: a reader may still have the file of the last round mapped.
            partial.replace(path)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
