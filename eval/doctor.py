"""`losa doctor`: what this processor can do with zeros, in about twenty seconds.

Kernel rows and memory bandwidth first; then one product of one token, as in decoding, measured for each kind of value
at several sparsities against what a user would run instead: where the ratio comes to 1, zeros start to pay.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np

from losa_export.errors import ConfigError, MissingDependencyError
from losa_export.eval.doctor_report import RIVALS, DoctorReport, Payoff, Product, advise
from losa_export.eval.kernel_bench import (
    DEFAULT_VALUES,
    KernelBenchConfig,
    kernel_facts,
    last_cache_bytes,
    max_copies,
    may_be_cached,
    memory_bandwidth,
    random_dense,
)
from losa_export.eval.kernel_bench_engines import (
    Engine,
    EngineSpec,
    PeerName,
    build_engine,
    check_answers,
    data_folder,
    peer_specs,
    require_packages,
)
from losa_export.eval.kernel_bench_roofline import break_even_by_bytes, crossing, roofline_us
from losa_export.eval.kernel_bench_shapes import Shape, parse_shapes
from losa_export.eval.kernel_bench_timing import TimingPlan, Timings, measure
from losa_export.eval.kernel_bench_weights import group_size, value_kind
from losa_export.eval.machine import MachineRecord, machine_record
from losa_export.eval.stats import MIN_BLOCKS, median, paired_ratio
from losa_export.progress import Progress
from losa_export.runtimes import native
from losa_export.runtimes.threads import resolve_threads

_PEERS: tuple[PeerName, ...] = ("ort-fp32", "ort-int8-dynamic", "ort-int4-block32", "ort-int4-block128")
# Measured first, if time should run short.
_FIRST_SPARSITIES = (0.5, 0.9, 0.7)
_BUILD_SHARE = 0.6
_LONGEST_RING = 256 << 20
_MEMORY_SHARE = 0.4
_MAX_RUN_S = 0.02
_TURN_S = 0.008
_RESERVE_S = 0.7
_MANY_DISTURBED = 1 / 4


@dataclass(frozen=True)
class DoctorConfig:
    """What to try, and for how long.

    Attributes:
        threads: of each product; None: what the machine offers.
        seconds: for everything; the six blocks that an interval needs may take longer on a slow machine.
        shape: rows x columns of the weight.
        sparsities: fractions of zeros to measure; fewer are if time runs short.
        values: kinds of values, as in `KernelBenchConfig`.
        seed: of weights and activations.
    """

    threads: int | None = None
    seconds: float = 20.0
    shape: str = "2048x2048"
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
    values: tuple[str, ...] = DEFAULT_VALUES
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the field."""
        KernelBenchConfig(
            shapes=(self.shape,), sparsities=self.sparsities, values=self.values, seconds=self.seconds, seed=self.seed
        )
        if len(parse_shapes((self.shape,))) != 1:
            raise ConfigError(f"shape is '{self.shape}'; give one size such as 2048x2048", field="shape")
        if len(set(self.sparsities)) < 2 or len(set(self.values)) != len(self.values) or not self.values:
            raise ConfigError("give at least two different sparsities, and each value once", field="sparsities")


def run_doctor(config: DoctorConfig | None = None, *, show_progress: bool = True) -> DoctorReport:
    """Examine this machine.

    A caller should print the report and then raise its `missing`, if there is one: rows and bandwidth need no onnx.

    Raises:
        KernelError: no kernel library, or LOSA_KERNEL names a row that cannot run.
        BenchmarkError: an answer is wrong.
        OutputError: no room for the weights' files.
        RuntimeFailureError: ONNX Runtime refuses a model.
    """
    config = config or DoctorConfig()
    start = time.perf_counter()
    threads = resolve_threads(config.threads)
    kernel, machine = native.describe(), machine_record()
    shape = parse_shapes((config.shape,))[0]
    ring_bytes = ring_for(config, machine)
    bandwidth_one = memory_bandwidth(1, ring_bytes)
    bandwidth_all = memory_bandwidth(threads, ring_bytes)
    missing: MissingDependencyError | None = None
    products: tuple[Product, ...] = ()
    timings: Timings | None = None
    warnings: list[str] = []
    try:
        require_packages(peer_specs(_PEERS, shape.columns))
    except MissingDependencyError as error:
        missing = error
    else:
        engines, timings = _measure(config, shape, threads, ring_bytes, kernel.row, start, show_progress)
        products = _products(engines, timings, bandwidth_all)
        warnings = _warnings(config, products, timings, last_cache_bytes(machine))
    payoffs = _payoffs(config, shape, products)
    return DoctorReport(
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        config=asdict(config),
        threads=threads,
        machine=machine,
        kernel=kernel_facts(kernel),
        ring_bytes=ring_bytes,
        bandwidth_one=bandwidth_one,
        bandwidth_all=bandwidth_all,
        bandwidth_samples=timings.bandwidth if timings else (),
        products=products,
        payoffs=payoffs,
        blocks=len(timings.disturbed) if timings else 0,
        disturbed_blocks=tuple(np.flatnonzero(timings.disturbed).tolist()) if timings else (),
        advice=tuple(advise(products)),
        warnings=tuple(warnings),
        elapsed_s=time.perf_counter() - start,
        missing=missing,
    )


def ring_for(config: DoctorConfig, machine: MachineRecord) -> int:
    """Bytes of a ring: three times the last cache, or what memory lets every engine have, whichever is less."""
    ring_bytes = min(3 * last_cache_bytes(machine), _LONGEST_RING)
    if machine.memory_available_bytes is not None:
        engines = len(_PEERS) + len(config.values) * len(set(config.sparsities))
        ring_bytes = min(ring_bytes, int(_MEMORY_SHARE * machine.memory_available_bytes / engines))
    return max(ring_bytes, 1)


