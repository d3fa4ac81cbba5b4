"""What a report is made of: the records that lie in some folders, each with the file it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losa_export.errors import InputError
from losa_export.eval import bench_report, bench_sweep, doctor_report, evaluation

if TYPE_CHECKING:
    from losa_export.training.journal import RoundRecord

# Records larger than this are something else.
_LARGEST_BYTES = 256 * 2**20

# What is read of each kind of record, so that one without it is left out by name.
_ENGINE_FIELDS = (
    "folder",
    "runtime",
    "engine.engine",
    "engine.version",
    "engine.kernel_row",
    "engine.model_files",
    "model",
    "files",
    "model_bytes",
    "peak_rss_bytes",
    "load_median_ms",
    *(f"{metric}.{name}" for metric in ("prefill", "decode") for name in ("median_ms", "mad_ms")),
)
_MACHINE_FIELDS = (
    *("cpu_model", "physical_cores", "virtual", "affinity_cpus", "memory_bytes"),
    *("system", "kernel", "packages", "git_revision"),
)
_CONFIG_FIELDS = (
    *("candidate", "baseline", "candidate_runtime", "baseline_runtime"),
    *("prompt_tokens", "new_tokens", "batch", "answers", "max_seconds"),
)
_ACCURACIES = tuple(
    f"{name}.{part}" for name in ("accuracy", "accuracy_normalised") for part in ("share", "standard_error")
)
_FIELDS: Mapping[str, tuple[str, ...]] = {
    bench_report.SCHEMA: (
        *("created_utc", "threads", "answers.mode", "answers.candidate", "answers.baseline"),
        *("warmup_blocks", "timed_seconds", "samples", "warnings"),
        *(f"config.{name}" for name in _CONFIG_FIELDS),
        *(f"machine.{name}" for name in _MACHINE_FIELDS),
        *(f"{side}.{name}" for side in ("candidate", "baseline") for name in _ENGINE_FIELDS),
        *(
            f"{metric}.all_blocks.{name}"
            for metric in ("prefill", "decode")
            for name in ("ratio", "low", "high", "verdict", "blocks", "smallest_shown")
        ),
    ),
    bench_sweep.SCHEMA: ("runs",),
    evaluation.SCHEMA: (
        *("target.folder", "target.engine.name", "target.engine.model_files"),
        *(f"texts.{name}" for name in ("name", "protocol", "window", "windows")),
        *(f"texts.target.{name}" for name in ("perplexity", "window_nll")),
        *(f"tasks.{name}" for name in ("name", "items", "usual")),
        *(f"tasks.target.{name}" for name in _ACCURACIES),
    ),
    doctor_report.SCHEMA: (
        *("threads", "bandwidth_one", "bandwidth_all", "bandwidth_samples"),
        *("machine.cpu_model", "machine.physical_cores"),
    ),
}
# Of an evaluation that held its target against a reference.
_COMPARED_FIELDS = (
    *("reference.folder", "reference.engine.name", "reference.engine.model_files", "texts.reference.perplexity"),
    *(f"texts.{name}" for name in ("kl_mean", "kl_p99", "agreement")),
    *(f"texts.nll_difference.{name}" for name in ("mean", "low", "high")),
    *(f"tasks.reference.{name}" for name in _ACCURACIES),
    *(f"tasks.mcnemar.{name}" for name in ("only_target", "only_reference", "p")),
)
_VERSIONS = {
    bench_report.SCHEMA: bench_report.SCHEMA_VERSION,
    bench_sweep.SCHEMA: bench_sweep.SCHEMA_VERSION,
    evaluation.SCHEMA: evaluation.SCHEMA_VERSION,
    doctor_report.SCHEMA: doctor_report.SCHEMA_VERSION,
}


@dataclass(frozen=True)
class Source:
    """One record: `document` as its schema says, from `file` (a sweep's file holds several)."""

    file: Path
    document: Mapping[str, Any]


@dataclass(frozen=True)
class RunSource:
    """The finished rounds of one training run."""

    folder: Path
    rounds: tuple[RoundRecord, ...]


@dataclass(frozen=True)
class Sources:
    """Everything that was found, in the order of the file names.

    Attributes:
        benches: benchmarks, those of sweeps among them.
        evals: evaluations.
        doctors: examinations of a machine.
        runs: training runs.
        files: whatever these came from, once each.
        skipped: files that look like a record of ours and cannot be used, each with the reason.
    """

    benches: tuple[Source, ...]
    evals: tuple[Source, ...]
    doctors: tuple[Source, ...]
    runs: tuple[RunSource, ...]
    files: tuple[Path, ...]
    skipped: tuple[tuple[Path, str], ...]


def find_sources(places: Sequence[Path]) -> Sources:
    """Look through files and folders, and the folders inside them.

    Raises: InputError if a place is missing, or none holds a record.
    """
    from losa_export.training.journal import JOURNAL_FILE

    records: dict[str, list[Source]] = {schema: [] for schema in _VERSIONS}
    runs: list[RunSource] = []
    skipped: list[tuple[Path, str]] = []
    for file in _files(places):
        if file.name == JOURNAL_FILE:
            _add_run(file, runs, skipped)
        elif file.suffix == ".json" and file.is_file() and file.stat().st_size <= _LARGEST_BYTES:
            _add_record(file, records, skipped)
    benches, evals, doctors = (
        tuple(records[schema]) for schema in (bench_report.SCHEMA, evaluation.SCHEMA, doctor_report.SCHEMA)
    )
    if not benches and not evals and not runs:
        why = "".join(f"; '{path.name}': {reason}" for path, reason in skipped)
        raise InputError(
            "there is no record of 'losa bench', 'losa eval' or 'losa train' in "
            f"{', '.join(map(str, places))}{why}; measure first"
        )
    found = [source.file for source in (*benches, *evals, *doctors)] + [run.folder / JOURNAL_FILE for run in runs]
    return Sources(benches, evals, doctors, tuple(runs), tuple(dict.fromkeys(found)), tuple(skipped))


def _files(places: Sequence[Path]) -> list[Path]:
    """All files of these places, each once, though a place may lie inside another."""
    found: dict[Path, Path] = {}
    for place in places:
        if not place.exists():
            raise InputError(f"'{place}' does not exist; give files or folders with records", path=place)
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _add_run(file: Path, runs: list[RunSource], skipped: list[tuple[Path, str]]) -> None:
    from losa_export.training.journal import read_journal

    try:
        rounds = tuple(read_journal(file.parent))
    except (OSError, ValueError, TypeError, KeyError) as error:
        skipped.append((file, f"not readable as rounds ({error})"))
        return
    if rounds:
        runs.append(RunSource(file.parent, rounds))


def _add_record(file: Path, records: dict[str, list[Source]], skipped: list[tuple[Path, str]]) -> None:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # not ours
    if _schema(document) is None:
        return
    reason = _unusable(document)
    if reason is not None:
        skipped.append((file, reason))
    elif document["schema"] == bench_sweep.SCHEMA:
        for number, run in enumerate(document["runs"], start=1):
            reason = _unusable(run) if _schema(run) == bench_report.SCHEMA else "it is no benchmark"
            if reason is None:
                records[bench_report.SCHEMA].append(Source(file, run))
            else:
                skipped.append((file, f"run {number}: {reason}"))
    else:
        records[document["schema"]].append(Source(file, document))


def _schema(document: object) -> str | None:
    """The schema of ours that a document names; None if there is none."""
    name = document.get("schema") if isinstance(document, dict) else None
    return name if name in _VERSIONS else None


def _unusable(document: Mapping[str, Any]) -> str | None:
    """Why a document with a schema of ours cannot be shown; None if it can."""
    schema, version = document["schema"], document.get("schema_version")
    if version != _VERSIONS[schema]:
        return f"schema version {version}, this version reads {_VERSIONS[schema]}"
    fields = _FIELDS[schema]
    if schema == evaluation.SCHEMA and "reference" in document:
        fields += _COMPARED_FIELDS
    missing = next((path for path in fields if not _has(document, path.split("."))), None)
    return None if missing is None else f"it has no field '{missing}'; measure again"


def _has(value: Any, path: Sequence[str]) -> bool:
    """Whether a field such as decode → median_ms is there; of a list, in each entry."""
    if not path:
        return True
    if isinstance(value, list):
        return all(_has(entry, path) for entry in value)
    return isinstance(value, Mapping) and path[0] in value and _has(value[path[0]], path[1:])
