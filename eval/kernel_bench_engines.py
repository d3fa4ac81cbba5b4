"""The engines that a kernel benchmark compares: our operators and their peers, each with a ring of distinct weights.

Every ONNX Runtime session has one node per copy, all fed by the same activations, so that one run goes once
through the ring. Weights lie in a data file that the engine maps, as those of an exported model do.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from losa_export.errors import (
    BenchmarkError,
    ConfigError,
    LosaError,
    MissingDependencyError,
    OutputError,
    RuntimeFailureError,
)
from losa_export.eval.kernel_bench_weights import (
    DOMAIN,
    Array,
    Float32,
    StoredWeight,
    ValueKind,
    dense_float_weight,
    dynamic_int8_weight,
    nbits_weight,
    random_weight,
)
from losa_export.eval.worker import settle
from losa_export.runtimes import native

PeerName = Literal[
    "ort-fp32",
    "ort-int8-dynamic",
    "ort-int4-block32",
    "ort-int4-block128",
    "ort-int8-block32",
    "ort-int8-block128",
    "torch-fp32",
    "torch-bf16",
]
PEERS: tuple[PeerName, ...] = get_args(PeerName)
KERNEL_VARIABLE = "LOSA_KERNEL"
MAX_COPIES = 1024
LEAST_COPIES = 2
MAX_RUN_S = 0.25
_TRIAL_RUNS = 5
_LONG_TRIAL_S = 0.2
_ALIGNMENT = 4096
_INLINE_BELOW_BYTES = 1024
_FATAL = 4

# Largest difference from the exact product, over the root mean square of the outputs. Only rounding of
# activations (and of sums, in float32) is allowed for; a misplaced weight is off by about 1.
_TOLERANCE_FLOAT32 = 1e-4  # sums of up to 50,000 products, each rounded to 2^-24, in any order
_TOLERANCE_INT16 = 2e-3  # half a step of amax / 32767, gathered over a row
_TOLERANCE_INT8 = 0.2  # half a step of amax / 127 is about 1 % of a typical sum; the largest of many is some 6 sigma
_TOLERANCE_BF16 = 0.1  # activations and outputs rounded to 8 bits


@dataclass(frozen=True)
class EngineSpec:
    """One engine and how it stores the weight: ours if `value` is given, else `peer`.

    Attributes:
        value: kind of our values.
        row: kernel row that computes ours.
        sparsity: fraction of zeros of our weight; 0 for a peer, to which zeros are numbers like others.
        peer: one of PEERS.
        block: columns that share a scale in MatMulNBits, else 0.
    """

    value: ValueKind | None = None
    row: str = ""
    sparsity: float = 0.0
    peer: PeerName | None = None
    block: int = 0

    @property
    def name(self) -> str:
        """Identifier in results: 'losa-int8@avx512', 'ort-fp32'."""
        if self.value is not None:
            return f"losa-{self.value.name}@{self.row}"
        name = str(self.peer)
        return f"{name.rpartition('-block')[0]}-block{self.block}" if self.block else name

    @property
    def is_dense_int4(self) -> bool:
        """Whether this is the peer that a user would pick instead of zeros."""
        return self.peer is not None and self.peer.startswith("ort-int4")

    @property
    def tolerance(self) -> float:
        """Largest difference from the exact product over the root mean square of the outputs."""
        if self.value is not None:
            return {0: _TOLERANCE_FLOAT32, 16: _TOLERANCE_INT16, 8: _TOLERANCE_INT8}[self.value.activation_bits]
        if self.peer in ("ort-fp32", "torch-fp32"):
            return _TOLERANCE_FLOAT32
        return _TOLERANCE_BF16 if self.peer == "torch-bf16" else _TOLERANCE_INT8

    def weight(self, dense: Float32, generator: np.random.Generator) -> StoredWeight:
        """A weight of this engine: drawn if it is ours, else `dense` (N, K) as the peer stores it."""
        if self.value is not None:
            rows, columns = dense.shape
            return random_weight(self.value, rows, columns, self.sparsity, generator)
        if self.peer == "ort-int8-dynamic":
            return dynamic_int8_weight(dense)
        if self.block:
            return nbits_weight(dense, 4 if self.is_dense_int4 else 8, self.block)
        return dense_float_weight(dense)

    @property
    def stored_scale(self) -> float:
        """Bytes the engine reads over those of the stored weight: torch keeps bfloat16 of our float32."""
        return 0.5 if self.peer == "torch-bf16" else 1.0


class Engine(Protocol):
    """A ring of weights, ready to be multiplied by activations.

    Attributes:
        spec: which engine.
        copies: products in one run.
        weight_bytes: of one copy.
    """

    spec: EngineSpec
    copies: int
    weight_bytes: int

    def outputs(self, x: Float32) -> Sequence[Array]:
        """The product of each copy: arrays (M, N)."""
        ...

    def prepare(self, x: Float32) -> None:
        """Take the activations (M, K) of the runs to come."""
        ...

    def run(self) -> None:
        """Multiply by every copy once."""
        ...

    def rest(self) -> None:
        """Return once no thread of this engine is busy, so that the next one has the machine to itself."""
        ...

    def close(self) -> None:
        """Release the weights."""
        ...


def peer_specs(names: Sequence[PeerName], columns: int) -> list[EngineSpec]:
    """Peers for a weight of `columns`; blocks of 128 become 64 where the width demands it.

    Raises:
        ConfigError: an unknown name.
    """
    found = []
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"peers: '{name}' is not known; choose from {', '.join(PEERS)}", field="peers")
        wanted = int(name.rpartition("-block")[2]) if "-block" in name else 0
        found.append(EngineSpec(peer=name, block=64 if wanted == 128 and columns % 128 else wanted))
    return found


def require_packages(specs: Sequence[EngineSpec]) -> None:
    """Raises: MissingDependencyError when an engine cannot be built for want of a package."""
    import importlib.util

    if importlib.util.find_spec("onnx") is None:
        raise MissingDependencyError.for_extra("onnx", "export", "measuring kernels in ONNX Runtime")
    torch = next((spec for spec in specs if spec.peer is not None and spec.peer.startswith("torch")), None)
    if torch is not None and importlib.util.find_spec("torch") is None:
        raise MissingDependencyError.for_extra("torch", "train", f"the peer '{torch.name}'")


def torch_is_installed() -> bool:
    """Whether the peers that run in torch can be measured."""
    import importlib.util

    return importlib.util.find_spec("torch") is not None


def build_engine(
    spec: EngineSpec,
    dense: Float32,
    ring_bytes: int,
    threads: int,
    generator: np.random.Generator,
    folder: Path,
    *,
    reference_x: Float32,
    max_copies: int = MAX_COPIES,
    max_run_s: float = MAX_RUN_S,
) -> tuple[Engine, Reference]:
    """Make an engine with its ring of weights.

    Args:
        spec: which engine.
        dense: (N, K), the weight that peers store; of ours it gives the shape.
        ring_bytes: what the copies together must exceed.
        threads: within one product.
        generator: source of our weights.
        folder: for the data file, which is gone again afterwards.
        reference_x: (M, K) activations, of which the exact products are computed.
        max_copies: most copies.
        max_run_s: about the longest time that going once through the ring may take for one token; a slower engine
            gets fewer copies. It does not wait for memory, so it loses nothing by that.

    Returns: the engine, and what its answers must be.

    Raises:
        RuntimeFailureError: ONNX Runtime refuses the model.
        KernelError, FormatError: our operator does.
    """
    first = spec.weight(dense, generator)
    weight_bytes = round(first.stored_bytes * spec.stored_scale)

    def make(bases: Sequence[StoredWeight], copies: int) -> Engine:
        if spec.peer in ("torch-fp32", "torch-bf16"):
            return TorchEngine(spec, bases, copies, weight_bytes, threads)
        return OrtEngine(spec, bases, copies, weight_bytes, threads, folder)

    copies = ring_copies(weight_bytes, ring_bytes, max_copies)
    if copies > LEAST_COPIES:
        trial = make([first], LEAST_COPIES if first.rotations > 1 else 1)
        copies = min(copies, max(LEAST_COPIES, int(max_run_s / product_seconds(trial, reference_x[:1]))))
        trial.close()
    # Columns move where rows have all moved already; ours are drawn anew.
    needed = range(1, -(-copies // first.rotations))
    bases = [first, *(spec.weight(np.roll(dense, index, axis=1), generator) for index in needed)]
    return make(bases, copies), Reference.of(bases, reference_x)


def ring_copies(weight_bytes: int, ring_bytes: int, most: int = MAX_COPIES) -> int:
    """Copies that together exceed `ring_bytes`: at least two, and not above `most`."""
    return min(max(LEAST_COPIES, ring_bytes // weight_bytes + 1), max(LEAST_COPIES, most))


def product_seconds(engine: Engine, x: Float32) -> float:
    """Time of one product, roughly: the fastest run of a few, since a disturbed one would cost the ring its copies."""
    engine.prepare(x)
    engine.run()
    fastest = float("inf")
    for _ in range(_TRIAL_RUNS):
        start = time.perf_counter()
        engine.run()
        fastest = min(fastest, time.perf_counter() - start)
        if fastest > _LONG_TRIAL_S:
            break
    engine.rest()
    return max(fastest, 1e-9) / engine.copies


@dataclass(frozen=True)
class Reference:
    """Exact answers of a ring: products in float64 of the matrices that the stored weights stand for.

    Attributes:
        outputs: for each base (M, N) float64.
        weights: the bases without their data, which know how outputs rotate.
    """

    outputs: tuple[NDArray[np.float64], ...]
    weights: tuple[StoredWeight, ...]

    @classmethod
    def of(cls, bases: Sequence[StoredWeight], x: Float32) -> Reference:
        """Multiply. `x` is (M, K)."""
        exact = x.astype(np.float64)
        outputs = tuple(exact @ base.dense.T.astype(np.float64) for base in bases)
        light = tuple(replace(base, dense=np.empty((0, 0), dtype=np.float32), tensors={}) for base in bases)
        return cls(outputs, light)

    def error(self, copy: int, answer: Array) -> float:
        """Largest difference of one copy's answer (M', N), M' ≤ M, over the root mean square of the outputs.

        Infinite for a wrong shape or an answer that is not finite.
        """
        rotations = self.weights[0].rotations
        base, shift = divmod(copy, rotations)
        expected = self.outputs[base][: answer.shape[0]]
        expected = self.weights[base].rotated_rows(expected, shift)
        if answer.shape != expected.shape or not np.isfinite(answer).all():
            return float("inf")
        size = float(np.sqrt(np.mean(np.square(self.outputs[base]))))
        return float(np.abs(answer - expected).max()) / size


def check_answers(engine: Engine, reference: Reference, x: Float32) -> float:
    """Hold every copy's answer against the exact one.

    Returns: the largest error found, over the root mean square of the outputs.

    Raises: BenchmarkError when it is more than rounding explains.
    """
    worst = 0.0
    for copy, answer in enumerate(engine.outputs(x)):
        error = reference.error(copy, np.asarray(answer))
        if not error <= engine.spec.tolerance:
            raise BenchmarkError(
                f"'{engine.spec.name}' gives a wrong answer for {x.shape[0]} token(s) and a weight of "
                f"{answer.shape[-1]} x {x.shape[1]}: copy {copy} is off by {error:.2g} of a typical output, "
                f"where rounding allows {engine.spec.tolerance:.2g}; its time would mean nothing, so none is given",
                engine=engine.spec.name,
                error=error,
            )
        worst = max(worst, error)
    return worst


class OrtEngine:
    """A session of ONNX Runtime with one node per copy; see `Engine`."""

    def __init__(
        self,
        spec: EngineSpec,
        bases: Sequence[StoredWeight],
        copies: int,
        weight_bytes: int,
        threads: int,
        folder: Path,
    ) -> None:
        self.spec, self.copies, self.weight_bytes = spec, copies, weight_bytes
        self._rows = bases[0].dense.shape[0]
        with tempfile.TemporaryDirectory(dir=folder) as inside, forced_row(spec.row):
            try:
                path = _write_model(Path(inside), bases, copies)
            except OSError as error:
                raise OutputError(
                    f"the weights of '{spec.name}' cannot be written to '{folder}': {error.strerror}; choose fewer "
                    "copies by a smaller --ring, or set TMPDIR to a place with room",
                    path=folder,
                ) from error
            self._session = _open(path, spec, threads)
        self._names = [output.name for output in self._session.get_outputs()]
        self._binding: Any = None

    def outputs(self, x: Float32) -> Sequence[Array]:
        """See `Engine`."""
        answers: Sequence[Array] = self._session.run(self._names, {"X": x})
        return answers

    def prepare(self, x: Float32) -> None:
        """Bind one output buffer to all nodes: they run one after another, and a model reuses its buffers too."""
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("X", ort.OrtValue.ortvalue_from_numpy(x))
        y = ort.OrtValue.ortvalue_from_numpy(np.empty((x.shape[0], self._rows), dtype=np.float32))
        for name in self._names:
            binding.bind_ortvalue_output(name, y)
        self._binding = binding

    def run(self) -> None:
        """See `Engine`."""
        self._session.run_with_iobinding(self._binding)

    def rest(self) -> None:
        """Nothing to wait for: the session's threads stop spinning when a run ends (see `_open`)."""

    def close(self) -> None:
        """See `Engine`."""
        self._binding = self._session = None


