"""The child side of a benchmark: one process, one loaded engine, timed where it runs.

Each engine has a process of its own so that its peak memory and its load time are its own, and so that
nothing of one engine (allocator, thread pool, heap) can help or hinder the other. The parent says what to
do next over a pipe; while the other engine runs, this process sleeps in a read.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import BenchmarkError, LosaError
from losa_export.eval.answers import Answers, Workload, answers_of, workload_logits
from losa_export.eval.parity import GateReport, GateThresholds, gate
from losa_export.runtimes.base import DecodeState, Runtime, RuntimeDescription, RuntimeName

Loader = Callable[..., Runtime]
StateMethod = Literal["prefill", "decode", "reset"]

_MODULES = {
    "ort": "losa_export.runtimes.ort",
    "ort-stock": "losa_export.runtimes.ort",
    "genai": "losa_export.runtimes.genai",
    "torch": "losa_export.runtimes.torch_cpu",
    "deepsparse": "losa_export.runtimes.deepsparse",
    "openvino": "losa_export.runtimes.openvino",
    "optimum": "losa_export.runtimes.optimum",
    "llamacpp": "losa_export.runtimes.llamacpp",
}
# About 2 ms of pure arithmetic: long enough that the clock's grain is nothing, short beside a sample.
_PROBE_ITERATIONS = 4000
_PROBED_CPUS = 8
# ONNX Runtime's threads spin for about 45 ms after a run, in the hope of another one.
_SETTLE_STEP_S = 0.01
_SETTLE_LIMIT_S = 0.5


@dataclass(frozen=True)
class MemoryUse:
    """Memory of this process in bytes; None where the system does not tell.

    Attributes:
        peak_rss_bytes: VmHWM, since the start or the last reset.
        rss_bytes: resident now.
        pss_bytes: resident now, shared pages split among the processes that map them.
    """

    peak_rss_bytes: int | None
    rss_bytes: int | None
    pss_bytes: int | None


@dataclass(frozen=True)
class Loaded:
    """An engine that is ready.

    Attributes:
        load_s: from the call to a usable runtime; modules were imported before, files read before by
            the parent, so the page cache is warm.
        import_s: importing the engine's modules.
        peak_load: memory right after loading, peak included.
    """

    load_s: float
    import_s: float
    vocab_size: int
    max_positions: int
    description: RuntimeDescription
    peak_load: MemoryUse


@dataclass(frozen=True)
class RawSample:
    """One generation: a prefill of each row, then one decode step a token.

    Attributes:
        prefill_s: time to the logits of the first token, of the last row.
        decode_s: (N,) seconds of each decode step, which adds a token to every row.
        probe_s: seconds of a fixed spin on each processor just before.
        cpu_s: processor time of all threads during the generation.
        idle_cpu_s, idle_wall_s: processor time this process burnt, and time that passed, since its
            previous command ended.
        preemptions: involuntary context switches of this process during the generation.
    """

    prefill_s: float
    decode_s: tuple[float, ...]
    probe_s: tuple[float, ...]
    cpu_s: float
    idle_cpu_s: float
    idle_wall_s: float
    preemptions: int


class EngineSession:
    """The commands the parent may give. Each public method is one."""

    def __init__(self, load: Loader | None = None) -> None:
        self._load = load
        self._runtime: Runtime | None = None
        self._states: dict[int, DecodeState] = {}
        self._made_states = 0
        self._idle_since = (time.process_time(), time.perf_counter())

    def load(self, name: RuntimeName, folder: Path, threads: int) -> Loaded:
        """Load `folder` with the engine `name`."""
        start = time.perf_counter()
        load = self._load
        if load is None:
            importlib.import_module(_MODULES[name])
            load = importlib.import_module("losa_export.runtimes.loader").load_runtime
        imported = time.perf_counter()
        runtime = load(name, folder, threads=threads)
        ready = time.perf_counter()
        self._runtime = runtime
        return Loaded(
            load_s=ready - imported,
            import_s=imported - start,
            vocab_size=runtime.vocab_size,
            max_positions=runtime.max_positions,
            description=runtime.describe(),
            peak_load=memory_use(),
        )

    def new_state(self, batch: int, capacity: int, dropped: list[int]) -> int:
        """Make a cache, after those that are no longer wanted are gone. Returns: its number."""
        for number in dropped:
            del self._states[number]
        self._made_states += 1
        self._states[self._made_states] = self._ready().new_state(batch, capacity)
        return self._made_states

    def on_state(
        self, number: int, method: StateMethod, arguments: dict[str, Any]
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.int64]]:
        """Prefill, decode or reset. Returns: logits, if the command gives any, and the rows' lengths."""
        state = self._states[number]
        if method == "reset":
            state.reset(**arguments)
            return None, np.array(state.lengths)
        return getattr(self._ready(), method)(state, **arguments), np.array(state.lengths)

    def answers(self, prompts: tuple[NDArray[np.int64], ...], new_tokens: int) -> Answers:
        """Answers of this engine, for another to be held against."""
        return answers_of(self._ready(), prompts, new_tokens)

    def gate(self, answers: Answers, thresholds: GateThresholds) -> GateReport:
        """Hold this engine against another's answers. Raises: GateError."""
        return gate(answers, self._ready(), thresholds)

    def workload_logits(self, workload: Workload) -> NDArray[np.float32]:
        """Logits of the timed work itself."""
        return workload_logits(self._ready(), workload)

    def sample(self, prompt: NDArray[np.int64], forced: NDArray[np.int64], batch: int = 1) -> RawSample:
        """Time one generation of `batch` rows alike. Raises: BenchmarkError when the answer holds NaN or infinity."""
        idle_cpu, idle_wall = (now - then for now, then in zip(_clocks(), self._idle_since, strict=True))
        runtime = self._ready()
        probe = spin_probe()
        state = runtime.new_state(batch, len(prompt) + len(forced))
        steps = [np.full(batch, token, dtype=np.int64) for token in forced]
        times = np.empty(len(steps) + 2, dtype=np.int64)
        clock = time.perf_counter_ns
        gc.collect()
        gc.disable()
        before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw, time.process_time()
        try:
            times[0] = clock()
            for row in range(batch):
                logits = runtime.prefill(state, row, prompt, last_only=True)
            times[1] = clock()
            for index, step in enumerate(steps):
                logits = runtime.decode(state, step)
                times[index + 2] = clock()
        finally:
            gc.enable()
        cpu = time.process_time() - cpu
        preemptions = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
        settle()
        if not np.isfinite(logits[-batch:]).all():
            raise BenchmarkError(
                f"runtime '{runtime.name}' gave NaN or infinite logits while it was timed; its answers are wrong"
            )
        seconds = np.diff(times) / 1e9
        return RawSample(
            prefill_s=float(seconds[0]),
            decode_s=tuple(float(value) for value in seconds[1:]),
            probe_s=probe,
            cpu_s=cpu,
            idle_cpu_s=idle_cpu,
            idle_wall_s=idle_wall,
            preemptions=preemptions,
        )

    def memory(self) -> MemoryUse:
        """Memory of this process."""
        return memory_use()

    def reset_peak(self) -> bool:
        """Make the peak count from now on; False where the system does not allow it."""
        gc.collect()
        return reset_peak_memory()

    def rest(self) -> None:
        """Note the time from which this process is idle."""
        self._idle_since = _clocks()

    def close(self) -> None:
        """Release the engine."""
        self._states.clear()
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None

    def _ready(self) -> Runtime:
        if self._runtime is None:
            raise BenchmarkError("no engine is loaded in this process; load one first")
        return self._runtime


