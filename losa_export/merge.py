"""Folding adapters into the weights they were trained for, under the mask, with proof.

    W' = (W + s·BA) ⊙ M

out of place, one tensor at a time. The result is an ordinary checkpoint: no adapter, no special code to load
it, exactly the zeros of the mask. W is the base's weight, or the one that the run put in its place
(`base_weights`). What was written is read back and proved (`proof`) before the output folder
appears; a merge that fails its proof leaves nothing.
"""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losa_export.architecture import DecoderSpec, prunable_names
from losa_export.base_weights import describe_changed_weights, with_changed_weights
from losa_export.checkpoint import CONFIG_FILE, Checkpoint, CheckpointWriter, copy_companions, open_checkpoint
from losa_export.errors import CheckpointError, InputError, MaskError
from losa_export.files import check_output, input_folder, output_folder, sha256_of, write_text_atomic
from losa_export.masks import BoolArray, MaskFile, ReadOnDemand, load_masks, save_masks
from losa_export.merge_record import (
    SPARSITY_FILE,
    MergeReport,
    describe_adapter,
    describe_checkpoint,
    sparsity_record,
    without_folders,
)
from losa_export.peft_adapter import Adapter, LowRank, open_adapter
from losa_export.proof import ReadMask, prove_logits, prove_tensors
from losa_export.reference import REFERENCE_FILE, compute_reference, save_reference

FloatArray = NDArray[np.float32]

MASKS_FILE = "masks.safetensors"
ADAPTER_FOLDER = "adapter"

# Rows of a weight are folded in slices of about this many elements, so that float64 copies stay at 32 MiB.
_SLICE_ELEMENTS = 1 << 22


