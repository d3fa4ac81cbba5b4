"""What a benchmark found, as dataclasses, and as the JSON document that docs/bench-schema.md describes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from losa_export.errors import InputError
from losa_export.eval.machine import MachineRecord
from losa_export.eval.other_load import OtherLoad
from losa_export.eval.parity import GateReport, ParityFigures
from losa_export.eval.stats import RatioEstimate, median, median_absolute_deviation, percentiles
from losa_export.eval.worker import MemoryUse
from losa_export.files import write_text_atomic

SCHEMA = "losa-bench"
SCHEMA_VERSION = 2

Side = Literal["candidate", "baseline"]
AnswerMode = Literal["same", "own"]


@dataclass(frozen=True)
class FileRecord:
    """A file of a model folder, by its name inside the folder."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Sample:
    """One generation. `disturbed`: a spin just before took over 5 % longer than it does in quiet."""

    side: Side
    block: int
    order: int
    prefill_ms: float
    decode_ms: tuple[float, ...]
    probe_ms: tuple[float, ...]
    disturbed: bool
    cpu_ms: float
    preemptions: int
    idle_cpu_ms: float
    idle_wall_ms: float

    @property
    def decode_mean_ms(self) -> float:
        """Mean time per output token of this generation."""
        return sum(self.decode_ms) / len(self.decode_ms)


@dataclass(frozen=True)
class Timing:
    """Samples of one kind, in milliseconds. `percentiles` are over `count` single measurements."""

    median_ms: float
    mad_ms: float
    percentiles_ms: dict[str, float]
    count: int
    tokens_per_s: float


@dataclass(frozen=True)
class EngineResult:
    """One side of the comparison.

    Attributes:
        folder: the folder's last name only.
        engine: the runtime's own description: engine, version, threads, kernel row.
        model: `weights`, `values`, `head` and `sparsity_fraction` of the linears, as far as the folder's export.json
            tells them.
        files: every file of the folder, hashed.
        model_bytes: graph and weights, without tokenizer and configuration.
        load_ms: each load, in fresh processes, page cache warm.
        load_median_ms: their median.
        import_ms: importing the engine's modules, once.
        memory_load: after loading; its peak is the peak of loading.
        memory_run: after the timed runs; its peak is since the answer check (see `peak_was_reset`).
        peak_rss_bytes: the larger of both peaks: VmHWM of the process.
        peak_was_reset: False where the system did not let the peak be reset, so that the peak of the
            run holds the answer check too.
        prefill: time to first token, over generations.
        decode: per output token; the median is over generations, percentiles over single tokens.
        idle_cpu_fraction: processors kept busy by this engine while the other one ran.
    """

    folder: str
    runtime: str
    engine: dict[str, Any]
    model: dict[str, Any]
    files: tuple[FileRecord, ...]
    model_bytes: int
    load_ms: tuple[float, ...]
    load_median_ms: float
    import_ms: float
    memory_load: MemoryUse
    memory_run: MemoryUse
    peak_rss_bytes: int | None
    peak_was_reset: bool
    prefill: Timing
    decode: Timing
    idle_cpu_fraction: float


@dataclass(frozen=True)
class SideCheck:
    """One engine held against another. `workload`: on the timed prompt and after the last timed token."""

    against: str
    gate: GateReport
    workload: ParityFigures


@dataclass(frozen=True)
class AnswerCheck:
    """How the answers were checked before timing.

    Attributes:
        mode: 'same': candidate against baseline; 'own': each against another engine on its own folder.
        decided_by: 'option', 'value types', 'weights digest' or 'default'.
        candidate: None where no other engine can open the folder.
        baseline: None in mode 'same' (it is the reference), and where no other engine can open the folder.
    """

    mode: AnswerMode
    decided_by: str
    candidate: SideCheck | None
    baseline: SideCheck | None


@dataclass(frozen=True)
class Comparison:
    """A ratio over all samples, and over the blocks without a disturbed sample if there are enough."""

    all_blocks: RatioEstimate
    quiet_blocks: RatioEstimate | None


@dataclass(frozen=True)
class BenchReport:
    """Everything `bench.json` holds. Ratios are baseline time over candidate time: above 1 the candidate wins."""

    created_utc: str
    config: dict[str, Any]
    threads: int
    machine: MachineRecord
    answers: AnswerCheck
    candidate: EngineResult
    baseline: EngineResult
    prefill: Comparison
    decode: Comparison
    load_ratio: float
    size_ratio: float
    memory_ratio: float | None
    warmup_blocks: int
    stationary: bool
    timed_seconds: float
    other_load: OtherLoad | None
    samples: tuple[Sample, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The document: plain dictionaries, lists and numbers."""
        document = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)}
        document["machine"] = self.machine.as_dict()
        for sample in document["samples"]:
            for key in ("decode_ms", "probe_ms"):
                sample[key] = [round(value, 5) for value in sample[key]]  # to 10 ns, below the clock's worth
        plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
        return plain

    def write(self, path: Path) -> None:
        """Write `bench.json`, whole or not at all. Raises: OutputError."""
        write_text_atomic(path, json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")


def read_bench(path: Path) -> dict[str, Any]:
    """The document of a `bench.json`.

    Raises:
        InputError: the file is missing, is not JSON, or is of another schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{path}' is not a readable bench.json ({error}); run 'losa bench' again", path=path
        ) from error
    found = (document.get("schema"), document.get("schema_version")) if isinstance(document, dict) else (None, None)
    if found != (SCHEMA, SCHEMA_VERSION):
        raise InputError(
            f"'{path}' has schema {found[0]!r} version {found[1]!r}, this version reads {SCHEMA!r} {SCHEMA_VERSION}; "
            "run 'losa bench' again",
            path=path,
        )
    return dict(document)


def summarise_prefill(samples: list[Sample], prompt_tokens: int) -> Timing:
    """Timing of the prefills of one side."""
    times = [sample.prefill_ms for sample in samples]
    middle = median(times)
    return Timing(
        middle, median_absolute_deviation(times), percentiles(times), len(times), 1000 * prompt_tokens / middle
    )


def summarise_decode(samples: list[Sample], batch: int = 1) -> Timing:
    """Timing of the decode steps of one side, `batch` tokens each: median over generations, percentiles over steps."""
    means = [sample.decode_mean_ms for sample in samples]
    tokens = np.concatenate([sample.decode_ms for sample in samples])
    middle = median(means)
    return Timing(middle, median_absolute_deviation(means), percentiles(tokens), len(tokens), 1000 * batch / middle)
