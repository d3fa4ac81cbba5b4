"""The zeros of a sparse model, read back from its file and held against every record of them.

The patterns are the masks in the file; one node's are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from losa_export.architecture import DecoderSpec, linear_shape
from losa_export.checkpoint import CONFIG_FILE, Checkpoint, read_json
from losa_export.errors import FormatError, InputError
from losa_export.graph.external import ModelFolder
from losa_export.graph.formats.base import PADDING_BYTES, block_offsets
from losa_export.graph.sparsity import MASKS_FILE, RECORD_FILE
from losa_export.graph.stored import StoredNode
from losa_export.masks import BoolArray, MaskFile, digest, zeros_count
from losa_export.onnx_file import MANIFEST_FILE
from losa_export.progress import Progress
from losa_export.verification import Check, Difference

# What decoding a damaged tensor, attribute or part can end in.
DAMAGE = (FormatError, KeyError, IndexError, ValueError, TypeError, OverflowError)

Table = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Sources:
    """What the zeros of the file are held against.

    Attributes:
        manifest: its export.json.
        merged: the checkpoint it was made of, if given.
        merged_record: tensors of the checkpoint's sparsity.json; None if it has none.
        merged_masks: its masks.safetensors; None if it has none.
        run: the masks of the training run, if given.
    """

    manifest: Mapping[str, Any]
    merged: Checkpoint | None = None
    merged_record: Table | None = None
    merged_masks: MaskFile | None = None
    run: MaskFile | None = None

    @property
    def masks(self) -> dict[str, MaskFile]:
        """Name of a check → the masks it reads, of those that are there."""
        given = {"merged masks": self.merged_masks, "run masks": self.run}
        return {name: masks for name, masks in given.items() if masks is not None}

    def absent(self) -> list[Check]:
        """The checks that the checkpoint has no files for."""
        if self.merged is None:
            return []
        files = {"merged record": (self.merged_record, RECORD_FILE), "merged masks": (self.merged_masks, MASKS_FILE)}
        return [
            Check.skipped(name, f"the merged checkpoint has no {file}")
            for name, (there, file) in files.items()
            if there is None
        ]


@dataclass(frozen=True)
class Pattern:
    """What is remembered of a matrix in the file; `sha256` is `losa_export.masks.digest` of its pattern."""

    shape: tuple[int, ...]
    zeros: int
    sha256: str

    @classmethod
    def of(cls, keep: BoolArray) -> Pattern:
        """Facts of a pattern (out, in), True = kept."""
        return cls(keep.shape, zeros_count(keep), digest(keep))


@dataclass
class Found:
    """What a pass over the file found: patterns by weight name, and differences by name of the check."""

    patterns: dict[str, Pattern] = field(default_factory=dict)
    differences: dict[str, list[Difference]] = field(default_factory=dict)

    def note(self, check: str, differences: Iterable[Difference]) -> None:
        """Add to what a check found."""
        self.differences.setdefault(check, []).extend(differences)

    def judge(self, check: str, compared: str) -> Check:
        """The check, by what was noted."""
        return Check.judged(check, compared, self.differences.get(check, []))


def table_of(record: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
    """The table `key` of a record, by name; whatever is none counts as empty."""
    table = record.get(key)
    if not isinstance(table, Mapping):
        return {}
    return {str(name): entry if isinstance(entry, Mapping) else {} for name, entry in table.items()}


def skipped_patterns(sources: Sources, reason: str) -> list[Check]:
    """Every check of the zeros, left out for the same reason."""
    names = ["zero patterns", "stored values", "sparsity", "total sparsity"]
    names += ["merged zeros", "merged record", "merged masks"] if sources.merged is not None else []
    names += ["run masks"] if sources.run is not None else []
    return [Check.skipped(name, reason) for name in names]


def check_sparse(
    model: ModelFolder, nodes: Sequence[StoredNode], sources: Sources, *, show_progress: bool = True
) -> list[Check]:
    """Hold the masks of a written model against its manifest, its checkpoint and its run.

    Args:
        model: the written model.
        nodes: those of its nodes that are sparse.
        sources: the records.
        show_progress: on standard error.

    Raises: CheckpointError if a weight of the checkpoint is damaged.
    """
    found = Found()
    values: dict[str, str] = {}
    with Progress("reading zero patterns", len(nodes), "nodes", enabled=show_progress) as progress:
        for node in nodes:
            _read_node(model, node, sources, found)
            values |= dict.fromkeys((part.name for part in node.parts), node.value_format.name)
            progress.advance()
    recorded = table_of(sources.manifest, "tensors")
    found.note("zero patterns", differing(found.patterns, digests_in(recorded, "mask_sha256"), MANIFEST_FILE))
    found.note("sparsity", miscounted(found.patterns, recorded, values))
    kind, stated = "sparse" if nodes else "dense", sources.manifest.get("weights")
    if stated != kind:
        found.note("sparsity", [Difference("weights", f"{kind} in the file, {stated} in export.json")])
    count = f"{len(found.patterns)} matrices"
    checks = [
        found.judge("zero patterns", f"digests of {count} from the masks in the file"),
        found.judge("stored values", "as many in each block of rows as its mask has bits"),
        found.judge("sparsity", f"shape, zeros and type of {count}"),
        _check_total(model.folder, sources.manifest, sum(one.zeros for one in found.patterns.values())),
    ]
    if sources.merged is not None:
        checks.append(found.judge("merged zeros", f"weights of {count} under the masks in the file"))
    if sources.merged_record is not None:
        meant = digests_in(sources.merged_record, "mask_sha256")
        found.note("merged record", differing(found.patterns, meant, RECORD_FILE))
        checks.append(found.judge("merged record", f"{len(meant)} digests of {RECORD_FILE}"))
    checks += sources.absent()
    for name, masks in sources.masks.items():
        meant = {tensor: digest(masks.read(tensor)) for tensor in masks.names}
        found.note(name, differing(found.patterns, meant, f"{masks.path.parent.name}/{masks.path.name}"))
        checks.append(found.judge(name, f"digests of {len(meant)} masks"))
    return checks


def _read_node(model: ModelFolder, node: StoredNode, sources: Sources, found: Found) -> None:
    """Decode one node's masks, count its values, and hold the checkpoint's weights against them."""
    label = str(node.tensors["mask"]).removesuffix(".mask")
    try:
        keeps = node.masks(model)
        found.note("stored values", _uncounted(model, node, label))
    except DAMAGE as error:
        found.note("zero patterns", [Difference(label, f"cannot be decoded ({error})")])
        return
    for part, keep in zip(node.parts, keeps, strict=True):
        found.patterns[part.name] = Pattern.of(keep)
        if sources.merged is not None:
            entry = (sources.merged_record or {}).get(part.name, {})
            found.note("merged zeros", _awake(sources.merged, part.name, keep, entry.get("kept_zeros")))


def _uncounted(model: ModelFolder, node: StoredNode, label: str) -> list[Difference]:
    """Whether the mask of a node has as many bits as values are stored, in each of its blocks of rows."""
    form = node.value_format
    shared = form.levels_per_element
    mask = model.read(node.tensors["mask"]).astype(np.uint8, copy=False)
    meant = block_offsets(mask, even_steps=shared > 1) // shared
    stored = (model.tensors[node.tensors["values"]].length - PADDING_BYTES) // form.element_type.itemsize
    if stored != meant[-1]:
        unit = "values" if shared == 1 else f"bytes of {shared} values"
        return [Difference(label, f"its mask asks for {meant[-1]} {unit}, {stored} are stored")]
    if not np.array_equal(model.read(node.tensors["block_offsets"]), meant):
        return [Difference(label, "block_offsets do not count the bits of its mask")]
    return []


def _awake(merged: Checkpoint, name: str, keep: BoolArray, kept_zeros: object) -> list[Difference]:
    """Whether a weight of the checkpoint is zero where the file prunes it, and elsewhere as often as was recorded."""
    if not merged.exists(name) or merged.shape(name) != keep.shape:
        return [Difference(name, f"'{merged.folder.name}' has no weight of shape {keep.shape} under this name")]
    weight = merged.read(name)
    awake = int(np.count_nonzero(weight[~keep]))
    if awake:
        return [Difference(name, f"{awake} weights of '{merged.folder.name}' are not zero where the file prunes them")]
    zeros = int(np.count_nonzero(keep & (weight == 0)))
    if isinstance(kept_zeros, int) and zeros != kept_zeros:
        return [Difference(name, f"{zeros} kept weights are zero, {RECORD_FILE} counted {kept_zeros}")]
    return []


def digests_in(table: Table, key: str) -> dict[str, str]:
    """The entries' digests under `key`, of those that have one."""
    return {name: str(entry[key]) for name, entry in table.items() if key in entry}


