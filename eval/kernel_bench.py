"""The kernel benchmark: single products, ours and their peers', interleaved in ONNX Runtime sessions of equal threads.

For each shape and sparsity every engine gets a ring of distinct weights larger than the caches; each answer is
checked; then the engines take turns, for each number of tokens, and ratios are formed within blocks of turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from losa_export.errors import BenchmarkError, ConfigError
from losa_export.eval.kernel_bench_engines import (
    MAX_COPIES,
    MAX_RUN_S,
    PEERS,
    Engine,
    EngineSpec,
    PeerName,
    Reference,
    build_engine,
    check_answers,
    check_distinct,
    data_folder,
    peer_specs,
    require_packages,
    ring_copies,
    torch_is_installed,
)
from losa_export.eval.kernel_bench_report import KernelBenchReport, KernelCase, KernelTiming
from losa_export.eval.kernel_bench_shapes import Shape, parse_shapes
from losa_export.eval.kernel_bench_timing import DRIFT_FRACTION, TimingPlan, Timings, drifts, measure
from losa_export.eval.kernel_bench_weights import Float32, bytes_per_weight, value_kind
from losa_export.eval.machine import MachineRecord, machine_record
from losa_export.eval.stats import median, median_absolute_deviation, paired_ratio
from losa_export.progress import Progress
from losa_export.runtimes import native
from losa_export.runtimes.threads import resolve_threads

DEFAULT_RING_BYTES = 256 << 20
QUICK_PEERS: tuple[PeerName, ...] = ("ort-fp32", "ort-int8-dynamic", "ort-int4-block32", "ort-int4-block128")
_MEBIBYTE = 1 << 20
_MAX_TOKENS = 4096
_BANDWIDTH_REPEATS = 2
# Room for an engine's own packed copy of the weights beside the mapped file.
_MEMORY_PER_RING_BYTE = 2.2
_UNKNOWN_CACHE_BYTES = 32 << 20
_MAPS_PER_COPY = 3
_MANY_DISTURBED = 1 / 4


# As files have them where the gate finds 8-bit activations to be enough.
DEFAULT_VALUES = ("fp32", "bf16", "int8-a8", "int4-a8")


@dataclass(frozen=True)
class KernelBenchConfig:
    """What to multiply, on which engines, and how long to look. None takes the default, which `quick` lowers.

    Attributes:
        shapes: 'smollm2', 'tinyllama', 'llama2-7b', or rows x columns such as '4096x11008'.
        sparsities: fractions of zeros in our weights, 0 to below 1.
        tokens: rows of the activations.
        values: kinds of our values: fp32, bf16, int8, int4; int8-a8 and int4-a8 with 8-bit activations;
            dense-bf16, dense-int8, dense-int4 (and their -a8) without a mask.
        rows: kernel rows; () is the one that would be chosen, ('all',) every one that this CPU
            runs but 'scalar', which defines the answers and is slow.
        peers: names as in PEERS; None is all that are installed, () none.
        threads: within one product; None: what the machine offers.
        seconds: timed part of a case.
        ring_mebibytes: what the copies of a weight together must exceed; None: 256, and three times the last cache.
        quick: fewer cases, peers and copies, for a first look.
        seed: of weights and activations.
    """

    shapes: tuple[str, ...] = ("llama2-7b",)
    sparsities: tuple[float, ...] | None = None
    tokens: tuple[int, ...] | None = None
    values: tuple[str, ...] = DEFAULT_VALUES
    rows: tuple[str, ...] = ()
    peers: tuple[PeerName, ...] | None = None
    threads: int | None = None
    seconds: float | None = None
    ring_mebibytes: int | None = None
    quick: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the field."""
        if not parse_shapes(self.shapes):
            raise ConfigError("shapes is empty; name a model or a size such as 4096x4096", field="shapes")
        for name in self.values:
            value_kind(name)
        peer_specs(self.peers or (), 128)
        if not self.values and self.peers == ():
            raise ConfigError("values and peers are both empty, so there is nothing to measure", field="values")
        for sparsity in self.sparsities or ():
            if not 0 <= sparsity < 1:
                raise ConfigError(
                    f"sparsities holds {sparsity!r}; give fractions of zeros from 0 to below 1, such as 0.7",
                    field="sparsities",
                )
        for count in self.tokens or ():
            if not _is_whole(count) or not 1 <= count <= _MAX_TOKENS:
                raise ConfigError(f"tokens holds {count!r}; give whole numbers from 1 to {_MAX_TOKENS}", field="tokens")
        if self.sparsities == () or self.tokens == ():
            field = "sparsities" if self.sparsities == () else "tokens"
            raise ConfigError(f"{field} is empty; name at least one, or leave it out", field=field)
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds is {self.seconds!r}; give a number above 0", field="seconds")
        if self.ring_mebibytes is not None and (not _is_whole(self.ring_mebibytes) or self.ring_mebibytes < 1):
            raise ConfigError(
                f"ring_mebibytes is {self.ring_mebibytes!r}; give a whole number of at least 1", field="ring_mebibytes"
            )
        if not _is_whole(self.seed) or self.seed < 0:
            raise ConfigError(f"seed is {self.seed!r}; give a whole number of at least 0", field="seed")

    @property
    def chosen_sparsities(self) -> tuple[float, ...]:
        """Given, else 50 and 70 %."""
        return self.sparsities or ((0.7,) if self.quick else (0.5, 0.7))

    @property
    def chosen_tokens(self) -> tuple[int, ...]:
        """Given, else one token of decoding, a small batch, and a prompt."""
        return self.tokens or ((1,) if self.quick else (1, 8, 128))

    @property
    def plan(self) -> TimingPlan:
        """Of each case."""
        return TimingPlan(seconds=self.seconds or (2.0 if self.quick else 8.0))

    def ring_bytes(self, cache_bytes: int) -> int:
        """Bytes that the copies of a weight must exceed, given those of the last level of cache."""
        if self.ring_mebibytes is not None:
            return self.ring_mebibytes * _MEBIBYTE
        return 2 * cache_bytes if self.quick else max(DEFAULT_RING_BYTES, 3 * cache_bytes)


