"""Continuous batching: requests join and leave at token boundaries.

One thread owns the model. Between two steps of the running answers it reads at most one piece of one prompt, so that
answers keep moving while a long prompt comes in. All decoding rows advance together by one token in a step. With int8
and int4 weights each row's numbers are the same, bit for bit, whoever stands beside it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import InputError, LosaError, RuntimeFailureError
from losa_export.runtimes.sampling import SamplingConfig, choose_token, log_probability, most_likely
from losa_export.runtimes.serve.slots import SlotPool, pieces

# Steps that running answers get between two prompts. Answers that began together would also end together, and the
# prompts that follow them would queue behind each other again and again; a few steps pull them apart. More than two
# delay the second of two prompts by more than they pull apart.
STEPS_BETWEEN_PROMPTS = 2

Int64 = NDArray[np.int64]
Failure = Literal["queue_timeout", "request_timeout", "shutdown", "engine"]


class QueueFullError(LosaError):
    """As many requests wait as may wait."""


class DrainingError(LosaError):
    """The server is shutting down and takes no new requests."""


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        token_id: in [0, V).
        log_probability: natural, under the unchanged distribution; None unless asked for.
        top: most likely tokens with theirs, most likely first.
    """

    token_id: int
    log_probability: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Started:
    """A prompt is about to be read. `cached` of its tokens were there already."""

    cached: int


@dataclass(frozen=True)
class Finished:
    """An answer has ended: by a stop id, or by its length."""

    reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Failed:
    """An answer will not be finished."""

    cause: Failure
    message: str


Event = Token | Started | Finished | Failed


@dataclass(eq=False)
class Job:
    """One answer to be made.

    Attributes:
        prompt: (S,) int64, S ≥ 1.
        max_new_tokens: at least 1; prompt and answer fit into a slot together.
        sampling: how tokens are drawn.
        seed: of the draws; None takes a fresh one.
        stop_ids: tokens that end the answer and are not part of it.
        top_logprobs: how many most likely tokens to tell with each; None tells no probability at all.
        sink: is given each event, wherever `Engine.deliver` calls it.
        queue_deadline: when waiting for a slot is given up, by the engine's clock.
        deadline: when the answer is given up.
    """

    prompt: Int64
    max_new_tokens: int
    sampling: SamplingConfig
    sink: Callable[[Event], None]
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    queue_deadline: float = float("inf")
    deadline: float = float("inf")
    cancelled: bool = False
    made: int = 0
    generator: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = np.random.default_rng(self.seed)


@dataclass
class _Reading:
    """The prompt that is being read."""

    job: Job
    row: int
    left: deque[tuple[int, int]]


@dataclass(frozen=True)
class Load:
    """How busy the engine is: requests that wait and run, and the part of the pool in use (0 to 1)."""

    waiting: int
    running: int
    used_fraction: float


