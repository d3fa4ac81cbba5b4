"""A generation as an HTTP answer: one JSON object, or a stream of events."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from losa_export.runtimes.serve.engine import Token
from losa_export.runtimes.serve.generation import Generation, Piece
from losa_export.runtimes.serve.requests import ChatRequest, CompletionRequest
from losa_export.runtimes.serve.service import Service
from losa_export.runtimes.serve.wire import DONE, Form, Json, Usage, event

Result = TypeVar("Result")

# The client has left: nobody reads this status but the log.
CLIENT_CLOSED = 499


class Reply:
    """The answer to one request.

    Args:
        service: counts what ended.
        request: the client may leave; then all its slots are freed.
        body: what was asked.
        generation: under way.
    """

    def __init__(
        self, service: Service, request: Request, body: ChatRequest | CompletionRequest, generation: Generation
    ) -> None:
        self._service, self._request, self._body, self._generation = service, request, body, generation
        self._is_chat = isinstance(body, ChatRequest)
        identifier = ("chatcmpl-" if self._is_chat else "cmpl-") + secrets.token_hex(12)
        self._form = Form("chat" if self._is_chat else "text", identifier, int(time.time()), service.facts.name)
        self._texts = [""] * len(generation.answers)
        self._tokens: list[list[Token]] = [[] for _ in generation.answers]
        self._ended: list[str | None] = [None] * len(generation.answers)

    async def respond(self) -> Response:
        """The response; its stream goes on while it is sent. Raises: ApiError when the answer failed."""
        try:
            if self._body.stream:
                # A request that is refused while it waits should get a status, not a broken stream.
                failed = await self._while_connected(self._generation.begun())
                if failed is not None:
                    raise self._service.refusal(failed)
                return _Stream(self._stream(), self._close)
            await self._while_connected(self._collect())
        except _ClientGoneError:
            self._close()
            return Response(status_code=CLIENT_CLOSED)
        except BaseException:
            self._close()
            raise
        self._close()
        choices = [
            self._form.choice(index, text, str(self._ended[index]), self._logprobs(self._tokens[index], 0))
            for index, text in enumerate(self._texts)
        ]
        return JSONResponse(self._form.whole(choices, self._usage()))

    async def _collect(self) -> None:
        async for piece in self._generation.pieces():
            if piece.failure is not None:
                raise self._service.refusal(piece.failure)
            self._take(piece)

    async def _stream(self) -> AsyncIterator[bytes]:
        if self._is_chat:
            for index in range(len(self._texts)):
                yield self._chunk(self._form.delta(index, "", opens=True))
        async for piece in self._generation.pieces():
            if piece.failure is not None:
                yield event(self._service.refusal(piece.failure).as_dict())
                return
            offset = len(self._texts[piece.choice])
            self._take(piece)
            logprobs = self._logprobs(piece.tokens, offset) if piece.tokens else None
            if piece.text or logprobs is not None:
                yield self._chunk(self._form.delta(piece.choice, piece.text, logprobs=logprobs))
            if piece.finish is not None:
                yield self._chunk(self._form.delta(piece.choice, "", finish=piece.finish))
        if self._body.final_usage:
            yield self._form.chunk([], self._usage())
        yield DONE

    def _chunk(self, choice: Json) -> bytes:
        return self._form.chunk([choice], self._usage() if self._body.continuous_usage else None)

    def _take(self, piece: Piece) -> None:
        self._texts[piece.choice] += piece.text
        self._tokens[piece.choice] += piece.tokens if self._body.logprob_count is not None else ()
        self._ended[piece.choice] = piece.finish

    def _logprobs(self, tokens: list[Token] | tuple[Token, ...], offset: int) -> Json | None:
        if self._body.logprob_count is None:
            return None
        return self._service.texts.chat(tokens) if self._is_chat else self._service.texts.plain(tokens, offset)

    def _usage(self) -> Usage:
        answers = self._generation.answers
        # A prompt that has several answers is read once, and counts once.
        prompts = answers[:: self._body.n]
        return Usage(
            prompt=sum(answer.job.prompt.size for answer in prompts),
            completion=sum(answer.tokens for answer in answers),
            cached=sum(answer.cached for answer in prompts),
        )

    def _close(self) -> None:
        """Free what still runs; counts and facts for metrics and log."""
        self._generation.cancel()
        usage, facts = self._usage(), self._request.state.facts
        facts.update(prompt_tokens=usage.prompt, completion_tokens=usage.completion, cached_tokens=usage.cached)
        first = [answer.timing.first_token for answer in self._generation.answers]
        if first[0] is not None:
            facts["first_token_seconds"] = round(first[0] - self._generation.answers[0].timing.submitted, 4)
        facts["finish"] = [ended or "broken" for ended in self._ended]
        for answer, ended in zip(self._generation.answers, self._ended, strict=True):
            self._service.ended(answer, ended or "broken")
        if self._service.settings.log_prompts:
            facts["answers"] = self._texts

    async def _while_connected(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`. Raises: _ClientGoneError as soon as the client leaves, with the work cancelled."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._disconnected())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _ClientGoneError
            return task.result()
        finally:
            for one in (task, gone):
                one.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _disconnected(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


class _Stream(StreamingResponse):
    """Server-sent events; `close` is called when the last is sent, or as soon as the client has left."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


class _ClientGoneError(Exception):
    """Nobody waits for this answer any more."""
