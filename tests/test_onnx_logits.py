from __future__ import annotations

import contextlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from onnx import TensorProto, helper, numpy_helper

from losa_export.onnx_logits import FIRST_LOGIT, with_first_logit
from tests.damage import damaged

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3) - 2


def small_model(op_type: str = "MatMul", *, profile: str | None = "ort", width: int = 3) -> bytes:
    """x (B, S, 2), doubled and then through a head."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["hidden"]),
        helper.make_node(op_type, ["hidden", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "S", width])],
        [numpy_helper.from_array(WEIGHT[:, :width], "head")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    if profile is not None:
        helper.set_model_props(model, {"losa.profile": profile})
    return model.SerializeToString()


@pytest.mark.parametrize("first", [0, 2, 4])
def test_logits_begin_at_the_token_that_is_said(first: int) -> None:
    changed = with_first_logit(small_model())
    assert changed is not None
    onnx.checker.check_model(onnx.load_from_string(changed), full_check=True)
    x = np.random.default_rng(0).standard_normal((1, 5, 2)).astype(np.float32)
    session = ort.InferenceSession(changed, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"x": x, FIRST_LOGIT: np.array([first])})
    np.testing.assert_allclose(logits, 2 * x[:, first:] @ WEIGHT, rtol=1e-6)


def test_all_else_stays() -> None:
    changed = with_first_logit(small_model())
    assert changed is not None
    before, after = onnx.load_from_string(small_model()), onnx.load_from_string(changed)
    assert [node.op_type for node in after.graph.node] == ["Add", "Slice", "MatMul"]
    assert after.graph.node[0] == before.graph.node[0]
    assert after.graph.output == before.graph.output
    assert after.graph.input[0] == before.graph.input[0]
    assert after.graph.initializer[0] == before.graph.initializer[0]
    assert after.opset_import == before.opset_import


def test_both_rows_of_a_norm_with_its_sum_are_cut() -> None:
    model = onnx.load_from_string(small_model())
    head = model.graph.node[1]
    head.op_type, head.domain = "SkipNormDenseMatMulInt8", "losa.sparse"
    head.input[:] = ["hidden", "x", "gamma", "values", "scales"]
    head.output[:] = ["logits", "sum"]
    changed = with_first_logit(model.SerializeToString())
    assert changed is not None
    nodes = onnx.load_from_string(changed).graph.node
    assert [(node.op_type, node.input[0]) for node in nodes[1:3]] == [("Slice", "hidden"), ("Slice", "x")]
    assert list(nodes[3].input) == [nodes[1].output[0], nodes[2].output[0], "gamma", "values", "scales"]


@pytest.mark.parametrize("model", [small_model(profile=None), small_model("Mul", width=2)])
def test_a_graph_from_elsewhere_or_with_an_unknown_head_is_left_alone(model: bytes) -> None:
    assert with_first_logit(model) is None


@given(model=damaged(small_model()))
def test_a_damaged_file_is_a_value_error_or_still_a_model(model: bytes) -> None:
    with contextlib.suppress(ValueError):  # any other exception is a fault
        with_first_logit(model)
