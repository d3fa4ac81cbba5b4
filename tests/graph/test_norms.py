"""Which additions and norms go into the product that reads them, and which keep their node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from losa_export.export import ExportConfig, export_onnx
from losa_export.graph.formats import DOMAIN, FORMATS
from losa_export.graph.nodes import NodeList
from losa_export.graph.norms import fuse_skip_norms

CONTRIB = "com.microsoft"
FMT = FORMATS["int8"]
K = 8

Change = Callable[["Parts"], None]


def constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.val(name, tensor.dtype, tensor.shape, const_value=tensor)


class Parts:
    """x + skip → norm → product; the sum is read once more. Tests change a part before the graph is made."""

    def __init__(self, dialect: str) -> None:
        self.nodes = NodeList()
        self.x, self.skip = (ir.val(name, ir.DataType.FLOAT, ["tokens", K]) for name in ("x", "skip"))
        self.inputs = [self.x, self.skip]
        self.gamma = constant("gamma", np.ones(K, np.float32))
        if dialect == "ort":
            outputs = self.nodes.add_many(
                "SkipSimplifiedLayerNormalization",
                [self.x, self.skip, self.gamma],
                [None, "", "", "total"],
                {"epsilon": 0.5},
                domain=CONTRIB,
            )
            self.normed, self.total = outputs[0], outputs[3]
        else:
            self.total = self.nodes.add("Add", [self.x, self.skip], output="total")
            self.normed = self.nodes.add("RMSNormalization", [self.total, self.gamma], {"axis": -1, "epsilon": 0.5})
        self.norm = self.nodes.nodes[-1]
        # A reader between the norm and the product, which the product's node must come before.
        self.doubled = self.nodes.add("Add", [self.total, self.total])
        encoded = FMT.encode_dense(np.ones((4, K), np.float32))
        self.weight = [constant(name, array) for name, array in encoded.tensors.items()]
        self.y = self.nodes.add(FMT.dense_op, [self.normed, *self.weight], encoded.attributes, domain=DOMAIN)
        self.product = self.nodes.nodes[-1]
        self.outputs = [self.y, self.doubled]

    def graph(self) -> ir.Graph:
        imports = {"": 23, CONTRIB: 1, DOMAIN: 1}
        weights = [self.gamma, *self.weight]
        return ir.Graph(self.inputs, self.outputs, nodes=self.nodes.nodes, initializers=weights, opset_imports=imports)


@pytest.fixture(params=["ort", "standard"])
def parts(request: pytest.FixtureRequest) -> Parts:
    return Parts(request.param)


def test_a_norm_that_one_product_reads_goes_into_it(parts: Parts) -> None:
    graph = parts.graph()
    assert fuse_skip_norms(graph) == 1
    assert [node.op_type for node in graph] == ["SkipNormDenseMatMulInt8", "Add"]
    product, add = graph
    assert list(product.inputs) == [parts.x, parts.skip, parts.gamma, *parts.weight]
    assert product.attributes.get_float("epsilon") == 0.5
    assert product.outputs[0] is parts.y
    assert product.outputs[1].name == "total"
    assert list(add.inputs) == [product.outputs[1]] * 2
    assert fuse_skip_norms(graph) == 0  # it is done


def test_a_sum_that_is_an_output_of_the_graph_stays_one(parts: Parts) -> None:
    parts.outputs.append(parts.total)
    graph = parts.graph()
    assert fuse_skip_norms(graph) == 1
    assert graph.outputs[2].name == "total"
    assert graph.outputs[2].producer() is graph[0]


def test_a_sum_that_nobody_else_reads_has_a_name_all_the_same(parts: Parts) -> None:
    """ONNX Runtime inlines a function only into a node that names all its outputs."""
    parts.outputs.remove(parts.doubled)
    parts.nodes.nodes.remove(parts.doubled.producer())
    for index in (0, 1):
        parts.doubled.producer().replace_input_with(index, None)
    graph = parts.graph()
    assert fuse_skip_norms(graph) == 1
    assert all(value.name for value in graph[0].outputs)
    assert len(graph[0].outputs) == 2


def second_reader(parts: Parts) -> None:
    parts.outputs.append(parts.nodes.add("Neg", [parts.normed]))


def also_an_output(parts: Parts) -> None:
    parts.outputs.append(parts.normed)


def weights_of_another_domain(parts: Parts) -> None:
    parts.product.domain = "elsewhere"


def gamma_that_is_computed(parts: Parts) -> None:
    given = ir.val("given", ir.DataType.FLOAT, [K])
    parts.inputs.append(given)
    parts.norm.replace_input_with(list(parts.norm.inputs).index(parts.gamma), given)


def added_bias(parts: Parts) -> None:
    first = parts.norm if parts.norm.domain == CONTRIB else parts.total.producer()
    assert first is not None
    first.replace_input_with(1, parts.gamma)  # of a shape that is stretched to that of x


@pytest.mark.parametrize(
    "change", [second_reader, also_an_output, weights_of_another_domain, gamma_that_is_computed, added_bias]
)
def test_any_other_norm_keeps_its_node(parts: Parts, change: Change) -> None:
    change(parts)
    graph = parts.graph()
    before = [node.op_type for node in graph]
    assert fuse_skip_norms(graph) == 0
    assert [node.op_type for node in graph] == before


def test_a_norm_with_a_bias_or_over_several_axes_keeps_its_node() -> None:
    contributed, standard = Parts("ort"), Parts("standard")
    contributed.norm.resize_inputs(4)
    contributed.norm.replace_input_with(3, contributed.gamma)
    standard.norm.attributes["axis"] = ir.AttrInt64("axis", 0)
    for parts in (contributed, standard):
        assert fuse_skip_norms(parts.graph()) == 0


def test_a_norm_of_something_that_is_no_sum_keeps_its_node() -> None:
    parts = Parts("standard")
    parts.norm.replace_input_with(0, parts.x)
    assert fuse_skip_norms(parts.graph()) == 0


# Of two blocks: how many norms go into the product of query, key and value, which they do unless these are apart, and
# how many into gate and up, unless these have biases. The first norm of all has nothing to add, and OPT's are others.
def expected(family: str, profile: str) -> tuple[int, int]:
    if family.startswith("opt"):
        return 0, 0
    packed = profile == "ort" and family not in ("llama-small-heads", "qwen3")
    return int(packed), 0 if family == "llama-biases" else 2


@pytest.mark.parametrize("profile", ["ort", "standard"])
def test_each_family_fuses_what_fits(family: Any, profile: Any, tmp_path: Path) -> None:
    found, separate = {}, {}
    for weights in ("dense", "sparse"):
        folder = tmp_path / weights
        export_onnx(ExportConfig(family.folder, folder, profile, weights, gate=False, progress=False))
        nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
        found[weights] = Counter(node.op_type for node in nodes)
        norms = ("SkipSimplifiedLayerNormalization", "RMSNormalization")
        separate[weights] = sum(found[weights][op_type] for op_type in norms)
    packed, swiglu = expected(family.name, profile)
    # Either of them, or the operator that begins with it (test_composed.py).
    assert found["sparse"]["SkipNormSparseMatMulFp32"] + found["sparse"]["SkipNormSparseAttentionFp32"] == packed
    assert found["sparse"]["SkipNormSparseSwiGLUFp32"] + found["sparse"]["SkipNormSparseMLPFp32"] == swiglu
    assert separate["sparse"] == separate["dense"] - packed - swiglu
    assert not any(op_type.startswith("SkipNorm") for op_type in found["dense"])
