"""The routes: OpenAI's chat, completions and models; health, metrics, the description of all this, and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from losa_export.runtimes.serve.limits import ApiError, Guard, Keys, parse_body, read_body
from losa_export.runtimes.serve.metrics import CONTENT_TYPE
from losa_export.runtimes.serve.openapi import describe
from losa_export.runtimes.serve.page import page_routes
from losa_export.runtimes.serve.reply import Reply
from losa_export.runtimes.serve.requests import ChatRequest, CompletionRequest
from losa_export.runtimes.serve.service import Int64, Service

Body = TypeVar("Body", ChatRequest, CompletionRequest)

# How much longer than it took to make an answer may take to be read.
SLOW_READER_SECONDS = 30.0

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def create_app(service: Service, keys: Keys) -> Starlette:
    """The application of one model. Its service begins to work when the application starts."""
    endpoints = _Endpoints(service)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(service.close)

    routes = [
        Route(CHAT, endpoints.chat, methods=["POST"]),
        Route(COMPLETIONS, endpoints.complete, methods=["POST"]),
        Route("/v1/models", endpoints.models, methods=["GET"]),
        Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
        Route("/health/live", endpoints.live, methods=["GET"]),
        Route("/health/ready", endpoints.ready, methods=["GET"]),
        Route("/metrics", endpoints.metrics, methods=["GET"]),
        Route("/openapi.json", endpoints.openapi, methods=["GET"]),
        *(page_routes() if service.settings.page else []),
    ]
    settings = service.settings
    longest = settings.body_timeout + settings.queue_timeout + settings.request_timeout + SLOW_READER_SECONDS
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Guard, keys=keys, longest=longest, observe=endpoints.observe)],
        exception_handlers={HTTPException: _http_error, ApiError: _api_error},
    )


class _Endpoints:
    """One method for each route."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._openapi = describe(service.facts.name)

    def observe(self, path: str, status: int) -> None:
        """Count a request that is over."""
        if path in (CHAT, COMPLETIONS):
            self._service.metrics.requests.labels(endpoint=path, status=str(status)).inc()

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest, self._service.chat_prompt)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest, self._service.plain_prompts)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._service.facts.as_dict(self._service.plan)]})

    async def model(self, request: Request) -> Response:
        self._service.check_model(request.path_params["name"])
        return JSONResponse(self._service.facts.as_dict(self._service.plan))

    async def live(self, _: Request) -> Response:
        return _health("live" if self._service.is_live else "hung", self._service.is_live)

    async def ready(self, _: Request) -> Response:
        return _health(self._service.condition, self._service.condition == "ready")

    async def metrics(self, _: Request) -> Response:
        return Response(self._service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(self._openapi)

    async def _answer(self, request: Request, model: type[Body], prompts_of: Callable[[Body], list[Int64]]) -> Response:
        settings = self._service.settings
        data = await read_body(request, limit=settings.max_body_bytes, timeout=settings.body_timeout)
        if settings.log_prompts:
            request.state.facts["body"] = data.decode("utf-8", "replace")
        body = parse_body(data, model)
        self._service.check_model(body.model)
        # A long prompt takes the tokenizer long; streams go on meanwhile.
        prompts = await anyio.to_thread.run_sync(prompts_of, body)
        generation = self._service.submit(prompts, body)
        return await Reply(self._service, request, body, generation).respond()


def _health(condition: str, good: bool) -> Response:
    return JSONResponse({"status": condition}, 200 if good else 503)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals in our form."""
    assert isinstance(error, HTTPException)
    what = {404: f"there is nothing at {request.url.path[:100]}", 405: f"{request.method} is not possible here"}
    refusal = ApiError(error.status_code, what.get(error.status_code, str(error.detail)))
    response = refusal.response()
    response.headers.update(error.headers or {})
    return response
