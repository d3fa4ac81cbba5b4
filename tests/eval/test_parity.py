from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from losa_export.errors import ConfigError, GateError
from losa_export.eval.parity import GateThresholds, compare, deviation, gate, log_softmax, position_errors


def test_relative_error_is_the_largest_difference_over_the_rows_root_mean_square():
    reference = np.array([[3.0, 4.0, 0.0, 0.0]], dtype=np.float32)
    candidate = np.array([[3.0, 4.5, 0.0, 0.25]], dtype=np.float32)
    errors = position_errors(reference, candidate)
    assert errors.relative[0] == pytest.approx(0.5 / 2.5, rel=1e-12)  # rms of 3, 4, 0, 0 is 2.5
    assert errors.absolute[0] == 0.5
    assert errors.worst_token[0] == 1


def test_kl_divergence_equals_its_definition():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 6, 9))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    figures = compare(a, b)
    expected = (p * np.log(p / q)).sum(-1)
    assert figures.kl_mean == pytest.approx(expected.mean(), rel=1e-10)  # float64 rounding
    assert figures.kl_max == pytest.approx(expected.max(), rel=1e-10)
    assert figures.positions == 6


def test_equal_logits_have_no_error_and_full_agreement():
    logits = np.random.default_rng(1).normal(size=(3, 4, 5)).astype(np.float32)
    figures = compare(logits, logits.copy())
    assert figures.max_relative_error == figures.kl_max == figures.max_absolute_error == 0.0
    assert figures.argmax_agreement == 1.0
    assert figures.positions == 12


def test_argmax_agreement_is_the_fraction_of_equal_choices():
    a = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    b = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert compare(a, b).argmax_agreement == 0.75


def test_a_common_shift_changes_no_probability_and_overflows_nowhere():
    a = np.array([[1000.0, 999.0, -1000.0]], dtype=np.float32)
    np.testing.assert_allclose(log_softmax(a), log_softmax(a - 1000), rtol=0, atol=1e-12)  # float64 rounding


def test_an_all_zero_reference_gives_a_huge_but_finite_relative_error():
    assert np.isfinite(compare(np.zeros((1, 3)), np.ones((1, 3))).max_relative_error)


logit_rows = arrays(np.float32, (3, 6), elements=st.floats(-50, 50, width=32))


@given(logit_rows, logit_rows, st.sampled_from([2.0, 1024.0]))
def test_divergence_is_never_negative_and_relative_error_knows_no_scale(a, b, factor):
    one, scaled = position_errors(a, b), position_errors(a * np.float32(factor), b * np.float32(factor))
    assert (one.kl >= 0).all()
    assert (one.agree == scaled.agree).all()
    has_scale = np.sqrt((a.astype(float) ** 2).mean(axis=1)) > 1e-20  # else the floor of the scale counts
    # Powers of two scale exactly; the rest is float64 rounding.
    np.testing.assert_allclose(scaled.relative[has_scale], one.relative[has_scale], rtol=1e-9)


def test_shapes_that_differ_are_refused():
    with pytest.raises(GateError, match=r"shape \(2, 4\), the reference has \(2, 5\)"):
        compare(np.zeros((2, 5)), np.zeros((2, 4)))


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_values_that_are_not_finite_are_named(value, word):
    bad = np.zeros((2, 5))
    bad[1, 3] = value
    with pytest.raises(GateError, match=rf"the runtime gives {word} logits \(first: token 3\)"):
        compare(np.zeros((2, 5)), bad)
    with pytest.raises(GateError, match=rf"the reference gives {word} logits"):
        compare(bad, np.zeros((2, 5)))


@pytest.mark.parametrize("field", ["max_relative_error", "max_kl", "tie_margin", "stray_share"])
@pytest.mark.parametrize("value", [-1e-9, float("nan")])
def test_thresholds_out_of_range_name_the_field(field, value):
    with pytest.raises(ConfigError, match=rf"GateThresholds\.{field} is"):
        GateThresholds(**{field: value})


def test_a_faithful_runtime_passes_and_its_report_is_plain_json(fake_runtime, reference_of):
    runtime = fake_runtime()
    report = gate(reference_of(runtime), runtime)
    stored = json.loads(json.dumps(report.as_dict()))
    assert stored["runtime"] == "fake"
    assert stored["prefill"]["positions"] == 15
    assert stored["decode"]["positions"] == stored["batch3"]["positions"] == 12
    assert stored["greedy"] == {"tokens": 24, "equal": 24, "tolerated": []}
    assert stored["prefill"]["max_relative_error"] == 0.0


