from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_export import quantise
from losa_export.errors import FormatError
from losa_export.quantise import optimal_codebook, quantise_int4, quantise_int8


def pruned(rows, columns, sparsity, seed=0, scale=0.02):
    generator = np.random.default_rng(seed)
    weight = (generator.standard_normal((rows, columns)) * scale).astype(np.float32)
    keep = generator.random(weight.shape) >= sparsity
    if 0 < sparsity < 1:  # by magnitude, so that there is a dead zone
        keep = np.abs(weight) >= np.quantile(np.abs(weight), sparsity)
    weight[~keep] = 0
    return weight, keep


def relative_error(weight, restored):
    return float(np.linalg.norm(restored - weight) / np.linalg.norm(weight))


shapes = st.tuples(st.integers(1, 20), st.integers(1, 150), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(0, 99))


@settings(max_examples=60)
@given(shapes, st.sampled_from([1, 32, 128]))
def test_int8_is_within_half_a_level_of_the_stored_scale(shape, group):
    weight, keep = pruned(*shape)
    before = weight.copy()
    found = quantise_int8(weight, keep, group)
    assert found.levels.dtype == np.int8
    assert found.scales.dtype == np.float16
    assert found.scales.shape == (shape[0], -(-shape[1] // group))
    assert found.levels.min() >= -127
    assert not found.levels[~keep].any()
    step = np.repeat(found.scales.astype(np.float32), group, axis=1)[:, : shape[1]]
    # Half a step; the largest weight of a group may lie 127 · 2⁻¹¹ steps beyond the last level.
    assert (np.abs(found.dequantise() - weight) <= step * 0.57).all()
    np.testing.assert_array_equal(weight, before)


@settings(max_examples=60)
@given(shapes, st.sampled_from([1, 32, 128]))
def test_int4_takes_the_nearest_entry_for_the_stored_scale(shape, group):
    weight, keep = pruned(*shape)
    before = weight.copy()
    found = quantise_int4(weight, keep, group)
    assert found.codes.dtype == np.uint8
    assert found.codebook.dtype == np.int8
    assert found.codebook.shape == (16,)
    assert (np.diff(found.codebook.astype(int)) > 0).all()
    assert found.codebook[0] >= -127
    assert not found.codes[~keep].any()
    step = np.repeat(found.scales.astype(np.float32), group, axis=1)[:, : shape[1]]
    every = np.abs(weight[:, :, None] - step[:, :, None] * found.codebook.astype(np.float32))
    ours = np.abs(found.dequantise(keep) - weight)
    # Half-level cells are numbered in float32, up to 512: a weight within 2⁻¹⁶ steps of a border may take either side.
    assert (ours[keep] <= every.min(axis=2)[keep] + step[keep] * 5e-5).all()
    np.testing.assert_array_equal(weight, before)


def test_pruned_positions_come_back_as_exact_zeros():
    weight, keep = pruned(33, 200, 0.7)
    assert not quantise_int4(weight, keep, 128).dequantise(keep)[~keep].any()
    assert not quantise_int8(weight, keep, 128).dequantise()[~keep].any()


def test_what_stands_at_pruned_positions_does_not_matter():
    weight, keep = pruned(16, 128, 0.5)
    dirty = np.where(keep, weight, np.float32(np.nan))
    np.testing.assert_array_equal(quantise_int8(dirty, keep, 64).levels, quantise_int8(weight, keep, 64).levels)
    found = quantise_int4(dirty, keep, 64)
    np.testing.assert_array_equal(found.codes, quantise_int4(weight, keep, 64).codes)
    assert np.isfinite(found.dequantise(keep)).all()


def test_a_codebook_leaves_the_dead_zone_out_and_a_dense_one_does_not():
    weight, keep = pruned(256, 512, 0.7)
    dead = np.abs(quantise_int4(weight, keep, 128).codebook.astype(int)).min()
    dense, everything = pruned(256, 512, 0.0)
    assert dead > 20
    assert np.abs(quantise_int4(dense, everything, 128).codebook.astype(int)).min() < 8


def test_errors_are_those_of_the_prototype_study():
    # sparse Gaussian weights, 70 % zeros by magnitude, group 128: int8 0.004 … 0.007, Lloyd levels 0.044
    weight, keep = pruned(512, 1024, 0.7)
    assert relative_error(weight, quantise_int8(weight, keep, 128).dequantise()) < 0.005
    assert relative_error(weight, quantise_int4(weight, keep, 128).dequantise(keep)) < 0.043


def test_a_codebook_is_the_best_of_all():
    # Values at few integer places only: then the best 16 of them can be found by trying all.
    generator = np.random.default_rng(3)
    places = np.sort(generator.choice(np.arange(-127, 128), 18, replace=False)).astype(float)
    costs = generator.random(18)
    moments = np.zeros((3, 512))
    for power in range(3):
        np.add.at(moments[power], quantise._cells(places), costs * places**power)

    def error(levels):
        return float((costs * np.square(places[:, None] - np.asarray(levels, float)).min(axis=1)).sum())

    found = optimal_codebook(moments)
    # All codebooks that leave two places without a level of their own; a level between places can only be better.
    tried = min(error(np.delete(places, pair)) for pair in itertools.combinations(range(18), 2))
    assert error(found) <= tried + 1e-9
    improved = [error([*found[:i], level, *found[i + 1 :]]) for i in range(16) for level in range(-127, 128)]
    assert error(found) <= min(improved) + 1e-9


def test_scales_that_suit_a_codebook_lower_the_error():
    weight, keep = pruned(64, 300, 0.5)
    importance = np.random.default_rng(1).lognormal(0, 2, 300).astype(np.float32)
    codebook = quantise.fit_codebook(weight, keep, 128, importance)
    (part,) = quantise.kept_groups(weight, keep, 128, importance)

    def errors(scales):
        levels = codebook.astype(np.float32)[quantise.nearest_codes(part.over(scales), codebook)]
        off = levels * np.repeat(scales, part.counts) - part.values
        return np.add.reduceat(part.costs * off * off, part.starts)

    suited = errors(quantise.suited_scales(part, codebook))
    # No group is worse than under any scale tried; float32 sums of a hundred terms differ in the sixth digit.
    for trial in quantise._SCALE_TRIALS:
        assert (suited <= errors(part.absmax_scales() * np.float32(trial)) * (1 + 1e-4)).all()
    assert suited.sum() < 0.85 * errors(part.absmax_scales()).sum()


def test_kept_groups_leave_out_what_is_all_zero():
    weight = np.arange(20, dtype=np.float32).reshape(2, 10) - 9
    keep = np.ones((2, 10), dtype=bool)
    keep[0, :4] = False  # a group without kept weights
    weight[1, 8:] = 0  # a short group of kept zeros
    keep[1, 5] = False
    (part,) = quantise.kept_groups(weight, keep, 4, importance=np.arange(10, dtype=np.float32))
    assert part.living.tolist() == [[False, True, True], [True, True, False]]
    assert part.counts.tolist() == [4, 2, 4, 3]
    assert part.starts.tolist() == [0, 4, 6, 10]
    assert part.values.tolist() == [-5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 8]
    assert part.costs.tolist() == [4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 6, 7]
    assert part.spread(np.arange(1, 5, dtype=np.float16)).tolist() == [[0, 1, 2], [3, 4, 0]]
    np.testing.assert_array_equal(weight[part.rows][part.keep], part.values)


def wanda(rows, columns, sparsity, norms, seed=0):
    """A Gaussian weight, pruned row by row by |w| times the norm of its column's input."""
    weight, _ = pruned(rows, columns, 0.0, seed)
    score = np.abs(weight) * norms
    keep = score >= np.quantile(score, sparsity, axis=1, keepdims=True)
    return np.where(keep, weight, np.float32(0)), keep


def test_importance_is_read_off_a_mask_that_wanda_made():
    norms = np.random.default_rng(5).lognormal(0, 0.7, 400).astype(np.float32)
    weight, keep = wanda(1000, 400, 0.6, norms)
    found = quantise.column_importance(weight, keep)
    truth = np.square(norms)
    seen = keep.any(axis=0)
    assert np.corrcoef(np.log(found[seen]), np.log(truth[seen]))[0, 1] > 0.97
    # and so the error of the outputs, for independent inputs, is near what the inputs themselves would give
    outputs = {
        name: float(
            (np.square(quantise_int4(weight, keep, 128, importance=given).dequantise(keep) - weight) @ truth).sum()
        )
        for name, given in {"mask": None, "inputs": truth, "alike": np.ones_like(truth)}.items()
    }
    assert outputs["inputs"] < outputs["mask"] < 1.2 * outputs["inputs"]
    assert outputs["mask"] < 0.7 * outputs["alike"]


def test_importance_is_even_where_the_mask_says_nothing_of_inputs():
    weight, keep = pruned(1000, 50, 0.6)
    np.testing.assert_allclose(quantise.column_importance(weight, keep), 1, rtol=0.1)
    weight, keep = pruned(1000, 50, 0.0)
    np.testing.assert_array_equal(quantise.column_importance(weight, keep), 1)
    nothing = np.zeros((4, 6), dtype=np.float32)
    np.testing.assert_array_equal(quantise.column_importance(nothing, nothing != 0), 1)


def test_importance_is_finite_and_bounded_whatever_a_column_kept():
    weight, keep = pruned(100, 8, 0.5)
    keep[:, 0] = False  # nothing
    weight[:, 1], keep[:, 1] = 0, True  # only zeros
    weight[0, 2], keep[:, 2] = 1e-30, [True] + [False] * 99
    found = quantise.column_importance(np.where(keep, weight, np.float32(0)), keep)
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() <= 1.01e4


def test_a_group_of_zeros_has_scale_0():
    weight = np.zeros((2, 96), np.float32)
    weight[0, :32] = np.linspace(-1, 1, 32)
    keep = np.ones_like(weight, dtype=bool)
    eight, four = quantise_int8(weight, keep, 32), quantise_int4(weight, keep, 32)
    for found in (eight, four):
        np.testing.assert_array_equal(found.scales[0, 1:], 0)
        np.testing.assert_array_equal(found.scales[1], 0)
        assert found.scales[0, 0] > 0
    assert not eight.dequantise()[:, 32:].any()
    assert not four.dequantise(keep)[:, 32:].any()


@pytest.mark.parametrize("quantise_it", [quantise_int8, quantise_int4])
def test_a_weight_of_nothing_but_zeros(quantise_it):
    found = quantise_it(np.zeros((5, 40), np.float32), np.zeros((5, 40), bool), 32)
    assert not found.scales.any()


@pytest.mark.parametrize("quantise_it", [quantise_int8, quantise_int4])
@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e6])
def test_scales_reach_far(quantise_it, size):
    weight, keep = pruned(32, 128, 0.5, scale=size)
    found = quantise_it(weight, keep, 32)
    restored = found.dequantise() if quantise_it is quantise_int8 else found.dequantise(keep)
    # At 1e-5 a scale is two float16 steps, rounded up: twice the step that a free scale would have.
    assert relative_error(weight, restored) < (0.02 if quantise_it is quantise_int8 else 0.12)