def merge_weight(weight: FloatArray, update: LowRank | None, keep: BoolArray | None) -> FloatArray:
    """(W + s·BA) ⊙ M as a new array.

    The update is accumulated in float64 and the sum rounded to float32 once, so the result depends neither on
    a BLAS library nor on its number of threads. Pruned positions are +0.0 even where W is infinite.

    Args:
        weight: (out, in) float32; not changed.
        update: A (rank, in), B (out, rank) and s; None folds nothing.
        keep: (out, in) bool, True = keep; None keeps all.
    Returns: (out, in) float32.
    Source: Huang et al. 2025, "Dynamic Low-Rank Sparse Adaptation for Large Language Models", arXiv:2502.14816.
    """
    merged = weight.copy()
    if update is not None:
        a = update.a.astype(np.float64)
        b = update.b.astype(np.float64) * update.scaling
        rows = max(1, _SLICE_ELEMENTS // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            with np.errstate(over="ignore", invalid="ignore"):  # the proof names a weight that is not finite
                merged[part] = (weight[part] + b[part] @ a).astype(np.float32)
    if keep is not None:
        merged[~keep] = 0.0
    return merged


def merge_run(run: Path, output: Path, *, base: Path | None = None, overwrite: bool = False) -> MergeReport:
    """Merge a training run: dense base, masks, adapters → an ordinary sparse checkpoint.

    Args:
        run: folder of a training run: config.toml, masks.safetensors, adapter/ unless it only pruned, and
            weights.safetensors if it changed weights of its base.
        output: the merged checkpoint. It appears whole and proved, or not at all.
        base: the dense checkpoint, if it no longer lies where the run found it.
        overwrite: replace a non-empty output.
    Raises:
        InputError: the run or its base is missing or unreadable; CheckpointError also for changed weights.
        MaskError, AdapterError: they do not fit the base.
        MergeProofError: the merge would wake a zero, lose a weight or change the function.
        OutputError: the output exists, touches an input, or cannot be written.
    """
    started = time.monotonic()
    input_folder(run, what="run")
    config = _read_run_config(run)
    folder = base if base is not None else _base_of(run, config)
    check_output(output, overwrite=overwrite, inputs=[run, folder])
    masks = load_masks(run / MASKS_FILE)
    checkpoint = open_checkpoint(folder)
    check_masks(masks, checkpoint)
    checkpoint = with_changed_weights(checkpoint, masks)
    adapter_folder = run / ADAPTER_FOLDER
    adapter = open_adapter(adapter_folder, checkpoint) if adapter_folder.is_dir() else None
    provenance = {
        "run": {"name": run.resolve().name, "config": without_folders(config)},
        "changed_weights": describe_changed_weights(checkpoint, run),
    }
    readers: dict[str, ReadMask] = dict.fromkeys(masks.names, masks.read)
    return _merge(checkpoint, readers, adapter, output, overwrite, [run], provenance, MASKS_FILE, started)


def merge_adapter(base: Path, adapter: Path, output: Path, *, overwrite: bool = False) -> MergeReport:
    """Merge a LoRA trained elsewhere into a sparse base, under the base's own mask.

    The mask is the base's masks.safetensors; where there is none, it is what is not zero in the base now (which
    is recorded, since a kept weight that happens to be zero is lost to the mask then).

    Args:
        base: a sparse checkpoint.
        adapter: a folder in PEFT's layout.
        output: the merged checkpoint.
        overwrite: replace a non-empty output.
    Raises: as `merge_run`; MaskError also if the base is not zero where its masks say so.
    """
    started = time.monotonic()
    check_output(output, overwrite=overwrite, inputs=[base, adapter])
    checkpoint = open_checkpoint(base)
    opened = open_adapter(adapter, checkpoint)
    if (base / MASKS_FILE).is_file():
        masks, source = load_masks(base / MASKS_FILE), MASKS_FILE
        check_masks(masks, checkpoint)
        check_zeros(masks, checkpoint)
        readers: dict[str, ReadMask] = dict.fromkeys(masks.names, masks.read)
    else:
        source = "weights of the base that are not zero"

        def not_zero(name: str) -> BoolArray:
            keep: BoolArray = checkpoint.read(name) != 0
            return keep

        prunable = (name for name in _prunable(checkpoint) if checkpoint.exists(name))
        readers = dict.fromkeys(sorted({*prunable, *opened.names}), not_zero)
    return _merge(checkpoint, readers, opened, output, overwrite, [adapter], {}, source, started)


def _merge(
    base: Checkpoint,
    masks: dict[str, ReadMask],
    adapter: Adapter | None,
    output: Path,
    overwrite: bool,
    inputs: list[Path],
    provenance: dict[str, Any],
    mask_source: str,
    started: float,
) -> MergeReport:
    adapted = adapter.names if adapter is not None else ()
    with output_folder(output, overwrite=overwrite, inputs=[base.folder, *inputs]) as folder:
        with CheckpointWriter(folder, merged_config(base.config)) as writer:
            for name, tensor in merged_tensors(base, masks, adapter):
                writer.add(name, tensor)
        copy_companions(base.folder, folder)
        written = open_checkpoint(folder)
        identity = {f"base_sha256:{path.name}": sha256_of(path) for path in written.weight_files()}
        save_masks(folder / MASKS_FILE, ReadOnDemand(masks), identity)
        proofs = prove_tensors(
            base, written, masks, load_masks(folder / MASKS_FILE).read, frozenset(adapted) - frozenset(masks)
        )
        reference = compute_reference(folder)
        logits = prove_logits(base, masks, adapter, folder, reference)
        save_reference(folder / REFERENCE_FILE, reference)
        report = MergeReport(output, proofs, logits, len(adapted), time.monotonic() - started)
        record = sparsity_record(
            report,
            {
                "base": describe_checkpoint(base),
                "mask_source": mask_source,
                "adapter": describe_adapter(adapter),
                **provenance,
            },
        )
        write_text_atomic(folder / SPARSITY_FILE, json.dumps(record, indent=2) + "\n")
    return report


def merged_tensors(
    base: Checkpoint, masks: Mapping[str, ReadMask], adapter: Adapter | None
) -> Iterator[tuple[str, FloatArray]]:
    """Yield every tensor of the merged checkpoint, one at a time; those without mask and adapter as they are."""
    for name in base.names():
        tensor = base.read(name)
        update = adapter.read(name, tensor.shape) if adapter is not None and name in adapter else None
        keep = masks[name](name) if name in masks else None
        yield name, merge_weight(tensor, update, keep)


def check_masks(masks: MaskFile, checkpoint: Checkpoint) -> None:
    """Hold a masks file against the checkpoint it is to be applied to.

    Raises: MaskError if a name or a shape differs, or the file records other weights.
    """
    mend = "give the checkpoint they were made for with --base, or run 'losa train' again"
    for name in masks.names:
        if not checkpoint.exists(name):
            raise MaskError(
                f"masks '{masks.path}' are of another checkpoint: '{checkpoint.folder}' has no tensor '{name}'; {mend}",
                tensor=name,
            )
        if masks.shape(name) != checkpoint.shape(name):
            raise MaskError(
                f"mask for '{name}' is {masks.shape(name)}, its weight is {checkpoint.shape(name)}; "
                f"masks '{masks.path}' are of another checkpoint than '{checkpoint.folder}': {mend}",
                tensor=name,
            )
    recorded = {key: value for key, value in masks.metadata.items() if key.startswith("base_sha256:")}
    if recorded and sorted(recorded.values()) != sorted(sha256_of(path) for path in checkpoint.weight_files()):
        raise MaskError(
            f"masks '{masks.path}' were made for other weights than those of '{checkpoint.folder}' "
            f"(the sha256 differs); {mend}",
            path=masks.path,
        )


def check_zeros(masks: MaskFile, checkpoint: Checkpoint) -> None:
    """Check that a sparse checkpoint is zero where its masks prune.

    Raises: MaskError naming the first weight that is not.
    """
    for name in masks.names:
        awake = int(np.count_nonzero(checkpoint.read(name)[~masks.read(name)]))
        if awake:
            raise MaskError(
                f"'{name}' in '{checkpoint.folder}' has {awake} weights that are not zero where its masks "
                f"prune; {masks.path.name} is of another checkpoint: take it away, or make the folder again",
                tensor=name,
            )


def merged_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of the merged checkpoint: float32, rotary settings in both spellings.

    transformers 5 writes `rope_parameters`, which 4.x does not read: it would silently take another base.
    """
    merged = {key: value for key, value in config.items() if key not in ("torch_dtype", "quantization_config")}
    merged["dtype"] = "float32"
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new is None:
        scaling = dict(old) if old else {"rope_type": "default"}
        if "type" in scaling:
            scaling.setdefault("rope_type", scaling.pop("type"))
        if "rope_theta" in config:
            scaling["rope_theta"] = config["rope_theta"]
        if "rope_theta" in scaling:
            merged["rope_parameters"] = scaling
    elif isinstance(new, Mapping) and "rope_theta" in new:
        merged["rope_theta"] = new["rope_theta"]
        scaling = {key: value for key, value in new.items() if key != "rope_theta"}
        merged["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return merged


def _prunable(checkpoint: Checkpoint) -> tuple[str, ...]:
    return prunable_names(DecoderSpec.from_config(checkpoint.config, checkpoint.folder / CONFIG_FILE))


def _read_run_config(run: Path) -> dict[str, Any]:
    path = run / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"'{run}' has no config.toml, so it is no run folder; give one made by 'losa train'", path=path
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' cannot be read as TOML ({error}); run 'losa train' again", path=path) from error


def _base_of(run: Path, config: Mapping[str, Any]) -> Path:
    section = config.get("train")
    model = section.get("model") if isinstance(section, Mapping) else None
    if not isinstance(model, str):
        raise InputError(f"'{run / 'config.toml'}' names no model under [train]; give the dense checkpoint with --base")
    if not Path(model).is_dir():
        raise CheckpointError(
            f"the dense checkpoint '{model}' that run '{run}' was made from is gone; give it with --base", path=model
        )
    return Path(model)
