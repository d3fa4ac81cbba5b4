"""SwiGLU by the compiled kernels: losa.sparse::SparseSwiGLUFp32, through the typed door and in ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from losa_export.errors import ConfigError, FormatError, KernelError
from losa_export.runtimes import native
from losa_export.runtimes.native import Weight

TOKENS = (*range(1, 21), 64, 128, 130)
SHAPES = ((1, 1), (15, 37), (16, 64), (17, 13), (172, 65))


class Pair(NamedTuple):
    """Both weights (rows, columns) with zeros in place, and packed."""

    gate: NDArray[np.float32]
    up: NDArray[np.float32]
    packed: Weight


def pack(gate: NDArray[np.float32], up: NDArray[np.float32], keep: NDArray[np.bool_]) -> Pair:
    """The container by its definition, written without the exporter's code; keep is (2, rows, columns)."""
    _, rows, columns = keep.shape
    pairs = -(-rows // 16)
    weights = np.where(keep, np.stack([gate, up]), np.float32(0))

    def by_block(array: NDArray[Any]) -> NDArray[Any]:
        """(2, rows, columns) as (blocks, columns, 16)."""
        padded = np.zeros((2, pairs * 16, columns), array.dtype)
        padded[:, :rows] = array
        return padded.reshape(2, pairs, 16, columns).transpose(1, 0, 3, 2).reshape(2 * pairs, columns, 16)

    kept = by_block(keep)
    packed = Weight(
        "fp32",
        rows=rows,
        columns=columns,
        mask=np.ascontiguousarray(np.packbits(kept, axis=2, bitorder="little")),
        values=np.concatenate([by_block(weights)[kept], np.zeros(16, np.float32)]),
        block_offsets=np.concatenate([[0], np.cumsum(kept.sum(axis=(1, 2)))]).astype(np.int64),
    )
    return Pair(weights[0], weights[1], packed)


def example(rows: int, columns: int, density: float, seed: int = 0) -> Pair:
    """Row 2 of the gate is empty, and rows 0 to 15 of the other full."""
    generator = np.random.default_rng(seed)
    gate, up = generator.standard_normal((2, rows, columns)).astype(np.float32)
    keep = generator.random((2, rows, columns)) < density
    keep[0, 2:3] = False
    keep[1, :16] = True
    return pack(gate, up, keep)


def activations(tokens: int, columns: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32)


def silu(z: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = z / (1 + np.exp(-z))
    return result


def assert_swiglu(y: NDArray[np.float32], x: NDArray[np.float32], pair: Pair) -> None:
    def product(weight: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """In float64, and how far float32 may be off: K additions of half a unit in the last place (2**-24)."""
        magnitude = np.abs(x).astype(np.float64) @ np.abs(weight).T.astype(np.float64)
        return x.astype(np.float64) @ weight.T.astype(np.float64), (x.shape[1] + 8) * 2.0**-24 * magnitude

    gate, gate_error = product(pair.gate)
    up, up_error = product(pair.up)
    exact = silu(gate) * up
    # The slope of silu is at most 1.1; of itself it rounds four times and has an exponential within 2e-7.
    error = 1.1 * gate_error * (np.abs(up) + up_error) + np.abs(silu(gate)) * up_error + 6e-7 * np.abs(exact)
    assert np.all(np.abs(y - exact) <= error)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_every_row_gates_every_shape(row: str, rows: int, columns: int, density: float) -> None:
    pair = example(rows, columns, density)
    native.validate(pair.packed, gated=True)
    for tokens in TOKENS:
        x = activations(tokens, columns)
        assert_swiglu(native.swiglu(x, pair.packed, row=row), x, pair)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 140),
    tokens=st.integers(1, 70),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_agree_with_the_definition(
    kernels: Path, rows: int, columns: int, tokens: int, density: float, seed: int
) -> None:
    pair = example(rows, columns, density, seed)
    x = activations(tokens, columns, seed)
    for name in native.describe().available_rows:
        assert_swiglu(native.swiglu(x, pair.packed, row=name), x, pair)


@pytest.mark.parametrize("tokens", [1, 120])
def test_silu_is_right_from_the_smallest_to_the_largest_number(row: str, tokens: int) -> None:
    """Output n is silu of activation n, multiplied by activation 0, which is 1."""
    identity = np.eye(16, dtype=np.float32)[1:]
    first = np.tile(np.arange(16) == 0, (15, 1))
    pair = pack(identity, np.ones((15, 16), np.float32), np.stack([identity > 0, first]))
    magnitudes = np.concatenate([[0], np.geomspace(1e-45, 3e38, 900), np.linspace(0.01, 110, 899)])
    z = np.concatenate([magnitudes, -magnitudes]).astype(np.float32).reshape(-1, 15)
    x = np.insert(z, 0, 1, axis=1)
    parts = [native.swiglu(part, pair.packed, row=row) for part in np.split(x, len(x) // tokens)]
    with np.errstate(over="ignore"):
        exact = silu(z.astype(np.float64))
    # An exponential within 2e-7 and three roundings. Where e^-z leaves float32 (z < -88) silu is below 1e-36.
    assert np.all(np.abs(np.concatenate(parts) - exact) <= 4e-7 * np.abs(exact) + 1e-36)


@pytest.mark.parametrize(("bad", "result"), [(np.inf, np.inf), (-np.inf, np.nan), (np.nan, np.nan)])
@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
def test_a_gate_that_is_not_finite_gives_what_the_formula_gives(
    row: str, bad: float, result: float, tokens: int
) -> None:
    """Both weights are 1, so that y = silu(x) · x."""
    ones = np.ones((17, 1), np.float32)
    pair = pack(ones, ones, np.ones((2, 17, 1), bool))
    x = np.full((tokens, 1), 2, np.float32)
    x[0] = bad
    y = native.swiglu(x, pair.packed, row=row)
    assert np.array_equal(y[0], np.full(17, result), equal_nan=True)
    assert np.isfinite(y[1:]).all()


@pytest.mark.parametrize("tokens", [1, 6, 40, 130])
def test_the_number_of_threads_changes_no_bit(row: str, tokens: int) -> None:
    pair = example(300, 196, 0.3)
    x = activations(tokens, 196)
    alone = native.swiglu(x, pair.packed, row=row, threads=1)
    assert_swiglu(alone, x, pair)
    for threads in (2, 3, 5):
        assert np.array_equal(alone, native.swiglu(x, pair.packed, row=row, threads=threads))


def test_leading_dimensions_are_kept_and_may_be_empty(row: str) -> None:
    pair = example(20, 24, 0.4)
    x = activations(6, 24).reshape(2, 3, 24)
    y = native.swiglu(x, pair.packed, row=row)
    assert y.shape == (2, 3, 20)
    assert_swiglu(y.reshape(6, 20), x.reshape(6, 24), pair)
    assert native.swiglu(x[:, :0], pair.packed, row=row).shape == (2, 0, 20)


def keep_last_row(block: int) -> Callable[[Weight], dict[str, Any]]:
    """Keeps row 15 of a block, in column 3 and there alone; everything else agrees with it."""

    def change(weight: Weight) -> dict[str, Any]:
        mask = weight.mask.copy()
        mask[block, 3] = (0, 0x80)
        counts = np.unpackbits(mask.reshape(len(mask), -1), axis=1).sum(axis=1)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return {"mask": mask, "block_offsets": offsets, "values": np.zeros(offsets[-1] + 16, np.float32)}

    return change


def shift_offset(weight: Weight) -> dict[str, Any]:
    return {"block_offsets": weight.block_offsets + np.array([0, 0, 0, 1, 0])}


BROKEN: dict[str, tuple[Callable[[Weight], dict[str, Any]], str]] = {
    "layout": (lambda _: {"layout": 2}, "layout is 2, this library reads layout 1"),
    "no rows": (lambda _: {"rows": 0}, "N = 0 and K = 12 are not the sides of a weight"),
    "more rows": (lambda _: {"rows": 40}, "mask has 96 bytes, N = 40 and K = 12 need 144"),
    "rows of both": (lambda _: {"rows": 64}, "mask has 96 bytes, N = 64 and K = 12 need 192"),
    "odd blocks": (lambda w: {"mask": w.mask[:3]}, "mask has 72 bytes, N = 20 and K = 12 need 96"),
    "odd offsets": (lambda w: {"block_offsets": w.block_offsets[:4]}, "block_offsets has 32 bytes, .* need 40"),
    "an offset": (shift_offset, r"block_offsets\[3\] is \d+, the mask of the blocks before it keeps"),
    "gate row": (keep_last_row(2), "mask keeps a weight of column 3 in a row beyond N = 20"),
    "other row": (keep_last_row(3), "mask keeps a weight of column 3 in a row beyond N = 20"),
    "short values": (
        lambda w: {"values": w.values[:-1]},
        "values has .* bytes, .* elements and 64 bytes of padding need",
    ),
    "mask type": (lambda w: {"mask": w.mask.astype(np.int8)}, "mask must be contiguous uint8, it is int8"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_pair_is_refused_with_the_reason(kernels: Path, what: str) -> None:
    weight = example(20, 12, 0.4).packed
    native.validate(weight, gated=True)
    change, message = BROKEN[what]
    broken = dataclasses.replace(weight, **change(weight))
    with pytest.raises(FormatError, match=message):
        native.validate(broken, gated=True)
    with pytest.raises(FormatError, match=message):
        native.swiglu(activations(1, 12), broken)


def test_one_weight_is_no_pair_and_a_pair_is_not_one_weight(kernels: Path) -> None:
    pair = example(20, 12, 0.4).packed
    with pytest.raises(FormatError, match="mask has 96 bytes, N = 20 and K = 12 need 48"):
        native.validate(pair)
    single = dataclasses.replace(pair, mask=pair.mask[:2], block_offsets=pair.block_offsets[:3])
    with pytest.raises(FormatError, match="mask has 48 bytes, N = 20 and K = 12 need 96"):
        native.validate(single, gated=True)


def test_activations_that_do_not_fit_are_refused(kernels: Path) -> None:
    weight = example(20, 12, 0.4).packed
    with pytest.raises(FormatError, match=r"x is float32 \(1, 13\), the weight needs float32 with last dimension 12"):
        native.swiglu(activations(1, 13), weight)
    with pytest.raises(ConfigError, match="threads is 0, it must be at least 1"):
        native.swiglu(activations(1, 12), weight, threads=0)
    with pytest.raises(KernelError, match="no kernel row is called 'sse9'"):
        native.swiglu(activations(1, 12), weight, row="sse9")


def write_model(path: Path, weight: Weight, **attributes: int) -> Path:
    """A model of the one node."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    node = helper.make_node(
        "SparseSwiGLUFp32",
        ["X", "mask", "values", "block_offsets"],
        ["Y"],
        name="layers.0.mlp",
        domain="losa.sparse",
        **{"N": weight.rows, "K": weight.columns, **attributes},
    )
    parts = {"mask": weight.mask, "values": weight.values, "block_offsets": weight.block_offsets}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("X", kinds.FLOAT, ("batch", "sequence", weight.columns))],
        [helper.make_tensor_value_info("Y", kinds.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in parts.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("losa.sparse", 1)]
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def open_session(path: Path, threads: int = 1) -> Any:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.library_path()))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (1, 16), (2, 64), (1, 130), (0, 5)])
def test_the_operator_gates_any_leading_shape(kernels: Path, tmp_path: Path, shape: tuple[int, int]) -> None:
    pair = example(172, 70, 0.4)
    model = write_model(tmp_path / "model.onnx", pair.packed)
    x = activations(shape[0] * shape[1], 70)
    one, two = (open_session(model, threads).run(None, {"X": x.reshape(*shape, 70)})[0] for threads in (1, 2))
    assert one.shape == (*shape, 172)
    assert_swiglu(one.reshape(-1, 172), x, pair)
    assert np.array_equal(one, two)
    assert np.array_equal(one.reshape(-1, 172), native.swiglu(x, pair.packed))


def test_the_output_shape_is_known_before_running(kernels: Path, tmp_path: Path) -> None:
    session = open_session(write_model(tmp_path / "model.onnx", example(20, 12, 0.4).packed))
    assert session.get_outputs()[0].shape == ["batch", "sequence", 20]


def test_the_operator_refuses_what_contradicts_itself(kernels: Path, tmp_path: Path) -> None:
    weight = example(20, 12, 0.4).packed
    cases = [
        (weight, {"N": 33}, "mask has 96 bytes, N = 33 and K = 12 need 144"),
        (weight, {"layout": 7}, "layout is 7"),
        (dataclasses.replace(weight, mask=weight.mask[:3]), {}, "mask has 72 bytes"),
        (dataclasses.replace(weight, **keep_last_row(3)(weight)), {}, "mask keeps a weight of column 3 in a row"),
    ]
    for broken, attributes, message in cases:
        path = write_model(tmp_path / "model.onnx", broken, **attributes)
        with pytest.raises(
            Exception, match=f"losa.FormatError: SparseSwiGLUFp32 node 'layers.0.mlp': {message}"
        ) as info:
            open_session(path)
        assert isinstance(native.typed_error(str(info.value)), FormatError)


def test_the_environment_forces_a_row(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = example(17, 70, 0.4)
    x = activations(20, 70)
    expected = native.swiglu(x, pair.packed, row=row)
    monkeypatch.setenv("LOSA_KERNEL", row)
    assert np.array_equal(native.swiglu(x, pair.packed), expected)
    session = open_session(write_model(tmp_path / "model.onnx", pair.packed))
    assert np.array_equal(session.run(None, {"X": x[None]})[0][0], expected)
    monkeypatch.setenv("LOSA_KERNEL", "sse9")
    with pytest.raises(Exception, match=r"losa.KernelError: LOSA_KERNEL: no kernel row is called 'sse9'"):
        open_session(tmp_path / "model.onnx")
