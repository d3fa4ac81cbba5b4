"""The portable meaning of every operator of every format: stock ONNX Runtime answers as the decoded weight does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from losa_export.graph.formats import FORMATS, EncodedWeight, ValueFormat, value_format
from losa_export.graph.stacking import interleave, parts_of

Build = Callable[[ValueFormat, str, EncodedWeight], onnx.ModelProto]

GROUP = 32
# rows, columns, density. Rows beyond blocks of 16, columns beyond steps of 4 and groups of 32, fewer columns than a
# group; all kept, none kept, and few enough that whole steps are empty.
SHAPES = [(1, 1, 1.0), (16, 8, 0.0), (37, 20, 0.3), (5, 3, 1.0), (64, 33, 0.7), (50, 131, 0.02), (33, 64, 1.0)]


@pytest.fixture(params=list(FORMATS))
def fmt(request: pytest.FixtureRequest) -> ValueFormat:
    return value_format(request.param, group=GROUP)


@pytest.fixture(params=[one for one in FORMATS if FORMATS[one].stores_dense])
def dense_fmt(request: pytest.FixtureRequest) -> ValueFormat:
    return value_format(request.param, group=GROUP)


def pruned(rows: int, columns: int, density: float, seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A weight and its pattern; an empty row, and a block without any weight where there are several."""
    generator = np.random.default_rng(seed)
    keep = generator.random((rows, columns)) < density
    if density < 1:
        keep[rows // 2] = False
        keep[:16] &= rows <= 32
    return np.where(keep, generator.standard_normal((rows, columns)), 0).astype(np.float32), keep


def stock(model: onnx.ModelProto, x: NDArray[np.generic], folder: Path) -> tuple[NDArray[np.float32], Counter[str]]:
    """The answer of ONNX Runtime without our library, and the operators that are left after its optimisations."""
    onnx.checker.check_model(model, full_check=False)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    [y] = session.run(None, {"X": x})
    left = Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)
    return y, left


def activations(columns: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((2, 3, columns)).astype(np.float32)


@pytest.mark.parametrize(("rows", "columns", "density"), SHAPES)
def test_a_sparse_product_folds_to_one_matmul(
    rows: int, columns: int, density: float, fmt: ValueFormat, one_node: Build, tmp_path: Path
) -> None:
    encoded = fmt.encode(*pruned(rows, columns, density, 3))
    weight, _ = fmt.decode(encoded)
    x = activations(columns)
    y, left = stock(one_node(fmt, fmt.sparse_op, encoded), x, tmp_path)
    # float32 sums of at most 131 terms around 1
    np.testing.assert_allclose(y, x @ weight.T, rtol=1e-5, atol=2e-5)
    assert left == {"MatMul": 1}


@pytest.mark.parametrize(("rows", "columns", "density"), SHAPES)
def test_swiglu_folds_to_two_products(
    rows: int, columns: int, density: float, fmt: ValueFormat, one_node: Build, tmp_path: Path
) -> None:
    (gate, kept_gate), (up, kept_up) = (pruned(rows, columns, density, seed) for seed in (3, 4))
    encoded = fmt.encode(interleave(gate, up), interleave(kept_gate, kept_up))
    gate, up = parts_of(fmt.decode(encoded)[0], [rows, rows], interleaved=True)
    encoded = replace(encoded, attributes={**encoded.attributes, "N": rows})
    x = activations(columns)
    y, left = stock(one_node(fmt, fmt.swiglu_op, encoded), x, tmp_path)
    wide = x.astype(np.float64)
    z = wide @ gate.T
    # two float32 sums of at most 131 terms around 1, multiplied, and a float32 sigmoid
    np.testing.assert_allclose(y, z / (1 + np.exp(-z)) * (wide @ up.T), rtol=1e-5, atol=2e-4)
    assert left["MatMul"] == 2
    assert left["Gather"] == left["CumSum"] == left["Split"] == 0


@pytest.mark.parametrize(("rows", "columns", "density"), SHAPES)
def test_a_dense_product_folds_to_one_matmul(
    rows: int, columns: int, density: float, dense_fmt: ValueFormat, one_node: Build, tmp_path: Path
) -> None:
    encoded = dense_fmt.encode_dense(pruned(rows, columns, density, 5)[0])
    weight, _ = dense_fmt.decode(encoded)
    x = activations(columns)
    y, left = stock(one_node(dense_fmt, dense_fmt.dense_op, encoded), x, tmp_path)
    # as above
    np.testing.assert_allclose(y, x @ weight.T, rtol=1e-5, atol=2e-5)
    assert left == {"MatMul": 1}


@pytest.mark.parametrize(("rows", "columns", "density"), SHAPES)
def test_an_embedding_gives_exactly_the_decoded_rows(
    rows: int, columns: int, density: float, dense_fmt: ValueFormat, one_node: Build, tmp_path: Path
) -> None:
    encoded = dense_fmt.encode_dense(pruned(rows, columns, density, 6)[0])
    weight, _ = dense_fmt.decode(encoded)
    ids = np.random.default_rng(0).integers(0, rows, (3, 7))
    y, _ = stock(one_node(dense_fmt, dense_fmt.embedding_op, encoded), ids, tmp_path)
    assert y.shape == (3, 7, columns)
    np.testing.assert_array_equal(y, weight[ids])


def test_an_embedding_unfolds_only_the_rows_it_is_asked_for(
    dense_fmt: ValueFormat, one_node: Build, tmp_path: Path
) -> None:
    encoded = dense_fmt.encode_dense(pruned(4000, 64, 1.0, 7)[0])
    stock(one_node(dense_fmt, dense_fmt.embedding_op, encoded), np.zeros((1, 1), np.int64), tmp_path)
    folded = onnx.load(tmp_path / "optimised.onnx").graph.initializer
    stored = sum(tensor.nbytes for tensor in encoded.tensors.values())
    assert sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in folded) < stored + 10_000


def test_a_norm_before_a_product_is_an_addition_and_a_norm(fmt: ValueFormat, one_node: Build, tmp_path: Path) -> None:
    columns = 70
    weight, keep = pruned(37, columns, 0.4, 3)
    encodings = {fmt.sparse_op: fmt.encode(weight, keep)}
    if fmt.stores_dense:
        encodings[fmt.dense_op] = fmt.encode_dense(weight)
    x, skip = activations(columns), 3 * activations(columns)[::-1]
    total = (x + skip).astype(np.float64)
    gamma = np.linspace(0.5, 1.5, columns)
    normed = total / np.sqrt(np.mean(total**2, axis=-1, keepdims=True) + 0.25) * gamma
    for op_type, encoded in encodings.items():
        model = one_node(fmt, str(fmt.normed_op(op_type)), encoded)
        onnx.checker.check_model(model, full_check=False)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        y, found = session.run(None, {"X": x, "skip": skip})
        np.testing.assert_array_equal(found, x + skip)
        # float32 sums of at most 70 terms around 1
        np.testing.assert_allclose(y, normed @ fmt.decode(encoded)[0].T, rtol=1e-5, atol=2e-5)
