"""Attention and MLP as one node each: what they are made of, what they compute, and what is left apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from losa_export.errors import FormatError, KernelError
from losa_export.export import ExportConfig, export_onnx
from losa_export.graph.attention import ATTENTION_OP, ATTRIBUTES
from losa_export.graph.composed import compose, composed_function, input_names, products_of
from losa_export.graph.external import check_external_data
from losa_export.graph.formats import DOMAIN, FORMATS, ValueFormat, value_format
from losa_export.graph.functions import own_functions
from losa_export.graph.nodes import Attribute, NodeList
from losa_export.graph.profiles import CONTRIB
from losa_export.graph.stacking import METADATA_KEY, describe, interleave, parse
from losa_export.graph.stored import stored_nodes
from losa_export.runtimes import native
from tests.graph.conftest import Family

WIDTH, HIDDEN = 48, 40
HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 4, 2, 16, 400
KINDS = ("MLP", "Attention")
OPSET = 23
Feeds = dict[str, NDArray[Any]]


def encoding(name: str, bits: int = 8) -> ValueFormat:
    return value_format(name, group=32, activation_bits=bits)


class Parts:
    """The nodes that an operator is made of, on random weights; tests change one before the graph is made."""

    def __init__(self, kind: str, form: ValueFormat, *, last: ValueFormat | None = None) -> None:
        self.kind, self.form = kind, form
        self.nodes = NodeList("layers.3/")
        self.initializers: list[ir.Value] = []
        self.generator = np.random.default_rng(5)
        self.x, self.skip = (self._input(name, ["batch", "sequence", WIDTH]) for name in ("X", "skip"))
        self.inputs = [self.x, self.skip]
        gamma = self._constant("gamma", self.generator.uniform(0.5, 1.5, WIDTH).astype(np.float32))
        rows = 2 * HIDDEN if kind == "MLP" else (HEADS + 2 * KV_HEADS) * HEAD_DIM
        plain = form.swiglu_op if kind == "MLP" else form.sparse_op
        before = [self.x, self.skip, gamma]
        inner, self.total = self._product(
            form, str(form.normed_op(plain)), before, rows, WIDTH, gated=kind == "MLP", outputs=["inner", "sum"]
        )
        self.first = self.nodes.nodes[-1]
        self.first.name = f"layers.3/{plain}_1"  # it was named before it had a norm
        self.outputs: list[ir.Value] = []
        # A reader of the sum that stands before the last product.
        self.doubled = self.nodes.add("Add", [self.total, self.total], output="doubled")
        if kind == "Attention":
            inner, *self.outputs = self._attention(inner)
        self.middle = self.nodes.nodes[-1]
        [self.y] = self._product(
            last or form, (last or form).sparse_op, [inner], WIDTH, HIDDEN if kind == "MLP" else HEADS * HEAD_DIM
        )
        self.last = self.nodes.nodes[-1]
        self.outputs = [self.y, self.total, *self.outputs, self.doubled]

    def _input(self, name: str, shape: list[int | str | None], kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.val(name, kind, shape)

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.val(name, tensor.dtype, tensor.shape, const_value=tensor)
        self.initializers.append(value)
        return value

    def _product(
        self,
        form: ValueFormat,
        op_type: str,
        before: list[ir.Value],
        rows: int,
        columns: int,
        *,
        gated: bool = False,
        outputs: list[str | None] | None = None,
    ) -> list[ir.Value]:
        keep = self.generator.random((rows, columns)) < 0.4
        weight = np.where(keep, self.generator.standard_normal((rows, columns)) / 5, 0).astype(np.float32)
        if gated:
            weight, keep = (interleave(*np.split(both, 2)) for both in (weight, keep))
        encoded = form.encode(weight, keep)
        stem = f"weight_{len(self.nodes.nodes)}"
        tensors = [self._constant(f"{stem}.{name}", array) for name, array in encoded.tensors.items()]
        attributes: dict[str, Attribute] = dict(encoded.attributes)
        if gated:
            attributes["N"] = rows // 2
        if len(before) > 1:
            attributes["epsilon"] = 0.25
        made = self.nodes.add_many(op_type, [*before, *tensors], outputs or ["Y"], attributes, domain=DOMAIN)
        for value, width in zip(made, (attributes["N"], WIDTH), strict=False):
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", width])
        self.nodes.nodes[-1].metadata_props[METADATA_KEY] = describe([])
        return made

    def _attention(self, packed: ir.Value) -> list[ir.Value]:
        cache = [self._input(f"past_{name}", ["batch", KV_HEADS, "past", HEAD_DIM]) for name in ("key", "value")]
        cache += [
            self._input("seqlens_k", ["batch"], ir.DataType.INT32),
            self._input("total_sequence_length", [1], ir.DataType.INT32),
        ]
        positions = self._input("position_ids", ["batch", "sequence"], ir.DataType.INT64)
        self.inputs += [*cache, positions]
        angles = np.arange(POSITIONS)[:, None] / 100.0 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        caches = [self._constant(f"{f.__name__}_cache", f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
        attributes: dict[str, Attribute] = {
            "num_heads": HEADS,
            "kv_num_heads": KV_HEADS,
            "scale": 0.25,
            "do_rotary": 1,
            "local_window_size": -1,
        }
        assert set(attributes) == set(ATTRIBUTES)
        made = self.nodes.add_many(
            ATTENTION_OP,
            [packed, None, None, *cache, *caches, positions],
            ["attended", "present_key", "present_value"],
            attributes,
            domain=DOMAIN,
        )
        for value in made[1:]:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape(["batch", KV_HEADS, "total", HEAD_DIM])
        return made

    def graph(self) -> ir.Graph:
        imports = {"": OPSET, DOMAIN: 1, CONTRIB: 1}
        return ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes.nodes,
            initializers=self.initializers,
            opset_imports=imports,
            name="parts",
        )

    def feeds(self, batch: int, tokens: int, past: int) -> Feeds:
        generator = np.random.default_rng([batch, tokens, past])
        shape = (batch, tokens, WIDTH)
        found: Feeds = {name: generator.standard_normal(shape).astype(np.float32) for name in ("X", "skip")}
        if self.kind == "MLP":
            return found
        caches = generator.standard_normal((2, batch, KV_HEADS, past, HEAD_DIM)).astype(np.float32)
        return found | {
            "past_key": caches[0],
            "past_value": caches[1],
            "seqlens_k": np.full(batch, past + tokens - 1, np.int32),
            "total_sequence_length": np.array([past + tokens], np.int32),
            "position_ids": np.tile(np.arange(past, past + tokens), (batch, 1)),
        }


def session(graph: ir.Graph, *, threads: int = 1, ours: bool = True) -> ort.InferenceSession:
    model = ir.Model(graph, ir_version=10, functions=own_functions(graph, OPSET))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if ours:
        try:
            options.register_custom_ops_library(str(native.library_path()))
        except KernelError as error:
            pytest.skip(f"needs the compiled kernels: {error}")
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


# Tokens of a call beside each other, one by one, and more than one pass has; behind a past, some of it longer than the
# keys that a thread takes at once.
CALLS = [(1, 1, 7), (1, 1, 700), (3, 1, 20), (1, 5, 0), (1, 9, 30), (2, 40, 0), (1, 130, 0), (1, 128, 0), (1, 300, 0)]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("values", list(FORMATS))
@pytest.mark.parametrize("kind", KINDS)
def test_one_node_gives_the_bits_of_those_it_is_made_of(kind: str, values: str, bits: int) -> None:
    """Whatever the number of tokens and threads."""
    apart = session(Parts(kind, encoding(values, bits)).graph())
    parts = Parts(kind, encoding(values, bits))
    graph = parts.graph()
    assert compose(graph) == 1
    assert [node.op_type for node in graph] == [f"SkipNormSparse{kind}{values.capitalize()}", "Add"]
    assert all(value.name for value in graph[0].outputs)  # or ONNX Runtime would inline no function
    one, together = session(graph), session(graph, threads=2)
    expected_shapes = [output.shape for output in apart.get_outputs()]
    assert [output.shape for output in one.get_outputs()] == expected_shapes
    for batch, tokens, past in CALLS:
        feeds = parts.feeds(batch, tokens, min(past, POSITIONS - tokens))
        expected = apart.run(None, feeds)
        for found in (one.run(None, feeds), together.run(None, feeds)):
            for mine, theirs in zip(found, expected, strict=True):
                np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_kernels_gives_the_bits_of_the_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(kind, encoding("int8"))
    for row in native.describe().available_rows:
        monkeypatch.setenv("LOSA_KERNEL", row)
        apart, graph = session(Parts(kind, encoding("int8")).graph()), parts.graph()
        compose(graph)
        one = session(graph, threads=2)
        for tokens in (1, 4, 60):
            feeds = parts.feeds(1, tokens, 3)
            for mine, theirs in zip(one.run(None, feeds), apart.run(None, feeds), strict=True):
                np.testing.assert_array_equal(mine, theirs)
        parts = Parts(kind, encoding("int8"))


@pytest.mark.parametrize("values", list(FORMATS))
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_without_our_library_finds_the_parts_inside(kind: str, values: str) -> None:
    parts = Parts(kind, encoding(values, 16))
    graph = parts.graph()
    compose(graph)
    feeds = parts.feeds(2, 6, 0)
    stock, ours = session(graph, ours=False).run(None, feeds), session(graph).run(None, feeds)
    for mine, theirs in zip(ours, stock, strict=True):
        # Activations are rounded to 16 bits by ours, in two products.
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-4 * np.abs(theirs).max())


def test_a_definition_brings_those_it_needs() -> None:
    for kind, inner in (
        ("MLP", {"SkipNormSparseSwiGLUBf16", "SparseMatMulBf16"}),
        ("Attention", {"SkipNormSparseMatMulBf16", ATTENTION_OP, "SparseMatMulBf16"}),
    ):
        graph = Parts(kind, FORMATS["bf16"]).graph()
        compose(graph)
        assert {one.name for one in own_functions(graph, OPSET)} == inner | {f"SkipNormSparse{kind}Bf16"}
    assert composed_function("SparseMatMulBf16", OPSET) is None
    assert products_of("NothingOfOurs") == ()


# ---- what stays apart ----


def read_twice(parts: Parts) -> None:
    parts.outputs.append(parts.nodes.add("Neg", [parts.last.inputs[0]], output="negated"))


def given_as_output(parts: Parts) -> None:
    value = parts.first.outputs[0]
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", None])
    parts.outputs.append(value)


def of_another_domain(parts: Parts) -> None:
    parts.first.domain = "elsewhere"


def without_its_norm(parts: Parts) -> None:
    parts.first.op_type = parts.form.product_of(parts.first.op_type)


@pytest.mark.parametrize("change", [read_twice, given_as_output, of_another_domain, without_its_norm])
@pytest.mark.parametrize("kind", KINDS)
def test_what_something_else_reads_or_is_of_another_kind_stays_apart(
    kind: str, change: Callable[[Parts], None]
) -> None:
    parts = Parts(kind, FORMATS["int8"])
    change(parts)
    graph = parts.graph()
    before = [node.op_type for node in graph]
    assert compose(graph) == 0
    assert [node.op_type for node in graph] == before


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_two_formats_stay_apart(kind: str) -> None:
    assert compose(Parts(kind, FORMATS["int8"], last=FORMATS["int4"]).graph()) == 0


def test_attention_with_keys_and_values_of_their_own_stays_apart() -> None:
    parts = Parts("Attention", FORMATS["int8"])
    parts.middle.replace_input_with(1, parts.x)
    assert compose(parts.graph()) == 0


# Attention in one node, of two blocks: not the first, whose norm has nothing to add, nor where query, key and value are
# apart or have biases. OPT has other norms; ONNX's own dialect has attention in other operators.
def expected(family: str, profile: str) -> tuple[int, int]:
    if family.startswith("opt"):
        return 0, 0
    whole = profile == "ort" and family not in ("llama-small-heads", "qwen3", "qwen2", "llama-biases")
    return int(whole), 0 if family == "llama-biases" else 2


@pytest.mark.parametrize("profile", ["ort", "standard"])
def test_each_family_has_what_fits(family: Family, profile: Any, tmp_path: Path) -> None:
    export_onnx(ExportConfig(family.folder, tmp_path / "onnx", profile, "sparse", gate=False, progress=False))
    model = check_external_data(tmp_path / "onnx")
    found = Counter(node.op_type for node in model.proto.graph.node)
    attention, mlp = expected(family.name, profile)
    assert (found["SkipNormSparseAttentionFp32"], found["SkipNormSparseMLPFp32"]) == (attention, mlp)
    names = [node.name for node in model.proto.graph.node]
    assert len(set(names)) == len(names)


def test_each_weight_of_a_node_is_found(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from losa_export.checkpoint import open_checkpoint

    export_onnx(
        ExportConfig(tiny_checkpoint, tmp_path / "dense", weights="dense", values="bf16", gate=False, progress=False)
    )
    checkpoint = open_checkpoint(tiny_checkpoint)
    for node in stored_nodes(check_external_data(tmp_path / "dense")):
        for part in node.parts:
            assert checkpoint.shape(part.name)[0] == part.rows
    graph = Parts("MLP", FORMATS["int8"]).graph()
    compose(graph)
    [node] = [node for node in graph if node.domain == DOMAIN]
    assert set(node.metadata_props) == {METADATA_KEY, f"{METADATA_KEY}.down"}
    assert parse(node.metadata_props[f"{METADATA_KEY}.down"], "node") == ()
    assert len(node.inputs) == len(input_names(node.op_type))


# ---- what is refused ----


def broken(kind: str, attribute: str, value: float | str) -> ort.InferenceSession:
    parts = Parts(kind, encoding("int8"))
    graph = parts.graph()
    compose(graph)
    attributes = graph[0].attributes
    attributes[attribute] = ir.convenience.convert_attribute(attribute, value)
    return session(graph)


@pytest.mark.parametrize(
    ("kind", "attribute", "value", "message"),
    [
        ("MLP", "N", 32, "mask has"),
        ("MLP", "down_K", 32, "weight 'down': mask has"),
        ("MLP", "down_group", 64, "weight 'down': scales has"),
        ("MLP", "down_N", "wide", "attribute 'down_N' is missing, or not one integer"),
        ("MLP", "epsilon", -1.0, "epsilon is -1.000000, not a finite number from 0 on"),
        ("Attention", "out_layout", 2, "weight 'out': layout is 2"),
        ("Attention", "out_activation_bits", 9, "weight 'out': activation_bits"),
        ("Attention", "num_heads", 3, "3 heads cannot share 2 of keys"),
        ("Attention", "local_window_size", 0, "local_window_size is 0"),
        ("Attention", "epsilon", float("nan"), "epsilon is"),
    ],
)
def test_wrong_attributes_are_refused_at_load(kind: str, attribute: str, value: float | str, message: str) -> None:
    where = f"losa.FormatError: SkipNormSparse{kind}Int8 node 'layers.3/SkipNormSparse{kind}Int8_1': "
    with pytest.raises(Exception, match=where) as info:
        broken(kind, attribute, value)
    assert message in str(info.value)
    assert isinstance(native.typed_error(str(info.value)), FormatError)


def test_weights_that_do_not_fit_each_other_are_refused() -> None:
    parts = Parts("MLP", encoding("fp32"))
    [wide] = parts._product(encoding("fp32"), encoding("fp32").sparse_op, [parts.last.inputs[0]], WIDTH, HIDDEN + 1)
    odd = wide.producer()
    assert odd is not None
    for place, value in enumerate(odd.inputs[1:], start=1):
        parts.last.replace_input_with(place, value)
    parts.last.attributes["K"] = ir.AttrInt64("K", HIDDEN + 1)
    parts.nodes.nodes.pop()
    odd.replace_input_with(0, None)
    graph = parts.graph()
    assert compose(graph) == 1
    with pytest.raises(Exception, match=f"down_K is {HIDDEN + 1}, not N = {HIDDEN}"):
        session(graph)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": np.zeros((1, 3, WIDTH - 1), np.float32)}, r"X is \(1, 3, 47\), not \(batch, sequence, K = 48\)"),
        ({"skip": np.zeros((1, 2, WIDTH), np.float32)}, "skip has not the shape of X"),
        ({"past_key": np.zeros((1, KV_HEADS, 4, 8), np.float32)}, "'past_value' of shape"),
        ({"past_value": np.zeros((1, KV_HEADS, 5, HEAD_DIM), np.float32)}, "'past_value' of shape"),
        ({"seqlens_k": np.array([9], np.int32)}, "seqlens_k is 9 in row 0"),
        ({"position_ids": np.full((1, 3), POSITIONS)}, "position 400 in row 0 has no row"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_arrives(changes: Feeds, message: str) -> None:
    parts = Parts("Attention", encoding("int8"))
    for value in parts.inputs:
        value.shape = None
    graph = parts.graph()
    for value in (*parts.outputs, *parts.inputs):
        value.shape = None
    compose(graph)
    one = session(graph)
    feeds = parts.feeds(1, 3, 4)
    with pytest.raises(Exception, match=f"losa.FormatError: .*'layers.3/SkipNormSparseAttentionInt8_1': .*{message}"):
        one.run(None, feeds | changes)
    one.run(None, feeds)  # the session lives on


def test_a_cache_that_is_written_in_place_gives_the_same() -> None:
    parts = Parts("Attention", encoding("int8"))
    graph = parts.graph()
    compose(graph)
    one = session(graph, threads=2)
    feeds = parts.feeds(1, 1, 20)
    expected = one.run(None, feeds)
    room = {name: np.zeros((1, KV_HEADS, 64, HEAD_DIM), np.float32) for name in ("key", "value")}
    for name, buffer in room.items():
        buffer[:, :, :20] = feeds[f"past_{name}"]
    binding = one.io_binding()
    for name, array in (feeds | {f"past_{name}": buffer for name, buffer in room.items()}).items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    y = np.empty((1, 1, WIDTH), np.float32)
    binding.bind_output("Y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    for name, buffer in room.items():
        binding.bind_output(f"present_{name}", "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
    for name in ("sum", "doubled"):
        binding.bind_output(name)
    one.run_with_iobinding(binding)
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(room["key"][:, :, :21], expected[2])
