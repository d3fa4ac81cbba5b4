"""`losa verify`: the chain of evidence from a training run to an exported folder, checked again from the files.

Every figure is computed anew from what lies on the disk and held against what was recorded on the way. Nothing is
executed, and neither torch nor transformers is needed; without the packages that read ONNX, the files are still held
against their hashes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losa_export.checkpoint import COMPANION_FILES, CONFIG_FILE, open_checkpoint, read_json
from losa_export.errors import CheckpointError, InputError, MissingDependencyError, UnsafePathError
from losa_export.export_gate import is_installed
from losa_export.files import input_folder, safe_child
from losa_export.masks import load_masks
from losa_export.onnx_file import MANIFEST_FILE, MANIFEST_FORMAT, MODEL_FILE, check_references
from losa_export.progress import Progress
from losa_export.verification import Check, Difference, Verification

if TYPE_CHECKING:
    from losa_export.verify_patterns import Sources


# An unlisted file of these names changes what an engine computes, or what its answer says.
_MODEL_SUFFIXES = frozenset((".onnx", ".data", ".safetensors", ".bin", ".gguf", ".pt", ".pth"))
_SETTINGS = frozenset((*COMPANION_FILES, CONFIG_FILE, "genai_config.json"))

# Smaller folders are hashed before anybody asks how far it is.
_PROGRESS_FROM_BYTES = 100 * 2**20
_CHUNK_BYTES = 1 << 22

_PACKAGES = ("onnx", "onnx_ir", "safetensors", "ml_dtypes")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class _Listed:
    """A file as export.json lists it."""

    size: int
    sha256: str


def verify(
    folder: Path,
    *,
    merged: Path | None = None,
    run: Path | None = None,
    evaluation: Path | None = None,
    files_only: bool = False,
    show_progress: bool = True,
) -> Verification:
    """Check an exported folder against its own manifest, and against what it was made of where that is given.

    Args:
        folder: an exported folder.
        merged: the checkpoint that it was made of.
        run: the training run that the checkpoint was made of.
        evaluation: eval.json of `losa eval` on the folder.
        files_only: sizes, hashes and references alone, which takes a second for a gigabyte: what a server does
            before it opens the folder.
        show_progress: on standard error, if the folder is large.
    Returns: each check and what differs. A file that is changed, missing or damaged is a difference, no error.
    Raises:
        InputError: a folder is missing, a file or empty.
        CheckpointError: export.json, eval.json or the checkpoint is missing, damaged or something else.
        MaskError: the run has no masks, or its masks file is damaged.
        UnsafePathError: a file that is listed or referred to is a link, is absolute or leaves the folder.
        MissingDependencyError: `merged` or `run` is given, and a package that reads them is not installed.
    """
    input_folder(folder, what="exported")
    manifest = _read_manifest(folder)
    listed = _listed_files(folder, manifest)
    measured = None if evaluation is None else _read_evaluation(evaluation)
    missing = next((package for package in _PACKAGES if not is_installed(package)), None)
    if missing is not None and (merged is not None or run is not None):
        raise MissingDependencyError.for_extra(missing.replace("_", "-"), "export", "comparing with what was exported")
    unread = None if missing is None else f"reading them needs the package '{missing}': losa-export[export]"
    unread = "only files are checked" if files_only else unread
    size = sum(one.size for one in listed.values())
    show = show_progress and size >= _PROGRESS_FROM_BYTES
    # Opened first: a wrong path should not cost the time of hashing.
    opened = _open_sources(manifest, merged, run) if unread is None else None
    with Progress(f"hashing {folder.name}", size / 1e6, "MB", enabled=show) as progress:
        hashes = _hash_files(folder, [*listed, MANIFEST_FILE], progress)
    readable, references = _check_references(folder, manifest, listed)
    checks = [
        _check_files(listed, hashes),
        _check_others(folder, listed),
        references,
        *_check_zeros(folder, opened, unread, readable, show),
        _check_gate(manifest),
        *([] if opened is None or opened.merged is None else [_check_source(manifest, opened, show)]),
    ]
    for name, given in (("merged checkpoint", merged), ("run", run), ("evaluation", evaluation)):
        if given is None:
            checks.append(Check.skipped(name, "none was given"))
    if measured is not None:
        checks += [_check_measured(measured, hashes), _check_figures(measured)]
    return Verification(folder.resolve().name, tuple(checks))


# ---- records --------------------------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> Record:
    """export.json. Raises: CheckpointError if it is missing, damaged or something else; UnsafePathError for a link."""
    path = folder / MANIFEST_FILE
    if path.is_symlink() or path.exists():
        _safe_child(folder, MANIFEST_FILE)
    record = read_json(path, what="exported folder", mend="give a folder that 'losa export' made, or export again")
    if record.get("format") != MANIFEST_FORMAT:
        raise CheckpointError(
            f"'{path}' has the format {record.get('format')!r}, not {MANIFEST_FORMAT!r}; give a folder that "
            "'losa export' made",
            path=path,
        )
    return record


def _read_evaluation(path: Path) -> Record:
    """eval.json. Raises: CheckpointError if it is missing, damaged or something else."""
    record = read_json(path, what="folder", mend="give the file that 'losa eval' wrote")
    if record.get("schema") != "losa-eval" or not isinstance(record.get("target"), Mapping):
        raise CheckpointError(
            f"'{path}' is no record of an evaluation; give the file that 'losa eval' wrote", path=path
        )
    return record


def _listed_files(folder: Path, manifest: Record) -> dict[str, _Listed]:
    """Files that export.json lists, by name. Raises: CheckpointError if that table is missing or malformed."""
    table = manifest.get("files")
    entries = table.items() if isinstance(table, Mapping) else ()
    listed = {}
    for name, entry in entries:
        match entry:
            case {"bytes": int(size), "sha256": str(sha256)}:
                listed[name] = _Listed(size, sha256)
    if not listed or len(listed) != len(entries) or MODEL_FILE not in listed:
        raise CheckpointError(
            f"'{folder / MANIFEST_FILE}' does not list {MODEL_FILE} and all other files with bytes and sha256; "
            "export again",
            path=folder / MANIFEST_FILE,
        )
    return listed


def _open_sources(manifest: Record, merged: Path | None, run: Path | None) -> Sources:
    """Open what the zeros are held against. Raises: as `verify`."""
    from losa_export.graph.sparsity import MASKS_FILE, RECORD_FILE
    from losa_export.verify_patterns import Sources, table_of

    run_masks = None
    if run is not None:
        run_masks = load_masks(input_folder(run, what="run") / MASKS_FILE)
    if merged is None:
        return Sources(manifest, run=run_masks)
    checkpoint = open_checkpoint(merged)
    record, masks = merged / RECORD_FILE, merged / MASKS_FILE
    return Sources(
        manifest,
        checkpoint,
        table_of(read_json(record, what="checkpoint", mend="run 'losa merge' again"), "tensors")
        if record.exists()
        else None,
        load_masks(masks) if masks.exists() else None,
        run_masks,
    )


# ---- files ----------------------------------------------------------------------------------------------------------


def _hash_files(folder: Path, names: Sequence[str], progress: Progress) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file that is there. Raises: UnsafePathError; InputError if one cannot be read."""
    found = {}
    for name in names:
        path = _safe_child(folder, name)
        if path is None:
            continue
        sha256, size = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    sha256.update(chunk)
                    size += len(chunk)
                    progress.advance(len(chunk) / 1e6)
        except OSError as error:
            raise InputError(
                f"'{path}' cannot be read: {error.strerror}; mend it, or copy it again", path=path
            ) from error
        found[name] = size, sha256.hexdigest()
    return found