def _measure(
    config: DoctorConfig,
    shape: Shape,
    threads: int,
    ring_bytes: int,
    row: str,
    start: float,
    show_progress: bool,
) -> tuple[list[Engine], Timings]:
    """Build as many engines as time allows, check each, and time them. Returns: engines, closed, and timings."""
    generator = np.random.default_rng(config.seed)
    x = generator.standard_normal((1, shape.columns), dtype=np.float32)
    dense = random_dense(shape, generator)
    kinds = [value_kind(name) for name in config.values]
    first = [sparsity for sparsity in _FIRST_SPARSITIES if sparsity in config.sparsities]
    sparsities = dict.fromkeys([*first, *config.sparsities])
    rounds = [peer_specs(_PEERS, shape.columns)]
    rounds += [[EngineSpec(value=kind, row=row, sparsity=sparsity) for kind in kinds] for sparsity in sparsities]
    count = sum(len(specs) for specs in rounds)
    needed = count * (ring_bytes + 4 * shape.rows * shape.columns)
    engines: list[Engine] = []
    with (
        data_folder(needed) as folder,
        Progress("examining this machine", config.seconds, "s", enabled=show_progress) as progress,
    ):

        def show() -> None:
            progress.advance(max(0.0, min(time.perf_counter() - start, config.seconds) - progress.done))

        for number, specs in enumerate(rounds):
            # Two sparsities besides the peers are the least from which a crossing can be told.
            if number > 2 and time.perf_counter() - start > _BUILD_SHARE * config.seconds:
                break
            for spec in specs:
                engine, reference = build_engine(
                    spec,
                    dense,
                    ring_bytes,
                    threads,
                    generator,
                    folder,
                    reference_x=x,
                    max_copies=max_copies(count),
                    max_run_s=_MAX_RUN_S,
                )
                check_answers(engine, reference, x)
                engine.prepare(x)
                engines.append(engine)
                show()
        left = config.seconds - (time.perf_counter() - start) - _RESERVE_S
        plan = TimingPlan(seconds=max(left, 0.1), min_blocks=MIN_BLOCKS, turn_seconds=_TURN_S)
        timings = measure(
            engines,
            plan,
            bandwidth=lambda: memory_bandwidth(threads, ring_bytes),
            after_block=lambda _, __: show(),
        )
        for engine in engines:
            engine.close()
    return engines, timings


def _products(engines: Sequence[Engine], timings: Timings, bandwidth_all: float) -> tuple[Product, ...]:
    bandwidth = median([*timings.bandwidth, bandwidth_all])
    middles = [median([value for block in blocks for value in block]) for blocks in timings.seconds]
    rivals = {}
    for rival, prefix in RIVALS.items():
        standing = [
            index for index, engine in enumerate(engines) if engine.spec.peer and engine.spec.name.startswith(prefix)
        ]
        rivals[rival] = min(standing, key=lambda index: middles[index])
    found = []
    for index, engine in enumerate(engines):
        samples = timings.seconds[index]
        ours = engine.spec.value
        ratios = {}
        if ours is not None:
            ratios = {rival: paired_ratio(timings.seconds[other], samples) for rival, other in rivals.items()}
        found.append(
            Product(
                name=engine.spec.name,
                value=None if ours is None else ours.name,
                sparsity=engine.spec.sparsity,
                copies=engine.copies,
                weight_bytes=engine.weight_bytes,
                median_us=1e6 * middles[index],
                limit_us=roofline_us(engine.weight_bytes, bandwidth),
                against=ratios,
                samples_us=tuple(tuple(1e6 * value for value in block) for block in samples),
            )
        )
    return tuple(sorted(found, key=lambda one: (one.value is None, one.sparsity)))


def _payoffs(config: DoctorConfig, shape: Shape, products: Sequence[Product]) -> tuple[Payoff, ...]:
    found = []
    weights = shape.rows * shape.columns
    for value in config.values:
        mine = [product for product in products if product.value == value]
        for rival, prefix in RIVALS.items() if mine else ():
            peers = [product for product in products if product.value is None and product.name.startswith(prefix)]
            engine = min(peers, key=lambda product: product.median_us)
            limit = break_even_by_bytes(
                value_kind(value), engine.weight_bytes / weights, group=group_size(shape.columns)
            )
            measured = crossing([one.sparsity for one in mine], [one.against[rival] for one in mine])
            found.append(Payoff(value, rival, engine.name, measured, limit))
    return tuple(found)


def _warnings(
    config: DoctorConfig,
    products: Sequence[Product],
    timings: Timings,
    cache_bytes: int,
) -> list[str]:
    found = []
    disturbed = sum(timings.disturbed)
    if disturbed > _MANY_DISTURBED * len(timings.disturbed):
        found.append(
            f"{disturbed} of {len(timings.disturbed)} blocks were disturbed (a spin took over 5 % longer than in "
            "quiet); stop other work on this machine and run again"
        )
    left_out = sorted(set(config.sparsities) - {product.sparsity for product in products if product.value})
    if left_out:
        found.append(
            f"time did not suffice for {', '.join(f'{one:.0%}' for one in left_out)} zeros; raise --seconds to see them"
        )
    cached = {
        product.name
        for product in products
        if may_be_cached(product.copies, product.weight_bytes, product.median_us, cache_bytes, _MAX_RUN_S)
    }
    if cached:
        found.append(
            f"the copies of {', '.join(sorted(cached))} take less than twice the last cache, which may hold a part of "
            "them"
        )
    return found