def test_the_gate_decodes_the_three_prompts_in_one_state(fake_runtime, reference_of):
    runtime = fake_runtime()
    reference = reference_of(runtime)
    runtime.calls.clear()
    gate(reference, runtime)
    assert runtime.calls.count(("decode", 3)) == 7  # eight greedy tokens, the first from the prefill
    assert runtime.calls.count(("decode", 1)) == 12


def test_a_wrong_prefill_names_prompt_position_and_token(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())

    def disturb(kind, row, state, logits):
        disturb.prefills += kind == "prefill"
        if kind == "prefill" and disturb.prefills == 2:
            logits[3:, 6] += 1
        return logits

    disturb.prefills = 0
    with pytest.raises(
        GateError, match=r"first output that diverges is prefill of prompt 1, position 3, token 6"
    ) as caught:
        gate(reference, fake_runtime(disturb=disturb))
    assert caught.value.where == "prefill of prompt 1, position 3"
    assert caught.value.relative_error > 0.1


def test_a_wrong_decode_names_the_step(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())

    def disturb(kind, batch, state, logits):
        if kind == "decode" and batch == 1 and state.steps == 2:
            logits[0, 4] -= 1
        return logits

    with pytest.raises(GateError, match=r"decode with past of prompt 0, step 2, token 4"):
        gate(reference, fake_runtime(disturb=disturb))


def test_a_row_that_only_a_batch_gets_wrong_is_named(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())

    def disturb(kind, batch, state, logits):
        if kind == "decode" and batch == 3 and state.steps == 3:
            logits[1, 4] -= 1
        return logits

    with pytest.raises(GateError, match=r"decode in a batch of 3, step 3, row 1, token 4"):
        gate(reference, fake_runtime(disturb=disturb))


def test_a_prefill_that_goes_wrong_only_in_a_batch_is_named(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())

    def disturb(kind, row, state, logits):
        if kind == "prefill" and len(state.lengths) == 3 and row == 2:
            logits[-1, 4] -= 1
        return logits

    with pytest.raises(GateError, match=r"prefill of prompt 2 into row 2 of a batch of 3, last position"):
        gate(reference, fake_runtime(disturb=disturb))


def test_nan_logits_fail_the_gate_by_that_name(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())

    def disturb(kind, row, state, logits):
        if kind == "decode":
            logits[0, 2] = np.nan
        return logits

    with pytest.raises(GateError, match=r"runtime 'fake' gives NaN logits at decode with past of prompt 0, step 0"):
        gate(reference, fake_runtime(disturb=disturb))


def test_nan_after_the_stored_decode_logits_is_found_too(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())

    def disturb(kind, batch, state, logits):
        if kind == "decode" and state.steps == 6:
            logits[2, 2] = np.nan
        return logits

    with pytest.raises(GateError, match=r"NaN logits at greedy token 7, row 2"):
        gate(reference, fake_runtime(disturb=disturb))


def test_logits_of_another_vocabulary_fail_the_gate(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())
    with pytest.raises(GateError, match=r"shape \(5, 11\)|shape \(5, 12\)"):
        gate(reference, fake_runtime(vocab_size=12))


def _swap_top_two(logits, row):
    order = np.argsort(logits[row])
    first, second = order[-1], order[-2]
    logits[row, first], logits[row, second] = logits[row, second], logits[row, first]


def test_a_greedy_flip_at_a_clear_lead_fails(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())

    def disturb(kind, batch, state, logits):
        if kind == "decode" and state.steps == 5:  # past the steps whose logits are stored
            _swap_top_two(logits, 1)
        return logits

    with pytest.raises(GateError, match=r"greedy token 6, row 1: token \d+ instead of \d+, where the refer"):
        gate(reference, fake_runtime(disturb=disturb))


def test_a_greedy_flip_at_a_tie_is_tolerated_and_reported(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())
    reference.greedy_margin[1, 6] = 1e-6

    def disturb(kind, batch, state, logits):
        if kind == "decode" and state.steps == 5:
            _swap_top_two(logits, 1)
        return logits

    report = gate(reference, fake_runtime(disturb=disturb))
    assert report.greedy.equal == report.greedy.tokens - 1
    (flip,) = report.greedy.tolerated
    assert (flip.prompt, flip.step) == (1, 6)
    assert flip.expected == reference.greedy[1, 6]
    assert flip.got != flip.expected
    assert flip.reference_margin == pytest.approx(1e-6)


