"""Latencies, throughput and goodput: exact on timestamps that are made up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa_export.eval.serve_metrics import (
    CountedBy,
    Objective,
    Outcome,
    RequestRecord,
    TokenChunk,
    inter_token_latencies,
    latencies,
    summarise,
)


def answered(
    started: float = 1.0, ttft: float = 0.5, itl: float = 0.25, tokens: int = 5, *, late: float = 0.0, index: int = 0
) -> RequestRecord:
    """A completed request of one token a chunk; times in seconds that binary fractions hold exactly."""
    chunks = tuple(TokenChunk(started + ttft + itl * place, 1) for place in range(tokens))
    return RequestRecord(
        index=index,
        intended_s=started - late,
        started_s=started,
        ended_s=chunks[-1].at_s,
        outcome=Outcome.COMPLETED,
        status=200,
        chunks=chunks,
        finished_s=chunks[-1].at_s,
        prompt_tokens=10,
        output_tokens=tokens,
        counted_by=CountedBy.EACH_CHUNK,
        finish_reason="length",
    )


def failed(outcome: Outcome, status: int | None = None, *, ended: float = 1.0) -> RequestRecord:
    return RequestRecord(0, 0.0, 0.0, ended, outcome, status)


def test_the_latencies_of_a_request() -> None:
    found = latencies(answered(late=2.0))
    assert found is not None
    assert found.ttft_ms == 500
    assert found.ttft_intended_ms == 2500
    assert found.tpot_ms == 250
    assert found.itl_ms == (250, 250, 250, 250)
    assert found.e2el_ms == 1500
    assert found.e2el_intended_ms == 3500


def test_a_last_chunk_without_tokens_belongs_to_the_end_and_to_no_gap() -> None:
    found = latencies(replace(answered(), finished_s=3.5))
    assert found is not None
    assert (found.e2el_ms, found.tpot_ms) == (2500, 500)
    assert sum(found.itl_ms) == 1000


def test_a_single_token_has_no_time_per_further_token() -> None:
    found = latencies(answered(tokens=1))
    assert found is not None
    assert found.tpot_ms is None
    assert found.itl_ms == ()
    assert Objective(tpot_ms=1.0).met(found)
    assert summarise([answered(tokens=1)]).tpot_ms is None


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.COMPLETED])
def test_what_was_not_completed_has_no_latency(outcome: Outcome) -> None:
    assert latencies(replace(answered(), outcome=outcome)) is None


def test_a_chunk_of_several_tokens_shares_its_gap_among_them() -> None:
    chunks = [TokenChunk(0.0, 3), TokenChunk(1.0, 4), TokenChunk(1.5, None), TokenChunk(2.5, 1)]
    assert inter_token_latencies(chunks) == (250, 250, 250, 250, 500, 1000)
    assert inter_token_latencies(chunks[:1]) == inter_token_latencies([]) == ()


def test_throughput_counts_completed_requests_over_the_whole_time() -> None:
    lost = replace(answered(started=2.0), outcome=Outcome.TRUNCATED, ended_s=9.0)
    metrics = summarise([answered(started=1.0), answered(started=2.0, tokens=3), lost])
    assert metrics.duration_s == 8
    assert metrics.requests_per_s == 2 / 8
    assert metrics.output_tokens == 8
    assert metrics.output_tokens_per_s == 1
    assert metrics.lost_output_tokens == 5
    assert metrics.prompt_tokens == 20
    assert metrics.total_tokens_per_s == 28 / 8
    assert metrics.token_chunks == 8
    assert metrics.counted_by == {"usage of each chunk": 2}


def test_every_outcome_is_counted() -> None:
    records = [
        answered(),
        *(failed(Outcome.REFUSED, status) for status in (429, 429, 503)),
        failed(Outcome.HTTP_ERROR, 500),
        failed(Outcome.TIMED_OUT),
        failed(Outcome.TRUNCATED, 200),
        failed(Outcome.INTERRUPTED),
    ]
    metrics = summarise(records)
    assert (metrics.completed, metrics.refused, metrics.failed) == (1, 3, 3)
    assert sum(metrics.outcomes.values()) == len(records)
    assert metrics.failures == {"429": 2, "503": 1, "500": 1, "timed_out": 1, "truncated": 1, "interrupted": 1}


def test_without_a_completed_request_there_are_no_latencies() -> None:
    metrics = summarise([failed(Outcome.REFUSED, 429)], objective=Objective(ttft_ms=1.0))
    assert metrics.ttft_ms is metrics.itl_ms is metrics.e2el_ms is None
    assert metrics.goodput_requests_per_s == metrics.output_tokens_per_s == 0
    assert metrics.prompt_tokens is None
    assert metrics.total_tokens_per_s is None


def test_prompt_tokens_are_not_guessed() -> None:
    assert summarise([answered(), replace(answered(), prompt_tokens=None)]).prompt_tokens is None


def test_goodput_needs_every_objective() -> None:
    quick, slow_start = answered(started=0.0), answered(started=0.0, ttft=0.75)
    slow_tokens, late = answered(started=0.0, itl=0.5), answered(started=0.0, late=1.0)
    records = [quick, slow_start, slow_tokens, late]
    duration = 2.5  # of slow_tokens

    def good(objective: Objective) -> tuple[float, float]:
        metrics = summarise(records, objective=objective)
        assert metrics.goodput_requests_per_s is not None
        assert metrics.goodput_intended_requests_per_s is not None
        return metrics.goodput_requests_per_s * duration, metrics.goodput_intended_requests_per_s * duration

    assert good(Objective()) == (4, 4)
    assert good(Objective(ttft_ms=500)) == (3, 2)  # a limit that is just kept is kept
    assert good(Objective(ttft_ms=499)) == (0, 0)
    assert good(Objective(tpot_ms=250)) == (3, 3)
    assert good(Objective(e2el_ms=1750)) == (3, 2)
    assert good(Objective(ttft_ms=500, tpot_ms=250)) == (2, 1)
    assert summarise(records).goodput_requests_per_s is None


def test_concurrency_is_counted_from_starts_and_ends() -> None:
    # 0-2, 1-3, 2-4: the third starts when the first ends
    records = [answered(started=float(start), ttft=1.0, itl=1.0, tokens=2) for start in range(3)]
    metrics = summarise(records)
    assert metrics.peak_concurrency == 2
    assert metrics.mean_concurrency == 6 / 4


def test_lateness_is_of_every_request_sent() -> None:
    metrics = summarise([answered(late=0.5), replace(failed(Outcome.REFUSED, 429), intended_s=-1.5)])
    assert metrics.lateness_ms is not None
    assert metrics.lateness_ms.mean == 1000


def test_a_clock_that_stood_still_divides_by_no_zero() -> None:
    assert summarise([failed(Outcome.REFUSED, 429, ended=0.0)]).requests_per_s == 0


waits = st.lists(st.floats(0.001, 100), min_size=1, max_size=50)


@given(waits, st.lists(st.integers(1, 99), min_size=1, max_size=6, unique=True))
def test_percentiles_are_ordered_and_lie_among_the_values(ttfts: list[float], levels: list[int]) -> None:
    found = summarise([answered(ttft=ttft) for ttft in ttfts], levels=[50, *sorted(levels)]).ttft_ms
    assert found is not None
    values = [found.percentiles[f"p{level:g}"] for level in sorted(levels)]
    assert values == sorted(values)
    # (start + ttft) - start rounds in the twelfth digit or so
    assert 1000 * min(ttfts) - 1e-6 <= min(values) <= max(values) <= 1000 * max(ttfts) + 1e-6
    assert found.percentiles["p50"] == pytest.approx(found.median)
    assert found.count == len(ttfts)
    at_least = sum(1000 * ttft <= values[-1] + 1e-6 for ttft in ttfts)
    assert at_least >= max(levels) / 100 * (len(ttfts) - 1)


@given(waits, st.floats(0.5, 2.0))
def test_percentiles_scale_with_the_times(ttfts: list[float], factor: float) -> None:
    one = summarise([answered(started=0.0, ttft=ttft) for ttft in ttfts]).ttft_ms
    other = summarise([answered(started=0.0, ttft=factor * ttft) for ttft in ttfts]).ttft_ms
    assert one is not None
    assert other is not None
    for name, value in one.percentiles.items():
        assert other.percentiles[name] == pytest.approx(factor * value)
    assert other.std == pytest.approx(factor * one.std, abs=1e-6)


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.floats(0.01, 5), st.floats(0.01, 1), st.integers(2, 20)), min_size=1, max_size=20
    )
)
def test_time_to_the_first_token_and_per_token_make_up_the_whole(
    requests: list[tuple[float, float, float, int]],
) -> None:
    for record in (answered(*one) for one in requests):
        found = latencies(record)
        assert found is not None
        assert found.tpot_ms is not None
        assert found.ttft_ms + found.tpot_ms * (record.output_tokens - 1) == pytest.approx(found.e2el_ms)
        assert sum(found.itl_ms) == pytest.approx(found.e2el_ms - found.ttft_ms)
