from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_export import compensate
from losa_export.compensate import InputMoments, compensated_int4, compensated_int8, output_errors
from losa_export.errors import FormatError
from losa_export.quantise import apply_codebook, nearest_codes, quantise_int4, quantise_int8


def problem(rows, columns, sparsity, seed=0, tokens=200):
    """A weight, its mask, and moments of correlated inputs that earlier rounding has disturbed."""
    generator = np.random.default_rng(seed)
    weight = (generator.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    keep = generator.random(weight.shape) >= sparsity
    weight[~keep] = 0
    few = max(1, columns // 4)
    x = generator.standard_normal((tokens, few)) @ generator.standard_normal((few, columns))
    x += 0.3 * generator.standard_normal(x.shape)
    x *= np.exp(generator.standard_normal(columns))
    disturbed = x + 0.02 * generator.standard_normal(x.shape)
    gram, cross = disturbed.T @ disturbed / tokens, disturbed.T @ x / tokens
    return weight, keep, InputMoments(gram.astype(np.float32), cross.astype(np.float32))


def importance(moments):
    """What `compensated_int4` fits its codebook by, from its definition."""
    gram = moments.gram.astype(np.float64)
    gram += 0.01 * gram.diagonal().mean() * np.eye(len(gram))
    found = np.sqrt(gram.diagonal() / np.linalg.inv(gram).diagonal())
    return (found / found.mean()).astype(np.float32)


shapes = st.tuples(st.integers(1, 20), st.integers(1, 150), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(0, 99))
groups = st.sampled_from([1, 32, 128])
# Errors of two roundings are sums of float32 products: they may come out in another order.
NOISE = 1e-4


@settings(max_examples=40)
@given(shapes, groups)
def test_int8_is_never_worse_than_plain_rounding_in_any_row(shape, group):
    weight, keep, moments = problem(*shape)
    found = compensated_int8(weight, keep, group, moments)
    assert found.levels.dtype == np.int8
    assert found.scales.dtype == np.float16
    assert np.abs(found.levels.astype(int)).max(initial=0) <= 127
    assert np.isfinite(found.scales).all()
    assert (found.scales >= 0).all()
    assert not found.levels[~keep].any()
    plain = quantise_int8(weight, keep, group).dequantise()
    ours, theirs = (output_errors(weight, one, moments) for one in (found.dequantise(), plain))
    size = -output_errors(weight, weight, moments)  # E‖y‖², roughly: what a float32 error is relative to
    assert (ours <= theirs + NOISE * size).all()


@settings(max_examples=40)
@given(shapes, groups)
def test_int4_is_never_worse_than_plain_rounding_in_any_row(shape, group):
    weight, keep, moments = problem(*shape)
    found = compensated_int4(weight, keep, group, moments)
    assert found.codes.dtype == np.uint8
    assert found.codes.max(initial=0) <= 15
    assert (np.diff(found.codebook.astype(int)) > 0).all()
    assert np.isfinite(found.scales).all()
    assert (found.scales >= 0).all()
    assert not found.codes[~keep].any()
    plain = apply_codebook(weight, keep, group, found.codebook, importance(moments))
    ours, theirs = (output_errors(weight, one.dequantise(keep), moments) for one in (found, plain))
    size = -output_errors(weight, weight, moments)
    assert (ours <= theirs + NOISE * size).all()


def output_error(weight, restored, moments):
    """Relative mean square error of outputs where nothing before was rounded."""
    off = restored - weight
    return np.vdot(off @ moments.gram, off) / np.vdot(weight @ moments.gram, weight)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
def test_correlated_inputs_let_errors_cancel(sparsity):
    weight, keep, moments = problem(64, 256, sparsity, tokens=2000)
    moments = InputMoments(moments.gram, moments.gram)
    plain4 = quantise_int4(weight, keep, 128, importance=moments.gram.diagonal()).dequantise(keep)
    ours4 = compensated_int4(weight, keep, 128, moments).dequantise(keep)
    assert output_error(weight, ours4, moments) < 0.5 * output_error(weight, plain4, moments)
    plain8 = quantise_int8(weight, keep, 128).dequantise()
    ours8 = compensated_int8(weight, keep, 128, moments).dequantise()
    assert output_error(weight, ours8, moments) < 0.5 * output_error(weight, plain8, moments)


def test_uncorrelated_inputs_leave_the_nearest_level_of_the_stored_scale():
    weight, keep, _ = problem(20, 96, 0.5)
    gram = np.diag(np.random.default_rng(1).random(96) + 0.1).astype(np.float32)
    found = compensated_int4(weight, keep, 32, InputMoments(gram, gram))
    nearest = nearest_codes(weight / np.repeat(found.scales.astype(np.float32), 32, axis=1), found.codebook)
    # A weight in the middle between two levels may go to either: its place is rounded on the way.
    assert (found.codes == nearest)[keep].mean() > 0.999


def test_a_few_weights_get_the_codes_that_trying_all_finds():
    weight, keep, moments = problem(60, 3, 0.0, tokens=50)
    found = compensated_int4(weight, keep, 32, moments)
    every = np.array(list(itertools.product(range(16), repeat=3)))
    reached = 0
    for row, ours in enumerate(output_errors(weight, found.dequantise(keep), moments)):
        restored = found.codebook.astype(np.float32)[every] * found.scales[row].astype(np.float32)
        best = output_errors(np.repeat(weight[row : row + 1], len(every), axis=0), restored, moments).min()
        assert ours >= best - 1e-6 * abs(best)  # float32 sums in another order
        reached += bool(ours <= best + 1e-3 * abs(best))
    assert reached >= 54  # descent may end beside the best of 4096, which few rows show


def test_no_single_code_lowers_the_error_much():
    weight, keep, moments = problem(8, 40, 0.5)
    found = compensated_int4(weight, keep, 32, moments)
    ours = output_errors(weight, found.dequantise(keep), moments)
    size = -output_errors(weight, weight, moments)
    for column, code in itertools.product(range(40), range(16)):
        codes = found.codes.copy()
        codes[:, column] = np.where(keep[:, column], code, 0)
        other = type(found)(codes, found.scales, found.codebook, found.group)
        # Two sweeps end near such a point, not at it.
        assert (output_errors(weight, other.dequantise(keep), moments) >= ours - 5e-3 * size).all()


def test_a_linear_makes_up_for_inputs_that_came_out_too_small():
    weight, keep, moments = problem(16, 64, 0.5, tokens=2000)
    halved = InputMoments(moments.gram / 4, moments.gram / 2)  # x̂ = x / 2
    restored = compensated_int8(weight, keep, 32, halved).dequantise()
    assert not restored[~keep].any()
    # Damping pulls weights that hardly any input meets back to where they were.
    assert output_error(2 * weight, restored, moments) < 0.01


def test_results_repeat_and_do_not_depend_on_how_many_rows_are_taken_at_a_time(monkeypatch):
    weight, keep, moments = problem(33, 130, 0.5)
    before = weight.copy()
    first = compensated_int4(weight, keep, 64, moments)
    again = compensated_int4(weight, keep, 64, moments)
    np.testing.assert_array_equal(first.codes, again.codes)
    np.testing.assert_array_equal(first.scales, again.scales)
    np.testing.assert_array_equal(weight, before)
    monkeypatch.setattr(compensate, "_WEIGHTS_AT_ONCE", 130 * 7)
    apart = compensated_int4(weight, keep, 64, moments)
    # BLAS adds up in another order for another shape, which may tip a weight between two levels.
    assert (first.codes == apart.codes).mean() > 0.95


def test_what_stands_at_pruned_positions_does_not_matter():
    weight, keep, moments = problem(16, 128, 0.5)
    dirty = np.where(keep, weight, np.float32(np.nan))
    for compensated, name in ((compensated_int8, "levels"), (compensated_int4, "codes")):
        clean = compensated(weight, keep, 64, moments)
        np.testing.assert_array_equal(getattr(compensated(dirty, keep, 64, moments), name), getattr(clean, name))


def test_inputs_that_are_always_zero_leave_plain_rounding():
    weight, keep, _ = problem(16, 128, 0.5)
    nothing = np.zeros((128, 128), np.float32)
    found = compensated_int8(weight, keep, 64, InputMoments(nothing, nothing)).dequantise()
    plain = quantise_int8(weight, keep, 64).dequantise()
    assert np.linalg.norm(found - weight) <= np.linalg.norm(plain - weight) * 1.0001  # float32 sums


@pytest.mark.parametrize("compensated", [compensated_int8, compensated_int4])
def test_a_weight_without_level_is_refused(compensated):
    weight, keep, moments = problem(4, 32, 0.0)
    weight[2, 5] = np.inf
    with pytest.raises(FormatError, match="the weight at row 2, column 5 is inf, which has no level"):
        compensated(weight, keep, 32, moments)
