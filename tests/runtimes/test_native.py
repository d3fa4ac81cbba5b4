"""The compiled kernels, through their typed door and as an operator inside ONNX Runtime."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from losa_export.errors import ConfigError, FormatError, KernelError
from losa_export.runtimes import native
from losa_export.runtimes.native import Weight

TOKENS = (*range(1, 21), 64, 128, 130)
SHAPES = ((1, 1), (1, 37), (17, 1), (16, 64), (33, 65), (50, 130), (192, 96))


def pack(weight: NDArray[np.float32], keep: NDArray[np.bool_]) -> Weight:
    """The container by its definition, written without the exporter's code."""
    rows, columns = weight.shape
    blocks = -(-rows // 16)
    padded_keep = np.zeros((blocks * 16, columns), bool)
    padded_keep[:rows] = keep
    padded = np.zeros((blocks * 16, columns), np.float32)
    padded[:rows] = weight
    by_block = padded_keep.reshape(blocks, 16, columns).transpose(0, 2, 1)
    values = padded.reshape(blocks, 16, columns).transpose(0, 2, 1)[by_block]
    return Weight(
        value_type="fp32",
        rows=rows,
        columns=columns,
        mask=np.ascontiguousarray(np.packbits(by_block, axis=2, bitorder="little")),
        values=np.concatenate([values, np.zeros(16, np.float32)]),
        block_offsets=np.concatenate([[0], np.cumsum(by_block.sum(axis=(1, 2)))]).astype(np.int64),
    )


def example(rows: int, columns: int, density: float, seed: int = 0) -> tuple[NDArray[np.float32], Weight]:
    """A weight with zeros in place, and packed; row 2 is empty, and block 1, if any, is full."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, columns)).astype(np.float32)
    keep = generator.random((rows, columns)) < density
    keep[2:3] = False
    keep[16:32] = True
    return np.where(keep, weight, np.float32(0)), pack(weight, keep)


def activations(tokens: int, columns: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32)


def assert_product(y: NDArray[np.float32], x: NDArray[np.float32], dense: NDArray[np.float32]) -> None:
    exact = x.astype(np.float64) @ dense.T.astype(np.float64)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(dense).T.astype(np.float64)
    # At most K additions, each rounded to half a unit in the last place of float32 (2**-24).
    assert np.all(np.abs(y - exact) <= (dense.shape[1] + 8) * 2.0**-24 * magnitude)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 1.0])
def test_every_row_multiplies_every_shape(row: str, rows: int, columns: int, density: float) -> None:
    dense, weight = example(rows, columns, density)
    for tokens in TOKENS:
        x = activations(tokens, columns)
        assert_product(native.matmul(x, weight, row=row), x, dense)


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
    dense, weight = example(rows, columns, density, seed)
    x = activations(tokens, columns, seed)
    for name in native.describe().available_rows:
        assert_product(native.matmul(x, weight, row=name), x, dense)


def test_leading_dimensions_are_kept_and_may_be_empty(row: str) -> None:
    dense, weight = example(20, 24, 0.4)
    x = activations(6, 24).reshape(2, 3, 24)
    y = native.matmul(x, weight, row=row)
    assert y.shape == (2, 3, 20)
    assert_product(y.reshape(6, 20), x.reshape(6, 24), dense)
    assert native.matmul(x[:, :0], weight, row=row).shape == (2, 0, 20)


def test_parts_may_lie_at_any_address(row: str) -> None:
    dense, weight = example(33, 70, 0.4)

    def shifted(array: NDArray[Any], by: int) -> NDArray[Any]:
        room = np.empty(array.nbytes + by, np.uint8)
        room[by:] = np.frombuffer(array.tobytes(), np.uint8)
        return np.ndarray(array.shape, array.dtype, room.data, by)

    moved = dataclasses.replace(
        weight,
        mask=shifted(weight.mask, 1),
        values=shifted(weight.values, 3),
        block_offsets=shifted(weight.block_offsets, 5),
    )
    for tokens in (1, 5, 64):
        x = activations(tokens, 70)
        assert_product(native.matmul(shifted(x, 2), moved, row=row), x, dense)


@pytest.mark.parametrize("tokens", [1, 6, 40, 130])
def test_the_number_of_threads_changes_no_bit(row: str, tokens: int) -> None:
    _, weight = example(300, 96, 0.3)
    x = activations(tokens, 96)
    alone = native.matmul(x, weight, row=row, threads=1)
    for threads in (2, 3, 5):
        assert np.array_equal(alone, native.matmul(x, weight, row=row, threads=threads))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
def test_what_is_not_finite_reaches_the_kept_weights_of_its_token_alone(row: str, bad: float, tokens: int) -> None:
    dense, weight = example(40, 64, 0.4)
    x = activations(tokens, 64)
    x[0, 7] = bad
    y = native.matmul(x, weight, row=row)
    assert not np.isfinite(y[0, dense[:, 7] != 0]).any()
    assert np.isfinite(y[1:]).all()


def test_a_kept_weight_that_is_zero_is_a_weight(row: str) -> None:
    weight = pack(np.zeros((4, 4), np.float32), np.ones((4, 4), bool))
    x = np.array([[np.inf, 0, 0, 0]], np.float32)
    assert np.isnan(native.matmul(x, weight, row=row)).all()


def change_offset(index: int, by: int) -> Callable[[Weight], dict[str, Any]]:
    def change(weight: Weight) -> dict[str, Any]:
        offsets = weight.block_offsets.copy()
        offsets[index] += by
        return {"block_offsets": offsets}

    return change


def change_bit(block: int, byte: int) -> Callable[[Weight], dict[str, Any]]:
    def change(weight: Weight) -> dict[str, Any]:
        mask = weight.mask.copy()
        mask[block, 3, byte] ^= 0x80
        return {"mask": mask}

    return change


BROKEN: dict[str, tuple[Callable[[Weight], dict[str, Any]], str]] = {
    "layout": (lambda _: {"layout": 2}, "layout is 2, this library reads layout 1"),
    "no rows": (lambda _: {"rows": 0}, "N = 0 and K = 12 are not the sides of a weight"),
    "negative columns": (lambda _: {"columns": -1}, "N = 20 and K = -1 are not"),
    "huge": (lambda _: {"rows": 2**62, "columns": 2**62}, "are not the sides of a weight"),
    "more rows": (lambda _: {"rows": 40}, "mask has 48 bytes, N = 40 and K = 12 need 72"),
    "more columns": (lambda _: {"columns": 13}, "mask has 48 bytes, N = 20 and K = 13 need 52"),
    "short mask": (lambda w: {"mask": w.mask[:1]}, "mask has 24 bytes"),
    "short offsets": (
        lambda w: {"block_offsets": w.block_offsets[:2]},
        "block_offsets has 16 bytes, N = 20 and K = 12 need 24",
    ),
    "first offset": (change_offset(0, 1), "block_offsets starts at 1, not at 0"),
    "middle offset": (change_offset(1, -1), r"block_offsets\[1\] is \d+, the mask of the blocks before it keeps"),
    "last offset": (change_offset(2, 1 << 40), r"block_offsets\[2\] is 1099511"),
    "mask bit": (change_bit(0, 0), r"block_offsets\[1\] is"),
    "short values": (
        lambda w: {"values": w.values[:-1]},
        "values has .* bytes, .* elements and 64 bytes of padding need",
    ),
    "no values": (lambda w: {"values": w.values[:0]}, "values has 0 bytes|has no data"),
    "mask type": (lambda w: {"mask": w.mask.astype(np.int8)}, "mask must be contiguous uint8, it is int8"),
    "values type": (lambda w: {"values": w.values.astype(np.float64)}, "values must be contiguous float32"),
    "values stride": (lambda w: {"values": np.repeat(w.values, 2)[::2]}, "values must be contiguous float32"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_weight_is_refused_with_the_reason(kernels: Path, what: str) -> None:
    _, weight = example(20, 12, 0.4)
    native.validate(weight)
    change, message = BROKEN[what]
    broken = dataclasses.replace(weight, **change(weight))
    with pytest.raises(FormatError, match=message):
        native.validate(broken)
    if broken.columns == 12:
        with pytest.raises(FormatError, match=message):
            native.matmul(activations(1, 12), broken)


def test_a_row_beyond_the_last_must_be_absent(kernels: Path) -> None:
    weight = pack(np.ones((32, 4), np.float32), np.eye(32, 4, dtype=bool) | np.eye(32, 4, -28, dtype=bool))
    with pytest.raises(FormatError, match="mask keeps a weight of column 0 in a row beyond N = 20"):
        native.validate(dataclasses.replace(weight, rows=20))


def test_activations_that_do_not_fit_are_refused(kernels: Path) -> None:
    _, weight = example(20, 12, 0.4)
    with pytest.raises(FormatError, match=r"x is float32 \(1, 13\), the weight needs float32 with last dimension 12"):
        native.matmul(activations(1, 13), weight)
    with pytest.raises(FormatError, match="x is float64"):
        native.matmul(activations(1, 12).astype(np.float64), weight)
    with pytest.raises(ConfigError, match="threads is 0, it must be at least 1"):
        native.matmul(activations(1, 12), weight, threads=0)


def test_the_library_describes_itself(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOSA_KERNEL", raising=False)
    info = native.describe()
    assert info.library == kernels
    assert info.row == info.available_rows[0]
    assert info.available_rows[-1] == info.compiled_rows[-1] == "scalar"
    assert set(info.available_rows) <= set(info.compiled_rows)


def test_large_pages_can_be_turned_off(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSA_LARGE_PAGES", "0")
    assert not native.describe().large_pages
    monkeypatch.delenv("LOSA_LARGE_PAGES")
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    assert native.describe().large_pages == (modes.is_file() and "[never]" not in modes.read_text())


def test_an_unknown_row_is_an_error(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight = example(20, 12, 0.4)
    with pytest.raises(KernelError, match=r"no kernel row is called 'sse9'; this build has: .*scalar"):
        native.matmul(activations(1, 12), weight, row="sse9")
    monkeypatch.setenv("LOSA_KERNEL", "sse9")
    with pytest.raises(KernelError, match=r"LOSA_KERNEL: no kernel row is called 'sse9'.*unset LOSA_KERNEL"):
        native.describe()


def test_a_row_that_this_cpu_lacks_is_an_error(kernels: Path) -> None:
    info = native.describe()
    lacking = set(info.compiled_rows) - set(info.available_rows)
    if not lacking:
        pytest.skip("this CPU runs every compiled row")
    _, weight = example(20, 12, 0.4)
    with pytest.raises(KernelError, match=r"needs instructions that this CPU lacks; it runs: .*scalar"):
        native.matmul(activations(1, 12), weight, row=lacking.pop())


def test_the_environment_forces_a_row(row: str) -> None:
    program = "from losa_export.runtimes import native; print(native.describe().row)"
    answer = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, "LOSA_KERNEL": row},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == row


def test_a_library_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOSA_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(KernelError, match=r"LOSA_LIBRARY names '.*none.so', which is not a file; unset it"):
        native.library_path()
    monkeypatch.delenv("LOSA_LIBRARY")
    monkeypatch.setattr("losa_export.runtimes.__path__", [str(tmp_path)])
    with pytest.raises(KernelError, match=r"liblosa_kernels.so is not in .*build it with 'pip install .'"):
        native.library_path()


def test_a_file_that_is_no_library_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.setenv("LOSA_LIBRARY", str(tmp_path / "text.so"))
    with pytest.raises(KernelError, match=r"text.so cannot be loaded .*build it again"):
        native.describe()


def test_messages_of_the_operator_become_typed_errors() -> None:
    wrapped = "Exception during initialization: losa.FormatError: SparseMatMulFp32 node 'q': layout is 2"
    error = native.typed_error(wrapped)
    assert isinstance(error, FormatError)
    assert str(error) == "SparseMatMulFp32 node 'q': layout is 2"
    assert isinstance(native.typed_error("x: losa.KernelError: no row"), KernelError)
    assert native.typed_error("the engine's own trouble") is None
