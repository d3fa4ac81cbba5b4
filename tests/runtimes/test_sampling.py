from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from losa_export.errors import ConfigError, RuntimeFailureError
from losa_export.runtimes.sampling import (
    SamplingConfig,
    choose_token,
    log_probability,
    min_p_filter,
    most_likely,
    softmax,
    top_k_filter,
    top_p_filter,
)

logit_rows = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))
top_ps = st.floats(1e-6, 1.0)
temperatures = st.floats(1e-3, 100.0)


@given(logits=logit_rows, seed=st.integers(0, 2**32))
def test_temperature_zero_is_the_most_likely_token_and_draws_nothing(logits: np.ndarray, seed: int) -> None:
    generator = np.random.default_rng(seed)
    before = generator.bit_generator.state
    assert choose_token(logits, SamplingConfig(), generator) == int(logits.argmax())
    assert generator.bit_generator.state == before


@given(logits=logit_rows, seed=st.integers(0, 2**32))
def test_a_tiny_temperature_chooses_among_the_most_likely(logits: np.ndarray, seed: int) -> None:
    chosen = choose_token(logits, SamplingConfig(temperature=1e-300), np.random.default_rng(seed))
    # any difference of two float32, divided by 1e-300, is beyond what exp can show: only exact ties survive
    assert logits[chosen] == logits.max()


@given(logits=logit_rows, seed=st.integers(0, 2**32))
def test_a_tiny_top_p_is_greedy(logits: np.ndarray, seed: int) -> None:
    config = SamplingConfig(temperature=1.0, top_p=1e-9)
    assert choose_token(logits, config, np.random.default_rng(seed)) == int(
        softmax(logits.astype(np.float64), 1.0).argmax()
    )


@given(logits=logit_rows, temperature=temperatures)
def test_softmax_is_a_distribution_that_keeps_the_order(logits: np.ndarray, temperature: float) -> None:
    values = logits.astype(np.float64)
    probabilities = softmax(values, temperature)
    assert probabilities.min() >= 0
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)  # float64 sum of at most 40 terms
    ordered = probabilities[np.argsort(values, kind="stable")]
    assert (ordered[1:] >= ordered[:-1] * (1 - 1e-6)).all()  # float32 exponentials round by up to 1e-7


@given(logits=logit_rows, top_p=top_ps)
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(logits: np.ndarray, top_p: float) -> None:
    probabilities = softmax(logits.astype(np.float64), 1.0)
    kept = top_p_filter(probabilities, top_p)
    members = kept > 0
    assert kept.sum() == pytest.approx(1.0, abs=1e-12)
    mass = probabilities[members].sum()
    assert mass >= top_p - 1e-12  # float64 sums in another order
    # without its least likely member the set no longer holds the mass
    assert members.sum() == 1 or mass - probabilities[members].min() < top_p + 1e-12
    # nothing outside is more likely than something inside
    assert members.all() or probabilities[~members].max() <= probabilities[members].min()


@given(logits=logit_rows, top_p=top_ps, temperature=temperatures, seed=st.integers(0, 2**32))
def test_one_seed_gives_one_token_and_it_is_in_the_kept_set(
    logits: np.ndarray, top_p: float, temperature: float, seed: int
) -> None:
    config = SamplingConfig(temperature=temperature, top_p=top_p)
    first = choose_token(logits, config, np.random.default_rng(seed))
    assert first == choose_token(logits, config, np.random.default_rng(seed))
    assert top_p_filter(softmax(logits.astype(np.float64), temperature), top_p)[first] > 0


