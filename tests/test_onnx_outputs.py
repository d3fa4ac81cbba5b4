from __future__ import annotations

import contextlib
from collections.abc import Callable

import onnx
import pytest
from hypothesis import given
from onnx import TensorProto, helper

from losa_export.onnx_outputs import with_outputs
from tests.damage import damaged


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])


def weight(name: str) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT, [1], [2.0])


def small_model(extra: tuple[onnx.NodeProto, ...] = ()) -> bytes:
    """`kept` needs x and w; `head` needs kept and v."""
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["middle"]),
        helper.make_node("Identity", ["middle"], ["present.kept"]),
        helper.make_node("Add", ["present.kept", "v"], ["sum"]),
        helper.make_node("Identity", ["sum"], ["logits"]),
        *extra,
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x")],
        [value("logits"), value("present.kept")],
        [weight("w"), weight("v")],
        value_info=[value("middle"), value("sum")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, {"losa.profile": "ort"})
    return model.SerializeToString()


def test_what_only_the_other_outputs_need_is_left_out_and_all_else_stays() -> None:
    before = onnx.load_from_string(small_model())
    after = onnx.load_from_string(with_outputs(small_model(), lambda name: name.startswith("present.")))
    onnx.checker.check_model(after)
    assert [node.op_type for node in after.graph.node] == ["Mul", "Identity"]
    assert [one.name for one in after.graph.initializer] == ["w"]
    assert [one.name for one in after.graph.output] == ["present.kept"]
    assert [one.name for one in after.graph.value_info] == ["middle"]
    assert after.graph.input == before.graph.input
    assert after.metadata_props == before.metadata_props
    assert after.opset_import == before.opset_import


def test_all_outputs_are_the_same_model() -> None:
    model = small_model()
    assert onnx.load_from_string(with_outputs(model, lambda _: True)) == onnx.load_from_string(model)


def test_a_graph_within_a_node_is_not_cut() -> None:
    branch = helper.make_graph([helper.make_node("Identity", ["sum"], ["y"])], "b", [], [value("y")])
    choice = helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch)
    with pytest.raises(ValueError, match="holds a graph of its own"):
        with_outputs(small_model((choice,)), lambda name: name == "logits")


def test_an_output_that_is_not_there_is_told() -> None:
    with pytest.raises(ValueError, match=r"none of its outputs \(logits, present.kept, …\) is wanted"):
        with_outputs(small_model(), lambda name: name == "nonsense")


@given(model=damaged(small_model()))
def test_a_damaged_file_is_a_value_error_or_still_a_model(model: bytes) -> None:
    wanted: Callable[[str], bool] = lambda name: name.startswith("present.")  # noqa: E731
    with contextlib.suppress(ValueError):  # any other exception is a fault
        with_outputs(model, wanted)