class Engine:
    """Answers jobs with one model.

    Args:
        pool: keys and values.
        chunk: prompt tokens read between two steps.
        max_queue: jobs that may wait beyond those that find a slot.
        deliver: called from the engine's thread, once a step, with all events of that step.
        clock: seconds, as time.monotonic.
    """

    def __init__(
        self,
        pool: SlotPool,
        *,
        chunk: int,
        max_queue: int,
        deliver: Callable[[Sequence[tuple[Job, Event]]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._chunk, self._max_queue = pool, chunk, max_queue
        self._deliver, self._clock = deliver, clock
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._reading: _Reading | None = None
        self._pause = 0  # steps until the next prompt may begin
        self._decoding: list[Job] = []  # in the order of the pool's rows
        self._last: list[int] = []  # the newest token of each, at first its prompt's last, not yet in the cache
        self._events: list[tuple[Job, Event]] = []
        self._closing = self._draining = False
        self._thread: threading.Thread | None = None
        self._beat = clock()

    # ---- from any thread ----

    def start(self) -> None:
        """Begin to work in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="losa-engine", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of these jobs, or none.

        Raises: QueueFullError, DrainingError; InputError for a prompt that does not fit.
        """
        for job in jobs:
            if not 1 <= job.prompt.size <= self._pool.context_tokens - job.max_new_tokens + 1 or job.max_new_tokens < 1:
                raise InputError(
                    f"{job.prompt.size} tokens of prompt and {job.max_new_tokens} of answer do not fit into a slot of "
                    f"{self._pool.context_tokens}"
                )
        with self._lock:
            if self._draining or self._closing:
                raise DrainingError("the server is shutting down; ask another one, or again later")
            free = self._pool.slots - len(self._decoding) - (self._reading is not None)
            if len(self._waiting) + len(jobs) > self._max_queue + max(free, 0):
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already; ask again later")
            self._waiting.extend(jobs)
            self._lock.notify()

    def cancel(self, job: Job) -> None:
        """Give up a job: its slot is free at the next token boundary, and it gets no further event."""
        with self._lock:
            job.cancelled = True
            self._lock.notify()

    def drain(self) -> None:
        """Take no new jobs."""
        with self._lock:
            self._draining = True

    def abandon(self) -> None:
        """Fail all jobs at the next token boundary, and take no more."""
        with self._lock:
            self._closing = True
            self._lock.notify()

    def close(self) -> None:
        """Fail all jobs, and end the thread."""
        self.abandon()
        if self._thread is not None:
            self._thread.join()

    @property
    def load(self) -> Load:
        """Waiting and running jobs, and how full the pool is."""
        running = len(self._decoding) + (self._reading is not None)
        return Load(
            len(self._waiting), running, self._pool.used_tokens / (self._pool.slots * self._pool.context_tokens)
        )

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._reading or self._decoding)

    @property
    def seconds_since_step(self) -> float:
        """How long the current step has taken; 0 while idle."""
        return 0.0 if self.idle else self._clock() - self._beat

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    # ---- in the engine's thread ----

    def _run(self) -> None:
        while True:
            with self._lock:
                while self.idle and not self._closing:
                    self._lock.wait()
                if self._closing:
                    break
            self.step()
        self._fail_all("shutdown", "the server is shutting down")
        self._flush()

    def step(self) -> None:
        """Go on by one token boundary: drop who left, read a piece of a prompt, decode a token for each."""
        self._beat = self._clock()
        try:
            self._drop()
            self._read_piece()
            self._decode_step()
        except LosaError as error:
            self._fail_all("engine", str(error))
        except Exception as error:  # an engine that dies silently would leave every client waiting
            self._fail_all("engine", f"{type(error).__name__}: {error}")
        self._flush()

    def _drop(self) -> None:
        """Let go of jobs that were cancelled or whose time is over."""
        now = self._clock()
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
            for job in waiting:
                if job.cancelled:
                    continue
                if now >= min(job.queue_deadline, job.deadline):
                    self._tell(job, Failed("queue_timeout", "no slot became free in time; ask again later"))
                    continue
                self._waiting.append(job)
        if self._reading is not None and self._is_over(self._reading.job, now):
            self._pool.release(self._reading.row)
            self._reading = None
        for row in reversed(range(len(self._decoding))):
            if self._is_over(self._decoding[row], now):
                self._leave(row)

    def _is_over(self, job: Job, now: float) -> bool:
        if job.cancelled:
            return True
        if now >= job.deadline:
            self._tell(job, Failed("request_timeout", "the answer took longer than the server allows"))
            return True
        return False

    def _read_piece(self) -> None:
        if self._reading is None:
            if self._pause and self._decoding:
                self._pause -= 1
                return
            with self._lock:
                if not self._waiting or self._pool.decoding == self._pool.slots:
                    return
                job = self._waiting[0]
                row, cached = self._pool.claim(job.prompt)
                self._waiting.popleft()
                self._reading = _Reading(job, row, deque(pieces(cached, job.prompt.size - 1, self._chunk)))
            self._tell(job, Started(cached))
        reading = self._reading
        if reading.left:
            start, stop = reading.left.popleft()
            self._pool.read(reading.row, reading.job.prompt[start:stop])
        if reading.left:
            return
        # The prompt's last token is decoded with the others' newest ones, which costs less than a pass of its own.
        self._reading, self._pause = None, STEPS_BETWEEN_PROMPTS
        self._pool.join(reading.row)
        self._decoding.append(reading.job)
        self._last.append(int(reading.job.prompt[-1]))

    def _decode_step(self) -> None:
        if not self._decoding:
            return
        logits = self._pool.decode(np.array(self._last, dtype=np.int64))
        for row in reversed(range(len(self._decoding))):
            try:
                token = self._choose(self._decoding[row], logits[row])
            except RuntimeFailureError as error:
                self._tell(self._decoding[row], Failed("engine", str(error)))
                self._leave(row, keep=False)
                continue
            if token is None:
                self._leave(row)
            else:
                self._last[row] = token

    def _leave(self, row: int, *, keep: bool = True) -> None:
        """Take a row out; the last one moves into its place, which is why rows are visited from the back."""
        self._pool.leave(row, keep=keep)
        self._decoding[row], self._last[row] = self._decoding[-1], self._last[-1]
        del self._decoding[-1], self._last[-1]

    def _choose(self, job: Job, logits: NDArray[np.float32]) -> int | None:
        """The next token of a job, told to it; None when that ends the answer. Raises: RuntimeFailureError for NaN."""
        token = choose_token(logits, job.sampling, job.generator)
        if token in job.stop_ids:
            self._tell(job, Finished("stop"))
            return None
        job.made += 1
        self._tell(job, _token(token, logits, job.top_logprobs))
        if job.made == job.max_new_tokens:
            self._tell(job, Finished("length"))
            return None
        return token

    def _fail_all(self, cause: Failure, message: str) -> None:
        with self._lock:
            jobs = [*self._waiting, *self._decoding, *([] if self._reading is None else [self._reading.job])]
            self._waiting.clear()
        if self._reading is not None:
            self._pool.release(self._reading.row)
            self._reading = None
        while self._decoding:
            self._leave(len(self._decoding) - 1)
        for job in jobs:
            self._tell(job, Failed(cause, message))

    def _tell(self, job: Job, event: Event) -> None:
        if not job.cancelled:
            self._events.append((job, event))

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._deliver(events)


def _token(token: int, logits: NDArray[np.float32], count: int | None) -> Token:
    if count is None:
        return Token(token)
    best = most_likely(logits, count)
    found = log_probability(logits, np.append(best, token)).tolist()
    return Token(token, found[-1], tuple(zip(best.tolist(), found[:-1], strict=True)))
