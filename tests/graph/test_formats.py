"""Sparse value formats: bit-exact round trips, the layout itself, and the portable function body."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_export.errors import ConfigError, FormatError, MaskError
from losa_export.graph.formats import DOMAIN, DOMAIN_VERSION, FORMATS, EncodedWeight, value_format
from losa_export.graph.formats.base import pack, unpack, unpack_mask
from losa_export.graph.nodes import NodeList
from losa_export.graph.stacking import interleave

OPSET = 23


def random_weight(rows: int, columns: int, density: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight with zeros where pruned, some kept zeros, and the pattern."""
    generator = np.random.default_rng(seed)
    keep = generator.random((rows, columns)) < density
    weight = generator.standard_normal((rows, columns)).astype(np.float32)
    weight[generator.random((rows, columns)) < 0.1] = 0.0
    return np.where(keep, weight, np.float32(0)), keep


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_encode_and_decode_are_exact_inverses(rows: int, columns: int, density: float, seed: int) -> None:
    weight, keep = random_weight(rows, columns, density, seed)
    before = weight.copy(), keep.copy()
    for fmt in FORMATS.values():
        decoded, kept = fmt.decode(fmt.encode(weight, keep))
        assert np.array_equal(decoded.view(np.int32), weight.view(np.int32))
        assert np.array_equal(kept, keep)
    assert np.array_equal(weight, before[0])
    assert np.array_equal(keep, before[1])


def test_values_keep_their_bits_even_if_they_are_no_numbers() -> None:
    weight = np.array([[np.nan, -0.0, np.inf], [1e-45, 0.0, -np.inf]], np.float32)
    decoded, _ = FORMATS["fp32"].decode(FORMATS["fp32"].encode(weight, np.ones((2, 3), np.bool_)))
    assert np.array_equal(decoded.view(np.int32), weight.view(np.int32))


def test_the_layout_is_block_then_column_then_row() -> None:
    weight = np.zeros((18, 2), np.float32)
    weight[3, 0], weight[9, 0], weight[0, 1], weight[17, 1] = 1, 2, 3, 4
    mask, values, offsets = pack(weight, weight != 0)
    assert values.tolist() == [1, 2, 3, 4]
    assert offsets.tolist() == [0, 3, 4]
    assert mask.tolist() == [[[1 << 3, 1 << 1], [1, 0]], [[0, 0], [1 << 1, 0]]]


def test_the_fp32_node_carries_padded_values_and_its_sizes() -> None:
    weight, keep = random_weight(20, 5, 0.4, 1)
    encoded = FORMATS["fp32"].encode(weight, keep)
    kept = int(keep.sum())
    assert encoded.attributes == {"N": 20, "K": 5, "layout": 1}
    assert {name: tensor.dtype for name, tensor in encoded.tensors.items()} == {
        "mask": np.uint8,
        "values": np.float32,
        "block_offsets": np.int64,
    }
    assert encoded.tensors["values"].shape == (kept + 16,)
    assert not encoded.tensors["values"][kept:].any()


@pytest.mark.parametrize(
    ("rows", "columns", "density"), [(1, 1, 1.0), (16, 8, 0.0), (37, 20, 0.3), (64, 33, 0.7), (5, 3, 1.0)]
)
def test_stock_onnxruntime_folds_the_function_to_one_matmul(
    rows: int, columns: int, density: float, tmp_path: Path
) -> None:
    fmt = FORMATS["fp32"]
    weight, keep = random_weight(rows, columns, density, 3)
    model = one_node_model(fmt.op_type, fmt.encode(weight, keep), rows, columns)
    onnx.checker.check_model(model, full_check=False)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, 3, columns)).astype(np.float32)
    [y] = session.run(None, {"X": x})
    # float32 sums of at most 33 terms
    np.testing.assert_allclose(y, x @ weight.T, rtol=1e-5, atol=1e-5)
    assert [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node] == ["MatMul"]