class TorchEngine:
    """`torch.nn.functional.linear` over a list of weights; see `Engine`."""

    def __init__(
        self, spec: EngineSpec, bases: Sequence[StoredWeight], copies: int, weight_bytes: int, threads: int
    ) -> None:
        import torch

        self.spec, self.copies, self.weight_bytes = spec, copies, weight_bytes
        self._torch: Any = torch
        torch.set_num_threads(threads)
        self._dtype = torch.bfloat16 if spec.peer == "torch-bf16" else torch.float32
        self._weights: list[Any] = []
        for copy in range(copies):
            base, shift = divmod(copy, bases[0].rotations)
            rows = torch.from_numpy(np.roll(bases[base].dense, shift, axis=0))
            # A copy of torch's own: numpy asks the system for huge pages, which a loaded model does not get.
            self._weights.append(rows.to(self._dtype, copy=True))
        self._x: Any = None

    def outputs(self, x: Float32) -> Sequence[Array]:
        """See `Engine`."""
        with self._torch.inference_mode():
            given = self._torch.from_numpy(x).to(self._dtype)
            return [self._torch.nn.functional.linear(given, weight).float().numpy() for weight in self._weights]

    def prepare(self, x: Float32) -> None:
        """See `Engine`."""
        self._x = self._torch.from_numpy(x).to(self._dtype)

    def run(self) -> None:
        """See `Engine`."""
        linear, x = self._torch.nn.functional.linear, self._x
        with self._torch.inference_mode():
            for weight in self._weights:
                linear(x, weight)

    def rest(self) -> None:
        """Wait: the threads of torch spin for a while after their work."""
        settle()

    def close(self) -> None:
        """See `Engine`."""
        self._weights, self._x = [], None
        gc.collect()


