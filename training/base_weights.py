"""Frozen weights that pruning or reconstruction changed: saved with the state, restored, and left in the run folder.

Only those are copied; all others are in the dense checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from losa_export.base_weights import DIGEST_KEY, WEIGHTS_FILE
from losa_export.files import disk_errors, sha256_of
from losa_export.training.model import AdaptedModel
from losa_export.training.tensors import flush, write_tensors

_PREFIX = "weight:"


def state_tensors(adapted: AdaptedModel) -> dict[str, Tensor]:
    """The changed weights under the names they have in a run's state."""
    return {f"{_PREFIX}{name}": weight for name, weight in adapted.changed_weights().items()}


def restore(adapted: AdaptedModel, tensors: Mapping[str, Tensor]) -> None:
    """Put changed weights of a run's state back, bit for bit; other tensors are not looked at.

    Raises: KeyError for a layer that the model lacks; MaskError for another shape.
    """
    for key, tensor in tensors.items():
        if key.startswith(_PREFIX):
            name = key.removeprefix(_PREFIX)
            layer = adapted.layers[name]
            with adapted.at_work({name: layer}):
                layer.set_weight(tensor)


def write_changed_weights(run: Path, adapted: AdaptedModel) -> dict[str, str]:
    """Write weights.safetensors into `run`, whole or not at all; without changed weights there is none.

    Returns: what the header of the masks says of it, so that neither is merged without the other.
    Raises: OutputError if the disk is full or the folder cannot be written.
    """
    path, changed = run / WEIGHTS_FILE, adapted.changed_weights()
    with disk_errors(run):
        if not changed:
            path.unlink(missing_ok=True)
            return {}
        partial = run / f".{WEIGHTS_FILE}.partial"
        try:
            ready = {name: weight.cpu().contiguous() for name, weight in changed.items()}
            write_tensors(partial, ready, {"format": "pt"})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        flush(run)
        return {DIGEST_KEY: sha256_of(path)}
