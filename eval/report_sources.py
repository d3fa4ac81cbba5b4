"""What a report is made of: the records that lie in some folders, each with the file it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losa_export.errors import InputError
from losa_export.eval import bench_report, bench_sweep

if TYPE_CHECKING:
    from losa_export.training.journal import RoundRecord

# Records larger than this are something else.
_LARGEST_BYTES = 256 * 2**20


@dataclass(frozen=True)
class BenchSource:
    """One benchmark: `document` as `bench.json` holds it, from `file` (a sweep's file holds several)."""

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
        runs: training runs.
        skipped: files that look like a record of ours and cannot be used, each with the reason.
    """

    benches: tuple[BenchSource, ...]
    runs: tuple[RunSource, ...]
    skipped: tuple[tuple[Path, str], ...]


def find_sources(places: Sequence[Path]) -> Sources:
    """Look through files and folders, and the folders inside them.

    Raises: InputError if a place is missing, or none holds a record.
    """
    from losa_export.training.journal import JOURNAL_FILE

    benches: list[BenchSource] = []
    runs: list[RunSource] = []
    skipped: list[tuple[Path, str]] = []
    for place in places:
        if not place.exists():
            raise InputError(f"'{place}' does not exist; give files or folders with records", path=place)
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in files:
            if file.name == JOURNAL_FILE:
                _add_run(file, runs, skipped)
            elif file.suffix == ".json" and file.is_file() and file.stat().st_size <= _LARGEST_BYTES:
                _add_benches(file, benches, skipped)
    if not benches and not runs:
        why = "".join(f"; '{path.name}': {reason}" for path, reason in skipped)
        raise InputError(
            f"there is no record of 'losa bench' or 'losa train' in {', '.join(map(str, places))}{why}; measure first"
        )
    return Sources(tuple(benches), tuple(runs), tuple(skipped))


def _add_run(file: Path, runs: list[RunSource], skipped: list[tuple[Path, str]]) -> None:
    from losa_export.training.journal import read_journal

    try:
        rounds = tuple(read_journal(file.parent))
    except (OSError, ValueError, TypeError, KeyError) as error:
        skipped.append((file, f"not readable as rounds ({error})"))
        return
    if rounds:
        runs.append(RunSource(file.parent, rounds))


def _add_benches(file: Path, benches: list[BenchSource], skipped: list[tuple[Path, str]]) -> None:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # not ours
    if not isinstance(document, dict):
        return
    known = {
        bench_report.SCHEMA: bench_report.SCHEMA_VERSION,
        bench_sweep.SCHEMA: bench_sweep.SCHEMA_VERSION,
    }
    schema, version = document.get("schema"), document.get("schema_version")
    if schema not in known:
        return
    if version != known[schema]:
        skipped.append((file, f"schema version {version}, this version reads {known[schema]}"))
        return
    found = document["runs"] if schema == bench_sweep.SCHEMA else [document]
    benches.extend(BenchSource(file, one) for one in found)