def differing(patterns: Mapping[str, Pattern], meant: Mapping[str, str], where: str) -> list[Difference]:
    """Patterns in the file against digests from elsewhere, both ways."""
    differences = []
    for name, expected in meant.items():
        if name not in patterns:
            differences.append(Difference(name, f"{where} has its pattern, the file none that can be read"))
        elif patterns[name].sha256 != expected:
            found = f"{patterns[name].sha256[:12]}… in the file, {expected[:12]}… in {where}"
            differences.append(Difference(name, f"digest {found}"))
    differences += [
        Difference(name, f"pruned in the file, {where} has no pattern of it")
        for name, pattern in patterns.items()
        if pattern.zeros and name not in meant
    ]
    return differences


def miscounted(patterns: Mapping[str, Pattern], recorded: Table, values: Mapping[str, str]) -> list[Difference]:
    """Facts of each matrix against its entry in the manifest, where it has one; `values` are names of value formats."""
    differences = []
    for name, pattern in patterns.items():
        if name not in recorded:
            continue
        facts = {
            "shape": list(pattern.shape),
            "zeros": pattern.zeros,
            "sparsity_fraction": pattern.zeros / max(1, prod(pattern.shape)),
        } | ({"values": values[name]} if name in values else {})
        differences += [
            Difference(name, f"{key} {fact} in the file, {recorded[name].get(key)} in export.json")
            for key, fact in facts.items()
            if recorded[name].get(key) != fact
        ]
    return differences


def _check_total(folder: Path, manifest: Mapping[str, Any], zeros: int) -> Check:
    """The share of zeros in all linears of the blocks, whose sizes config.json tells where we know the family."""
    name = "total sparsity"
    if manifest.get("exporter") == "torch":
        return Check.skipped(name, f"torch.onnx made the graph, whose linears {CONFIG_FILE} does not tell")
    try:
        config = read_json(folder / CONFIG_FILE, what="exported folder", mend="export again")
        spec = DecoderSpec.from_config(config, folder / CONFIG_FILE)
    except InputError:
        return Check.skipped(name, f"{CONFIG_FILE} is missing, or of no family that our builder knows")
    size = spec.num_layers * sum(prod(linear_shape(spec, linear)) for linear in spec.layout.linears)
    fraction = zeros / max(1, size)
    recorded = manifest.get("sparsity_fraction")
    differences = [Difference("sparsity_fraction", f"{fraction} in the file, {recorded} in export.json")]
    return Check.judged(name, "zeros of all linears of the blocks", differences if recorded != fraction else [])
