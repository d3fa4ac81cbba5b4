"""What the runtimes' tests share.

A decoder of one attention block, written by hand for both kinds of cache: the runtimes can be tried alone. And
`Containers`: weights of every type and kind, packed by docs/format.md without the exporter's code, with the
arithmetic of the kernels in numpy.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_export.errors import KernelError
from losa_export.runtimes import native

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 40, 32, 2, 1, 16, 48


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The compiled library, or a skip where it has not been built."""
    try:
        return native.library_path()
    except KernelError as error:
        pytest.skip(f"needs the compiled kernels: {error}")


def runnable_rows() -> tuple[str, ...]:
    try:
        return native.describe().available_rows
    except KernelError:
        return ("scalar",)  # the fixture `kernels` says why nothing can run


@pytest.fixture(params=runnable_rows())
def row(request: pytest.FixtureRequest, kernels: Path) -> str:
    """The name of each kernel row that this CPU runs. The others are tried by tests/native."""
    return str(request.param)


@pytest.fixture(scope="session")
def containers(kernels: Path) -> type[Containers]:
    return Containers


@pytest.fixture(scope="session")
def pruned(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with six tenths of each block linear set to zero."""
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("pruned") / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            threshold = np.quantile(np.abs(weight), 0.6)
            tensors[name] = np.where(np.abs(weight) < threshold, np.float32(0), 2 * weight)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


Kind = Literal["sparse", "gated", "dense"]
STEP_COLUMNS = {"fp32": 1, "bf16": 2, "int8": 4, "int4": 4}


@dataclass(frozen=True)
class Example:
    """A packed weight and what it stands for.

    Attributes:
        weight: the container.
        gated: two matrices, for `swiglu`.
        levels: (matrices, N, K) with zeros in place: of integers before the scale, else the values; float64, exact.
        scales: (matrices, N, groups) float32; None for fp32 and bf16.
    """

    weight: native.Weight
    gated: bool
    levels: NDArray[np.float64]
    scales: NDArray[np.float32] | None

    @property
    def dense(self) -> NDArray[np.float64]:
        """(matrices, N, K): the weight's values, exact."""
        if self.scales is None:
            return self.levels
        columns = self.levels.shape[2]
        return self.levels * np.repeat(self.scales, self.weight.group, axis=2)[:, :, :columns]


class Containers:
    """Weights by their definition, and products by theirs."""

    @staticmethod
    def example(
        value_type: native.ValueType,
        rows: int,
        columns: int,
        *,
        kind: Kind = "sparse",
        density: float = 0.4,
        group: int = 128,
        activation_bits: int = 16,
        seed: int = 0,
    ) -> Example:
        """A random weight: row 2 keeps nothing, rows 16 to 31 everything; some scales are 0."""
        generator = np.random.default_rng(seed)
        matrices = 2 if kind == "gated" else 1
        shape = (matrices, rows, columns)
        keep = generator.random(shape) < density
        keep[:, 2:3] = False
        keep[:, 16:32] = True
        if kind == "dense":
            keep[:] = True
        scales = codebook = None
        if value_type in ("fp32", "bf16"):
            elements = generator.standard_normal(shape).astype(np.float32)
            if value_type == "bf16":
                elements = to_bf16(elements)
            levels = from_bf16(elements) if value_type == "bf16" else elements
        else:
            scales = (generator.random((matrices, rows, -(-columns // group))) * 0.02).astype(np.float16)
            scales[generator.random(scales.shape) < 0.05] = 0
            scales[generator.random(scales.shape) < 0.05] = 6e-8  # the smallest number of float16
            if value_type == "int8":
                elements = generator.integers(-127, 128, shape).astype(np.int8)
                levels = elements
            else:
                codebook = np.sort(generator.choice(np.arange(-127, 128), 16, replace=False)).astype(np.int8)
                elements = generator.integers(0, 16, shape).astype(np.uint8)
                levels = codebook[elements]
        weight = pack(value_type, elements, None if kind == "dense" else keep, scales, codebook, group, activation_bits)
        return Example(
            weight=weight,
            gated=kind == "gated",
            levels=np.where(keep, levels, 0).astype(np.float64),
            scales=None if scales is None else scales.astype(np.float32),
        )

    @staticmethod
    def tensors(weight: native.Weight) -> dict[str, NDArray[Any]]:
        """The operator's inputs after the first, in order."""
        names = ("mask", "values", "block_offsets", "scales", "codebook")
        return {name: getattr(weight, name) for name in names if getattr(weight, name) is not None}

    @staticmethod
    def model(
        weight: native.Weight,
        operator: str,
        *,
        attributes: dict[str, Any] | None = None,
        inputs: tuple[str, ...] = (),
        shape: tuple[str | int, ...] | None = None,
        gamma: NDArray[Any] | None = None,
    ) -> Any:
        """An ONNX model of one node `losa.sparse::<operator><Type>`, called 'layers.0', that gives Y.

        Args:
            operator: SparseMatMul, SparseSwiGLU, DenseMatMul or Embedding.
            gamma: makes it the operator SkipNorm…, which also takes 'skip', of any shape, and gives 'sum'.
            attributes: in place of the weight's own, or more; an epsilon of 1e-5 is among them where there is a gamma.
            inputs: tensors that are graph inputs rather than initializers.
            shape: of the first input; by default (batch, sequence) for ids and (batch, sequence, K) for X.
        """
        import onnx

        helper, kinds = onnx.helper, onnx.TensorProto
        embedding = operator == "Embedding"
        first = "ids" if embedding else "X"
        numbers = {"N": weight.rows, "K": weight.columns, "layout": weight.layout}
        if weight.scales is not None:
            numbers["group"] = weight.group
            if not embedding:
                numbers["activation_bits"] = weight.activation_bits
        tensors = [as_tensor(name, a, weight.value_type) for name, a in Containers.tensors(weight).items()]
        norm = [] if gamma is None else [as_tensor("gamma", gamma, weight.value_type)]
        node = helper.make_node(
            f"{'SkipNorm' if norm else ''}{operator}{weight.value_type.capitalize()}",
            [first, *(["skip"] if norm else []), *(tensor.name for tensor in norm + tensors)],
            ["Y", *(["sum"] if norm else [])],
            name="layers.0",
            domain="losa.sparse",
            **(numbers | ({"epsilon": 1e-5} if norm else {}) | (attributes or {})),
        )
        tensors = norm + tensors
        if shape is None:
            shape = ("batch", "sequence") if embedding else ("batch", "sequence", weight.columns)
        fed = [helper.make_tensor_value_info(first, kinds.INT64 if embedding else kinds.FLOAT, shape)]
        if norm:
            fed.append(helper.make_tensor_value_info("skip", kinds.FLOAT, None))
        fed += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors if t.name in inputs]
        graph = helper.make_graph(
            [node],
            "one",
            fed,
            [helper.make_tensor_value_info(name, kinds.FLOAT, None) for name in node.output],
            [tensor for tensor in tensors if tensor.name not in inputs],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("losa.sparse", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    @staticmethod
    def session(model: Any, threads: int = 1) -> Any:
        """The model (or its bytes) in ONNX Runtime with our operators."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.register_custom_ops_library(str(native.library_path()))
        source = model if isinstance(model, bytes) else model.SerializeToString()
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    @staticmethod
    def activations(tokens: int, columns: int, seed: int = 1) -> NDArray[np.float32]:
        """Normal numbers; one token in four is all zero but for its first column."""
        x = np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32)
        x[3::4, 1:] = 0
        return x

    @staticmethod
    def products(x: NDArray[np.float32], example: Example) -> NDArray[np.float32]:
        """(matrices, tokens, N) of an int8 or int4 weight, bit for bit as activations.h has it."""
        weight, scales = example.weight, example.scales
        assert scales is not None
        levels, token_scales = round_activations(x, weight.group, weight.activation_bits)
        groups = scales.shape[2]
        padded = np.zeros((*example.levels.shape[:2], groups * weight.group))
        padded[:, :, : weight.columns] = example.levels
        padded = padded.reshape(*padded.shape[:2], groups, weight.group)
        y = np.zeros((len(padded), len(x), weight.rows), np.float32)
        for group in range(groups):
            # float64 is exact here: sums stay below 2^30.
            sums = (levels[:, group] @ padded[:, :, group].transpose(0, 2, 1)).astype(np.float32)
            with np.errstate(all="ignore"):  # a scale may be NaN, or underflow
                both = scales[:, None, :, group] * token_scales[None, :, group, None]
                y = fused_multiply_add(sums, both, y)
        return y

    @staticmethod
    def assert_product(y: NDArray[np.float32], x: NDArray[np.float32], example: Example) -> None:
        """`y` is x W^T: to the bit for int8 and int4, else up to the rounding of float32 sums."""
        if example.scales is not None:
            np.testing.assert_array_equal(y, Containers.products(x, example)[0])
            return
        exact, error = float_products(x, example)
        assert np.all(np.abs(y - exact[0]) <= error[0])

    @staticmethod
    def assert_swiglu(y: NDArray[np.float32], x: NDArray[np.float32], example: Example) -> None:
        """`y` is silu(x Wgate^T) · (x Wup^T), within the rounding of its type's products and of silu."""
        if example.scales is not None:
            exact = Containers.products(x, example).astype(np.float64)
            error = np.zeros_like(exact)
        else:
            exact, error = float_products(x, example)
        with np.errstate(over="ignore"):
            silu = exact[0] / (1 + np.exp(-exact[0]))
        result = silu * exact[1]
        # The slope of silu is at most 1.1; of itself it rounds four times and has an exponential within 2e-7.
        # A product below 2^-126 loses up to 2^-150 to a subnormal result.
        bound = 1.1 * error[0] * (np.abs(exact[1]) + error[1]) + np.abs(silu) * error[1]
        assert np.all(np.abs(y - result) <= bound + 6e-7 * np.abs(result) + 2.0**-149)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even; finite values only."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_products(x: NDArray[np.float32], example: Example) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(matrices, tokens, N) in float64, and how far float32 may be off.

    That is at most K additions, each rounded to half a unit in the last place (2^-24).
    """
    exact = x.astype(np.float64) @ example.dense.transpose(0, 2, 1)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(example.dense).transpose(0, 2, 1)
    return exact, (x.shape[1] + 8) * 2.0**-24 * magnitude


def pack(
    value_type: native.ValueType,
    elements: NDArray[Any],
    keep: NDArray[np.bool_] | None,
    scales: NDArray[np.float16] | None,
    codebook: NDArray[np.int8] | None,
    group: int,
    activation_bits: int,
) -> native.Weight:
    """The container by docs/format.md; elements (matrices, N, K) are values, levels or codes; no `keep`: dense."""
    _, rows, columns = elements.shape
    width = STEP_COLUMNS[value_type]
    steps = -(-columns // width)
    stored = elements if keep is None else np.where(keep, elements, 0)
    positions = by_step(stored.astype(elements.dtype), steps, width)
    kept = np.ones(positions.shape, bool) if keep is None else by_step(keep, steps, width)
    if value_type == "int4":
        chunks = [codes_of_step(p[k]) for p, k in zip(positions.reshape(-1, 64), kept.reshape(-1, 64), strict=True)]
        sizes = np.array([len(chunk) for chunk in chunks]).reshape(len(positions), steps).sum(axis=1)
        values = np.concatenate(chunks)
    else:
        values = positions[kept]
        sizes = kept.sum(axis=(1, 2))
    padding = np.zeros(64 // values.itemsize, values.dtype)
    return native.Weight(
        value_type=value_type,
        rows=rows,
        columns=columns,
        mask=None if keep is None else np.ascontiguousarray(np.packbits(kept, axis=2, bitorder="little")),
        values=np.concatenate([values, padding]),
        block_offsets=None if keep is None else np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        scales=None if scales is None else np.ascontiguousarray(by_block(scales).transpose(0, 2, 1)),
        codebook=codebook,
        group=group,
        activation_bits=activation_bits,
    )


def as_tensor(name: str, array: NDArray[Any], value_type: str) -> Any:
    """A TensorProto; uint16 values of bf16 are its bits."""
    import onnx

    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    if name == "values" and value_type == "bf16":
        kind = onnx.TensorProto.BFLOAT16
    return onnx.TensorProto(name=name, data_type=kind, dims=array.shape, raw_data=array.tobytes())


def by_block(array: NDArray[Any]) -> NDArray[Any]:
    """(matrices, N, width) as (blocks, 16, width), the blocks of the matrices taking turns; zeros behind row N."""
    matrices, rows, width = array.shape
    blocks = -(-rows // 16)
    padded = np.zeros((matrices, blocks * 16, width), array.dtype)
    padded[:, :rows] = array
    return padded.reshape(matrices, blocks, 16, width).transpose(1, 0, 2, 3).reshape(matrices * blocks, 16, width)


def by_step(array: NDArray[Any], steps: int, width: int) -> NDArray[Any]:
    """(matrices, N, K) as (blocks, steps, positions), zeros behind row N and column K."""
    blocks = by_block(array)
    padded = np.zeros((len(blocks), 16, steps * width), array.dtype)
    padded[:, :, : array.shape[2]] = blocks
    return padded.reshape(-1, 16, steps, width).transpose(0, 2, 1, 3).reshape(len(blocks), steps, 16 * width)


def codes_of_step(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two codes a byte, the low half first."""
    even = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
    return even[::2] | even[1::2] << 4


def round_activations(x: NDArray[np.float32], group: int, bits: int) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Levels (tokens, groups, group) and scales (tokens, groups), as activations.h has them."""
    largest = np.float32(127 if bits == 8 else 32767)
    groups = -(-x.shape[1] // group)
    padded = np.zeros((len(x), groups * group), np.float32)
    padded[:, : x.shape[1]] = x
    padded = padded.reshape(len(x), groups, group)
    finite = np.isfinite(padded).all(axis=2)
    with np.errstate(all="ignore"):
        amax = np.abs(padded).max(axis=2)
        inverse = largest / amax
        usable = finite & (amax > 0) & np.isfinite(inverse)
        scales = np.where(finite, np.where(usable, amax / largest, np.float32(0)), np.float32(np.nan))
        levels = np.where(usable[:, :, None], np.rint(padded * inverse[:, :, None]), np.float32(0))
    return levels.astype(np.float64), scales.astype(np.float32)


def fused_multiply_add(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]) -> NDArray[np.float32]:
    """a · b + c rounded once. The float64 sum is rounded to odd first, after which float32 rounds as if exact.

    Source: Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums: proved algorithms using
    rounding to odd".
    """
    product = a.astype(np.float64) * b  # exact
    addend = c.astype(np.float64)
    total = product + addend
    tail = total - product
    error = (product - (total - tail)) + (addend - tail)  # exact: what the sum has lost
    even = (total.view(np.int64) & 1) == 0
    odd = np.where((error != 0) & even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return odd.astype(np.float32)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder whose cache is one buffer, written in place by GroupQueryAttention."""
    folder = tmp_path_factory.mktemp("shared")
    write_block(folder, shared=True)
    return folder


@pytest.fixture(scope="session")
def growing_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same decoder in standard operators (opset 23), whose cache comes back longer after each call."""
    folder = tmp_path_factory.mktemp("growing")
    write_block(folder, shared=False)
    return folder


def write_block(folder: Path, *, shared: bool) -> None:
    """Write model.onnx, model.onnx.data and genai_config.json of the decoder; the same weights at each call."""
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    weights = block_weights()
    if not shared:
        weights |= {"axes": np.array([1, 2], np.int64), "zero": np.array(0, np.int64), "one": np.array(1, np.int64)}
        weights |= {"column": np.array([-1], np.int64)}
    total = "total" if not shared else "capacity"
    cache_in = ["batch", KV_HEADS, "past" if not shared else "capacity", HEAD_DIM]
    cache_out = ["batch", KV_HEADS, total, HEAD_DIM]
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        value("attention_mask", TensorProto.INT64, ["batch", "total"]),
        value("position_ids", TensorProto.INT64, ["batch", "sequence"]),
        value("past_key_values.0.key", TensorProto.FLOAT, cache_in),
        value("past_key_values.0.value", TensorProto.FLOAT, cache_in),
    ]
    outputs = [
        value("logits", TensorProto.FLOAT, ["batch", "sequence", VOCAB]),
        value("present.0.key", TensorProto.FLOAT, cache_out),
        value("present.0.value", TensorProto.FLOAT, cache_out),
    ]
    graph = helper.make_graph(
        _nodes(shared), "block", inputs, outputs, [onnx.numpy_helper.from_array(w, name) for name, w in weights.items()]
    )
    opsets = [helper.make_opsetid("", 21 if shared else 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10 if shared else 11)
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=64
    )
    settings: dict[str, Any] = {
        "model": {"context_length": POSITIONS, "vocab_size": VOCAB},
        "search": {"past_present_share_buffer": shared},
    }
    (folder / "genai_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session", name="block_weights")
def _block_weights() -> dict[str, NDArray[np.generic]]:
    """The weights of both folders by name."""
    return block_weights()


def block_weights() -> dict[str, NDArray[np.generic]]:
    """The weights by name; matrices are (in, out)."""
    generator = np.random.default_rng(7)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return (generator.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)

    angles = np.arange(POSITIONS)[:, None] / 10000 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    return {
        "embedding": 5 * matrix(VOCAB, HIDDEN),
        "query": matrix(HIDDEN, HEADS * HEAD_DIM),
        "key": matrix(HIDDEN, KV_HEADS * HEAD_DIM),
        "value": matrix(HIDDEN, KV_HEADS * HEAD_DIM),
        "output": matrix(HEADS * HEAD_DIM, HIDDEN),
        "head": matrix(HIDDEN, VOCAB),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }


def _nodes(shared: bool) -> list[Any]:
    from onnx import TensorProto, helper

    node = helper.make_node
    cache = ["past_key_values.0.key", "past_key_values.0.value"]
    present = ["present.0.key", "present.0.value"]
    nodes = [node("Gather", ["embedding", "input_ids"], ["x"])]
    nodes += [node("MatMul", ["x", name], [name[0]]) for name in ("query", "key", "value")]
    if shared:
        nodes += [
            node("Constant", [], ["one"], value=helper.make_tensor("", TensorProto.INT64, [1], [1])),
            node("ReduceSum", ["attention_mask", "one"], ["counts"], keepdims=0),
            node("Sub", ["counts", "one"], ["last"]),
            node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32),
            node("Shape", ["attention_mask"], ["mask_shape"], start=1, end=2),
            node("Squeeze", ["mask_shape"], ["width"]),
            node("Cast", ["width"], ["total_length"], to=TensorProto.INT32),
            node(
                "GroupQueryAttention",
                ["q", "k", "v", *cache, "seqlens_k", "total_length", "cos", "sin"],
                ["attended", *present],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                do_rotary=1,
            ),
        ]
    else:
        rotary = ["cos", "sin", "position_ids"]
        nodes += [
            node("RotaryEmbedding", ["q", *rotary], ["qr"], num_heads=HEADS),
            node("RotaryEmbedding", ["k", *rotary], ["kr"], num_heads=KV_HEADS),
            # a token sees those that are not padding, and none after itself; the new ones are the last of the total
            node("Cast", ["attention_mask"], ["given"], to=TensorProto.BOOL),
            node("Unsqueeze", ["given", "axes"], ["keep"]),
            node("Shape", ["input_ids"], ["s"], start=1, end=2),
            node("Shape", ["attention_mask"], ["t"], start=1, end=2),
            node("Squeeze", ["s"], ["sequence"]),
            node("Squeeze", ["t"], ["total"]),
            node("Sub", ["total", "sequence"], ["past"]),
            node("Range", ["past", "total", "one"], ["own"]),
            node("Unsqueeze", ["own", "column"], ["rows"]),
            node("Range", ["zero", "total", "one"], ["columns"]),
            node("LessOrEqual", ["columns", "rows"], ["causal"]),
            node("And", ["keep", "causal"], ["mask"]),
            node(
                "Attention",
                ["qr", "kr", "v", "mask", *cache],
                ["attended", *present],
                q_num_heads=HEADS,
                kv_num_heads=KV_HEADS,
            ),
        ]
    return [
        *nodes,
        node("MatMul", ["attended", "output"], ["o"]),
        node("Add", ["x", "o"], ["y"]),
        node("MatMul", ["y", "head"], ["logits"]),
    ]