def _safe_child(folder: Path, name: str) -> Path | None:
    """As `safe_child`, but None where there is no such file. Raises: UnsafePathError, also for an impossible name."""
    try:
        return safe_child(folder, name)
    except UnsafePathError:
        raise
    except InputError:
        return None
    except (OSError, ValueError) as error:
        raise UnsafePathError(
            f"'{folder / MANIFEST_FILE}' lists a file whose name is none ({type(error).__name__}); export again",
            folder=folder,
            name=name,
        ) from error


def _check_files(listed: Mapping[str, _Listed], hashes: Mapping[str, tuple[int, str]]) -> Check:
    differences = []
    for name, meant in listed.items():
        if name not in hashes:
            differences.append(Difference(name, "missing"))
            continue
        size, sha256 = hashes[name]
        if size != meant.size:
            differences.append(Difference(name, f"{size} bytes, {meant.size} in {MANIFEST_FILE}"))
        elif sha256 != meant.sha256:
            differences.append(Difference(name, f"sha256 {sha256[:12]}…, {meant.sha256[:12]}… in {MANIFEST_FILE}"))
    return Check.judged("files", f"sizes and sha256 of {len(listed)} files", differences)


def _check_others(folder: Path, listed: Mapping[str, _Listed]) -> Check:
    """No model data, tokenizer or setting lies in the folder that an engine would take up though it is not listed."""
    differences = [
        Difference(path.name, f"not in {MANIFEST_FILE}")
        for path in sorted(folder.iterdir())
        if path.name not in listed and (path.suffix in _MODEL_SUFFIXES or path.name in _SETTINGS)
    ]
    return Check.judged("other files", "no unlisted model data, tokenizer or settings", differences)