@pytest.mark.parametrize(("rows", "columns", "density"), [(1, 1, 1.0), (16, 8, 0.0), (37, 20, 0.3), (64, 33, 0.7)])
def test_stock_onnxruntime_folds_swiglu_to_two_products(
    rows: int, columns: int, density: float, tmp_path: Path
) -> None:
    fmt = FORMATS["fp32"]
    (gate, kept_gate), (up, kept_up) = (random_weight(rows, columns, density, seed) for seed in (3, 4))
    encoded = fmt.encode(interleave(gate, up), interleave(kept_gate, kept_up))
    encoded = replace(encoded, attributes=dict(encoded.attributes) | {"N": rows})
    model = one_node_model(fmt.swiglu_op_type, encoded, rows, columns)
    onnx.checker.check_model(model, full_check=False)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, 3, columns)).astype(np.float32)
    [y] = session.run(None, {"X": x})
    z = x.astype(np.float64) @ gate.T
    # float32 sums of at most 33 terms, and a float32 sigmoid
    np.testing.assert_allclose(y, z / (1 + np.exp(-z)) * (x.astype(np.float64) @ up.T), rtol=1e-5, atol=1e-5)
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert operators["MatMul"] == 2
    assert operators["Gather"] == operators["CumSum"] == operators["Split"] == 0


def one_node_model(op_type: str, encoded: EncodedWeight, rows: int, columns: int) -> onnx.ModelProto:
    fmt = FORMATS["fp32"]
    x = ir.val("X", ir.DataType.FLOAT, ["batch", "sequence", columns])
    tensors = {name: ir.tensor(array, name=name) for name, array in encoded.tensors.items()}
    parts = [ir.val(name, tensor.dtype, tensor.shape, const_value=tensor) for name, tensor in tensors.items()]
    nodes = NodeList()
    y = nodes.add(op_type, [x, *parts], dict(encoded.attributes), domain=DOMAIN, output="Y")
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", rows])
    imports = {"": OPSET, DOMAIN: DOMAIN_VERSION}
    graph = ir.Graph([x], [y], nodes=nodes.nodes, initializers=parts, opset_imports=imports, name="one")
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[fmt.function(op_type, OPSET)]))


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'fp7' is not a value format; choose one of fp32"):
        value_format("fp7")


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(MaskError, match=r"mask of shape \(2, 3\) does not fit a weight of shape \(3, 2\)"):
        pack(np.zeros((3, 2), np.float32), np.zeros((2, 3), np.bool_))


def test_a_weight_that_is_awake_where_it_is_pruned_is_refused() -> None:
    with pytest.raises(MaskError, match="not zero at every pruned position"):
        pack(np.ones((3, 2), np.float32), np.zeros((3, 2), np.bool_))


def test_masks_that_contradict_their_size_are_refused() -> None:
    with pytest.raises(FormatError, match=r"17 rows need uint8 \(2, K, 2\)"):
        unpack_mask(np.zeros((1, 4, 2), np.uint8), 17)
    with pytest.raises(FormatError, match="keeps rows beyond the last of 15"):
        unpack_mask(np.full((1, 4, 2), 255, np.uint8), 15)


def test_values_that_contradict_the_mask_are_refused() -> None:
    mask, values, _ = pack(np.ones((4, 4), np.float32), np.ones((4, 4), np.bool_))
    with pytest.raises(FormatError, match="keeps 16 positions, but 15 values are stored"):
        unpack(mask, values[:-1], 4)


def test_fp32_tensors_that_contradict_each_other_are_refused() -> None:
    fmt = FORMATS["fp32"]
    encoded = fmt.encode(np.ones((4, 4), np.float32), np.ones((4, 4), np.bool_))
    wrong = EncodedWeight({**encoded.tensors, "block_offsets": np.array([0, 15])}, encoded.attributes)
    with pytest.raises(FormatError, match="block_offsets do not count"):
        fmt.decode(wrong)
    short = EncodedWeight({**encoded.tensors, "values": np.zeros(3, np.float32)}, encoded.attributes)
    with pytest.raises(FormatError, match=r"float32 \(nnz \+ 16,\) is needed"):
        fmt.decode(short)
