"""Value formats: round trips, the layout itself, and what is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_export.errors import ConfigError, FormatError, MaskError
from losa_export.graph.formats import FORMATS, EncodedWeight, ValueFormat, format_of, value_format
from losa_export.graph.formats.base import block_offsets, lay_out, pack, take_back, unpack, unpack_mask
from losa_export.quantise import quantise_int4, quantise_int8

LEVELS = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "int8": np.int8, "int4": np.uint8}
GROUP = 32


def random_weight(rows: int, columns: int, density: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight with zeros where pruned, some kept zeros, and the pattern."""
    generator = np.random.default_rng(seed)
    keep = generator.random((rows, columns)) < density
    weight = generator.standard_normal((rows, columns)).astype(np.float32)
    weight[generator.random((rows, columns)) < 0.1] = 0.0
    return np.where(keep, weight, np.float32(0)), keep


def rounded(name: str, weight: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """What a format makes of a weight, by its definition."""
    if name == "int8":
        return quantise_int8(weight, keep, GROUP).dequantise()
    if name == "int4":
        return quantise_int4(weight, keep, GROUP).dequantise(keep)
    return weight.astype(LEVELS[name]).astype(np.float32)


@pytest.fixture(params=list(FORMATS))
def fmt(request: pytest.FixtureRequest) -> ValueFormat:
    return value_format(request.param, group=GROUP)


# ---- the layout -----------------------------------------------------------------------------------------------------

SHAPES = {
    "rows": st.integers(1, 70),
    "columns": st.integers(1, 40),
    "density": st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=100)
@given(**SHAPES, step_columns=st.sampled_from([1, 2, 4]), even_steps=st.booleans(), name=st.sampled_from(list(LEVELS)))
def test_pack_and_unpack_are_exact_inverses(
    rows: int, columns: int, density: float, seed: int, step_columns: int, even_steps: bool, name: str
) -> None:
    if name == "fp32" and step_columns > 2:
        step_columns = 2  # a step of a row is at most eight bytes
    generator = np.random.default_rng(seed)
    keep = generator.random((rows, columns)) < density
    levels = generator.integers(0, 16, (rows, columns)).astype(LEVELS[name])
    before = levels.copy(), keep.copy()
    mask, values, offsets = pack(levels, keep, step_columns=step_columns, even_steps=even_steps)
    assert np.array_equal(block_offsets(mask, even_steps=even_steps), offsets)
    assert offsets[-1] == values.size
    found, kept = unpack(mask, values, rows, columns, even_steps=even_steps)
    assert np.array_equal(kept, keep)
    assert np.array_equal(found, np.where(keep, levels, np.zeros(1, levels.dtype)))
    assert found.dtype == values.dtype == levels.dtype
    assert np.array_equal(take_back(lay_out(levels, step_columns), rows, columns, step_columns), levels)
    assert np.array_equal(levels, before[0])
    assert np.array_equal(keep, before[1])


def test_the_layout_is_block_then_step_then_row_then_column() -> None:
    """Written out by the definition: bit r·ks + k mod ks of step k div ks, and values in order of the bits."""
    rows, columns, ks = 18, 7, 4
    keep = np.random.default_rng(0).random((rows, columns)) < 0.5
    levels = np.arange(1, rows * columns + 1, dtype=np.uint8).reshape(rows, columns)
    mask, values, offsets = pack(levels, keep, step_columns=ks, even_steps=True)
    expected_values: list[int] = []
    expected_offsets = [0]
    for block in range(2):
        for step in range(2):
            bits, stored = 0, []
            for bit in range(16 * ks):
                row, column = 16 * block + bit // ks, ks * step + bit % ks
                if row < rows and column < columns and keep[row, column]:
                    bits |= 1 << bit
                    stored.append(int(levels[row, column]))
            assert int.from_bytes(mask[block, step].tobytes(), "little") == bits
            expected_values += stored + [0] * (len(stored) % 2)
        expected_offsets.append(len(expected_values))
    assert values.tolist() == expected_values
    assert offsets.tolist() == expected_offsets


def test_steps_of_one_column_are_columns() -> None:
    weight = np.zeros((18, 2), np.float32)
    weight[3, 0], weight[9, 0], weight[0, 1], weight[17, 1] = 1, 2, 3, 4
    mask, values, offsets = pack(weight, weight != 0)
    assert values.tolist() == [1, 2, 3, 4]
    assert offsets.tolist() == [0, 3, 4]
    assert mask.tolist() == [[[1 << 3, 1 << 1], [1, 0]], [[0, 0], [1 << 1, 0]]]


def test_a_dense_layout_holds_every_position_of_every_step() -> None:
    levels = np.arange(1, 18 * 5 + 1, dtype=np.uint8).reshape(18, 5)
    values = lay_out(levels, 4).reshape(2, 2, 16, 4)
    for block, step, row, column in np.ndindex(values.shape):
        place = 16 * block + row, 4 * step + column
        inside = place[0] < 18 and place[1] < 5
        assert values[block, step, row, column] == (levels[place] if inside else 0)


# ---- formats --------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(**SHAPES, name=st.sampled_from(list(FORMATS)))
def test_decode_gives_back_the_rounded_weight_and_the_pattern(
    rows: int, columns: int, density: float, seed: int, name: str
) -> None:
    fmt = value_format(name, group=GROUP)
    weight, keep = random_weight(rows, columns, density, seed)
    before = weight.copy(), keep.copy()
    decoded, kept = fmt.decode(fmt.encode(weight, keep))
    # bits, not closeness: -0.0 and 0.0 differ; but a scale of 0 loses no sign, since levels are integers
    assert np.array_equal(decoded.view(np.int32), rounded(name, weight, keep).view(np.int32))
    assert np.array_equal(kept, keep)
    assert np.array_equal(weight, before[0])
    assert np.array_equal(keep, before[1])


@settings(max_examples=50)
@given(
    rows=SHAPES["rows"], columns=SHAPES["columns"], seed=SHAPES["seed"], name=st.sampled_from(["bf16", "int8", "int4"])
)
def test_dense_tables_decode_to_the_rounded_weight(rows: int, columns: int, seed: int, name: str) -> None:
    fmt = value_format(name, group=GROUP)
    weight, _ = random_weight(rows, columns, 1.0, seed)
    every = np.ones(weight.shape, np.bool_)
    decoded, kept = fmt.decode(fmt.encode_dense(weight))
    assert np.array_equal(decoded.view(np.int32), rounded(name, weight, every).view(np.int32))
    assert kept.all()


def test_values_keep_their_bits_even_if_they_are_no_numbers() -> None:
    weight = np.array([[np.nan, -0.0, np.inf], [1e-45, 0.0, -np.inf]], np.float32)
    decoded, _ = FORMATS["fp32"].decode(FORMATS["fp32"].encode(weight, np.ones((2, 3), np.bool_)))
    assert np.array_equal(decoded.view(np.int32), weight.view(np.int32))


def test_bf16_rounds_to_nearest_even() -> None:
    ulp = np.float32(2.0**-7)  # between 1 and 2
    weight = np.array([[1 + ulp / 2, 1 + 3 * ulp / 2, 1 + 0.51 * ulp, 1 + 0.49 * ulp]], np.float32)
    decoded, _ = FORMATS["bf16"].decode(FORMATS["bf16"].encode(weight, np.ones((1, 4), np.bool_)))
    assert decoded.tolist() == [[1.0, 1 + 2 * ulp, 1 + ulp, 1.0]]


ROWS, COLUMNS = 20, 70  # two blocks; the last step and the last group are short
STORED = {
    "fp32": ({"mask": (2, 70, 2), "block_offsets": (3,)}, 1),
    "bf16": ({"mask": (2, 35, 4), "block_offsets": (3,)}, 2),
    "int8": ({"mask": (2, 18, 8), "block_offsets": (3,), "scales": (2, 3, 16)}, 4),
    "int4": ({"mask": (2, 18, 8), "block_offsets": (3,), "scales": (2, 3, 16), "codebook": (16,)}, 4),
}


def test_a_sparse_node_carries_what_its_kernel_reads(fmt: ValueFormat) -> None:
    weight, keep = random_weight(ROWS, COLUMNS, 0.4, 1)
    encoded = fmt.encode(weight, keep)
    shapes, step_columns = STORED[fmt.name]
    assert {name: tensor.shape for name, tensor in encoded.tensors.items() if name != "values"} == shapes
    assert tuple(encoded.tensors) == fmt.tensor_names(fmt.sparse_op) == fmt.tensor_names(fmt.swiglu_op)
    assert fmt.step_columns == step_columns
    values = encoded.tensors["values"]
    assert values.dtype == LEVELS[fmt.name]
    stored = int(encoded.tensors["block_offsets"][-1])
    if fmt.name == "int4":
        in_steps = np.unpackbits(encoded.tensors["mask"], axis=2).sum(axis=2)
        assert stored == ((in_steps + 1) // 2).sum()
    else:
        assert stored == keep.sum()
    assert values[stored:].nbytes == 64
    assert not values[stored:].astype(np.float32).any()
    expected = {"N": ROWS, "K": COLUMNS, "layout": 1}
    if "scales" in encoded.tensors:
        expected |= {"group": GROUP, "activation_bits": 16}
        scales = encoded.tensors["scales"]
        assert scales.dtype == np.float16
        assert not scales[1, :, ROWS - 16 :].any()
    assert encoded.attributes == expected
    assert tuple(encoded.attributes) == fmt.attribute_names(fmt.sparse_op)


def test_int4_codes_lie_low_half_first_and_each_step_begins_a_byte() -> None:
    fmt = value_format("int4", group=GROUP)
    weight, keep = random_weight(16, 8, 1.0, 3)
    keep[:, 4:] = False
    keep[15, 3] = False  # 63 weights in the first step, none in the second
    weight[~keep] = 0
    codes = quantise_int4(weight, keep, GROUP).codes[:, :4].reshape(-1)[:63]
    values = fmt.encode(weight, keep).tensors["values"]
    assert values[:32].tolist() == [int(a) | int(b) << 4 for a, b in zip(codes[::2], [*codes[1::2], 0], strict=True)]
    assert values.size == 32 + 64


def test_a_dense_table_has_no_mask_and_its_last_rows_count_for_nothing(fmt: ValueFormat) -> None:
    if not fmt.stores_dense:
        assert fmt.dense_op not in fmt.op_types
        assert fmt.embedding_op not in fmt.op_types
        return
    weight, _ = random_weight(ROWS, COLUMNS, 1.0, 1)
    encoded = fmt.encode_dense(weight)
    assert tuple(encoded.tensors) == fmt.tensor_names(fmt.dense_op) == fmt.tensor_names(fmt.embedding_op)
    positions = 2 * -(-COLUMNS // fmt.step_columns) * 16 * fmt.step_columns
    bytes_stored = positions * encoded.tensors["values"].itemsize // (2 if fmt.name == "int4" else 1)
    assert encoded.tensors["values"].nbytes == bytes_stored + 64
    assert "activation_bits" not in fmt.attribute_names(fmt.embedding_op)


def test_settings_reach_the_node() -> None:
    weight, keep = random_weight(16, 300, 0.5, 0)
    encoded = value_format("int8", group=64, activation_bits=8).encode(weight, keep)
    assert encoded.attributes == {"N": 16, "K": 300, "layout": 1, "group": 64, "activation_bits": 8}
    assert encoded.tensors["scales"].shape == (1, 5, 16)
    assert value_format("bf16", group=64) is FORMATS["bf16"]


def test_every_operator_names_its_format() -> None:
    operators = [op_type for one in FORMATS.values() for op_type in one.op_types]
    assert len(set(operators)) == len(operators) == 14 + 4 * 2 + 3  # the products with a norm before them
    for one in FORMATS.values():
        assert {format_of(op_type) for op_type in one.op_types} == {one}
    assert format_of("SparseMatMulFuture") is None


def test_a_product_with_a_norm_holds_the_same_weight(fmt: ValueFormat) -> None:
    products = [fmt.sparse_op, fmt.swiglu_op, *([fmt.dense_op] if fmt.stores_dense else [])]
    for op_type in products:
        normed = fmt.normed_op(op_type)
        assert normed == f"SkipNorm{op_type}"
        assert fmt.product_of(normed) == fmt.product_of(op_type) == op_type
        assert fmt.tensor_names(normed) == fmt.tensor_names(op_type)
        assert fmt.attribute_names(normed) == fmt.attribute_names(op_type)
        assert fmt.input_names(op_type) == ("X",)
        assert fmt.input_names(normed) == ("X", "skip", "gamma")
        assert fmt.normed_op(normed) is None
    assert fmt.normed_op(fmt.embedding_op) is None
    assert fmt.input_names(fmt.embedding_op) == ("ids",)


def test_encoding_takes_no_more_memory_than_the_weight_itself(fmt: ValueFormat) -> None:
    weight = np.random.default_rng(0).standard_normal((16384, 256)).astype(np.float32)
    keep = np.arange(weight.size).reshape(weight.shape) % 2 == 0
    weight[~keep] = 0
    fmt.encode(weight[:16], keep[:16])  # what is imported and made once
    peaks = [traced_peak(lambda: fmt.encode(weight, keep))]
    if fmt.stores_dense:
        peaks.append(traced_peak(lambda: fmt.encode_dense(weight)))
    # bf16 has two copies of two bytes a weight in the end; blocks of rows take some megabytes
    assert max(peaks) < weight.nbytes + 6_000_000


def traced_peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'fp7' is not a value format; choose one of fp32, bf16, int8, int4"):
        value_format("fp7")


def test_a_mask_of_another_shape_is_refused(fmt: ValueFormat) -> None:
    message = r"mask of shape \(2, 3\) does not fit a weight of shape \(3, 2\)"
    with pytest.raises(MaskError, match=message):
        fmt.encode(np.zeros((3, 2), np.float32), np.zeros((2, 3), np.bool_))
    with pytest.raises(MaskError, match=message):
        pack(np.zeros((3, 2), np.float32), np.zeros((2, 3), np.bool_))


def test_a_weight_that_is_awake_where_it_is_pruned_is_refused(fmt: ValueFormat) -> None:
    weight = np.zeros((600, 4), np.float32)
    weight[599, 3] = np.nan
    with pytest.raises(MaskError, match="not zero at every pruned position"):
        fmt.encode(weight, np.zeros(weight.shape, np.bool_))


def test_masks_that_contradict_their_size_are_refused() -> None:
    with pytest.raises(FormatError, match=r"uint8 \(1, 4, 2\), which fits no weight of 17 rows and 4 columns"):
        unpack_mask(np.zeros((1, 4, 2), np.uint8), 17, 4)
    with pytest.raises(FormatError, match=r"uint8 \(1, 2, 8\), which fits no weight of 16 rows and 9 columns"):
        unpack_mask(np.zeros((1, 2, 8), np.uint8), 16, 9)
    with pytest.raises(FormatError, match=r"uint8 \(1, 4, 6\), which fits no weight"):
        unpack_mask(np.zeros((1, 4, 6), np.uint8), 16, 12)
    with pytest.raises(FormatError, match="keeps weights outside of 15 rows and 4 columns"):
        unpack_mask(np.full((1, 4, 2), 255, np.uint8), 15, 4)
    with pytest.raises(FormatError, match="keeps weights outside of 16 rows and 7 columns"):
        unpack_mask(np.full((1, 2, 8), 255, np.uint8), 16, 7)


def test_values_that_contradict_the_mask_are_refused() -> None:
    mask, values, _ = pack(np.ones((4, 4), np.float32), np.ones((4, 4), np.bool_))
    with pytest.raises(FormatError, match="keeps 16 positions, but 15 values are stored"):
        unpack(mask, values[:-1], 4, 4)
    with pytest.raises(FormatError, match="of 4 rows and 4 columns needs 64 values, but 63 are stored"):
        take_back(np.zeros(63, np.int8), 4, 4, 4)


def changed(encoded: EncodedWeight, **tensors: np.ndarray) -> EncodedWeight:
    return replace(encoded, tensors={**encoded.tensors, **tensors})


def test_tensors_that_contradict_each_other_are_refused(fmt: ValueFormat) -> None:
    encoded = fmt.encode(np.ones((4, 4), np.float32), np.ones((4, 4), np.bool_))
    with pytest.raises(FormatError, match="block_offsets do not count"):
        fmt.decode(changed(encoded, block_offsets=np.array([0, 15])))
    with pytest.raises(FormatError, match=r"values are \w+ \(3,\); \w+ \(stored \+ (16|32|64),\) is needed"):
        fmt.decode(changed(encoded, values=encoded.tensors["values"][:3]))
    with pytest.raises(FormatError, match="values are float64"):
        fmt.decode(changed(encoded, values=np.zeros(80)))
    if "scales" in encoded.tensors:
        with pytest.raises(FormatError, match=r"scales are float16 \(1, 2, 16\), not float16 \(1, 1, 16\)"):
            fmt.decode(changed(encoded, scales=np.zeros((1, 2, 16), np.float16)))
    if "codebook" in encoded.tensors:
        with pytest.raises(FormatError, match=r"codebook has shape \(15,\), not \(16,\)"):
            fmt.decode(changed(encoded, codebook=np.zeros(15, np.int8)))
