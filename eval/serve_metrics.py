"""From the timestamps of streamed requests to latencies, throughput and goodput, as `vllm bench serve` names them.

Pure functions; docs/serve-bench.md gives each definition. Timestamps are seconds since the load began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np

from losa_export.eval.stats import PERCENTILES, median, percentiles


class Outcome(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    # Status 429 or 503: the server protects itself, as it should under too much load.
    REFUSED = "refused"
    HTTP_ERROR = "http_error"
    # An error that was sent inside a stream.
    STREAM_ERROR = "stream_error"
    # A stream without finish_reason or without [DONE].
    TRUNCATED = "truncated"
    # A complete stream without a token.
    EMPTY = "empty"
    # Not the protocol: no event stream, no JSON, or no object of the expected shape.
    MALFORMED = "malformed"
    TIMED_OUT = "timed_out"
    CONNECTION_ERROR = "connection_error"
    INTERRUPTED = "interrupted"


class CountedBy(StrEnum):
    """Where the number of output tokens comes from."""

    EACH_CHUNK = "usage of each chunk"
    FINAL_USAGE = "usage at the end"
    CHUNKS = "number of chunks"


@dataclass(frozen=True)
class TokenChunk:
    """A chunk of a stream that brought tokens.

    Attributes:
        at_s: when it arrived.
        tokens: how many it brought, at least one; None where the server does not tell.
    """

    at_s: float
    tokens: int | None


@dataclass(frozen=True)
class RequestRecord:
    """What happened to one request.

    Attributes:
        index: its place among the prompts.
        intended_s: when the arrival process wanted it to be sent.
        started_s: when it was sent.
        ended_s: when nothing more was to come.
        outcome: how it ended.
        status: of HTTP; None where no answer came.
        detail: what went wrong; '' if nothing did.
        chunks: those that brought tokens.
        finished_s: arrival of the last chunk of the answer, with or without tokens; None if there was none.
        prompt_tokens: by the server's count; None where it does not tell.
        output_tokens: by `counted_by`.
        counted_by: None without tokens.
        finish_reason: as the server gave it.
    """

    index: int
    intended_s: float
    started_s: float
    ended_s: float
    outcome: Outcome
    status: int | None = None
    detail: str = ""
    chunks: tuple[TokenChunk, ...] = ()
    finished_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int = 0
    counted_by: CountedBy | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Latencies:
    """Of one completed request, in milliseconds.

    Attributes:
        ttft_ms: from sending the request to its first token.
        ttft_intended_ms: the same from the moment at which it should have been sent.
        tpot_ms: (e2el - ttft) / (output tokens - 1); None for a single token.
        itl_ms: gaps between chunks, each shared evenly among the tokens of the later chunk.
        e2el_ms: from sending the request to the last chunk of the answer.
        e2el_intended_ms: likewise from the intended moment.
    """

    ttft_ms: float
    ttft_intended_ms: float
    tpot_ms: float | None
    itl_ms: tuple[float, ...]
    e2el_ms: float
    e2el_intended_ms: float


@dataclass(frozen=True)
class Objective:
    """Longest times of a request that counts as good, in milliseconds; None does not bind."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    def met(self, found: Latencies, *, from_intended: bool = False) -> bool:
        """Whether all of them are kept, from the real or from the intended start.

        A request of a single token has no time per further token, and keeps any.
        """
        measured = (
            (self.ttft_ms, found.ttft_intended_ms if from_intended else found.ttft_ms),
            (self.tpot_ms, found.tpot_ms),
            (self.e2el_ms, found.e2el_intended_ms if from_intended else found.e2el_ms),
        )
        return all(limit is None or value is None or value <= limit for limit, value in measured)


@dataclass(frozen=True)
class Distribution:
    """Of one latency, in milliseconds; `std` is the population's, percentiles interpolate linearly."""

    count: int
    mean: float
    median: float
    std: float
    percentiles: dict[str, float]


@dataclass(frozen=True)
class LoadMetrics:
    """Of all requests sent at one rate and concurrency. Latencies are those of completed requests.

    Attributes:
        duration_s: from the first request's start to the last one's end, however it ended.
        outcomes: outcome → how many, those that occurred.
        failures: what went wrong, such as '429' or 'truncated' → how many.
        prompt_tokens: of completed requests, by the server's count; None where it does not tell of each.
        output_tokens: of completed requests.
        lost_output_tokens: that other requests had brought before they failed; in no throughput.
        token_chunks: chunks of completed requests that brought tokens.
        counted_by: where output tokens were counted → completed requests.
        requests_per_s, output_tokens_per_s: of completed requests.
        total_tokens_per_s: prompts and answers; None where `prompt_tokens` is.
        goodput_requests_per_s: completed requests that keep the objective; None without one.
        goodput_intended_requests_per_s: likewise, measured from their intended starts.
        mean_concurrency, peak_concurrency: requests that were under way.
        ttft_ms, ttft_intended_ms, tpot_ms, itl_ms, e2el_ms: None where no request has it.
        lateness_ms: real less intended start, of all requests sent.
    """

    duration_s: float
    outcomes: dict[str, int]
    failures: dict[str, int]
    prompt_tokens: int | None
    output_tokens: int
    lost_output_tokens: int
    token_chunks: int
    counted_by: dict[str, int]
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float | None
    goodput_requests_per_s: float | None
    goodput_intended_requests_per_s: float | None
    mean_concurrency: float
    peak_concurrency: int
    ttft_ms: Distribution | None
    ttft_intended_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2el_ms: Distribution | None
    lateness_ms: Distribution | None

    @property
    def completed(self) -> int:
        """Requests that were answered in full."""
        return self.outcomes.get(Outcome.COMPLETED, 0)

    @property
    def refused(self) -> int:
        """Requests that the server turned away with 429 or 503."""
        return self.outcomes.get(Outcome.REFUSED, 0)

    @property
    def failed(self) -> int:
        """All others, but for those that an interrupt cut off."""
        return sum(self.outcomes.values()) - self.completed - self.refused - self.outcomes.get(Outcome.INTERRUPTED, 0)