def test_looser_thresholds_let_a_small_error_pass(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())

    def disturb(kind, row, state, logits):
        return logits * np.float32(1 + 1e-3)

    with pytest.raises(GateError, match=r"limit 0\.0001"):
        gate(reference, fake_runtime(disturb=disturb), GateThresholds(max_relative_error=1e-4))
    gate(reference, fake_runtime(disturb=disturb), GateThresholds(max_relative_error=1e-1, max_kl=1e-2))


def _shift_prefills(first, last):
    """Disturbs position 3 of some of the prompts that are read alone, counted from 1."""

    def disturb(kind, row, state, logits):
        disturb.prefills += kind == "prefill"
        if kind == "prefill" and first <= disturb.prefills <= last:
            logits[3, 6] += 1
        return logits

    disturb.prefills = 0
    return disturb


def test_few_strays_are_let_pass_named_and_left_out_of_the_figures(fake_runtime, reference_of):
    reference, few = reference_of(fake_runtime()), GateThresholds(stray_share=0.15)  # 2 of 15
    report = gate(reference, fake_runtime(disturb=_shift_prefills(1, 2)), few)
    assert [stray.where for stray in report.strays] == [f"prefill of prompt {p}, position 3" for p in (0, 1)]
    assert all(stray.kl > few.max_kl for stray in report.strays)
    assert (report.prefill.positions, report.prefill.max_relative_error) == (13, 0.0)


def test_one_stray_more_than_may_fails(fake_runtime, reference_of):
    with pytest.raises(GateError, match=r"after 2 that may, the next output that diverges is prefill of prompt 2, pos"):
        gate(
            reference_of(fake_runtime()),
            fake_runtime(disturb=_shift_prefills(1, 3)),
            GateThresholds(stray_share=0.15),
        )


def test_strays_do_not_cover_a_row_that_a_batch_gets_wrong(fake_runtime, reference_of):
    def disturb(kind, batch, state, logits):
        if kind == "decode" and batch == 3:
            logits[1, 4] -= 1
        return logits

    with pytest.raises(GateError, match=r"decode in a batch of 3, step \d, row 1, token 4"):
        gate(reference_of(fake_runtime()), fake_runtime(disturb=disturb), GateThresholds(stray_share=0.15))


def test_a_greedy_flip_at_a_clear_lead_may_be_a_stray_but_not_all_of_them(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())

    def flips(steps):
        def disturb(kind, batch, state, logits):
            if kind == "decode" and state.steps in steps:  # past the steps whose logits are stored
                _swap_top_two(logits, 1)
            return logits

        return fake_runtime(disturb=disturb)

    few = GateThresholds(stray_share=0.05)  # 1 of 24
    report = gate(reference, flips([5]), few)
    assert (report.greedy.equal, len(report.greedy.tolerated)) == (23, 1)
    with pytest.raises(GateError, match=r"greedy token 7, row 1"):
        gate(reference, flips([5, 6]), few)


def test_a_reference_without_decode_steps_is_refused(fake_runtime, reference_of):
    reference = reference_of(fake_runtime(), decode_steps=0)
    with pytest.raises(GateError, match=r"no prompts or no decode steps"):
        gate(reference, fake_runtime())


def test_deviation_covers_prompts_and_decode_steps_and_judges_nothing(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())

    def disturb(kind, row, state, logits):
        return logits + np.arange(logits.shape[-1], dtype=np.float32)

    assert deviation(reference, fake_runtime()).max_relative_error == 0.0
    figures = deviation(reference, fake_runtime(disturb=disturb))
    assert figures.positions == 15 + 12
    assert figures.kl_mean > 0.1
    assert figures.max_absolute_error == pytest.approx(10, rel=1e-6)  # float32 rounding of the sum


def test_deviation_needs_finite_logits(fake_runtime, reference_of):
    reference = reference_of(fake_runtime())
    with pytest.raises(GateError, match="the runtime gives NaN logits"):
        deviation(reference, fake_runtime(disturb=lambda kind, row, state, logits: logits * np.nan))
