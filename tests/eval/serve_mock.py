"""A server of OpenAI's interface whose latencies, failures and chunks are told beforehand."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from aiohttp import web


@dataclass(frozen=True)
class Answer:
    """How the server answers one request."""

    ttft_s: float = 0.0
    itl_s: float = 0.0
    # How many tokens each chunk brings; None: as many chunks of one token as the request asks for.
    chunks: tuple[int, ...] | None = None
    usage: Literal["each", "final", "none"] = "each"
    status: int = 200
    # What is left out at the end, or comes instead of it.
    done: bool = True
    finish: bool = True
    error: str | None = None
    raw: bytes | None = None
    # Closes the connection after that many chunks.
    break_after: int | None = None
    content_type: str = "text/event-stream"
    hang_s: float = 0.0
    # Closes the connection without a word.
    drop: bool = False


@dataclass
class MockServer:
    """Runs in a thread of its own: `with MockServer(plan) as server`.

    `plan` maps the number of a request and its body to an Answer.
    """

    plan: Callable[[int, dict[str, Any]], Answer] = lambda number, body: Answer()
    models: Any = field(default_factory=lambda: {"data": [{"id": "mock", "losa": {"slots": 4}}]})
    key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    running: int = 0
    peak: int = 0
    url: str = ""
    port: int = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        hanging = asyncio.all_tasks(self._loop)
        for task in hanging:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*hanging, return_exceptions=True))
        self._loop.close()

    def _application(self) -> web.Application:
        application = web.Application()
        application.router.add_get("/v1/models", self._list)
        application.router.add_post("/v1/completions", self._complete)
        application.router.add_post("/v1/chat/completions", self._complete)
        return application

    async def _list(self, request: web.Request) -> web.Response:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "no valid API key"}}, status=401)
        return web.json_response(self.models)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        self.paths.append(request.path)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            return await self._answer(request, body, self.plan(number, body))
        finally:
            self.running -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any], answer: Answer) -> web.StreamResponse:
        if answer.drop:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if answer.status != 200:
            document = {"error": {"message": f"told to answer {answer.status}"}}
            # A status of 3xx would lead a client astray that follows it.
            return web.json_response(document, status=answer.status, headers={"Location": "/v1/models"})
        response = web.StreamResponse(headers={"Content-Type": answer.content_type})
        await response.prepare(request)
        try:
            await self._stream(request, response, body, answer)
        except ConnectionError:  # the client has left
            return response
        return response

    async def _stream(
        self, request: web.Request, response: web.StreamResponse, body: dict[str, Any], answer: Answer
    ) -> None:
        chat = request.path.endswith("/chat/completions")
        total = 0

        async def event(text: str | None, reason: str | None, *, usage_only: bool = False) -> None:
            counted = {"prompt_tokens": 7, "completion_tokens": total, "total_tokens": 7 + total}
            choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
            choice |= {"delta": {"content": text}} if chat else {"text": text or ""}
            document = {
                "choices": [] if usage_only else [choice],
                "usage": counted if usage_only or answer.usage == "each" else None,
            }
            await response.write(b"data: " + json.dumps(document).encode() + b"\n\n")

        if chat:
            await event("", None)  # the role, which is no token
        await asyncio.sleep(answer.ttft_s)
        if answer.hang_s:
            await asyncio.sleep(answer.hang_s)
        chunks = (1,) * body["max_tokens"] if answer.chunks is None else answer.chunks
        for place, tokens in enumerate(chunks):
            if place:
                await asyncio.sleep(answer.itl_s * tokens)
            if place == answer.break_after:
                assert request.transport is not None
                request.transport.abort()
                return
            total += tokens
            await event("word " * tokens, None)
        if answer.error is not None:
            await response.write(b"data: " + json.dumps({"error": {"message": answer.error}}).encode() + b"\n\n")
        if answer.raw is not None:
            await response.write(answer.raw)
        if answer.finish:
            await event(None, "length")
        if answer.usage == "final":
            await event(None, None, usage_only=True)
        if answer.done:
            await response.write(b"data: [DONE]\n\n")