def latencies(record: RequestRecord) -> Latencies | None:
    """Latencies of a request; None unless it was completed."""
    if record.outcome is not Outcome.COMPLETED or not record.chunks or record.finished_s is None:
        return None
    first, last = record.chunks[0].at_s, record.finished_s
    further = record.output_tokens - 1
    return Latencies(
        ttft_ms=1000 * (first - record.started_s),
        ttft_intended_ms=1000 * (first - record.intended_s),
        tpot_ms=1000 * (last - first) / further if further > 0 else None,
        itl_ms=inter_token_latencies(record.chunks),
        e2el_ms=1000 * (last - record.started_s),
        e2el_intended_ms=1000 * (last - record.intended_s),
    )


def inter_token_latencies(chunks: Sequence[TokenChunk]) -> tuple[float, ...]:
    """Milliseconds between tokens: a gap before a chunk of k tokens counts as k gaps of a k-th.

    Further tokens of the first chunk have no gap: they belong to the time to the first token. A chunk that does not
    tell its tokens counts as one.
    """
    gaps: list[float] = []
    for before, after in pairwise(chunks):
        tokens = after.tokens or 1
        gaps += [1000 * (after.at_s - before.at_s) / tokens] * tokens
    return tuple(gaps)


def summarise(
    records: Sequence[RequestRecord], *, levels: Sequence[float] = PERCENTILES, objective: Objective | None = None
) -> LoadMetrics:
    """Metrics of a load of at least one request.

    Args:
        records: of every request that was sent.
        levels: percentiles to give, each from 0 to 100.
        objective: what makes a request good.
    """
    done = [record for record in records if record.outcome is Outcome.COMPLETED]
    found = [one for one in map(latencies, done) if one is not None]
    # A clock that stands still between start and end must not divide by zero.
    duration = max(max(one.ended_s for one in records) - min(one.started_s for one in records), 1e-9)
    output_tokens = sum(record.output_tokens for record in done)
    told = [record.prompt_tokens for record in done if record.prompt_tokens is not None]
    prompt_tokens = sum(told) if done and len(told) == len(done) else None

    def good(from_intended: bool) -> float | None:
        if objective is None:
            return None
        return sum(objective.met(one, from_intended=from_intended) for one in found) / duration

    def spread(values: Iterable[float]) -> Distribution | None:
        return _distribution(tuple(values), levels)

    return LoadMetrics(
        duration_s=duration,
        outcomes=dict(Counter(str(record.outcome) for record in records)),
        failures=_failures(records),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        lost_output_tokens=sum(record.output_tokens for record in records) - output_tokens,
        token_chunks=sum(len(record.chunks) for record in done),
        counted_by=dict(Counter(str(record.counted_by) for record in done)),
        requests_per_s=len(done) / duration,
        output_tokens_per_s=output_tokens / duration,
        total_tokens_per_s=None if prompt_tokens is None else (prompt_tokens + output_tokens) / duration,
        goodput_requests_per_s=good(False),
        goodput_intended_requests_per_s=good(True),
        mean_concurrency=sum(record.ended_s - record.started_s for record in records) / duration,
        peak_concurrency=_peak(records),
        ttft_ms=spread(one.ttft_ms for one in found),
        ttft_intended_ms=spread(one.ttft_intended_ms for one in found),
        tpot_ms=spread(one.tpot_ms for one in found if one.tpot_ms is not None),
        itl_ms=spread(gap for one in found for gap in one.itl_ms),
        e2el_ms=spread(one.e2el_ms for one in found),
        lateness_ms=spread(1000 * (record.started_s - record.intended_s) for record in records),
    )


def _failures(records: Iterable[RequestRecord]) -> dict[str, int]:
    """By status where HTTP refused, else by outcome."""
    by_status = (Outcome.REFUSED, Outcome.HTTP_ERROR)
    return dict(
        Counter(
            str(record.status) if record.outcome in by_status else str(record.outcome)
            for record in records
            if record.outcome is not Outcome.COMPLETED
        )
    )


def _distribution(values: tuple[float, ...], levels: Sequence[float]) -> Distribution | None:
    if not values:
        return None
    return Distribution(
        count=len(values),
        mean=float(np.mean(values)),
        median=median(values),
        std=float(np.std(values)),
        percentiles=percentiles(values, levels),
    )


def _peak(records: Iterable[RequestRecord]) -> int:
    """Most requests under way at once; one that ends when another starts is no longer counted."""
    steps = [step for one in records for step in ((one.started_s, 1), (one.ended_s, -1))]
    running = peak = 0
    for _, step in sorted(steps):
        running += step
        peak = max(peak, running)
    return peak