@contextmanager
def forced_row(row: str) -> Iterator[None]:
    """Let sessions made inside use kernel row `row` ('': leave the choice alone). It is read when a node is made."""
    before = os.environ.get(KERNEL_VARIABLE)
    if row:
        os.environ[KERNEL_VARIABLE] = row
    try:
        yield
    finally:
        if row:
            os.environ.pop(KERNEL_VARIABLE)
            if before is not None:
                os.environ[KERNEL_VARIABLE] = before


@contextmanager
def data_folder(needed_bytes: int) -> Iterator[Path]:
    """A folder for data files, gone at the end.

    It lies in memory where there is room, since writing back to a disk would disturb the measurement; such a file is
    mapped in pages of 4 KiB like any other.

    Raises: OutputError when neither place has room.
    """
    places = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    for place in places:
        if place.is_dir() and os.access(place, os.W_OK) and shutil.disk_usage(place).free > needed_bytes:
            with tempfile.TemporaryDirectory(prefix="losa-kernels-", dir=place) as folder:
                yield Path(folder)
            return
    raise OutputError(
        f"the weights to be measured need {needed_bytes / 2**30:.1f} GiB for a moment, and neither "
        f"{' nor '.join(str(place) for place in places)} has that much room; choose fewer copies by a smaller --ring, "
        "or set TMPDIR to a place with room",
        needed_bytes=needed_bytes,
    )