@pytest.mark.parametrize("quantise_it", [quantise_int8, quantise_int4])
def test_a_group_of_tiny_weights_loses_less_than_a_float16_step(quantise_it):
    weight, keep = pruned(8, 128, 0.0)
    weight[:, :32] = 1e-9
    found = quantise_it(weight, keep, 32)
    restored = found.dequantise() if quantise_it is quantise_int8 else found.dequantise(keep)
    assert np.abs(restored - weight)[:, :32].max() < 127 * 2.0**-24


@pytest.mark.parametrize("quantise_it", [quantise_int8, quantise_int4])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"row 3, column 7 is nan.*mend the checkpoint"),
        (-np.inf, r"row 3, column 7 is -inf.*mend the checkpoint"),
        (1e7, r"largest weight is 1e\+07.*float16 scales reach 8\.319e\+06.*fp32 or bf16"),
    ],
)
def test_weights_that_scales_cannot_hold_are_refused(quantise_it, value, message):
    weight, keep = pruned(8, 40, 0.0)
    weight[3, 7] = value
    with pytest.raises(FormatError, match=message):
        quantise_it(weight, keep, 32)
    keep[3, 7] = False  # a pruned position is none of our business
    quantise_it(weight, keep, 32)


@pytest.mark.parametrize("quantise_it", [quantise_int8, quantise_int4])
def test_a_weight_too_small_for_any_scale_is_refused(quantise_it):
    weight, keep = pruned(8, 40, 0.0, scale=1e-9)
    with pytest.raises(FormatError, match=r"float16 scales resolve only 7\.57e-06.*fp32 or bf16"):
        quantise_it(weight, keep, 32)


