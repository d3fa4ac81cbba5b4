"""One encoded weight, two answers: our kernels in ONNX Runtime, and stock ONNX Runtime by the function body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from losa_export.errors import KernelError
from losa_export.graph.formats import FORMATS, EncodedWeight, ValueFormat, value_format
from losa_export.graph.stacking import interleave
from losa_export.runtimes import native

Build = Callable[[ValueFormat, str, EncodedWeight], onnx.ModelProto]

GROUP = 32
# rows, columns, density, as in test_bodies
SHAPES = [(1, 1, 1.0), (16, 8, 0.0), (37, 20, 0.3), (5, 3, 1.0), (64, 33, 0.7), (50, 131, 0.02), (33, 64, 1.0)]
TOKENS = 5


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    try:
        native.library_path()
    except KernelError as error:
        pytest.skip(f"needs the compiled kernels: {error}")


@pytest.fixture(params=list(FORMATS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[one for one in FORMATS if FORMATS[one].stores_dense])
def dense_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pruned(rows: int, columns: int, density: float, seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    generator = np.random.default_rng(seed)
    keep = generator.random((rows, columns)) < density
    return np.where(keep, generator.standard_normal((rows, columns)), 0).astype(np.float32), keep


def run(model: onnx.ModelProto, x: NDArray[Any], *, ours: bool) -> NDArray[np.float32]:
    return run_all(model, {"X": x}, ours=ours)[0]


def run_all(model: onnx.ModelProto, feeds: dict[str, NDArray[Any]], *, ours: bool) -> list[NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if ours:
        options.register_custom_ops_library(str(native.library_path()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    answers: list[NDArray[np.float32]] = session.run(None, feeds)
    return answers


def activations(columns: int, bits: int) -> NDArray[np.float32]:
    """Whole numbers whose largest in each group is that of the kernels' integers: rounding changes none of them."""
    largest = 2 ** (bits - 1) - 1
    x = np.random.default_rng(bits).integers(-largest, largest + 1, (1, TOKENS, columns)).astype(np.float32)
    x[:, :, ::GROUP] = largest
    return x


def near(columns: int, x: NDArray[np.float32]) -> dict[str, float]:
    """float32 sums in another order: some roundings of sums of `columns` terms of at most 4 times the largest x."""
    return {"rtol": 1e-5, "atol": 4 * np.sqrt(columns) * float(np.abs(x).max()) * 2e-6}


def weight_of(fmt: ValueFormat, encoded: EncodedWeight) -> native.Weight:
    tensors, attributes = encoded.tensors, encoded.attributes
    values: NDArray[Any] = tensors["values"]
    return native.Weight(
        fmt.name,  # type: ignore[arg-type]
        attributes["N"],
        attributes["K"],
        tensors.get("mask"),  # type: ignore[arg-type]
        values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values,
        tensors.get("block_offsets"),  # type: ignore[arg-type]
        tensors.get("scales"),  # type: ignore[arg-type]
        tensors.get("codebook"),  # type: ignore[arg-type]
        attributes.get("group", GROUP),
        attributes.get("activation_bits", 16),
    )


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("rows", "columns", "density"), SHAPES)
def test_sparse_products_agree(rows: int, columns: int, density: float, bits: int, name: str, one_node: Build) -> None:
    fmt = value_format(name, group=GROUP, activation_bits=bits)
    encoded = fmt.encode(*pruned(rows, columns, density, 3))
    native.validate(weight_of(fmt, encoded))
    model, x = one_node(fmt, fmt.sparse_op, encoded), activations(columns, bits)
    np.testing.assert_allclose(run(model, x, ours=True), run(model, x, ours=False), **near(columns, x))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("rows", "columns", "density"), SHAPES)
