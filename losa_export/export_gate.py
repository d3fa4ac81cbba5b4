"""The last step of an export: hold the written folder against its checkpoint.

An export with fp32 values must answer as its checkpoint. One that rounds weights cannot, so it passes two tests: it
must answer as the checkpoint with the weights that the file holds, which proves the graph and the kernels; and not too
differently from the checkpoint itself, which a broken rounding would.
"""

from __future__ import annotations

import importlib.util
import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from losa_export.checkpoint import open_checkpoint
from losa_export.errors import CheckpointError, GateError, KernelError, MissingDependencyError
from losa_export.onnx_file import MODEL_FILE

if TYPE_CHECKING:
    from losa_export.eval.parity import GateThresholds, ReferenceAnswers
    from losa_export.reference import Reference
    from losa_export.runtimes.ort import OrtRuntime

Truth = Literal["torch", "stored"]

# Mean KL divergence from the checkpoint, in nats a token, beyond which something is broken rather than rounded: several
# times what SmolLM2-135M shows at 70 % zeros (bf16 7e-5, int8 0.003, int4 0.14, int8 activations 0.02).
_MOST_KL = {"fp32": 1e-5, "bf16": 5e-3, "int8": 0.05, "int4": 0.5}
_MOST_KL_OF_INT8_ACTIVATIONS = 0.2
# What activations of 8 bits may add to it where they are not asked for: about twice what they add there once outliers
# are smoothed, or the given share of what rounding the weights has cost.
_MOST_KL_TO_ADD = 0.01
_MOST_SHARE_TO_ADD = 0.1


@dataclass(frozen=True)
class StoredTypes:
    """How an exported model stores its weights. All None where they are ordinary fp32 matrices throughout.

    Attributes:
        values: type of the linears' values.
        head: type of the head.
        embedding: type of the embedding.
        group: columns that share a scale, None where nothing has scales.
        activations: what our kernels round those of the linears to, None where they round none. The head's, which have
            16 bits, are named where linears have none.
    """

    values: str | None = None
    head: str | None = None
    embedding: str | None = None
    group: int | None = None
    activations: str | None = None

    @classmethod
    def settled(cls, values: str, head: str, embedding: str, group: int, activations: str) -> StoredTypes:
        """As chosen, without what these types do not use."""
        scaled = [kind for kind in (values, head, embedding) if kind in ("int8", "int4")]
        rounded = (activations if values in scaled else "int16") if {values, head}.intersection(scaled) else None
        return cls(values, head, embedding, group if scaled else None, rounded)

    @property
    def rounds(self) -> bool:
        """Whether some weights are not the checkpoint's to the last bit."""
        return not {self.values, self.head, self.embedding} <= {None, "fp32"}

    def __str__(self) -> str:
        details = [f"groups of {self.group}"] if self.group else []
        details += [f"{self.activations} activations"] if self.activations else []
        embedding = f", embedding {self.embedding}" if self.embedding != self.head else ""
        return f"{self.values}, head {self.head}{embedding}" + (f" ({', '.join(details)})" if details else "")


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


def run_gate(
    checkpoint: Path, folder: Path, source: Truth, types: StoredTypes, *, choose_activations: bool = False
) -> tuple[StoredTypes, dict[str, Any]]:
    """Compare a written folder with its checkpoint: prefill, decode with past, batch 3, greedy tokens.

    Args:
        checkpoint: the source.
        folder: what was made of it.
        source: where the truth comes from.
        types: how it stores its weights.
        choose_activations: the folder has 8-bit activations of the linears; make them 16 where answers suffer.

    Returns: the types of the folder as it is now, and the figures for export.json, with the engine that answered.

    Raises: GateError naming the first output that diverges, or what rounding costs if it is too much.
    """
    answers = _read_answers(checkpoint, folder, source, types)
    if choose_activations:
        return _choose_activations(folder, answers, types)
    return types, _hold_against(folder, answers, types)


@dataclass(frozen=True)
class _Answers:
    """What a folder is held against.

    Attributes:
        source: where it comes from.
        truth: the checkpoint's answers.
        rounded: those of the checkpoint with the weights that the folder holds; None without torch, or where these are
            the checkpoint's own.
    """

    source: Truth
    truth: Reference
    rounded: Reference | None


def _read_answers(checkpoint: Path, folder: Path, source: Truth, types: StoredTypes) -> _Answers:
    from losa_export.reference import compute_reference_apart

    if source == "stored":
        return _Answers(source, _stored_reference(checkpoint), None)
    rounded: Reference | None = None
    with tempfile.TemporaryDirectory(prefix="losa-reference-") as scratch:
        truth = compute_reference_apart(checkpoint, Path(scratch) / "reference.safetensors")
        if types.rounds:
            rounded = compute_reference_apart(checkpoint, Path(scratch) / "rounded.safetensors", exported=folder)
    return _Answers(source, truth, rounded)


