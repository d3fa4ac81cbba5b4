"""Which linears are sparse, and under which zero pattern.

The pattern a checkpoint was pruned with lies in its masks.safetensors, and is the truth: a kept weight may be
exactly zero. Only where no pattern is stored is it read off the weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from losa_export.checkpoint import Checkpoint, read_json
from losa_export.errors import InputError, MaskError
from losa_export.masks import MaskFile, digest, load_masks

MASKS_FILE = "masks.safetensors"
RECORD_FILE = "sparsity.json"

# Below this share of zeros the compressed form saves too little to be worth an operator of its own.
SPARSE_FROM_FRACTION = 0.3

Weights = Literal["sparse", "dense"]
MaskSource = Literal["masks.safetensors", "nonzero", "none"]


class TensorReader(Protocol):
    """Where weights come from: a `Checkpoint`, or a model in memory."""

    def read(self, name: str) -> NDArray[np.float32]:
        """Read a tensor."""
        ...


@dataclass
class SparsityPlan:
    """Decides tensor by tensor, and notes what it decided.

    Attributes:
        source: where the patterns come from.
        store_sparse: whether sparse linears are compressed, or written densely with their zeros.
        digests: tensor → digest of its pattern, of every tensor decided so far.
        recorded: tensor → digest that the checkpoint says it has, where it says so.
    """

    source: MaskSource
    store_sparse: bool
    prunable: frozenset[str]
    recorded: Mapping[str, str]
    masks: MaskFile | None = None
    digests: dict[str, str] = field(default_factory=dict)

    def keep(self, name: str, weight: NDArray[np.float32]) -> NDArray[np.bool_] | None:
        """The pattern (out, in) of tensor `name`, True = kept; None if it is dense.

        Raises: MaskError if the pattern is not the one that the checkpoint's record was written for.
        """
        keep = self._pattern(name, weight)
        if keep is None:
            return None
        self.digests[name] = digest(keep)
        if self.recorded.get(name, self.digests[name]) != self.digests[name]:
            raise MaskError(
                f"the zero pattern of '{name}' is not the one that {RECORD_FILE} records; {MASKS_FILE} is missing "
                "or belongs to another checkpoint: run 'losa merge' again",
                tensor=name,
            )
        return keep

    def _pattern(self, name: str, weight: NDArray[np.float32]) -> NDArray[np.bool_] | None:
        if self.masks is not None:
            return self.masks.read(name) if name in self.masks else None
        if self.source == "none" or name not in self.prunable:
            return None
        keep: NDArray[np.bool_] = weight != 0
        return keep if 1.0 - np.count_nonzero(keep) / keep.size >= SPARSE_FROM_FRACTION else None


def plan_sparsity(
    checkpoint: Checkpoint, source: TensorReader, linears: Mapping[str, tuple[int, int]], weights: Weights | None
) -> SparsityPlan:
    """Look at a checkpoint and settle how its linears are stored.

    Args:
        checkpoint: the folder with masks and records, if there are such.
        source: of the weights.
        linears: weights that may be sparse → (out, in).
        weights: what the user asked for; None chooses sparse for a sparse checkpoint.

    Raises:
        MaskError: a stored mask does not fit its tensor, or prunes one that is not a linear of a block.
        InputError: sparse weights were asked for, but nothing is sparse.
    """
    prunable = frozenset(linears)
    recorded = _recorded_digests(checkpoint)
    masks_path = checkpoint.folder / MASKS_FILE
    if masks_path.exists():
        masks = load_masks(masks_path)
        _check_masks(masks, linears)
        return SparsityPlan("masks.safetensors", weights != "dense", prunable, recorded, masks)
    if weights == "dense" and not recorded:
        return SparsityPlan("none", False, prunable, recorded)
    if weights == "sparse" and not recorded and not _some_tensor_is_sparse(source, prunable):
        raise InputError(
            f"checkpoint '{checkpoint.folder}' has no {MASKS_FILE}, and no linear of which "
            f"{SPARSE_FROM_FRACTION:.0%} are zero: prune it with 'losa train' first, or export with --weights dense"
        )
    # Whether anything is sparse shows while the weights are read; looking first would read them twice.
    return SparsityPlan("nonzero", weights != "dense", prunable, recorded)


def _check_masks(masks: MaskFile, linears: Mapping[str, tuple[int, int]]) -> None:
    for name in masks.names:
        if name not in linears:
            raise MaskError(
                f"'{masks.path}' prunes '{name}', which is no linear of a block of this model; the masks belong to "
                "another checkpoint: run 'losa merge' again",
                tensor=name,
            )
        if masks.shape(name) != linears[name]:
            raise MaskError(
                f"mask for '{name}' is {masks.shape(name)}, its weight is {linears[name]}; '{masks.path}' was made "
                "for another checkpoint: run 'losa merge' again",
                tensor=name,
            )


def _recorded_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor → mask digest, from the checkpoint's sparsity.json if there is one."""
    path = checkpoint.folder / RECORD_FILE
    if not path.is_file():
        return {}
    record = read_json(path, what="checkpoint", mend="run 'losa merge' again, or delete the file")
    tensors: Any = record.get("tensors")
    if not isinstance(tensors, Mapping):
        raise MaskError(f"'{path}' has no table 'tensors': run 'losa merge' again, or delete the file", path=path)
    return {
        str(name): entry["mask_sha256"]
        for name, entry in tensors.items()
        if isinstance(entry, Mapping) and isinstance(entry.get("mask_sha256"), str)
    }


def _some_tensor_is_sparse(source: TensorReader, prunable: frozenset[str]) -> bool:
    for name in sorted(prunable):
        weight = source.read(name)
        if 1.0 - np.count_nonzero(weight) / weight.size >= SPARSE_FROM_FRACTION:
            return True
    return False