def _check_references(folder: Path, manifest: Record, listed: Mapping[str, _Listed]) -> tuple[bool, Check]:
    """Whether the model can be read, and whether it refers to listed files alone. Raises: UnsafePathError."""
    name = "external data"
    try:
        files = check_references(folder).data_files
    except UnsafePathError:
        raise
    except InputError as error:
        return False, Check.judged(name, f"what {MODEL_FILE} refers to", [Difference(MODEL_FILE, str(error))])
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    differences = [Difference(one, f"referred to, but not in {MANIFEST_FILE}") for one in names if one not in listed]
    size = sum(listed[one].size for one in (MODEL_FILE, *names) if one in listed)
    if manifest.get("model_bytes") != size:
        text = f"{manifest.get('model_bytes')} in {MANIFEST_FILE}, whose files for the model add up to {size}"
        differences.append(Difference("model_bytes", text))
    return True, Check.judged(name, f"{MODEL_FILE} refers to {' and '.join(names) or 'no other file'}", differences)


# ---- contents -------------------------------------------------------------------------------------------------------


def _check_zeros(
    folder: Path, sources: Sources | None, unread: str | None, readable: bool, show_progress: bool
) -> list[Check]:
    """The checks of `verify_patterns` or `verify_dense`, or why there are none."""
    if sources is None:
        return [Check.skipped("zero patterns", str(unread))]
    from losa_export.graph.external import check_external_data
    from losa_export.graph.stored import stored_nodes
    from losa_export.verify_dense import check_dense
    from losa_export.verify_patterns import DAMAGE, check_sparse, skipped_patterns, table_of

    if not readable:
        return skipped_patterns(sources, f"{MODEL_FILE} or its data cannot be read")
    try:
        model = check_external_data(folder)
        nodes = list(stored_nodes(model))
    except DAMAGE as error:
        damaged = Check.judged("model", "nodes and initializers", [Difference(MODEL_FILE, str(error))])
        return [damaged, *skipped_patterns(sources, f"{MODEL_FILE} cannot be read")]
    sparse = [node for node in nodes if node.is_sparse]
    if sparse or table_of(sources.manifest, "tensors"):
        return check_sparse(model, sparse, sources, show_progress=show_progress)
    rounded = frozenset(part.name for node in nodes for part in node.parts)
    return check_dense(model, rounded, sources, show_progress=show_progress)


def _check_gate(manifest: Record) -> Check:
    """The figures of the export's own gate against the limits that were recorded with them."""
    gate = manifest.get("gate")
    if not isinstance(gate, Mapping):
        return Check.skipped("gate", "the export was not held against its checkpoint (--no-gate)")
    limits = []
    if "thresholds" in gate:
        for part in ("prefill", "decode", "batch3"):
            limits.append(((part, "max_relative_error"), ("thresholds", "max_relative_error")))
            limits.append(((part, "kl_max"), ("thresholds", "max_kl")))
    if "deviation" in gate:
        limits.append((("deviation", "kl_mean"), ("deviation", "kl_mean_limit")))
    if not limits:
        return Check.skipped("gate", "it recorded no figures: its engine had nothing to be held against")
    differences = []
    for figure, limit in limits:
        found, most = _number(gate, figure), _number(gate, limit)
        if not 0 <= found <= most:  # so that NaN fails too
            differences.append(Difference(" ".join(figure), f"{found} is not within the limit {most}"))
    if "thresholds" in gate and not _all_tokens_counted(gate):
        differences.append(Difference("greedy", "equal and tolerated tokens do not add up to those compared"))
    return Check.judged("gate", f"{len(limits)} figures against their limits", differences)


