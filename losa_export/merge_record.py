"""What a merge tells about itself: the report that is printed, and ``sparsity.json`` beside the weights."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from losa_export.checkpoint import Checkpoint
from losa_export.files import sha256_of
from losa_export.peft_adapter import Adapter
from losa_export.proof import LogitProof, TensorProof

SPARSITY_FILE = "sparsity.json"

_FORMAT = "losa-sparsity-1"
# Fields of a run's configuration that hold paths: only the last part is anyone else's business.
_PATH_FIELDS = ("model", "output", "tuning_text", "calibration_text")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did and proved.

    Attributes:
        output: the merged checkpoint.
        tensors: weight name → what was found in each masked weight.
        logits: agreement with base, mask and adapter kept apart.
        adapted: number of weights that an adapter was folded into.
        seconds: wall time of merge and proof.
    """

    output: Path
    tensors: Mapping[str, TensorProof]
    logits: LogitProof
    adapted: int
    seconds: float

    @property
    def pruned(self) -> int:
        """Pruned positions of all masked weights."""
        return sum(proof.pruned for proof in self.tensors.values())

    @property
    def sparsity_fraction(self) -> float:
        """Pruned positions as a fraction of all masked weights."""
        size = sum(proof.size for proof in self.tensors.values())
        return self.pruned / size if size else 0.0

    @property
    def lost(self) -> int:
        """Kept weights that rounded to zero although the base weight was not zero."""
        return sum(proof.lost for proof in self.tensors.values())

    def __str__(self) -> str:
        return (
            f"merged into {self.output} in {self.seconds:.1f} s\n"
            f"  sparsity          {self.sparsity_fraction:.2%} of {len(self.tensors)} weights, "
            f"{self.adapted} with an adapter\n"
            f"  pruned positions  {self.pruned}, every one exactly zero\n"
            f"  kept weights lost {self.lost}\n"
            f"  logits            relative error {self.logits.max_relative_error:.1e} merged against unmerged, "
            f"same arg-max at {self.logits.argmax_agreement:.1%} of {self.logits.positions} positions"
        )


def sparsity_record(report: MergeReport, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """``sparsity.json``: the zero pattern of each weight, where it came from, and what was proved."""
    tensors = {
        name: {
            "shape": list(proof.shape),
            "zeros": proof.pruned,
            "kept_zeros": proof.kept_zeros,
            "sparsity_fraction": proof.pruned / proof.size if proof.size else 0.0,
            "mask_sha256": proof.mask_sha256,
        }
        for name, proof in report.tensors.items()
    }
    return {
        "format": _FORMAT,
        "tensors": tensors,
        "totals": {
            "weights": len(tensors),
            "positions": sum(proof.size for proof in report.tensors.values()),
            "zeros": report.pruned,
            "sparsity_fraction": report.sparsity_fraction,
        },
        "proof": {
            "pruned_positions_not_zero": 0,
            "kept_weights_lost": report.lost,
            "masks_equal_after_reading_back": True,
            "logits_merged_against_unmerged": asdict(report.logits),
        },
        "provenance": {**provenance, "versions": _versions()},
    }


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Name the folder and the SHA-256 of each weight file."""
    return {
        "name": checkpoint.folder.resolve().name,
        "weights_sha256": {path.name: sha256_of(path) for path in checkpoint.weight_files()},
    }


def describe_adapter(adapter: Adapter | None) -> dict[str, Any] | None:
    """Name the folder, the rank of each layer and the scalings; None for no adapter."""
    if adapter is None:
        return None
    layers = {name: adapter.rank_and_scaling(name) for name in adapter.names}
    return {
        "name": adapter.folder.resolve().name,
        "ranks": {name: rank for name, (rank, _) in layers.items()},
        "scalings": sorted({scaling for _, scaling in layers.values()}),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("losa-export", "numpy", "safetensors", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a source tree that was not installed
            found[package] = "unknown"
    return found


def without_folders(config: Mapping[str, Any]) -> dict[str, Any]:
    """The run's [train] table with file and folder names in place of whole paths."""

    def last(value: Any) -> Any:
        return [Path(item).name for item in value] if isinstance(value, list) else Path(str(value)).name

    table = config.get("train", {})
    return {key: last(value) if key in _PATH_FIELDS else value for key, value in table.items()}
