"""export.json: what an exported folder holds, read back from the files that were written."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from losa_export.errors import FormatError
from losa_export.files import sha256_of
from losa_export.graph.external import ModelFolder
from losa_export.graph.stored import stored_nodes
from losa_export.masks import digest, zeros_count
from losa_export.onnx_file import MANIFEST_FILE

_VERSIONS_OF = ("losa-export", "numpy", "onnx", "onnx-ir", "onnxruntime")


@dataclass(frozen=True)
class StoredLinear:
    """One sparse linear as it stands in the written file.

    Attributes:
        shape: (out, in).
        zeros: pruned positions.
        mask_sha256: identity of the zero pattern, see `losa_export.masks.digest`.
        stored_bytes: of its node's tensors, by its share of the kept weights.
        values: name of the value format.
    """

    shape: tuple[int, int]
    zeros: int
    mask_sha256: str
    stored_bytes: int
    values: str

    def as_dict(self) -> dict[str, Any]:
        """The entry in export.json."""
        return {
            "shape": list(self.shape),
            "zeros": self.zeros,
            "sparsity_fraction": self.zeros / (self.shape[0] * self.shape[1]),
            "mask_sha256": self.mask_sha256,
            "stored_bytes": self.stored_bytes,
            "values": self.values,
        }


def read_sparse_linears(model: ModelFolder) -> dict[str, StoredLinear]:
    """Every sparse linear of a written model: tensor name → facts, its pattern decoded from the file.

    A node may hold several linears; each is told apart and counted with its share of the node's bytes.

    Raises: FormatError if a node is of no known format, or its mask does not fit its attributes or its parts.
    """
    found: dict[str, StoredLinear] = {}
    for node in stored_nodes(model):
        if not node.is_sparse:
            continue
        stored_bytes = sum(model.tensors[name].length for name in node.tensors.values())
        keeps = node.masks(model)
        kept = sum(int(np.count_nonzero(keep)) for keep in keeps)
        for part, keep in zip(node.parts, keeps, strict=True):
            share = np.count_nonzero(keep) / kept if kept else 1 / len(keeps)
            found[part.name] = StoredLinear(
                (keep.shape[0], keep.shape[1]),
                zeros_count(keep),
                digest(keep),
                round(stored_bytes * share),
                node.value_format.name,
            )
    return found


def check_digests(stored: Mapping[str, StoredLinear], meant: Mapping[str, str]) -> None:
    """Hold the patterns in the file against those that were meant to be written.

    Raises: FormatError naming the first tensor that differs or is missing.
    """
    for name, expected in meant.items():
        linear = stored.get(name)
        if linear is None or linear.mask_sha256 != expected:
            raise FormatError(
                f"the zero pattern of '{name}' in the written file is not that of the checkpoint; "
                "the disk or the writer is at fault, export again",
                tensor=name,
            )


def file_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Plain file name → its size in bytes and SHA-256, for all files of the folder but the manifest itself."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST_FILE
    }


def versions(*more: str) -> dict[str, str]:
    """Version of Python and of each package that had a part in the export, `more` of them; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in (*_VERSIONS_OF, *more):
        number = package_version(package)
        if number is not None:
            found[package] = number
    return found


def package_version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