def spin_probe() -> tuple[float, ...]:
    """Seconds of a fixed piece of arithmetic on each processor we may use (the first eight).

    A processor that is shared, throttled or stolen by a hypervisor shows as a longer spin.
    """
    if not hasattr(os, "sched_getaffinity"):
        return (_spin(),)
    cpus = os.sched_getaffinity(0)
    try:
        found = []
        for cpu in sorted(cpus)[:_PROBED_CPUS]:
            os.sched_setaffinity(0, {cpu})  # of this thread only
            found.append(_spin())
        return tuple(found)
    finally:
        os.sched_setaffinity(0, cpus)


def settle() -> None:
    """Wait until this process's threads are asleep, so that they take nothing from the engine that runs next."""
    for _ in range(round(_SETTLE_LIMIT_S / _SETTLE_STEP_S)):
        before = time.process_time()
        time.sleep(_SETTLE_STEP_S)
        if time.process_time() - before < _SETTLE_STEP_S / 10:
            return


def memory_use(proc: Path = Path("/proc/self")) -> MemoryUse:
    """Read this process's memory; `proc` may point elsewhere in tests."""
    return MemoryUse(
        peak_rss_bytes=_kib_field(proc / "status", "VmHWM:"),
        rss_bytes=_kib_field(proc / "status", "VmRSS:"),
        pss_bytes=_kib_field(proc / "smaps_rollup", "Pss:"),
    )


def reset_peak_memory(proc: Path = Path("/proc/self")) -> bool:
    """Reset VmHWM to the present size. Returns: whether the system let us."""
    try:
        (proc / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def serve(connection: Connection, session: EngineSession) -> None:
    """Answer commands until the parent closes the pipe.

    A request is (command, keyword arguments). A reply is ("ok", value) or ("error", class name, message,
    traceback). Only the process that started us holds the other end.
    """
    while True:
        try:
            command, arguments = connection.recv()
        except (EOFError, OSError):
            session.close()
            return
        try:
            reply: tuple[Any, ...] = ("ok", getattr(session, command)(**arguments))
        except LosaError as error:
            reply = ("error", type(error).__name__, str(error), "")
        except Exception as error:
            reply = ("error", type(error).__name__, str(error), traceback.format_exc())
        session.rest()
        try:
            connection.send(reply)
        except OSError:
            return


def main() -> None:
    """Entry of the child process: the pipe's descriptor is the first argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    serve(Connection(int(sys.argv[1])), EngineSession())


def _spin() -> float:
    start = time.perf_counter()
    hashlib.pbkdf2_hmac("sha256", b"losa", b"spin", _PROBE_ITERATIONS)
    return time.perf_counter() - start


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _kib_field(path: Path, name: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