def _number(table: Record, path: Sequence[str]) -> float:
    """The number at a path of keys; NaN if there is none."""
    found: Any = table
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, int | float) else math.nan


def _all_tokens_counted(gate: Record) -> bool:
    match gate.get("greedy"):
        case {"tokens": int(tokens), "equal": int(equal), "tolerated": list(tolerated)}:
            return tokens == equal + len(tolerated)
    return False


def _check_source(manifest: Record, sources: Sources, show_progress: bool) -> Check:
    """The checkpoint's weight files against those that were exported."""
    assert sources.merged is not None
    size = sum(path.stat().st_size for path in sources.merged.weight_files()) / 1e6
    with Progress(f"hashing {sources.merged.folder.name}", size, "MB", enabled=show_progress) as progress:
        sha256 = sources.merged.weights_sha256()
        progress.advance(size)
    source = manifest.get("source")
    recorded = source.get("weights_sha256") if isinstance(source, Mapping) else None
    text = f"sha256 {sha256[:12]}…, {str(recorded)[:12]}… in {MANIFEST_FILE}"
    differences = [] if recorded == sha256 else [Difference(sources.merged.folder.name, text)]
    return Check.judged("merged weights", f"sha256 of the weights of '{sources.merged.folder.name}'", differences)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def _check_measured(evaluation: Record, hashes: Mapping[str, tuple[int, str]]) -> Check:
    """Whether these are the files that were evaluated."""
    name = "evaluated files"
    measured = evaluation["target"].get("sha256")
    if not isinstance(measured, Mapping) or not measured:
        return Check.skipped(name, "eval.json does not say which files it measured; run 'losa eval' again")
    differences = []
    for file, sha256 in measured.items():
        if file not in hashes:
            differences.append(Difference(file, f"evaluated, but missing here or not in {MANIFEST_FILE}"))
        elif hashes[file][1] != sha256:
            text = f"sha256 {hashes[file][1][:12]}…, {str(sha256)[:12]}… when it was evaluated"
            differences.append(Difference(file, text))
    if MODEL_FILE not in measured:
        differences.append(Difference(MODEL_FILE, "not among the files that were evaluated"))
    return Check.judged(name, f"sha256 of {', '.join(map(str, measured))}", differences)


def _check_figures(evaluation: Record) -> Check:
    """Perplexities against the losses of the windows that they are the mean of."""
    differences, count = [], 0
    texts = evaluation.get("texts")
    for text in texts if isinstance(texts, list) else []:
        for side in ("target", "reference"):
            loss = text.get(side) if isinstance(text, Mapping) else None
            if isinstance(loss, Mapping):
                count += 1
                if not _is_mean(loss):
                    what = f"{text.get('name')} of the {side}"
                    differences.append(Difference(what, "its perplexity is not that of its windows' losses"))
    return Check.judged("perplexity", f"{count} figures from the losses of their windows", differences)


def _is_mean(loss: Record) -> bool:
    match loss:
        case {"nll": float(nll), "window_nll": [*windows]} if windows and all(map(_is_loss, windows)):
            perplexity = loss.get("perplexity")
            mean = math.fsum(windows) / len(windows)
            # Powers of another C library may differ in their last bit.
            expected = math.exp(mean) if mean < 709 else None
            same = perplexity is None if expected is None else _close(perplexity, expected)
            return _close(nll, mean) and same
    return False


def _is_loss(value: object) -> bool:
    """Whether it is a mean loss of tokens; a larger one could only come from a damaged file."""
    return isinstance(value, float) and 0 <= value < 1e6


def _close(found: object, expected: float) -> bool:
    return isinstance(found, float) and math.isclose(found, expected, rel_tol=1e-12)