def _choose_activations(folder: Path, answers: _Answers, types: StoredTypes) -> tuple[StoredTypes, dict[str, Any]]:
    """Hold the folder with 16-bit activations against the answers, and then as it is, with those of 8 bits."""
    from losa_export.graph.stored import with_activation_bits

    model = folder / MODEL_FILE
    narrow = model.read_bytes()
    wide = with_activation_bits(narrow, 16)
    model.write_bytes(wide)
    wide_types = replace(types, activations="int16")
    figures = _hold_against(folder, answers, wide_types)
    if figures["engine"]["name"] == "ort-stock":  # which rounds no activations, so nothing can be said of it
        return wide_types, figures
    so_far = figures["deviation"]["kl_mean"]
    most = max(_MOST_KL_TO_ADD, _MOST_SHARE_TO_ADD * so_far)
    choice: dict[str, Any] = {"int16_kl_mean": so_far, "most_kl_to_add": most}
    model.write_bytes(narrow)
    try:
        found = _hold_against(folder, answers, types)
    except GateError as error:
        choice["int8_error"] = str(error)
    else:
        choice["int8_kl_mean"] = found["deviation"]["kl_mean"]
        if choice["int8_kl_mean"] <= so_far + most:
            return types, {**found, "activations_choice": {**choice, "int16": figures}}  # the stricter comparison
    model.write_bytes(wide)
    return wide_types, {**figures, "activations_choice": choice}


def _hold_against(folder: Path, answers: _Answers, types: StoredTypes) -> dict[str, Any]:
    from losa_export.eval.parity import gate
    from losa_export.runtimes.ort import OrtRuntime

    # The record says which engine answered. Without packed copies its weights stay those of the mapped file.
    runtime = OrtRuntime.load(folder, custom_op=types.values is not None and _has_native_library(), prepack=False)
    with closing(runtime):
        figures: dict[str, Any] = {"reference": answers.source, "engine": runtime.describe().as_dict()}
        if not types.rounds:
            return {**gate(answers.truth, runtime).as_dict(), **figures, "against": "checkpoint"}
        figures["deviation"] = _check_deviation(answers.truth, runtime, types)
        if answers.rounded is not None:
            report = gate(answers.rounded, runtime, _thresholds(runtime, types))
            return {**report.as_dict(), **figures, "against": "checkpoint with the stored weights"}
        return {**_gate_against_stock(folder, answers.truth, runtime, types), **figures}


def _check_deviation(truth: Reference, runtime: OrtRuntime, types: StoredTypes) -> dict[str, Any]:
    """What rounding does to the answers. Raises: GateError if it is more than rounding can do."""
    from losa_export.eval.parity import deviation

    found = deviation(truth, runtime)
    limit = max(_MOST_KL[kind] for kind in (types.values, types.head, types.embedding) if kind is not None)
    if types.activations == "int8" and runtime.name != "ort-stock":
        limit = max(limit, _MOST_KL_OF_INT8_ACTIVATIONS)
    if found.kl_mean > limit:
        raise GateError(
            f"the weights as stored ({types}) give other answers than the checkpoint's: KL {found.kl_mean:.3g} nats a "
            f"token (limit {limit:g}), the same arg-max at {found.argmax_agreement:.0%} of {found.positions} "
            "positions; choose finer types, or smaller groups",
            kl_mean=found.kl_mean,
            limit=limit,
        )
    return {**asdict(found), "kl_mean_limit": limit}


def _gate_against_stock(folder: Path, truth: Reference, runtime: OrtRuntime, types: StoredTypes) -> dict[str, Any]:
    """Where no torch can compute with the stored weights: hold our kernels against the operators' own definition.

    Without our kernels there is nothing to hold against it.
    """
    from losa_export.eval.answers import answers_of
    from losa_export.eval.parity import gate
    from losa_export.runtimes.ort import OrtRuntime

    if runtime.name == "ort-stock":
        return {"runtime": runtime.name, "against": None}
    with closing(OrtRuntime.load(folder, custom_op=False, prepack=False)) as stock:
        answers: ReferenceAnswers = answers_of(stock, truth.prompts, truth.greedy.shape[1])
    return {**gate(answers, runtime, _thresholds(runtime, types)).as_dict(), "against": "ort-stock on the same file"}


def _thresholds(runtime: OrtRuntime, types: StoredTypes) -> GateThresholds:
    """What still counts as the same answer, for weights that are the same to the last bit."""
    from losa_export.eval.parity import thresholds_for

    return thresholds_for(None if runtime.name == "ort-stock" else types.activations)


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