@settings(max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_tokens_are_drawn_as_often_as_their_probability_says(seed: int) -> None:
    probabilities = np.array([0.5, 0.3, 0.2])
    logits = np.log(probabilities).astype(np.float32)
    generator = np.random.default_rng(seed)
    config = SamplingConfig(temperature=1.0)
    counts = np.bincount([choose_token(logits, config, generator) for _ in range(4000)], minlength=3)
    # 0.05 is more than six standard deviations (sqrt(0.25 / 4000) = 0.008)
    assert np.abs(counts / 4000 - probabilities).max() < 0.05


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf], dtype=np.float32)
    generator = np.random.default_rng(0)
    assert {choose_token(logits, SamplingConfig(temperature=1.0), generator) for _ in range(50)} == {1}


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
def test_logits_that_are_not_numbers_are_refused(bad: list[float]) -> None:
    with pytest.raises(RuntimeFailureError, match=r"logits whose maximum is .*no token can be chosen; check the"):
        choose_token(np.array(bad, np.float32), SamplingConfig(), np.random.default_rng(0))


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf"), "hot", True])
def test_an_impossible_temperature_is_refused_by_name(temperature: object) -> None:
    with pytest.raises(ConfigError, match=r"temperature is .*, but must be a finite number of at least 0"):
        SamplingConfig(temperature=temperature)  # type: ignore[arg-type]


@pytest.mark.parametrize("top_p", [0.0, -1.0, 1.01, float("nan"), None])
def test_an_impossible_top_p_is_refused_by_name(top_p: object) -> None:
    with pytest.raises(ConfigError, match=r"top_p is .*, but must be greater than 0 and at most 1"):
        SamplingConfig(top_p=top_p)  # type: ignore[arg-type]


@given(logits=logit_rows, top_k=st.integers(0, 50))
def test_top_k_keeps_that_many_and_none_more_likely_is_left_out(logits: np.ndarray, top_k: int) -> None:
    probabilities = softmax(logits.astype(np.float64), 1.0)
    kept = top_k_filter(probabilities, top_k)
    members = kept > 0
    assert kept.sum() == pytest.approx(1.0, abs=1e-12)
    if 0 < top_k < logits.size:
        expected = np.argsort(-probabilities, kind="stable")[:top_k]
        assert set(np.flatnonzero(members)) <= set(expected.tolist())  # those of probability 0 show nothing
        assert members.sum() == (probabilities[expected] > 0).sum()
    else:
        assert kept is probabilities


@given(logits=logit_rows, min_p=st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_likely_beside_the_most_likely(logits: np.ndarray, min_p: float) -> None:
    probabilities = softmax(logits.astype(np.float64), 1.0)
    kept = min_p_filter(probabilities, min_p)
    assert kept.sum() == pytest.approx(1.0, abs=1e-12)
    assert ((kept > 0) == ((probabilities >= min_p * probabilities.max()) & (probabilities > 0))).all()


@given(logits=logit_rows, seed=st.integers(0, 2**32))
def test_top_1_and_min_p_1_draw_the_most_likely(logits: np.ndarray, seed: int) -> None:
    generator = np.random.default_rng(seed)
    best = softmax(logits.astype(np.float64), 1.0).argmax()
    assert choose_token(logits, SamplingConfig(temperature=1.0, top_k=1), generator) == best
    drawn = choose_token(logits, SamplingConfig(temperature=1.0, min_p=1.0), generator)
    probabilities = softmax(logits.astype(np.float64), 1.0)
    assert probabilities[drawn] == probabilities.max()


@given(logits=logit_rows, count=st.integers(0, 50))
def test_log_probabilities_and_the_most_likely(logits: np.ndarray, count: int) -> None:
    best = most_likely(logits, count)
    assert best.tolist() == np.argsort(-logits, kind="stable")[:count].tolist()
    values = logits.astype(np.float64)
    expected = values - values.max() - np.log(np.exp(values - values.max()).sum())
    # float32 exponentials of at most 40 terms
    np.testing.assert_allclose(log_probability(logits, np.arange(logits.size)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", -1), ("top_k", 1.5), ("top_k", True), ("min_p", -0.1), ("min_p", 1.1), ("min_p", float("nan"))],
)
def test_a_filter_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingConfig(**{field: value})  # type: ignore[arg-type]