def _write_model(folder: Path, bases: Sequence[StoredWeight], copies: int) -> Path:
    """`model.onnx` and its data: copies of Y_i = X W_i^T that share X."""
    from onnx import TensorProto, helper

    first = bases[0]
    rows, columns = first.dense.shape
    attributes: Mapping[str, Any] = first.attributes
    nodes, initializers, outputs = [], [], []
    with (folder / "weights").open("wb") as file:
        for copy in range(copies):
            base, shift = divmod(copy, first.rotations)
            weight = bases[base]
            names = []
            for name, array in weight.rotated(shift).items():
                names.append(f"{name}{copy}")
                initializers.append(_initializer(names[-1], array, file))
            outputs.append(helper.make_tensor_value_info(f"Y{copy}", TensorProto.FLOAT, ["M", rows]))
            nodes.append(
                helper.make_node(weight.operator, ["X", *names], [f"Y{copy}"], None, None, weight.domain, **attributes)
            )
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, ["M", columns])
    graph = helper.make_graph(nodes, "ring", [x], outputs, initializers)
    opsets = [helper.make_opsetid(name, version) for name, version in (("", 21), ("com.microsoft", 1), (DOMAIN, 1))]
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return path


def _initializer(name: str, array: Array, file: Any) -> Any:
    """A tensor that refers to `file`, where `array` is appended at a page boundary; inline if it is small."""
    from onnx import TensorProto, helper

    bfloat16 = array.dtype == np.uint16
    kind = TensorProto.BFLOAT16 if bfloat16 else helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
    if array.nbytes < _INLINE_BELOW_BYTES:
        tensor.raw_data = array.tobytes()
        return tensor
    offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
    file.seek(offset)
    file.write(np.ascontiguousarray(array).data)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights"), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _open(path: Path, spec: EngineSpec, threads: int) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Threads wait for work while a run lasts, as they should, and sleep after it: other sessions are measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        if spec.value is not None:
            options.register_custom_ops_library(str(native.library_path()))
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except LosaError:
        raise
    except Exception as error:  # the binding has a dozen exception classes with no common base of their own
        own = native.typed_error(str(error))
        if own is not None:
            raise own from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeFailureError(
            f"ONNX Runtime {ort.__version__} cannot make '{spec.name}': {lines[0]}; "
            "leave it out by --values or --peers",
            engine=spec.name,
        ) from error


def check_distinct(specs: Sequence[EngineSpec]) -> None:
    """Raises: ConfigError when an engine is asked for twice."""
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} would be measured twice; name each value, row and peer once")
