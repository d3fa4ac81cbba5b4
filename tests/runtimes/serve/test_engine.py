"""The engine step by step, without its thread: what happens at each token boundary is then exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from losa_export.errors import InputError
from losa_export.runtimes.ort import OrtRuntime
from losa_export.runtimes.sampling import SamplingConfig
from losa_export.runtimes.serve.engine import (
    STEPS_BETWEEN_PROMPTS,
    DrainingError,
    Engine,
    Event,
    Failed,
    Finished,
    Job,
    QueueFullError,
    Started,
    Token,
)
from losa_export.runtimes.serve.slots import SlotPool

Int64 = NDArray[np.int64]
Offline = Callable[[Int64, int], list[int]]
GREEDY = SamplingConfig()


@pytest.fixture(scope="module")
def runtime(served: Path) -> Iterator[OrtRuntime]:
    with closing(OrtRuntime.load(served, threads=1)) as opened:
        yield opened


@dataclass
class Asked:
    """A job and what was told of it."""

    prompt: Int64
    new: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        options = {"sampling": GREEDY, "stop_ids": frozenset({2})} | self.options
        self.job = Job(self.prompt, self.new, sink=self.events.append, **options)

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, Token)]

    @property
    def end(self) -> Event | None:
        return self.events[-1] if self.events and isinstance(self.events[-1], Finished | Failed) else None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def deliver(events: Sequence[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.sink(event)


def engine_of(runtime: OrtRuntime, *, slots: int = 2, chunk: int = 8, max_queue: int = 4, **options: Any) -> Engine:
    return Engine(SlotPool(runtime, slots, 64), chunk=chunk, max_queue=max_queue, deliver=deliver, **options)


def run(engine: Engine, steps: int = 500) -> None:
    for _ in range(steps):
        if engine.idle:
            return
        engine.step()
    raise AssertionError("the engine did not come to an end")


def prompt(seed: int, size: int = 12) -> Int64:
    return np.random.default_rng(seed).integers(3, 128, size=size)


@settings(max_examples=30)
@given(data=st.data())
def test_in_any_company_an_answer_is_the_one_made_alone(
    runtime: OrtRuntime, offline: Offline, data: st.DataObject
) -> None:
    engine = engine_of(runtime, slots=data.draw(st.integers(1, 4)), chunk=data.draw(st.integers(2, 20)), max_queue=99)
    asked = []
    for seed in range(data.draw(st.integers(1, 8))):
        shared = prompt(1000, data.draw(st.integers(0, 20)))
        asked.append(
            Asked(np.concatenate([shared, prompt(seed, data.draw(st.integers(1, 20)))]), data.draw(st.integers(1, 20)))
        )
        engine.submit([asked[-1].job])
        for _ in range(data.draw(st.integers(0, 6))):
            engine.step()
        if data.draw(st.integers(0, 5)) == 0:
            engine.cancel(asked[data.draw(st.integers(0, seed))].job)
    run(engine)
    for one in asked:
        expected = offline(one.prompt, one.new)
        if one.job.cancelled:
            assert one.tokens == expected[: len(one.tokens)]
            continue
        assert one.tokens == expected
        assert one.end == Finished("length" if len(expected) == one.new else "stop")


def test_a_running_answer_moves_between_the_pieces_of_a_long_prompt(runtime: OrtRuntime) -> None:
    engine = engine_of(runtime)
    first, second = (
        Asked(prompt(0, 8), 30, {"stop_ids": frozenset()}),
        Asked(prompt(1, 33), 3, {"stop_ids": frozenset()}),
    )
    engine.submit([first.job])
    engine.step()
    engine.submit([second.job])
    for _ in range(STEPS_BETWEEN_PROMPTS):
        engine.step()
        assert second.events == []
    before = len(first.tokens)
    for piece in range(1, 5):  # 8 + 8 + 8 + 8 tokens, and the last one decoded beside the other answer
        assert second.tokens == []
        engine.step()
        assert len(first.tokens) == before + piece
    assert len(second.tokens) == 1
    assert second.events[0] == Started(0)


def test_nobody_waits_for_answers_that_do_not_run(runtime: OrtRuntime) -> None:
    engine = engine_of(runtime)
    first, second = Asked(prompt(0, 8), 1), Asked(prompt(1, 8), 1)
    engine.submit([first.job])
    engine.step()
    assert first.end == Finished("length")
    engine.submit([second.job])
    engine.step()
    assert second.end == Finished("length")


def test_cancelling_frees_the_slot_at_the_next_boundary_and_tells_nothing_more(runtime: OrtRuntime) -> None:
    engine = engine_of(runtime, slots=1)
    first, second = Asked(prompt(0), 40, {"stop_ids": frozenset()}), Asked(prompt(1), 1)
    engine.submit([first.job])
    engine.step()
    engine.submit([second.job])
    engine.step()
    assert second.events == []
    told = len(first.events)
    engine.cancel(first.job)
    engine.step()
    assert isinstance(second.events[0], Started)
    assert len(first.events) == told
    run(engine)
    assert second.end == Finished("length") or second.end == Finished("stop")


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 6])
def test_a_job_can_be_cancelled_whenever(runtime: OrtRuntime, steps: int) -> None:
    engine = engine_of(runtime, slots=1)
    one = Asked(prompt(0, 30), 10)
    engine.submit([one.job])
    for _ in range(steps):
        engine.step()
    engine.cancel(one.job)
    engine.step()
    assert engine.idle
    assert engine.load.running == engine.load.waiting == 0


def test_more_than_may_wait_is_refused_whole(runtime: OrtRuntime) -> None:
    engine = engine_of(runtime, slots=1, max_queue=2)
    engine.submit([Asked(prompt(0)).job])
    with pytest.raises(QueueFullError, match="1 requests are waiting already"):
        engine.submit([Asked(prompt(seed)).job for seed in range(3)])
    assert engine.load.waiting == 1
    engine.submit([Asked(prompt(seed)).job for seed in range(2)])
    with pytest.raises(QueueFullError):
        engine.submit([Asked(prompt(9)).job])
    run(engine)


def test_a_job_that_does_not_fit_is_refused(runtime: OrtRuntime) -> None:
    engine = engine_of(runtime)
    engine.submit([Asked(prompt(0, 60), 5).job])
    for size, new in ((60, 6), (65, 1), (0, 5), (10, 0)):
        with pytest.raises(InputError, match="do not fit into a slot of 64"):
            engine.submit([Asked(prompt(0, size), new).job])


def test_time_ends_waiting_reading_and_decoding(runtime: OrtRuntime) -> None:
    clock = Clock()
    engine = engine_of(runtime, slots=2, clock=clock)
    decoding = Asked(prompt(0, 8), 50, {"deadline": 10.0, "stop_ids": frozenset()})
    reading = Asked(prompt(1, 40), 5, {"deadline": 10.0})
    waiting = Asked(prompt(2), 5, {"queue_deadline": 5.0})
    engine.submit([decoding.job])
    engine.step()
    engine.submit([reading.job])
    for _ in range(STEPS_BETWEEN_PROMPTS + 1):
        engine.step()
    engine.submit([waiting.job])
    engine.step()
    assert reading.events == [Started(0)]
    assert waiting.events == []
    clock.now = 6.0
    engine.step()
    assert waiting.end == Failed("queue_timeout", "no slot became free in time; ask again later")
    clock.now = 11.0
    engine.step()
    for one in (decoding, reading):
        assert one.end == Failed("request_timeout", "the answer took longer than the server allows")
    assert engine.idle


def test_draws_come_again_with_the_seed_in_company_too(runtime: OrtRuntime) -> None:
    sampling = {"sampling": SamplingConfig(temperature=1.0, top_p=0.9), "seed": 5, "stop_ids": frozenset()}
    alone = Asked(prompt(0), 12, sampling)
    engine = engine_of(runtime)
    engine.submit([alone.job])
    run(engine)
    again, other = Asked(prompt(0), 12, sampling), Asked(prompt(3), 12)
    engine.submit([other.job, again.job])
    run(engine)
    assert again.tokens == alone.tokens
    different = Asked(prompt(0), 12, sampling | {"seed": 6})
    engine.submit([different.job])
    run(engine)
    assert different.tokens != alone.tokens


def test_probabilities_are_those_of_the_model(runtime: OrtRuntime) -> None:
    one = Asked(prompt(0), 3, {"top_logprobs": 4, "stop_ids": frozenset()})
    engine = engine_of(runtime)
    engine.submit([one.job])
    run(engine)
    logits = runtime.prefill(runtime.new_state(1, 64), 0, one.prompt)[-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    first = one.events[1]
    assert isinstance(first, Token)
    assert first.log_probability == pytest.approx(expected[first.token_id], abs=1e-5)
    assert [token for token, _ in first.top] == np.argsort(-expected, kind="stable")[:4].tolist()
    assert first.top[0] == (first.token_id, first.log_probability)


def test_a_failing_model_fails_its_answers_and_not_the_engine(
    runtime: OrtRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(runtime)
    one, two = Asked(prompt(0), 20, {"stop_ids": frozenset()}), Asked(prompt(1), 20)
    engine.submit([one.job, two.job])
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_run", lambda *_, **__: (_ for _ in ()).throw(ValueError("boom")))
        engine.step()
    for asked in (one, two):
        assert asked.end == Failed("engine", "ValueError: boom")
    three = Asked(prompt(2), 3)
    engine.submit([three.job])
    run(engine)
    assert isinstance(three.end, Finished)


def test_logits_that_are_no_numbers_fail_one_answer_alone(
    runtime: OrtRuntime, monkeypatch: pytest.MonkeyPatch, offline: Offline
) -> None:
    engine = engine_of(runtime)
    one, two = Asked(prompt(0), 9, {"stop_ids": frozenset()}), Asked(prompt(1), 9)
    engine.submit([one.job, two.job])
    engine.step()
    engine.step()
    real = runtime.decode

    def damaged(*given: Any) -> NDArray[np.float32]:
        logits = real(*given)
        logits[0] = np.nan
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "decode", damaged)
        engine.step()
    assert isinstance(one.end, Failed)
    assert "maximum is nan" in one.end.message
    again = Asked(one.prompt, 2)
    engine.submit([again.job])
    run(engine)
    assert again.events[0] == Started(0)  # nothing is taken over from an answer that broke
    assert two.tokens == offline(two.prompt, two.new)


def test_the_thread_answers_and_ends_with_what_is_left_told(runtime: OrtRuntime, offline: Offline) -> None:
    import threading

    done = threading.Event()

    def delivered(events: Sequence[tuple[Job, Event]]) -> None:
        deliver(events)
        if any(isinstance(event, Finished) for _, event in events):
            done.set()

    engine = Engine(SlotPool(runtime, 1, 64), chunk=8, max_queue=4, deliver=delivered)
    first, second = Asked(prompt(0), 6), Asked(prompt(1), 50, {"stop_ids": frozenset()})
    engine.start()
    assert engine.alive
    engine.submit([first.job])
    assert done.wait(30)
    assert first.tokens == offline(first.prompt, 6)
    engine.submit([second.job])
    engine.drain()
    with pytest.raises(DrainingError):
        engine.submit([Asked(prompt(2)).job])
    engine.close()
    assert not engine.alive
    assert second.end == Failed("shutdown", "the server is shutting down") or second.end == Finished("length")
