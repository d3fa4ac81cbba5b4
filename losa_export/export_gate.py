"""The last step of an export: hold the written folder against its checkpoint."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from losa_export.checkpoint import open_checkpoint
from losa_export.errors import CheckpointError, KernelError, MissingDependencyError

if TYPE_CHECKING:
    from losa_export.reference import Reference

Truth = Literal["torch", "stored"]


@dataclass(frozen=True)
class StoredTypes:
    """How an exported model stores its weights. All None where they are dense, which is fp32 throughout.

    Attributes:
        values: type of the non-zeros.
        head: type of the head and the embedding.
        group: columns that share a scale, None where nothing has scales.
        activations: what our kernels round activations to, None where they round none.
    """

    values: str | None = None
    head: str | None = None
    group: int | None = None
    activations: str | None = None

    @classmethod
    def settled(cls, values: str, head: str, group: int, activations: str) -> StoredTypes:
        """As chosen, without what these types do not use."""
        scaled = not {values, head}.isdisjoint(("int8", "int4"))
        return cls(values, head, group if scaled else None, activations if scaled else None)

    @property
    def rounds(self) -> bool:
        """Whether some weights are not the checkpoint's to the last bit."""
        return not {self.values, self.head} <= {None, "fp32"}

    def __str__(self) -> str:
        scaled = f" (groups of {self.group}, {self.activations} activations)" if self.group else ""
        return f"{self.values}, head {self.head}{scaled}"


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def reference_source(checkpoint: Path) -> Truth:
    """Where the gate's truth comes from, settled before any work.

    Raises: MissingDependencyError if there is none.
    """
    from losa_export.reference import REFERENCE_FILE

    if is_installed("torch") and is_installed("transformers"):
        return "torch"
    if (checkpoint / REFERENCE_FILE).is_file():
        return "stored"
    raise MissingDependencyError(
        f"the gate compares the export with its source, but torch is not installed and '{checkpoint}' has no "
        f"{REFERENCE_FILE}; install torch with: pip install 'losa-export[train]', or skip the comparison with "
        "--no-gate",
        package="torch",
        extra="train",
    )


def run_gate(checkpoint: Path, folder: Path, source: Truth, types: StoredTypes) -> dict[str, Any]:
    """Compare a written folder with its checkpoint: prefill, decode with past, batch 3, greedy tokens.

    Args:
        checkpoint: the source.
        folder: what was made of it.
        source: where the truth comes from.
        types: how it stores its weights.

    Returns: the figures for export.json, with the engine that answered.

    Raises: GateError naming the first output that diverges.
    """
    from losa_export.eval.parity import gate
    from losa_export.reference import compute_reference_apart
    from losa_export.runtimes.ort import OrtRuntime

    if source == "torch":
        with tempfile.TemporaryDirectory(prefix="losa-reference-") as scratch:
            reference = compute_reference_apart(checkpoint, Path(scratch) / "reference.safetensors")
    else:
        reference = _stored_reference(checkpoint)
    # The record says which engine answered. Without packed copies its weights stay those of the mapped file.
    runtime = OrtRuntime.load(folder, custom_op=types.values is not None and _has_native_library(), prepack=False)
    try:
        report = gate(reference, runtime)
        return {**report.as_dict(), "reference": source, "engine": runtime.describe().as_dict()}
    finally:
        runtime.close()


def _stored_reference(source: Path) -> Reference:
    """The reference kept in the checkpoint. Raises: CheckpointError if the weights have changed since."""
    from losa_export.reference import REFERENCE_FILE, load_reference

    reference = load_reference(source / REFERENCE_FILE)
    if reference is None or reference.model_id != open_checkpoint(source).weights_sha256():
        raise CheckpointError(
            f"'{source / REFERENCE_FILE}' was computed from other weights than those in '{source}'; "
            "run 'losa merge' again, or skip the comparison with --no-gate"
        )
    return reference


def _has_native_library() -> bool:
    from losa_export.runtimes.native import library_path

    try:
        library_path()
    except KernelError:
        return False
    return True
