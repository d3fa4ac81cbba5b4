"""Frozen weights that a run changed: kept beside its masks, and put in place of the base's when it is merged.

Pruning with compensation and reconstruction change the kept weights themselves. The dense checkpoint is never
rewritten; the run folder holds the changed tensors alone, and its masks name their digest, so that neither can
be merged without the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from losa_export.checkpoint import Checkpoint
from losa_export.errors import CheckpointError
from losa_export.files import sha256_of
from losa_export.masks import MaskFile

WEIGHTS_FILE = "weights.safetensors"
# Key in the header of the masks.
DIGEST_KEY = "changed_weights_sha256"


def with_changed_weights(checkpoint: Checkpoint, masks: MaskFile) -> Checkpoint:
    """The checkpoint with the weights that the run of `masks` changed; itself if it changed none.

    Args:
        checkpoint: the dense base.
        masks: those of the run, which lie beside the changed weights.
    Raises: CheckpointError if the weights are missing, damaged, not those of the masks, or do not fit the base.
    """
    path, expected = masks.path.parent / WEIGHTS_FILE, masks.metadata.get(DIGEST_KEY)
    if expected is None:
        if path.exists():
            raise CheckpointError(
                f"'{path}' lies beside masks of a run that changed no weights; it is of another run: take it away",
                path=path,
            )
        return checkpoint
    if not path.is_file():
        raise CheckpointError(
            f"the run changed weights of its base, but '{path}' is gone; run 'losa train' again", path=path
        )
    if sha256_of(path) != expected:
        raise CheckpointError(
            f"'{path}' is damaged or of another run than the masks beside it (the sha256 differs); "
            "run 'losa train' again",
            path=path,
        )
    changed = checkpoint.overlaid(path)
    unmasked = sorted(changed.replaced - set(masks.names))
    if unmasked:
        raise CheckpointError(
            f"'{path}' changes tensor '{unmasked[0]}', which has no mask; run 'losa train' again", tensor=unmasked[0]
        )
    return changed


def describe_changed_weights(checkpoint: Checkpoint, run: Path) -> dict[str, Any] | None:
    """Name the file of changed weights, its SHA-256 and how many tensors it holds; None if there are none."""
    if not checkpoint.replaced:
        return None
    path = run / WEIGHTS_FILE
    return {"name": path.name, "sha256": sha256_of(path), "tensors": len(checkpoint.replaced)}
