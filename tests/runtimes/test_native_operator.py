"""losa.sparse::SparseMatMulFp32 inside ONNX Runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_export.errors import FormatError, KernelError
from losa_export.runtimes import native

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

ROWS, COLUMNS = 40, 70


def parts(seed: int = 0) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
    """A weight (40, 70) with zeros in place, and its compressed parts by their definition."""
    generator = np.random.default_rng(seed)
    keep = np.zeros((48, COLUMNS), bool)
    keep[:ROWS] = generator.random((ROWS, COLUMNS)) < 0.4
    dense = np.where(keep, generator.standard_normal((48, COLUMNS)), 0).astype(np.float32)
    by_block = keep.reshape(3, 16, COLUMNS).transpose(0, 2, 1)
    values = dense.reshape(3, 16, COLUMNS).transpose(0, 2, 1)[by_block]
    return dense[:ROWS], {
        "mask": np.packbits(by_block, axis=2, bitorder="little"),
        "values": np.concatenate([values, np.zeros(16, np.float32)]),
        "block_offsets": np.concatenate([[0], np.cumsum(by_block.sum(axis=(1, 2)))]).astype(np.int64),
    }


def build(
    weights: dict[str, NDArray[Any]],
    *,
    inputs: tuple[str, ...] = (),
    shape: tuple[str | int, ...] | None = ("batch", "sequence", COLUMNS),
    **attributes: int,
) -> Any:
    """A model of the one node; the weights named in `inputs` are graph inputs, not initializers."""
    helper, kinds = onnx.helper, onnx.TensorProto
    node = helper.make_node(
        "SparseMatMulFp32",
        ["X", "mask", "values", "block_offsets"],
        ["Y"],
        name="layers.0.q_proj",
        domain="losa.sparse",
        **{"N": ROWS, "K": COLUMNS, **attributes},
    )
    fed = [helper.make_tensor_value_info("X", kinds.FLOAT, shape)]
    for name in inputs:
        kind = helper.np_dtype_to_tensor_dtype(weights[name].dtype)
        fed.append(helper.make_tensor_value_info(name, kind, weights[name].shape))
    graph = helper.make_graph(
        [node],
        "one",
        fed,
        [helper.make_tensor_value_info("Y", kinds.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items() if name not in inputs],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("losa.sparse", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def open_session(model: Any, threads: int = 1) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.library_path()))
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (1, 16), (2, 64), (1, 130), (0, 5)])
def test_the_operator_multiplies_any_leading_shape(kernels: Path, shape: tuple[int, int]) -> None:
    dense, weights = parts()
    x = np.random.default_rng(1).standard_normal((*shape, COLUMNS)).astype(np.float32)
    y = open_session(build(weights), threads=2).run(None, {"X": x})[0]
    assert y.shape == (*shape, ROWS)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(dense).T
    # At most 70 additions, each rounded to half a unit in the last place of float32.
    assert np.all(np.abs(y - x.astype(np.float64) @ dense.T) <= 80 * 2.0**-24 * magnitude)


def test_a_single_vector_is_a_product_too(kernels: Path) -> None:
    dense, weights = parts()
    x = np.ones(COLUMNS, np.float32)
    y = open_session(build(weights, shape=(COLUMNS,))).run(None, {"X": x})[0]
    assert y.shape == (ROWS,)
    assert np.allclose(y, dense.sum(axis=1), atol=1e-4)  # sums of 70 values near 1, in float32


def test_the_output_shape_is_known_before_running(kernels: Path) -> None:
    session = open_session(build(parts()[1]))
    assert session.get_outputs()[0].shape == ["batch", "sequence", ROWS]


def test_an_input_of_unknown_rank_is_taken_as_it_comes(kernels: Path) -> None:
    dense, weights = parts()
    session = open_session(build(weights, shape=None))
    assert session.get_outputs()[0].shape in (None, [])
    for shape in ((COLUMNS,), (2, 1, COLUMNS)):
        y = session.run(None, {"X": np.ones(shape, np.float32)})[0]
        assert y.shape == (*shape[:-1], ROWS)
        assert np.allclose(y, dense.sum(axis=1), atol=1e-4)  # sums of 70 values near 1, in float32
    with pytest.raises(Exception, match=r"losa.FormatError: .*the last dimension of X is absent"):
        session.run(None, {"X": np.array(1, np.float32)})


@pytest.mark.parametrize("tokens", [1, 130])
def test_session_threads_change_no_bit(kernels: Path, tokens: int) -> None:
    model = build(parts()[1])
    x = np.random.default_rng(2).standard_normal((1, tokens, COLUMNS)).astype(np.float32)
    one, two = (open_session(model, threads).run(None, {"X": x})[0] for threads in (1, 2))
    assert np.array_equal(one, two)
    assert np.array_equal(one, native.matmul(x, as_container(parts()[1])))


def as_container(weights: dict[str, NDArray[Any]]) -> native.Weight:
    return native.Weight("fp32", ROWS, COLUMNS, weights["mask"], weights["values"], weights["block_offsets"])


def test_weights_in_external_data_may_lie_at_any_offset(kernels: Path, tmp_path: Path) -> None:
    dense, weights = parts()
    model = build(weights)
    data = b"x"  # so that no tensor behind it is aligned
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        onnx.external_data_helper.set_external_data(tensor, "weights.bin", offset=len(data), length=len(raw))
        tensor.ClearField("raw_data")
        data += raw + b"xy"
    (tmp_path / "weights.bin").write_bytes(data)
    onnx.save_model(model, tmp_path / "model.onnx")
    x = np.eye(COLUMNS, dtype=np.float32)[None]
    y = open_session(tmp_path / "model.onnx").run(None, {"X": x})[0]
    assert np.array_equal(y[0].T, dense)  # one product each, with 1: exact


@pytest.mark.parametrize("name", ["mask", "values", "block_offsets"])
def test_a_weight_that_is_not_constant_is_refused(kernels: Path, name: str) -> None:
    with pytest.raises(Exception, match=rf"losa.FormatError: .*'layers.0.q_proj': input '{name}' is not an initial"):
        open_session(build(parts()[1], inputs=(name,)))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"N": 0}, "N = 0 and K = 70 are not the sides of a weight"),
        ({"N": 49}, "mask has 420 bytes, N = 49 and K = 70 need 560"),
        ({"K": 71}, "mask has 420 bytes, N = 40 and K = 71 need 426"),
        ({"layout": 7}, "layout is 7, this library reads layout 1"),
    ],
)
def test_attributes_that_contradict_the_weight_are_refused(
    kernels: Path, attributes: dict[str, int], message: str
) -> None:
    with pytest.raises(
        Exception, match=rf"losa.FormatError: SparseMatMulFp32 node 'layers.0.q_proj': {message}"
    ) as info:
        open_session(build(parts()[1], **attributes))
    assert isinstance(native.typed_error(str(info.value)), FormatError)


def test_parts_that_contradict_each_other_are_refused(kernels: Path) -> None:
    _, weights = parts()
    broken = {
        "mask has 280 bytes": {**weights, "mask": weights["mask"][:2]},
        r"values has \d+ bytes": {**weights, "values": weights["values"][:-1]},
        "block_offsets has 24 bytes": {**weights, "block_offsets": weights["block_offsets"][:3]},
        r"block_offsets\[1\] is": {**weights, "block_offsets": weights["block_offsets"] + [0, 1, 0, 0]},
    }
    for message, changed in broken.items():
        with pytest.raises(Exception, match=f"losa.FormatError: .*'layers.0.q_proj': {message}"):
            open_session(build(changed))


def test_a_missing_attribute_is_refused(kernels: Path) -> None:
    model = build(parts()[1])
    kept = [attribute for attribute in model.graph.node[0].attribute if attribute.name != "K"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(Exception, match=r"losa.FormatError: .*attribute 'K' is missing"):
        open_session(model)


@pytest.mark.parametrize("columns", [COLUMNS - 1, COLUMNS + 1])
def test_activations_of_another_width_are_refused_when_they_arrive(kernels: Path, columns: int) -> None:
    session = open_session(build(parts()[1], shape=("batch", "width")))
    with pytest.raises(Exception, match=f"losa.FormatError: .*the last dimension of X is {columns}, .* has K = 70"):
        session.run(None, {"X": np.zeros((1, columns), np.float32)})


def test_a_forced_row_runs_and_an_unknown_one_is_refused(kernels: Path, tmp_path: Path) -> None:
    _, weights = parts()
    onnx.save_model(build(weights), tmp_path / "model.onnx")
    x = np.random.default_rng(3).standard_normal((1, 5, COLUMNS)).astype(np.float32)
    program = (
        "import sys, numpy as np, onnxruntime as ort\n"
        "options = ort.SessionOptions()\n"
        "options.register_custom_ops_library(sys.argv[1])\n"
        "session = ort.InferenceSession(sys.argv[2], options, providers=['CPUExecutionProvider'])\n"
        "sys.stdout.buffer.write(session.run(None, {'X': np.frombuffer(sys.stdin.buffer.read(), np.float32)"
        f".reshape(1, 5, {COLUMNS})}})[0].tobytes())\n"
    )

    def run(row: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-P", "-c", program, str(kernels), str(tmp_path / "model.onnx")],
            env={**os.environ, "LOSA_KERNEL": row},
            input=x.tobytes(),
            capture_output=True,
            check=False,
        )

    for row in native.describe().available_rows:
        answer = run(row)
        assert answer.returncode == 0, answer.stderr.decode()
        expected = native.matmul(x, as_container(weights), row=row)
        assert np.array_equal(np.frombuffer(answer.stdout, np.float32), expected.ravel())
    refused = run("sse9")
    assert refused.returncode != 0
    error = native.typed_error(refused.stderr.decode())
    assert isinstance(error, KernelError)
    assert "no kernel row is called 'sse9'" in str(error)