def bench_kernels(config: KernelBenchConfig, *, show_progress: bool = True) -> KernelBenchReport:
    """Measure every case of `config`.

    Returns: the report; write it with `.write(path)`, show it with `kernel_bench_report.print_kernel_bench`.

    Raises:
        MissingDependencyError: onnx is missing, or torch where a torch peer is named.
        KernelError: no library, or a row that this CPU lacks.
        BenchmarkError: an answer is wrong, or memory does not suffice.
        OutputError: no room for the weights' files.
        RuntimeFailureError: ONNX Runtime refuses a model.
    """
    threads = resolve_threads(config.threads)
    shapes = parse_shapes(config.shapes)
    kernel = native.describe()
    rows = _chosen_rows(config.rows, kernel)
    peers = config.peers
    if peers is None:
        peers = QUICK_PEERS if config.quick else tuple(n for n in PEERS if torch_is_installed() or "torch" not in n)
    require_packages(peer_specs(peers, 128))
    machine = machine_record()
    cache = last_cache_bytes(machine)
    ring_bytes = config.ring_bytes(cache)
    rounds = len(shapes) * len(config.chosen_sparsities)
    cases: list[KernelCase] = []
    with Progress("kernels", rounds * len(config.chosen_tokens), "cases", enabled=show_progress) as progress:
        for shape in shapes:
            bench = _ShapeBench(config, shape, rows, peers, threads, ring_bytes, machine)
            for case in bench.cases():
                cases.append(case)
                progress.advance(case=f"{case.rows}x{case.columns} M={case.tokens}")
    return KernelBenchReport(
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        config={**asdict(config), "rows": list(rows), "peers": list(peers)},
        threads=threads,
        ring_bytes=ring_bytes,
        machine=machine,
        kernel=kernel_facts(kernel),
        cases=tuple(cases),
        warnings=tuple(_warnings(cases, cache)),
    )


