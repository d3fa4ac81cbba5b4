"""One answer as it comes: from the engine's events to pieces of text with their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Literal

from losa_export.runtimes.detokenize import StreamDecoder
from losa_export.runtimes.serve.engine import Event, Failed, Finished, Job, Started, Token
from losa_export.runtimes.serve.stops import StopMatcher

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """Some more of one answer.

    Attributes:
        choice: which answer of the request.
        text: whole characters; '' when tokens came that show nothing yet.
        tokens: those that came with it.
        finish: why the answer ended; None while it goes on.
        failure: why it will never be finished.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    failure: Failed | None = None


@dataclass
class Timing:
    """When things happened to an answer, by time.monotonic; None: not yet."""

    submitted: float = field(default_factory=monotonic)
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass
class Answer:
    """What is known of one answer so far.

    Attributes:
        job: its work.
        decoder: its tokens to text.
        stops: its stop strings.
        tokens: how many came.
        cached: tokens of the prompt that were there already.
        done: ended, by itself or by failure.
    """

    job: Job
    decoder: StreamDecoder
    stops: StopMatcher
    timing: Timing = field(default_factory=Timing)
    tokens: int = 0
    cached: int = 0
    done: bool = False


class Generation:
    """All answers of one request.

    Args:
        answers: of its jobs, in the order of the choices.
        cancel: `Engine.cancel`.
        inbox: gets (choice, event) from the jobs' sinks, in the event loop's thread.
    """

    def __init__(
        self, answers: Sequence[Answer], cancel: Callable[[Job], None], inbox: asyncio.Queue[tuple[int, Event]]
    ) -> None:
        self.answers, self._cancel, self._inbox = answers, cancel, inbox
        self._early: list[tuple[int, Event]] = []

    async def begun(self) -> Failed | None:
        """Wait until the first prompt is being read. Returns: the failure, if it came instead."""
        first = await self._inbox.get()
        self._early.append(first)
        return first[1] if isinstance(first[1], Failed) else None

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces as they come. All jobs are cancelled when the iterator is closed before its end."""
        try:
            while not all(answer.done for answer in self.answers):
                # All that has come since: a reader that is late gets fewer, longer pieces.
                events = self._early or [await self._inbox.get()]
                self._early = []
                while not self._inbox.empty():
                    events.append(self._inbox.get_nowait())
                for choice, answer in enumerate(self.answers):
                    piece = self._take(choice, answer, [event for index, event in events if index == choice])
                    if piece is not None:
                        yield piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Free the slots of all answers that are not done."""
        for answer in self.answers:
            if not answer.done:
                answer.done = True
                self._cancel(answer.job)

    def _take(self, choice: int, answer: Answer, events: Sequence[Event]) -> Piece | None:
        text, tokens = "", []
        finish: FinishReason | None = None
        for event in events:
            if answer.done:
                break  # tokens that were on their way when a stop string ended the answer
            match event:
                case Started(cached):
                    answer.timing.started, answer.cached = monotonic(), cached
                case Token(token_id):
                    answer.timing.last_token = monotonic()
                    answer.timing.first_token = answer.timing.first_token or answer.timing.last_token
                    answer.tokens += 1
                    tokens.append(event)
                    text += answer.stops.push(answer.decoder.push(token_id))
                    if answer.stops.stopped:
                        answer.done, finish = True, "stop"
                        self._cancel(answer.job)
                case Finished(reason):
                    text += answer.stops.push(answer.decoder.finish())
                    text += answer.stops.finish()
                    answer.done = True
                    finish = "stop" if answer.stops.stopped else reason
                case Failed():
                    answer.done = True
                    return Piece(choice, text, tuple(tokens), failure=event)
        return Piece(choice, text, tuple(tokens), finish) if tokens or text or finish else None


def answer_of(job: Job, tokenizer: Tokenizer, stops: Sequence[str]) -> Answer:
    """An answer of which nothing has come yet."""
    return Answer(job, StreamDecoder(tokenizer, job.prompt.tolist()), StopMatcher(stops))
