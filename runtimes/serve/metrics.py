"""What Prometheus may ask: load, tokens, and how long readers wait."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from losa_export.runtimes.serve.engine import Load
from losa_export.runtimes.serve.generation import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEPS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class Metrics:
    """Counters and histograms of one worker; of all workers together where they share a folder.

    Args:
        facts: labels of `losa_model_info`, such as the model's name and the kernel row.
    """

    def __init__(self, facts: dict[str, str]) -> None:
        # Several workers write into files of a folder, and whoever is asked adds them up.
        self._shared = SHARED_FOLDER in os.environ
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "losa_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self.answers = Counter("losa_answers", "Answers by how they ended.", ["reason"], registry=registry)
        self.prompt_tokens = Counter("losa_prompt_tokens", "Prompt tokens of begun answers.", registry=registry)
        self.cached_tokens = Counter(
            "losa_prompt_tokens_cached", "Prompt tokens that another prompt had brought.", registry=registry
        )
        self.new_tokens = Counter("losa_generated_tokens", "Tokens of answers.", registry=registry)
        self.waiting = self._gauge("losa_requests_waiting", "Requests that wait for a slot.")
        self.running = self._gauge("losa_requests_running", "Requests in a slot.")
        self.used = self._gauge("losa_kv_cache_usage_ratio", "Part of the slots' tokens in use by running requests.")
        self.first_token = Histogram(
            "losa_time_to_first_token_seconds", "From a request to its first token.", buckets=_WAITS, registry=registry
        )
        self.per_token = Histogram(
            "losa_time_per_output_token_seconds",
            "Mean time between the tokens of an answer, after the first.",
            buckets=_STEPS,
            registry=registry,
        )
        self.duration = Histogram(
            "losa_answer_duration_seconds", "From a request to its last token.", buckets=_WAITS, registry=registry
        )
        info = self._gauge("losa_model_info", "Constant 1, with what is served as labels.", sorted(facts))
        info.labels(**facts).set(1)

    def _gauge(self, name: str, text: str, labels: list[str] | None = None) -> Gauge:
        return Gauge(
            name, text, labels or [], registry=self._registry, multiprocess_mode="livemax" if labels else "livesum"
        )

    def load(self, load: Load) -> None:
        """How busy the engine is now."""
        self.waiting.set(load.waiting)
        self.running.set(load.running)
        self.used.set(load.used_fraction)

    def ended(self, answer: Answer, reason: str) -> None:
        """One answer is over, whole or not."""
        self.answers.labels(reason=reason).inc()
        timing = answer.timing
        if timing.started is not None:
            self.prompt_tokens.inc(answer.job.prompt.size)
            self.cached_tokens.inc(answer.cached)
        if timing.first_token is None or timing.last_token is None:
            return
        self.first_token.observe(timing.first_token - timing.submitted)
        self.duration.observe(timing.last_token - timing.submitted)
        if answer.tokens > 1:
            self.per_token.observe((timing.last_token - timing.first_token) / (answer.tokens - 1))

    def render(self) -> bytes:
        """The page for Prometheus."""
        registry = self._registry
        if self._shared:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
