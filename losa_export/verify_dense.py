"""The zeros of a densely stored model, read back from its file and held against every record of them.

The patterns are the values that are not zero. They hold every pruned position among their zeros, and perhaps kept
weights that happen to be zero, so masks are held against them one way.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from losa_export.graph.external import ModelFolder
from losa_export.graph.sparsity import RECORD_FILE
from losa_export.graph.zeros import nonzero_patterns
from losa_export.masks import BoolArray
from losa_export.onnx_file import MANIFEST_FILE, MODEL_FILE
from losa_export.progress import Progress
from losa_export.verification import Check, Difference
from losa_export.verify_patterns import (
    DAMAGE,
    Found,
    Pattern,
    Sources,
    Table,
    differing,
    digests_in,
    miscounted,
    skipped_patterns,
    table_of,
)

# Table of export.json: weight name → its zeros as they were written.
_ZEROS = "zero_patterns"


def check_dense(
    model: ModelFolder, rounded: frozenset[str], sources: Sources, *, show_progress: bool = True
) -> list[Check]:
    """Hold the zeros of ordinary matrices against the manifest, the checkpoint and the run.

    Args:
        model: the written model.
        rounded: names of the weights in nodes of our domain.
        sources: the records.
        show_progress: on standard error.

    Raises: CheckpointError if a weight of the checkpoint is damaged.
    """
    recorded = table_of(sources.manifest, _ZEROS)
    shapes = {name: shape for name, entry in recorded.items() if (shape := _shape(entry)) is not None}
    for masks in sources.masks.values():
        shapes |= {name: (shape[0], shape[1]) for name in masks.names for shape in [masks.shape(name)]}
    reason = _why_not(sources.manifest, shapes.keys(), rounded)
    if reason is not None:
        return skipped_patterns(sources, reason)
    found = Found()
    with Progress("reading zeros", len(shapes), "matrices", enabled=show_progress) as progress:
        try:
            for name, nonzero in nonzero_patterns(model, shapes):
                _read_matrix(name, nonzero, sources, found)
                progress.advance()
        except DAMAGE as error:
            found.note("zero patterns", [Difference(MODEL_FILE, f"cannot be decoded ({error})")])
    return _judge(found, recorded, sources)


def _why_not(manifest: Mapping[str, Any], names: Set[str], rounded: Set[str]) -> str | None:
    """Why the zeros of linears `names` cannot be read off the file; None if they can."""
    if names & rounded or (not names and manifest.get("values") not in (None, "fp32")):
        return "its matrices are dense and rounded, and rounding may add zeros"
    if names:
        return None
    if manifest.get("mask_source") == "none":
        return "nothing in it was pruned"
    return "its matrices are dense, and export.json records no zeros of them; export again"


def _shape(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """(out, in) of an entry, None if it has none."""
    match entry.get("shape"):
        case [int(rows), int(columns)]:
            return rows, columns
    return None


def _read_matrix(name: str, nonzero: BoolArray, sources: Sources, found: Found) -> None:
    """Remember one matrix, and hold the checkpoint's weight and all masks against it."""
    found.patterns[name] = Pattern.of(nonzero)
    merged = sources.merged
    if merged is not None:
        if not merged.exists(name) or merged.shape(name) != nonzero.shape:
            text = f"'{merged.folder.name}' has no weight of shape {nonzero.shape} under this name"
            found.note("merged zeros", [Difference(name, text)])
        elif different := int(np.count_nonzero((merged.read(name) != 0) != nonzero)):
            text = f"{different} weights are zero either in the file or in '{merged.folder.name}', not in both"
            found.note("merged zeros", [Difference(name, text)])
    for check, masks in sources.masks.items():
        if name in masks and masks.shape(name) == nonzero.shape:
            awake = int(np.count_nonzero(nonzero & ~masks.read(name)))
            if awake:
                where = f"{masks.path.parent.name}/{masks.path.name}"
                found.note(check, [Difference(name, f"{awake} weights are not zero where {where} prunes them")])


def _judge(found: Found, recorded: Table, sources: Sources) -> list[Check]:
    count = f"{len(found.patterns)} matrices"
    found.note("zero patterns", differing(found.patterns, digests_in(recorded, "nonzero_sha256"), MANIFEST_FILE))
    found.note("sparsity", miscounted(found.patterns, recorded, {}))
    patterns = found.judge("zero patterns", f"digests of {count} from the values that are not zero")
    sparsity = found.judge("sparsity", f"shape and zeros of {count}")
    if not recorded:
        reason = "export.json records no zeros of dense matrices; export again"
        patterns, sparsity = (Check.skipped(name, reason) for name in ("zero patterns", "sparsity"))
    stated = [sources.manifest.get(key) for key in ("weights", "sparsity_fraction")]
    if stated != ["dense", 0]:
        found.note("total sparsity", [Difference("weights", f"dense in the file, {stated} in export.json")])
    checks = [
        patterns,
        Check.skipped("stored values", "dense matrices have no masks"),
        sparsity,
        found.judge("total sparsity", "none is stored sparsely"),
    ]
    if sources.merged is not None:
        checks.append(found.judge("merged zeros", f"zeros of {count} in file and checkpoint"))
    if sources.merged_record is not None:
        found.note("merged record", _recounted(found, sources.merged_record))
        checks.append(found.judge("merged record", f"numbers of zeros in {RECORD_FILE}"))
    checks += sources.absent()
    for check, masks in sources.masks.items():
        lost = [
            name
            for name in masks.names
            if name not in found.patterns or masks.shape(name) != found.patterns[name].shape
        ]
        found.note(check, [Difference(name, f"no matrix of shape {masks.shape(name)} in the file") for name in lost])
        checks.append(found.judge(check, f"pruned positions of {len(masks.names)} masks are zero"))
    return checks


def _recounted(found: Found, record: Table) -> list[Difference]:
    """Zeros of each matrix against those pruned and those kept all the same."""
    differences = []
    for name, entry in record.items():
        match entry:
            case {"zeros": int(pruned), "kept_zeros": int(kept)} if name in found.patterns:
                zeros = found.patterns[name].zeros
                if zeros != pruned + kept:
                    text = f"{zeros} zeros in the file, {pruned} pruned and {kept} kept ones in {RECORD_FILE}"
                    differences.append(Difference(name, text))
    return differences
