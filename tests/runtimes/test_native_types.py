"""Every value type through the typed door: bf16, int8 and int4, sparse, gated and dense, by every kernel row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from losa_export.errors import FormatError
from losa_export.runtimes import native

TYPES = ("fp32", "bf16", "int8", "int4")
QUANTISED = ("int8", "int4")
TOKENS = (*range(10), 12, 15, 16, 17, 24, 33, 64, 130)  # tests/native tries more
# The second and third have a short last step, the later ones a short last group of 32, 64 or 128.
SHAPES = ((1, 1), (17, 13), (33, 65), (16, 128), (40, 131), (50, 260))


def kinds(value_type: str) -> tuple[str, ...]:
    return ("sparse", "gated") if value_type == "fp32" else ("sparse", "gated", "dense")


CASES = [(value_type, kind) for value_type in TYPES for kind in kinds(value_type)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("value_type", "kind"), CASES)
def test_every_row_multiplies_every_shape(
    row: str, containers: Any, value_type: str, kind: str, rows: int, columns: int
) -> None:
    for density in (0.0, 0.3, 1.0) if kind != "dense" and rows < 40 else (0.3,):
        example = containers.example(value_type, rows, columns, kind=kind, density=density)
        native.validate(example.weight, gated=example.gated)
        multiply, check = door(containers, example)
        for tokens in TOKENS:
            x = containers.activations(tokens, columns)
            check(multiply(x, example.weight, row=row), x, example)


def door(containers: Any, example: Any) -> tuple[Callable[..., NDArray[np.float32]], Callable[..., None]]:
    """The function that multiplies with such a weight, and the check of its result."""
    if example.gated:
        return native.swiglu, containers.assert_swiglu
    return native.matmul, containers.assert_product


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("kind", ["sparse", "gated", "dense"])
@pytest.mark.parametrize("value_type", QUANTISED)
def test_every_group_and_activation_width_is_exact(
    row: str, containers: Any, value_type: str, kind: str, activation_bits: int, group: int
) -> None:
    for columns in (group - 5, group, 2 * group + 1, 3 * group - 4):
        example = containers.example(
            value_type, 50, columns, kind=kind, group=group, activation_bits=activation_bits, seed=columns
        )
        multiply, check = door(containers, example)
        for tokens in (1, 2, 7, 9, 24, 65):
            x = containers.activations(tokens, columns)
            check(multiply(x, example.weight, row=row), x, example)


@given(
    value_type=st.sampled_from(QUANTISED),
    kind=st.sampled_from(["sparse", "dense"]),
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    tokens=st.integers(1, 70),
    density=st.floats(0, 1),
    group=st.sampled_from([32, 64, 128]),
    activation_bits=st.sampled_from([8, 16]),
    exponent=st.integers(-149, 127),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_of_integers_agree_to_the_bit(
    kernels: Path,
    containers: Any,
    value_type: str,
    kind: str,
    rows: int,
    columns: int,
    tokens: int,
    density: float,
    group: int,
    activation_bits: int,
    exponent: int,
    seed: int,
) -> None:
    example = containers.example(
        value_type,
        rows,
        columns,
        kind=kind,
        density=density,
        group=group,
        activation_bits=activation_bits,
        seed=seed,
    )
    with np.errstate(all="ignore"):  # the largest and smallest exponents leave float32 on purpose
        x = np.ldexp(containers.activations(tokens, columns, seed), exponent).astype(np.float32)
    expected = native.matmul(x, example.weight, row="scalar")
    np.testing.assert_array_equal(expected, containers.products(x, example)[0])
    for name in native.describe().available_rows:
        np.testing.assert_array_equal(native.matmul(x, example.weight, row=name), expected, err_msg=name)


@given(
    value_type=st.sampled_from(["fp32", "bf16"]),
    kind=st.sampled_from(["sparse", "gated"]),
    rows=st.integers(1, 70),
    columns=st.integers(1, 140),
    tokens=st.integers(1, 70),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_of_floats_agree_but_for_the_order_of_sums(
    kernels: Path,
    containers: Any,
    value_type: str,
    kind: str,
    rows: int,
    columns: int,
    tokens: int,
    density: float,
    seed: int,
) -> None:
    example = containers.example(value_type, rows, columns, kind=kind, density=density, seed=seed)
    multiply, check = door(containers, example)
    x = containers.activations(tokens, columns, seed)
    for name in native.describe().available_rows:
        check(multiply(x, example.weight, row=name), x, example)


def ties(bits: int, tokens: int, columns: int) -> NDArray[np.float32]:
    """Activations that lie halfway between two levels; the largest is L, so that a level is 1."""
    largest = 127 if bits == 8 else 32767
    generator = np.random.default_rng(5)
    x = generator.integers(-largest, largest, (tokens, columns)) + 0.5
    x[:, ::32] = largest
    return x.astype(np.float32)


@pytest.mark.parametrize("bits", [8, 16])
def test_ties_round_to_even(row: str, containers: Any, bits: int) -> None:
    """An identity with levels and scales of 1 shows what each activation is rounded to."""
    weight = identity(containers, 96, bits)
    for tokens in (1, 5, 16, 40):
        x = ties(bits, tokens, 96)
        assert np.any(np.rint(x) != np.floor(x + 0.5)), "no tie shows the rule"
        np.testing.assert_array_equal(native.matmul(x, weight, row=row), np.rint(x))


def identity(containers: Any, size: int, bits: int) -> native.Weight:
    example = containers.example("int8", size, size, kind="dense", group=32, activation_bits=bits)
    values = np.zeros_like(example.weight.values)
    positions = np.arange(size)
    values[(positions // 16 * (size // 4) + positions // 4) * 64 + positions % 16 * 4 + positions % 4] = 1
    return dataclasses.replace(example.weight, values=values, scales=np.ones_like(example.weight.scales))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("magnitude", [0.0, -0.0, 1e-45, 1e-40, 1.1e-38, 9e-35, 1e-34, 1e-20, 1e30, 3.4e38])
@pytest.mark.parametrize("value_type", QUANTISED)
def test_tiny_and_huge_activations_are_exact(
    row: str, containers: Any, value_type: str, magnitude: float, bits: int
) -> None:
    example = containers.example(value_type, 40, 70, group=32, activation_bits=bits)
    for tokens in (1, 3, 24, 64):
        x = np.clip(containers.activations(tokens, 70) / 5, -1, 1) * np.float32(magnitude)
        y = native.matmul(x, example.weight, row=row)
        np.testing.assert_array_equal(y, containers.products(x, example)[0])
        assert np.isfinite(y[:, 2]).all()


@pytest.mark.parametrize("kind", ["sparse", "gated", "dense"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("value_type", QUANTISED)
def test_what_is_not_finite_makes_its_token_nan_and_no_other(
    row: str, containers: Any, value_type: str, bad: float, kind: str
) -> None:
    example = containers.example(value_type, 40, 131, kind=kind, group=64)
    multiply, _ = door(containers, example)
    for tokens in (1, 4, 9, 16, 64):
        for token, column in ((0, 7), (tokens - 1, 130), (tokens // 2, 64)):
            x = containers.activations(tokens, 131)
            clean = multiply(x, example.weight, row=row)
            assert np.isfinite(clean).all()
            x[token, column] = bad
            y = multiply(x, example.weight, row=row)
            assert np.isnan(y[token]).all()
            np.testing.assert_array_equal(np.delete(y, token, 0), np.delete(clean, token, 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_what_is_not_finite_reaches_the_kept_bf16_weights_of_its_token_alone(
    row: str, containers: Any, bad: float, kind: str
) -> None:
    example = containers.example("bf16", 40, 65, kind=kind)
    for tokens in (1, 4, 16, 64):
        for column in (7, 64):
            x = containers.activations(tokens, 65)
            x[0, column] = bad
            y = native.matmul(x, example.weight, row=row)
            assert not np.isfinite(y[0, example.dense[0, :, column] != 0]).any()
            assert np.isfinite(y[1:]).all()


@pytest.mark.parametrize("tokens", [1, 6, 17, 130])
@pytest.mark.parametrize(("value_type", "kind"), CASES)
def test_the_number_of_threads_changes_no_bit(
    row: str, containers: Any, value_type: str, kind: str, tokens: int
) -> None:
    example = containers.example(value_type, 300, 160, kind=kind)
    multiply, _ = door(containers, example)
    x = containers.activations(tokens, 160)
    alone = multiply(x, example.weight, row=row, threads=1)
    for threads in (2, 3, 5):
        np.testing.assert_array_equal(alone, multiply(x, example.weight, row=row, threads=threads))


@pytest.mark.parametrize(("value_type", "kind"), CASES)
def test_a_token_does_not_depend_on_those_around_it_by_more_than_its_type_allows(
    row: str, containers: Any, value_type: str, kind: str
) -> None:
    """Integer products of many tokens are those of each alone, to the bit."""
    example = containers.example(value_type, 48, 200, kind=kind)
    multiply, check = door(containers, example)
    x = containers.activations(130, 200)
    alone = np.concatenate([multiply(x[i : i + 1], example.weight, row=row) for i in range(130)])
    check(alone, x, example)
    if value_type in QUANTISED:
        np.testing.assert_array_equal(alone, multiply(x, example.weight, row=row))


def shifted(array: NDArray[Any] | None, by: int) -> NDArray[Any] | None:
    """A copy that starts `by` bytes behind an aligned address."""
    if array is None:
        return None
    room = np.empty(array.nbytes + by, np.uint8)
    room[by:] = np.frombuffer(array.tobytes(), np.uint8)
    return np.ndarray(array.shape, array.dtype, room.data, by)


@pytest.mark.parametrize(("value_type", "kind"), CASES)
def test_parts_may_lie_at_any_address(row: str, containers: Any, value_type: str, kind: str) -> None:
    example = containers.example(value_type, 33, 70, kind=kind, group=32)
    weight = example.weight
    moved = dataclasses.replace(
        weight,
        mask=shifted(weight.mask, 1),
        values=shifted(weight.values, 3),
        block_offsets=shifted(weight.block_offsets, 5),
        scales=shifted(weight.scales, 7),
        codebook=shifted(weight.codebook, 9),
    )
    multiply, check = door(containers, example)
    for tokens in (1, 5, 64):
        x = containers.activations(tokens, 70)
        y = multiply(shifted(x, 2), moved, row=row)
        check(y, x, example)
        np.testing.assert_array_equal(y, multiply(x, weight, row=row))


@pytest.mark.parametrize("value_type", TYPES)
def test_a_gated_container_is_a_plain_one_of_twice_the_rows(containers: Any, value_type: str) -> None:
    """Its products, before they are paired, agree with the definition; so the pairing alone has a tolerance."""
    example = containers.example(value_type, 32, 70, kind="gated")
    plain = dataclasses.replace(example.weight, rows=64)
    x = containers.activations(9, 70)
    products = native.matmul(x, plain).reshape(9, 2, 2, 16).transpose(2, 0, 1, 3).reshape(2, 9, 32)
    for matrix in range(2):
        one = dataclasses.replace(
            example,
            levels=example.levels[matrix : matrix + 1],
            scales=None if example.scales is None else example.scales[matrix : matrix + 1],
        )
        containers.assert_product(products[matrix], x, one)


@pytest.mark.parametrize("value_type", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_an_embedding_gives_the_rows_of_the_table(containers: Any, value_type: str, rows: int, columns: int) -> None:
    example = containers.example(value_type, rows, columns, kind="dense", group=32)
    ids = np.random.default_rng(3).integers(0, rows, (2, 3, 5))
    y = native.embedding(ids, example.weight)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, example.dense[0][ids].astype(np.float32))
    assert native.embedding(ids[:, :0], example.weight).shape == (2, 0, 5, columns)


@pytest.mark.parametrize("value_type", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("wrong", [-1, 40, 47, 48, 2**40, -(2**63), 2**63 - 1])
def test_an_id_that_is_no_row_is_refused(containers: Any, value_type: str, wrong: int) -> None:
    example = containers.example(value_type, 40, 70, kind="dense")
    with pytest.raises(FormatError, match=f"id {wrong} is not"):
        native.embedding(np.array([3, wrong, 39]), example.weight)


def test_ids_of_another_type_are_refused(containers: Any) -> None:
    weight = containers.example("int8", 40, 70, kind="dense").weight
    for ids in (np.array([1.5]), np.array([1], np.int32)):
        with pytest.raises(FormatError, match=rf"ids is {ids.dtype} \(1,\), an embedding needs int64"):
            native.embedding(ids, weight)


def test_a_huge_weight_is_refused_before_its_result_is_given_memory(containers: Any) -> None:
    weight = containers.example("int8", 40, 70, kind="dense").weight
    with pytest.raises(FormatError, match="are not the sides of a weight"):
        native.matmul(containers.activations(1, 70), dataclasses.replace(weight, rows=2**62))
    with pytest.raises(FormatError, match="are not the sides of a weight"):
        native.embedding(np.array([0]), dataclasses.replace(weight, columns=2**62))


def test_an_embedding_of_a_sparse_weight_is_refused(containers: Any) -> None:
    with pytest.raises(FormatError, match="an embedding is a dense weight"):
        native.embedding(np.array([0]), containers.example("int8", 40, 70).weight)


def test_a_dense_weight_is_neither_gated_nor_of_fp32(containers: Any) -> None:
    with pytest.raises(FormatError, match="a dense weight is neither gated nor of fp32"):
        native.validate(containers.example("int8", 32, 70, kind="dense").weight, gated=True)
    table = native.Weight("fp32", 16, 4, None, np.zeros(80, np.float32), None)
    with pytest.raises(FormatError, match="a dense weight is neither gated nor of fp32"):
        native.validate(table)


def change_array(name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Any], dict[str, Any]]:
    return lambda weight: {name: change(getattr(weight, name).copy())}


def put(name: str, index: Any, value: Any) -> Callable[[Any], dict[str, Any]]:
    def change(array: NDArray[Any]) -> NDArray[Any]:
        array[index] = value
        return array

    return change_array(name, change)


def keep_beyond(position: tuple[int, int, int], bit: int) -> Callable[[Any], dict[str, Any]]:
    """Keep one position more, with a value and offsets to match."""

    def change(weight: Any) -> dict[str, Any]:
        mask = weight.mask.copy()
        bits = int.from_bytes(mask[position[0], position[1]].tobytes(), "little")
        mask[position] |= np.uint8(1 << bit)
        more = int.from_bytes(mask[position[0], position[1]].tobytes(), "little")
        assert more != bits
        per_element = 2 if weight.value_type == "int4" else 1
        grown = -(-more.bit_count() // per_element) - -(-bits.bit_count() // per_element)
        offsets = weight.block_offsets.copy()
        offsets[position[0] + 1 :] += grown
        return {
            "mask": mask,
            "block_offsets": offsets,
            "values": np.append(weight.values, np.zeros(grown, weight.values.dtype)),
        }

    return change


# Of a weight of 20 rows and 70 columns in groups of 32: 2 blocks, 35 steps of bf16 or 18 of bytes, 3 groups.
BROKEN: dict[str, tuple[tuple[str, ...], Callable[[Any], dict[str, Any]], str]] = {
    "layout": (TYPES, lambda _: {"layout": 2}, "layout is 2, this library reads layout 1"),
    "no rows": (TYPES, lambda _: {"rows": 0}, "N = 0 and K = 70 are not the sides of a weight"),
    "huge": (TYPES, lambda _: {"rows": 2**62, "columns": 2**62}, "are not the sides of a weight"),
    "more rows": (TYPES, lambda _: {"rows": 40}, "mask has [0-9]+ bytes, N = 40 and K = 70 need"),
    "more columns": (TYPES, lambda _: {"columns": 73}, "mask has [0-9]+ bytes, N = 20 and K = 73 need"),
    "group 256": (QUANTISED, lambda _: {"group": 256}, "group is 256, this library knows 32, 64 and 128"),
    "group 0": (QUANTISED, lambda _: {"group": 0}, "group is 0, this library knows 32, 64 and 128"),
    "other group": (QUANTISED, lambda _: {"group": 64}, "scales has 192 bytes, N = 20 and K = 70 need 128"),
    "bits": (QUANTISED, lambda _: {"activation_bits": 4}, "activation_bits is 4, this library knows 8 and 16"),
    "short mask": (TYPES, change_array("mask", lambda a: a[:1]), "mask has [0-9]+ bytes"),
    "no mask": (TYPES, lambda _: {"mask": None}, "mask has 0 bytes"),
    "no offsets": (TYPES, lambda _: {"block_offsets": None}, "block_offsets has 0 bytes"),
    "short offsets": (TYPES, change_array("block_offsets", lambda a: a[:2]), "block_offsets has 16 bytes, .* need 24"),
    "first offset": (TYPES, put("block_offsets", 0, 1), "block_offsets starts at 1, not at 0"),
    "far offset": (TYPES, put("block_offsets", 1, -(2**63)), r"block_offsets\[1\] is -9223372036854775808, the mask"),
    "short values": (
        TYPES,
        change_array("values", lambda a: a[:-1]),
        "values has .* bytes, .* 64 bytes of padding need",
    ),
    "no values": (TYPES, change_array("values", lambda a: a[:0]), "values has 0 bytes|values has no data"),
    "row beyond": (
        TYPES,
        lambda w: keep_beyond((1, 0, -1), 7)(w),
        "mask keeps a weight of column . in a row beyond N = 20",
    ),
    "column beyond": (QUANTISED, keep_beyond((0, 17, 0), 3), "mask keeps a weight beyond the last of K = 70 columns"),
    "short scales": (QUANTISED, change_array("scales", lambda a: a[:1]), "scales has 96 bytes, .* need 192"),
    "no scales": (QUANTISED, lambda _: {"scales": None}, "scales has 0 bytes"),
    "negative scale": (QUANTISED, put("scales", (1, 2, 3), -1), r"scales\[83\] is not a finite number of 0 or more"),
    "infinite scale": (QUANTISED, put("scales", (0, 0, 5), np.inf), r"scales\[5\] is not a finite number"),
    "scale of NaN": (QUANTISED, put("scales", (0, 1, 0), np.nan), r"scales\[16\] is not a finite number"),
    "short codebook": (("int4",), change_array("codebook", lambda a: a[:15]), "codebook has 15 bytes, .* need 16"),
    "no codebook": (("int4",), lambda _: {"codebook": None}, "codebook has 0 bytes"),
    "mask type": (TYPES, change_array("mask", lambda a: a.astype(np.int8)), "mask must be contiguous uint8"),
    "values type": (TYPES, change_array("values", lambda a: a.astype(np.float64)), "values must be contiguous"),
    "scales type": (
        QUANTISED,
        change_array("scales", lambda a: a.astype(np.float32)),
        "scales must be contiguous float16, it is float32",
    ),
    "codebook type": (
        ("int4",),
        change_array("codebook", lambda a: a.astype(np.uint8)),
        "codebook must be contiguous int8, it is uint8",
    ),
    "value type": (
        TYPES,
        lambda _: {"value_type": "int2"},
        "value_type is 'int2'; choose one of fp32, bf16, int8, int4",
    ),
}


@pytest.mark.parametrize(
    ("what", "value_type"), [(what, kind) for what, (types, *_) in BROKEN.items() for kind in types]
)
def test_a_broken_weight_is_refused_with_the_reason(containers: Any, what: str, value_type: str) -> None:
    weight = containers.example(value_type, 20, 70, group=32).weight
    native.validate(weight)
    _, change, message = BROKEN[what]
    broken = dataclasses.replace(weight, **change(weight))
    with pytest.raises(FormatError, match=message):
        native.validate(broken)
    if broken.columns == 70:
        with pytest.raises(FormatError, match=message):
            native.matmul(containers.activations(1, 70), broken)


def test_a_column_beyond_the_last_must_be_absent_from_a_pair_too(containers: Any) -> None:
    weight = containers.example("bf16", 16, 71, density=0.0).weight
    broken = dataclasses.replace(weight, **keep_beyond((0, 35, 0), 1)(weight))
    with pytest.raises(FormatError, match="mask keeps a weight beyond the last of K = 71 columns"):
        native.validate(broken)


@pytest.mark.parametrize("value_type", ["bf16", "int8", "int4"])
def test_a_dense_weight_of_another_size_is_refused(containers: Any, value_type: str) -> None:
    weight = containers.example(value_type, 20, 70, kind="dense").weight
    native.validate(weight)
    for change in ({"values": weight.values[:-1]}, {"columns": 75}):
        with pytest.raises(FormatError, match=r"values has \d+ bytes, \d+ elements and 64 bytes of padding need \d+"):
            native.validate(dataclasses.replace(weight, **change))
    with pytest.raises(FormatError, match=r"(values|scales) has \d+ bytes, "):
        native.validate(dataclasses.replace(weight, rows=33))


@pytest.mark.parametrize("value_type", ["bf16", "int8", "int4"])
def test_a_dense_weight_ends_at_its_last_row_and_column(containers: Any, value_type: str) -> None:
    """Of 20 rows and 69 columns, a step has 2 or 4 columns; column 68 is the first of the last step."""
    weight = containers.example(value_type, 20, 69, kind="dense").weight
    width = 2 if value_type == "bf16" else 4
    steps = -(-69 // width)
    for row, column in ((0, 69), (15, 69), (20, 0), (31, 68)):
        step, within = divmod(column, width)
        position = (row // 16 * steps + step) * 16 * width + row % 16 * width + within
        values = weight.values.copy()
        if value_type == "int4":
            values[position // 2] |= 1 << position % 2 * 4
        else:
            values[position] = 1
        message = f"values has a number beyond N = 20 and K = 69 at row {row}, column {column}"
        with pytest.raises(FormatError, match=message):
            native.validate(dataclasses.replace(weight, values=values))