@pytest.mark.parametrize("quantise_it", [quantise_int8, quantise_int4])
def test_a_mask_or_group_that_does_not_fit_is_refused(quantise_it):
    weight, keep = pruned(8, 40, 0.5)
    with pytest.raises(FormatError, match=r"mask bool \(8, 39\) does not fit a weight of shape \(8, 40\)"):
        quantise_it(weight, keep[:, 1:], 32)
    with pytest.raises(FormatError, match="groups of 0 columns"):
        quantise_it(weight, keep, 0)


def test_parts_and_samples_do_not_show(monkeypatch):
    weight, keep = pruned(100, 130, 0.5)
    whole = quantise_int4(weight, keep, 64)
    monkeypatch.setattr(quantise, "_WEIGHTS_AT_ONCE", 1000)
    parts = quantise_int4(weight, keep, 64)
    np.testing.assert_array_equal(whole.codebook, parts.codebook)
    np.testing.assert_array_equal(whole.codes, parts.codes)
    monkeypatch.setattr(quantise, "_CODEBOOK_SAMPLE", weight.size // 4)
    monkeypatch.setattr(quantise, "_IMPORTANCE_SAMPLE", weight.size // 2)
    sampled = quantise_int4(weight, keep, 64)
    ratio = relative_error(weight, sampled.dequantise(keep)) / relative_error(weight, whole.dequantise(keep))
    assert ratio < 1.03


def test_memory_stays_near_that_of_the_result():
    weight, keep = pruned(2048, 2048, 0.0)
    tracemalloc.start()
    quantise_int4(weight, keep, 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < weight.size + (24 << 20)  # one byte a code, and the temporaries of one part
