"""The benchmark: two engines side by side, answers first, then interleaved timing, then a verdict by rule.

Blocks of four generations, candidate - baseline - baseline - candidate, alternate in one run at equal
threads, prompt and output lengths. Each block gives a ratio; their centre carries an interval by ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from losa_export.errors import BenchmarkError, ConfigError
from losa_export.eval.answer_check import PassedChecks, check_answers, choose_mode, model_facts
from losa_export.eval.answers import Workload, make_workload
from losa_export.eval.bench_report import (
    BenchReport,
    Comparison,
    EngineResult,
    FileRecord,
    Sample,
    Side,
    summarise_decode,
    summarise_prefill,
)
from losa_export.eval.engine import Engine, EngineProcess
from losa_export.eval.machine import machine_record
from losa_export.eval.other_load import OtherLoad, other_load, read_cpu_times, usable_cpus
from losa_export.eval.parity import GateThresholds
from losa_export.eval.stats import MIN_BLOCKS, RatioEstimate, Verdict, agree_within, median, paired_ratio
from losa_export.eval.worker import Loaded, MemoryUse, RawSample
from losa_export.files import input_folder, sha256_of
from losa_export.progress import Progress
from losa_export.runtimes.base import RUNTIME_NAMES, RuntimeName
from losa_export.runtimes.isolated import ENGINES
from losa_export.runtimes.threads import resolve_threads

ORDER: tuple[Side, ...] = ("candidate", "baseline", "baseline", "candidate")
SIDES: tuple[Side, ...] = ("candidate", "baseline")
DISTURBED_SPIN = 1.05
_IDLE_LIMIT = 0.05
# Where other processes took more of our processors than this, nothing is said of who was faster.
_MOST_OTHER_LOAD = 0.1

AnswerOption = Literal["auto", "same", "own"]
# Makes the engine for a label that runs a runtime.
Launch = Callable[[str, RuntimeName], Engine]


@dataclass(frozen=True)
class BenchConfig:
    """What to compare, and how long to look.

    Attributes:
        candidate: folder of the model under test.
        baseline: folder of the model it is compared with.
        candidate_runtime, baseline_runtime: of `RUNTIME_NAMES`.
        threads: compute threads of each engine; None: what the machine offers.
        prompt_tokens: tokens prefilled in each generation.
        new_tokens: tokens then decoded.
        batch: rows that are decoded together, each with a prompt of its own; prompts are prefilled one by one.
        answers: 'same': both must answer alike; 'own': the weights differ on purpose, so each folder is
            checked by another engine; 'auto': by the weights' digests in both export.json, else 'same'.
        min_blocks, max_blocks: blocks of four generations to time.
        min_seconds, max_seconds: length of the timed part. `max_seconds` wins over `min_blocks`, but not
            over the six blocks that an interval needs.
        max_warmup_blocks: untimed blocks at most.
        warmup_tolerance: the last two warm-up blocks' medians must agree within this fraction.
        precision: stop once both intervals' half widths are at most this fraction of the ratio.
        load_samples: how often each model is loaded.
        seed: of token ids.
        timeout_s: longest time one command to an engine may take.
        thresholds: what counts as the same answer.
    """

    candidate: Path
    baseline: Path
    candidate_runtime: RuntimeName = "ort"
    baseline_runtime: RuntimeName = "ort-stock"
    threads: int | None = None
    prompt_tokens: int = 128
    new_tokens: int = 64
    batch: int = 1
    answers: AnswerOption = "auto"
    min_blocks: int = 8
    max_blocks: int = 100
    min_seconds: float = 10.0
    max_seconds: float = 180.0
    max_warmup_blocks: int = 6
    warmup_tolerance: float = 0.03
    precision: float = 0.02
    load_samples: int = 3
    seed: int = 0
    timeout_s: float = 900.0
    thresholds: GateThresholds = field(default_factory=GateThresholds)

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the field."""
        for name in ("candidate_runtime", "baseline_runtime"):
            if getattr(self, name) not in RUNTIME_NAMES:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(RUNTIME_NAMES)}", field=name
                )
        if self.answers not in get_args(AnswerOption):
            raise ConfigError(f"answers is {self.answers!r}; choose auto, same or own", field="answers")
        least = {
            "prompt_tokens": 1,
            "new_tokens": 1,
            "batch": 1,
            "min_blocks": MIN_BLOCKS,
            "max_blocks": self.min_blocks,
            "max_warmup_blocks": 1,
            "load_samples": 1,
            "seed": 0,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least {lowest}", field=name)
        positive = ("max_seconds", "warmup_tolerance", "precision", "timeout_s")
        for name in positive:
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give a number above 0", field=name)
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise ConfigError(
                f"min_seconds is {self.min_seconds!r}; give a number from 0 to max_seconds ({self.max_seconds:g})",
                field="min_seconds",
            )

    def folder(self, side: Side) -> Path:
        """The model folder of a side."""
        return self.candidate if side == "candidate" else self.baseline

    def runtime(self, side: Side) -> RuntimeName:
        """The runtime of a side."""
        return self.candidate_runtime if side == "candidate" else self.baseline_runtime

    def label(self, side: Side) -> str:
        """How messages call a side."""
        return f"the {side} ('{self.folder(side).name}' in {self.runtime(side)})"

    def as_dict(self) -> dict[str, Any]:
        """The options as plain values; folders by their last name only."""
        fields = asdict(self)
        fields["candidate"], fields["baseline"] = self.candidate.name, self.baseline.name
        return fields


def bench(
    config: BenchConfig,
    *,
    launch: Launch | None = None,
    passed: PassedChecks | None = None,
    show_progress: bool = True,
) -> BenchReport:
    """Compare two engines.

    Args:
        config: see `BenchConfig`.
        launch: makes the engine for a label and runtime; None starts a child process for each, in the runtime's own
            environment if it has one.
        passed: answers that earlier benchmarks of this process have checked and this one need not; grows.
        show_progress: False for silence on stderr.

    Returns: the report; write it with `.write(path)`, show it with `report.print_bench`.

    Raises:
        InputError: a folder is missing or empty, or what its runtime raises.
        ConfigError: the prompt and new tokens exceed a model's positions.
        BenchmarkError: the answers differ, or the vocabularies do.
        RuntimeFailureError: an engine died or hung; its last output is in the message.
    """
    threads = resolve_threads(config.threads)
    start: Launch = launch or (
        lambda label, name: EngineProcess(label, timeout_s=config.timeout_s, engine=ENGINES.get(name))
    )
    machine = machine_record()
    files = {side: file_records(input_folder(config.folder(side), what=side)) for side in SIDES}
    with ExitStack() as stack:
        engines: dict[Side, Engine] = {}
        loads: dict[Side, list[Loaded]] = {side: [] for side in SIDES}
        with Progress("loading", 2 * config.load_samples, "loads", enabled=show_progress) as progress:
            for repeat in range(config.load_samples):
                last = repeat == config.load_samples - 1
                for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
                    engine = start(config.label(side), config.runtime(side))
                    stack.callback(engine.close)
                    loads[side].append(_load(engine, config, side, threads))
                    if last:
                        engines[side] = engine
                    else:
                        engine.close()
                    progress.advance()
        loaded = {side: loads[side][-1] for side in SIDES}
        workload = _workload(config, loaded)
        mode, decided_by = choose_mode(config.answers, config.candidate, config.baseline)
        _check_vocabularies(config, loaded, mode)

        def another(side: Side, name: RuntimeName) -> Engine:
            engine = start(f"'{config.folder(side).name}' in {name}, to check {config.label(side)}", name)
            stack.callback(engine.close)
            engine.call("load", name=name, folder=config.folder(side), threads=threads)
            return engine

        with Progress("checking the answers", 1, "check", enabled=show_progress) as progress:
            answers = check_answers(
                mode,
                decided_by,
                config,
                engines,
                workload,
                another,
                files=files,
                threads=threads,
                passed={} if passed is None else passed,
            )
            progress.advance()
        was_reset = {side: bool(engines[side].call("reset_peak")) for side in SIDES}
        run = _Run(config, engines, workload, show_progress)
        warmup_blocks, stationary = run.warm_up()
        pids = [os.getpid(), *(pid for pid in (engine.pid for engine in engines.values()) if pid is not None)]
        cpus = usable_cpus()
        before = read_cpu_times(pids, cpus)
        timed_seconds = run.measure()
        load = other_load(before, read_cpu_times(pids, cpus), timed_seconds, len(cpus))
        memory: dict[Side, MemoryUse] = {side: engines[side].call("memory") for side in SIDES}

    samples = mark_disturbed(run.samples)
    results = {
        side: _engine_result(config, side, files[side], loads[side], memory[side], was_reset[side], samples)
        for side in SIDES
    }
    candidate, baseline = results["candidate"], results["baseline"]
    prefill = compare_sides(samples, lambda sample: sample.prefill_ms)
    decode = compare_sides(samples, lambda sample: sample.decode_mean_ms)
    too_busy = load is not None and load.others > _MOST_OTHER_LOAD
    if too_busy:
        prefill, decode = without_verdict(prefill), without_verdict(decode)
    peaks = candidate.peak_rss_bytes, baseline.peak_rss_bytes
    return BenchReport(
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        config=config.as_dict(),
        threads=threads,
        machine=machine,
        answers=answers,
        candidate=candidate,
        baseline=baseline,
        prefill=prefill,
        decode=decode,
        load_ratio=baseline.load_median_ms / candidate.load_median_ms,
        size_ratio=candidate.model_bytes / baseline.model_bytes,
        memory_ratio=peaks[0] / peaks[1] if peaks[0] and peaks[1] else None,
        warmup_blocks=warmup_blocks,
        stationary=stationary,
        timed_seconds=timed_seconds,
        other_load=load,
        samples=samples,
        warnings=tuple(_warnings(config, results, prefill, decode, samples, stationary, load)),
    )


def file_records(folder: Path) -> tuple[FileRecord, ...]:
    """Every plain file directly in `folder`, hashed. Reading them also warms the page cache for the loads."""
    return tuple(
        FileRecord(path.name, path.stat().st_size, sha256_of(path))
        for path in sorted(folder.iterdir())
        if path.is_file()
    )


def mark_disturbed(raw: list[tuple[Side, int, RawSample]]) -> tuple[Sample, ...]:
    """Samples in the order taken, flagged where any processor's spin was slower than its quiet time.

    The quiet time of a processor is the tenth percentile of its spins in the whole run.
    """
    probes = np.array([sample.probe_s for _, _, sample in raw])
    quiet = np.percentile(probes, 10, axis=0)
    slow = (probes > DISTURBED_SPIN * quiet).any(axis=1)
    return tuple(
        Sample(
            side=side,
            block=block,
            order=order,
            prefill_ms=1e3 * sample.prefill_s,
            decode_ms=tuple(1e3 * value for value in sample.decode_s),
            probe_ms=tuple(1e3 * value for value in sample.probe_s),
            disturbed=bool(slow[order]),
            cpu_ms=1e3 * sample.cpu_s,
            preemptions=sample.preemptions,
            idle_cpu_ms=1e3 * sample.idle_cpu_s,
            idle_wall_ms=1e3 * sample.idle_wall_s,
        )
        for order, (side, block, sample) in enumerate(raw)
    )


def without_verdict(comparison: Comparison) -> Comparison:
    """The same figures, and nothing said of who was faster."""
    quiet = comparison.quiet_blocks
    return Comparison(
        replace(comparison.all_blocks, verdict=Verdict.NO_VERDICT),
        None if quiet is None else replace(quiet, verdict=Verdict.NO_VERDICT),
    )


def compare_sides(samples: tuple[Sample, ...], value: Callable[[Sample], float]) -> Comparison:
    """The ratio of one metric over all blocks, and over those in which no sample was disturbed."""
    blocks = sorted({sample.block for sample in samples})
    quiet = [block for block in blocks if not any(s.disturbed for s in samples if s.block == block)]

    def ratio(chosen: list[int]) -> RatioEstimate:
        table = {
            side: [[value(s) for s in samples if s.block == block and s.side == side] for block in chosen]
            for side in SIDES
        }
        return paired_ratio(table["baseline"], table["candidate"])

    return Comparison(ratio(blocks), ratio(quiet) if len(quiet) >= MIN_BLOCKS else None)


class _Run:
    """The loop of blocks: warm-up, then timing until the intervals are narrow enough or time is up."""

    def __init__(
        self, config: BenchConfig, engines: dict[Side, Engine], workload: Workload, show_progress: bool
    ) -> None:
        self._config = config
        self._engines = engines
        self._workload = workload
        self._show = show_progress
        self.samples: list[tuple[Side, int, RawSample]] = []

    def warm_up(self) -> tuple[int, bool]:
        """Run untimed blocks until the last two agree. Returns: how many, and whether they agreed."""
        config = self._config
        history: dict[tuple[Side, str], list[float]] = {}
        with Progress("warming up", config.max_warmup_blocks, "blocks at most", enabled=self._show) as progress:
            for block in range(1, config.max_warmup_blocks + 1):
                taken = list(self._block())
                for side in SIDES:
                    mine = [sample for owner, sample in taken if owner == side]
                    history.setdefault((side, "prefill"), []).append(median([s.prefill_s for s in mine]))
                    history.setdefault((side, "decode"), []).append(median([np.mean(s.decode_s) for s in mine]))
                progress.advance()
                if all(agree_within(medians, config.warmup_tolerance) for medians in history.values()):
                    return block, True
        return config.max_warmup_blocks, False

    def measure(self) -> float:
        """Time blocks. Returns: seconds of the timed part."""
        config = self._config
        start = time.perf_counter()
        block = 0
        with Progress("timing", config.min_blocks, "blocks", enabled=self._show) as progress:
            while True:
                self.samples += [(side, block, sample) for side, sample in self._block()]
                block += 1
                elapsed = time.perf_counter() - start
                shown = {}
                enough = False
                if block >= MIN_BLOCKS:
                    decode, prefill = self._interim("decode"), self._interim("prefill")
                    shown = {"decode": f"{decode.ratio:.2f}x", "prefill": f"{prefill.ratio:.2f}x"}
                    narrow = max(decode.half_width, prefill.half_width) <= config.precision
                    looked = block >= config.min_blocks and elapsed >= config.min_seconds
                    enough = (narrow and looked) or elapsed >= config.max_seconds or block >= config.max_blocks
                progress.total = max(progress.total, block)
                progress.advance(1, **shown)
                if enough:
                    return elapsed

    def _block(self) -> Iterator[tuple[Side, RawSample]]:
        for side in ORDER:
            yield (
                side,
                self._engines[side].call(
                    "sample",
                    prompt=self._workload.prompt,
                    forced=self._workload.forced,
                    batch=self._config.batch,
                ),
            )

    def _interim(self, metric: Literal["prefill", "decode"]) -> RatioEstimate:
        blocks = self.samples[-1][1] + 1
        table: dict[Side, list[list[float]]] = {side: [[] for _ in range(blocks)] for side in SIDES}
        for side, block, sample in self.samples:
            value = sample.prefill_s if metric == "prefill" else float(np.mean(sample.decode_s))
            table[side][block].append(value)
        return paired_ratio(table["baseline"], table["candidate"])


def _load(engine: Engine, config: BenchConfig, side: Side, threads: int) -> Loaded:
    loaded: Loaded = engine.call("load", name=config.runtime(side), folder=config.folder(side), threads=threads)
    return loaded


def _workload(config: BenchConfig, loaded: dict[Side, Loaded]) -> Workload:
    positions = min(one.max_positions for one in loaded.values())
    needed = config.prompt_tokens + config.new_tokens
    if needed > positions:
        raise ConfigError(
            f"prompt_tokens {config.prompt_tokens} and new_tokens {config.new_tokens} need {needed} positions, "
            f"but a model here has {positions}; ask for fewer",
            field="prompt_tokens",
        )
    vocabulary = min(one.vocab_size for one in loaded.values())
    generator = np.random.default_rng(config.seed)
    return make_workload(vocabulary, positions, config.prompt_tokens, config.new_tokens, generator)


def _check_vocabularies(config: BenchConfig, loaded: dict[Side, Loaded], mode: str) -> None:
    sizes = {side: loaded[side].vocab_size for side in SIDES}
    if mode == "same" and sizes["candidate"] != sizes["baseline"]:
        raise BenchmarkError(
            f"{config.label('candidate')} has a vocabulary of {sizes['candidate']}, {config.label('baseline')} one of "
            f"{sizes['baseline']}: they are different models; compare exports of one checkpoint, or say --answers own",
            **sizes,
        )


def _engine_result(
    config: BenchConfig,
    side: Side,
    files: tuple[FileRecord, ...],
    loads: list[Loaded],
    memory: MemoryUse,
    was_reset: bool,
    samples: tuple[Sample, ...],
) -> EngineResult:
    mine = [sample for sample in samples if sample.side == side]
    last = loads[-1]
    peaks = [peak for peak in (last.peak_load.peak_rss_bytes, memory.peak_rss_bytes) if peak is not None]
    load_ms = tuple(1e3 * one.load_s for one in loads)
    idle_wall = sum(sample.idle_wall_ms for sample in mine)
    return EngineResult(
        folder=config.folder(side).name,
        runtime=config.runtime(side),
        engine=last.description.as_dict(),
        model=model_facts(config.folder(side)),
        files=files,
        model_bytes=sum(last.description.model_files.values()),
        load_ms=load_ms,
        load_median_ms=median(load_ms),
        import_ms=1e3 * last.import_s,
        memory_load=last.peak_load,
        memory_run=memory,
        peak_rss_bytes=max(peaks, default=None),
        peak_was_reset=was_reset,
        prefill=summarise_prefill(mine, config.prompt_tokens * config.batch),
        decode=summarise_decode(mine, config.batch),
        idle_cpu_fraction=sum(sample.idle_cpu_ms for sample in mine) / idle_wall if idle_wall else 0.0,
    )


def _warnings(
    config: BenchConfig,
    results: dict[Side, EngineResult],
    prefill: Comparison,
    decode: Comparison,
    samples: tuple[Sample, ...],
    stationary: bool,
    load: OtherLoad | None,
) -> Iterator[str]:
    if load is not None and load.others > _MOST_OTHER_LOAD:
        yield (
            f"other processes took {load.others:.0%} of the processors while this was timed (at most "
            f"{_MOST_OTHER_LOAD:.0%} is allowed), so no verdict is given; stop them and run again"
        )
    if not stationary:
        yield (
            f"after {config.max_warmup_blocks} warm-up blocks two neighbours still differed by more than "
            f"{config.warmup_tolerance:.0%}; stop other work on this machine and run again"
        )
    disturbed = sum(sample.disturbed for sample in samples)
    if disturbed > len(samples) / 4:
        yield (
            f"{disturbed} of {len(samples)} samples were disturbed (a spin took over 5 % longer than in quiet); "
            "stop other work on this machine and run again"
        )
    for name, comparison in (("prefill", prefill), ("decode", decode)):
        everything, quiet = comparison.all_blocks, comparison.quiet_blocks
        if everything.half_width > config.precision:
            yield (
                f"the interval of the {name} ratio is ±{everything.half_width:.1%}, wider than the "
                f"{config.precision:.1%} asked for; raise --max-time"
            )
        if quiet is not None and quiet.verdict != everything.verdict:
            yield f"{name}: without disturbed blocks the verdict would be {quiet.verdict}; run again in quiet"
    for side in SIDES:
        idle = results[side].idle_cpu_fraction
        if idle > _IDLE_LIMIT:
            yield (
                f"{config.label(side)} kept {idle:.2f} processors busy while the other engine ran, "
                "which slows that one; its threads spin when idle"
            )
