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
    # One float32 rounding of weight / scale, at most 128 · 2⁻²⁴ steps, may turn a tie the other way.
    assert (ours[keep] <= every.min(axis=2)[keep] + step[keep] * 2e-5).all()
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


def test_refitting_scales_lowers_the_error():
    weight, keep = pruned(64, 256, 0.5)
    kept, mask = weight.reshape(64, 2, 128), keep.reshape(64, 2, 128)
    codebook = quantise_int4(weight, keep, 128).codebook

    def error(scales):
        codes = quantise.nearest_codes(quantise._over_scale(kept, scales), codebook)
        values = codebook.astype(np.float32)[codes] * scales.astype(np.float32)[:, :, None]
        return float(np.square(np.where(mask, values - kept, 0)).sum())

    begin = quantise.absmax_scales(kept)
    assert error(quantise.refitted_scales(kept, mask, begin, codebook)) < 0.97 * error(begin)


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
    monkeypatch.setattr(quantise, "_SAMPLE_WEIGHTS", weight.size // 4)
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