def test_swiglu_agrees(rows: int, columns: int, density: float, bits: int, name: str, one_node: Build) -> None:
    fmt = value_format(name, group=GROUP, activation_bits=bits)
    (gate, kept_gate), (up, kept_up) = (pruned(rows, columns, density, seed) for seed in (3, 4))
    # small gates, so that silu is not one of its two straight ends
    x = activations(columns, bits)
    gate = gate / np.float32(np.abs(x).max())
    encoded = fmt.encode(interleave(gate, up), interleave(kept_gate, kept_up))
    encoded = replace(encoded, attributes={**encoded.attributes, "N": rows})
    native.validate(weight_of(fmt, encoded), gated=True)
    model = one_node(fmt, fmt.swiglu_op, encoded)
    # a product of two sums
    tolerance = near(columns, x)
    tolerance["atol"] *= 4 * np.sqrt(columns)
    np.testing.assert_allclose(run(model, x, ours=True), run(model, x, ours=False), **tolerance)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("rows", "columns", "density"), SHAPES)
def test_dense_products_agree(
    rows: int, columns: int, density: float, bits: int, dense_name: str, one_node: Build
) -> None:
    fmt = value_format(dense_name, group=GROUP, activation_bits=bits)
    encoded = fmt.encode_dense(pruned(rows, columns, density, 5)[0])
    native.validate(weight_of(fmt, encoded))
    model, x = one_node(fmt, fmt.dense_op, encoded), activations(columns, bits)
    np.testing.assert_allclose(run(model, x, ours=True), run(model, x, ours=False), **near(columns, x))


@pytest.mark.parametrize(("rows", "columns", "density"), SHAPES)
def test_embeddings_are_equal(rows: int, columns: int, density: float, dense_name: str, one_node: Build) -> None:
    fmt = value_format(dense_name, group=GROUP)
    encoded = fmt.encode_dense(pruned(rows, columns, density, 6)[0])
    model = one_node(fmt, fmt.embedding_op, encoded)
    ids = np.random.default_rng(0).integers(0, rows, (3, 7))
    np.testing.assert_array_equal(run(model, ids, ours=True), run(model, ids, ours=False))


@pytest.mark.parametrize("product", ["sparse", "gated", "dense"])
def test_products_with_a_norm_agree(product: str, name: str, one_node: Build) -> None:
    fmt = value_format(name, group=GROUP)
    if product == "dense" and not fmt.stores_dense:
        pytest.skip("ONNX has this product")
    rows, columns = 37, 131
    weight, keep = pruned(rows, columns, 0.4, 3)
    if product == "gated":
        op_type, encoded = fmt.swiglu_op, fmt.encode(interleave(weight, weight[::-1]), interleave(keep, keep[::-1]))
        encoded = replace(encoded, attributes={**encoded.attributes, "N": rows})
    elif product == "sparse":
        op_type, encoded = fmt.sparse_op, fmt.encode(weight, keep)
    else:
        op_type, encoded = fmt.dense_op, fmt.encode_dense(weight)
    model = one_node(fmt, str(fmt.normed_op(op_type)), encoded)
    x, skip = np.random.default_rng(1).standard_normal((2, 1, TOKENS, columns)).astype(np.float32)
    ours, stock = (run_all(model, {"X": x, "skip": skip}, ours=choice) for choice in (True, False))
    np.testing.assert_array_equal(ours[1], stock[1])
    # Activations are rounded to one part in 65534 of a group's largest, some 4; that by 53 weights around 1, and of
    # SwiGLU times another product of some 10.
    np.testing.assert_allclose(ours[0], stock[0], rtol=1e-3, atol=1e-2 if product == "gated" else 1e-3)


@pytest.mark.parametrize(("bits", "smallest", "largest"), [(16, 1e-7, 1e-4), (8, 1e-4, 2e-2)])
@pytest.mark.parametrize("scaled_name", ["int8", "int4"])
def test_rounded_activations_are_all_that_differs(
    bits: int, smallest: float, largest: float, scaled_name: str, one_node: Build
) -> None:
    """Ordinary activations: 1/65534 or 1/254 of a group's largest is lost at most, and something is."""
    fmt = value_format(scaled_name, group=GROUP, activation_bits=bits)
    model = one_node(fmt, fmt.sparse_op, fmt.encode(*pruned(64, 256, 0.4, 8)))
    x = np.random.default_rng(1).standard_normal((1, TOKENS, 256)).astype(np.float32)
    ours, stock = (run(model, x, ours=choice) for choice in (True, False))
    error = np.sqrt(np.mean((ours - stock) ** 2) / np.mean(stock**2))
    assert smallest < error < largest