def last_cache_bytes(machine: MachineRecord) -> int:
    """Bytes in all instances of the last cache that the processors we may use share; 32 MiB if unknown."""
    data = [cache for cache in machine.caches if cache.kind != "Instruction"]
    if not data:
        return _UNKNOWN_CACHE_BYTES
    last = max(data, key=lambda cache: cache.level)
    return last.size_bytes * max(1, -(-machine.affinity_cpus // last.shared_by))


def kernel_facts(kernel: native.KernelInfo) -> dict[str, Any]:
    """What a result records of the kernel library: everything but where it lies."""
    return {
        "row": kernel.row,
        "available_rows": list(kernel.available_rows),
        "large_pages": kernel.large_pages,
        "compiled_rows": list(kernel.compiled_rows),
        "version": kernel.version,
    }


def memory_bandwidth(threads: int, ring_bytes: int, *, repeats: int = _BANDWIDTH_REPEATS) -> float:
    """Bytes a second that `threads` together read from memory, each from a buffer of its own."""
    mebibytes = max(32, -(-ring_bytes // threads // _MEBIBYTE))
    return native.read_bandwidth(threads, mebibytes, repeats)


def timing_of(
    engine: Engine,
    shape: Shape,
    tokens: int,
    error: float,
    samples: tuple[tuple[float, ...], ...],
    bandwidth: Sequence[float],
    references: tuple[Sequence[Sequence[float]] | None, Sequence[Sequence[float]] | None],
) -> KernelTiming:
    """Figures of one engine from its samples.

    Args:
        engine: which.
        shape: of the weight.
        tokens: rows of the activations.
        error: found by the check.
        samples: block → seconds per product.
        bandwidth: bytes a second, read in the same run; may be empty.
        references: samples of ONNX Runtime's float32, and of the fastest dense int4, in the same blocks; None where
            there is none, or it is this engine.
    """
    everything = [value for block in samples for value in block]
    middle = median(everything)
    ratios = [None if other is None else paired_ratio(other, samples) for other in references]
    rate = engine.weight_bytes / middle
    return KernelTiming(
        name=engine.spec.name,
        kernel_row=engine.spec.row or None,
        copies=engine.copies,
        weight_bytes=engine.weight_bytes,
        error=error,
        samples_us=tuple(tuple(1e6 * value for value in block) for block in samples),
        median_us=1e6 * middle,
        mad_us=1e6 * median_absolute_deviation(everything),
        bytes_per_weight=engine.weight_bytes / (shape.rows * shape.columns),
        gigabytes_per_s=rate / 1e9,
        bandwidth_share=rate / median(bandwidth) if bandwidth else None,
        gigaops_per_s=2 * tokens * shape.rows * shape.columns / middle / 1e9,
        drifts=drifts(samples),
        against_fp32=ratios[0],
        against_int4=ratios[1],
    )


class _ShapeBench:
    """All cases of one shape. Peers stay for all sparsities, since zeros are nothing to them."""

    def __init__(
        self,
        config: KernelBenchConfig,
        shape: Shape,
        rows: Sequence[str],
        peers: Sequence[PeerName],
        threads: int,
        ring_bytes: int,
        machine: MachineRecord,
    ) -> None:
        self._config, self._shape = config, shape
        self._threads, self._ring_bytes = threads, ring_bytes
        self._peers = peer_specs(peers, shape.columns)
        self._kinds = [(value_kind(name), row) for name in config.values for row in rows]
        check_distinct([*self._ours(0.5), *self._peers])
        self._generator = np.random.default_rng(config.seed)
        self._max_copies = max_copies(len(self._kinds) + len(self._peers))
        self._needed = check_memory(
            shape, [*self._peers, *self._ours(min(config.chosen_sparsities))], ring_bytes, machine
        )

    def _ours(self, sparsity: float) -> list[EngineSpec]:
        return [EngineSpec(value=kind, row=row, sparsity=sparsity) for kind, row in self._kinds]

    def cases(self) -> list[KernelCase]:
        """Measure: for each sparsity, each number of tokens."""
        shape, most = self._shape, max(self._config.chosen_tokens)
        x = self._generator.standard_normal((most, shape.columns), dtype=np.float32)
        dense = random_dense(shape, self._generator)
        found: list[KernelCase] = []
        with data_folder(self._needed) as folder:
            peers = self._build(self._peers, dense, x, folder)
            for sparsity in self._config.chosen_sparsities:
                ours = self._build(self._ours(sparsity), dense, x, folder)
                found += [
                    self._case([*peers, *ours], sparsity, np.ascontiguousarray(x[:tokens]))
                    for tokens in self._config.chosen_tokens
                ]
                for engine, _ in ours:
                    engine.close()
            for engine, _ in peers:
                engine.close()
        return found

    def _build(
        self, specs: Sequence[EngineSpec], dense: Float32, x: Float32, folder: Path
    ) -> list[tuple[Engine, Reference]]:
        return [
            build_engine(
                spec,
                dense,
                self._ring_bytes,
                self._threads,
                self._generator,
                folder,
                reference_x=x,
                max_copies=self._max_copies,
            )
            for spec in specs
        ]

    def _case(self, built: Sequence[tuple[Engine, Reference]], sparsity: float, x: Float32) -> KernelCase:
        engines = [engine for engine, _ in built]
        errors = [check_answers(engine, reference, x) for engine, reference in built]
        for engine in engines:
            engine.prepare(x)
        timings = measure(
            engines,
            self._config.plan,
            bandwidth=lambda: memory_bandwidth(self._threads, self._ring_bytes),
        )
        return case_of(self._shape, sparsity, x.shape[0], engines, errors, timings)


def case_of(
    shape: Shape,
    sparsity: float,
    tokens: int,
    engines: Sequence[Engine],
    errors: Sequence[float],
    timings: Timings,
) -> KernelCase:
    """The figures of a case, with ratios to float32 and to whichever dense int4 was fastest in it."""
    middles = [median([value for block in blocks for value in block]) for blocks in timings.seconds]
    fp32 = next((index for index, engine in enumerate(engines) if engine.spec.peer == "ort-fp32"), None)
    int4 = min(
        (index for index, engine in enumerate(engines) if engine.spec.is_dense_int4),
        key=lambda index: middles[index],
        default=None,
    )
    found = []
    for index, engine in enumerate(engines):
        references = tuple(
            None if reference is None or reference == index else timings.seconds[reference]
            for reference in (fp32, int4)
        )
        found.append(
            timing_of(
                engine,
                shape,
                tokens,
                errors[index],
                timings.seconds[index],
                timings.bandwidth,
                (references[0], references[1]),
            )
        )
    return KernelCase(
        names=shape.names,
        rows=shape.rows,
        columns=shape.columns,
        sparsity=sparsity,
        tokens=tokens,
        strongest_int4=None if int4 is None else engines[int4].spec.name,
        bandwidth_samples=timings.bandwidth,
        disturbed_blocks=tuple(index for index, slow in enumerate(timings.disturbed) if slow),
        elapsed_s=timings.elapsed_s,
        timings=tuple(found),
    )


def random_dense(shape: Shape, generator: np.random.Generator) -> Float32:
    """(N, K) float32 for the peers, of the size that trained weights have."""
    dense = generator.standard_normal((shape.rows, shape.columns), dtype=np.float32)
    dense *= np.float32(1 / math.sqrt(shape.columns))
    return dense


def max_copies(engines: int, proc: Path = Path("/proc")) -> int:
    """Copies that each of `engines` may have: ONNX Runtime maps every tensor by itself, and Linux limits maps."""
    try:
        limit = int((proc / "sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return MAX_COPIES
    return max(2, min(MAX_COPIES, int(0.6 * limit / (_MAPS_PER_COPY * max(1, engines)))))


def check_memory(shape: Shape, specs: Sequence[EngineSpec], ring_bytes: int, machine: MachineRecord) -> int:
    """Bytes of the data files of all engines of a shape.

    Raises: BenchmarkError when they and the engines' own copies exceed what is free.
    """
    weights = shape.rows * shape.columns
    rings = []
    for spec in specs:
        if spec.value is not None:
            each = bytes_per_weight(spec.value, spec.sparsity) * weights
        else:
            each = weights * (1 if spec.block or spec.peer == "ort-int8-dynamic" else 4)
        size = max(1, round(each))
        rings.append(ring_copies(size, ring_bytes) * size)
    needed = round(_MEMORY_PER_RING_BYTE * sum(rings)) + 16 * weights
    free = machine.memory_available_bytes
    if free is not None and needed > free:
        raise BenchmarkError(
            f"measuring {shape.rows} x {shape.columns} on {len(specs)} engines needs about {needed / 2**30:.1f} GiB "
            f"of memory, and {free / 2**30:.1f} GiB are free; choose fewer --values, --rows or --peers, or a smaller "
            "--ring",
            needed_bytes=needed,
            free_bytes=free,
        )
    return sum(rings)


def _chosen_rows(rows: Sequence[str], kernel: native.KernelInfo) -> tuple[str, ...]:
    if not rows:
        return (kernel.row,)
    if tuple(rows) == ("all",):
        # The scalar row defines the answers; timing it says nothing, and takes long.
        return tuple(row for row in kernel.available_rows if row != "scalar") or kernel.available_rows
    for row in rows:
        if row not in kernel.available_rows:
            raise ConfigError(
                f"rows: '{row}' is not a kernel row that this CPU runs; choose from "
                f"{', '.join(kernel.available_rows)}, or all",
                field="rows",
            )
    return tuple(rows)


def may_be_cached(
    copies: int, weight_bytes: int, median_us: float, cache_bytes: int, max_run_s: float = MAX_RUN_S
) -> bool:
    """Whether a ring is too small to keep the caches cold, and that not because the engine is too slow to notice."""
    return copies * weight_bytes < 2 * cache_bytes and copies * median_us / 1e6 < max_run_s / 2


def _warnings(cases: Sequence[KernelCase], cache_bytes: int) -> list[str]:
    found = []
    disturbed = [case for case in cases if len(case.disturbed_blocks) > _MANY_DISTURBED * case.blocks]
    if disturbed:
        found.append(
            f"in {len(disturbed)} of {len(cases)} cases over a quarter of the blocks were disturbed (a spin took over "
            "5 % longer than in quiet); stop other work on this machine and run again"
        )
    for case in cases:
        warm = [
            timing.name
            for timing in case.timings
            if may_be_cached(timing.copies, timing.weight_bytes, timing.median_us, cache_bytes)
        ]
        if warm:
            found.append(
                f"{case.rows} x {case.columns}, {case.sparsity:.0%} zeros: the copies of {', '.join(warm)} take less "
                "than twice the last cache, which may hold a part of them"
            )
        drifting = [timing.name for timing in case.timings if timing.drifts]
        if drifting:
            found.append(
                f"{case.rows} x {case.columns}, {case.tokens} token(s), {case.sparsity:.0%} zeros: two halves of the "
                f"time of {', '.join(drifting)} differ by over {DRIFT_FRACTION:.0%}; raise --seconds"
            )
    return list(dict.fromkeys(found))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
