"""What stands between the wire and the routes: keys, sizes, times, and one form for every refusal."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from losa_export.runtimes.serve.wire import error_object

_LOG = logging.getLogger("losa.serve")
Model = TypeVar("Model", bound=BaseModel)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ApiError(Exception):
    """A refusal as the client sees it.

    Args:
        status: of HTTP.
        message: what is wrong, where, and the mend.
        kind: OpenAI's `type`.
        param: the field.
        code: OpenAI's `code`.
        retry_after: seconds after which it is worth while to ask again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after = retry_after

    def as_dict(self) -> dict[str, object]:
        """The body."""
        return error_object(self.message, self.kind, param=self.param, code=self.code)

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body will not be read
        return JSONResponse(self.as_dict(), self.status, headers)


class Keys:
    """API keys, compared in constant time.

    Args:
        keys: () lets everybody in.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        # Digests have one length, so that not even a key's length can be measured.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allow(self, authorization: str | None) -> bool:
        """Whether a header `Authorization: Bearer KEY` opens the door. Every key is compared, whichever fits."""
        if not self._digests:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        fits = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(fits)


class Guard:
    """The outermost layer: a request's name, its key, its line in the log; no exception goes further than here.

    Args:
        app: behind it.
        keys: for paths under /v1/.
        longest: seconds from a request's head to the last byte of its answer. The engine keeps its own times; this
            one is for readers that take nothing, and hold a connection by it.
        observe: is told path and status of each request that is over; status 0 if none was sent.
    """

    def __init__(self, app: ASGIApp, keys: Keys, longest: float, observe: Callable[[str, int], None]) -> None:
        self._app, self._keys, self._longest, self._observe = app, keys, longest, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        identifier = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        facts: dict[str, object] = {}
        scope["state"] = {**scope.get("state", {}), "request_id": identifier, "facts": facts}
        started, status = time.monotonic(), 0

        async def named_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", identifier.encode())]}
            await send(message)

        try:
            if scope["path"].startswith("/v1/") and not self._keys.allow(request.headers.get("authorization")):
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                    "authentication_error",
                    code="invalid_api_key",
                )
            async with asyncio.timeout(self._longest):
                await self._app(scope, receive, named_send)
        except TimeoutError:
            facts["finish"] = ["not read in time"]
        except ApiError as error:
            await error.response()(scope, receive, named_send)
        except Exception as error:
            # The text of an unknown error may hold a prompt, so it goes into the log's traceback alone.
            _LOG.exception("request failed", extra={"facts": {"request": identifier, "error": type(error).__name__}})
            if status == 0:
                failed = ApiError(500, "the server failed on this request; see its log", "server_error")
                await failed.response()(scope, receive, named_send)
        finally:
            self._observe(scope["path"], status)
            seconds = round(time.monotonic() - started, 4)
            _LOG.info(
                "request",
                extra={
                    "facts": {
                        "request": identifier,
                        "client": (scope.get("client") or ("",))[0],
                        "method": scope["method"],
                        "path": scope["path"][:200],
                        "status": status,
                        "seconds": seconds,
                        **facts,
                    }
                },
            )


async def read_body(request: Request, *, limit: int, timeout: float) -> bytes:
    """The body of a JSON request.

    Raises: ApiError 415 for another type, 413 beyond `limit` bytes, 408 when it takes longer than `timeout` seconds,
    400 when the client breaks off.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Any web page may send other types to any server in the reader's name; this one its browser would ask about.
        raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json")
    too_long = ApiError(413, f"the body is longer than the {limit} bytes that this server reads; shorten the prompt")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the connection closed before the body was complete")
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_long
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout:g} seconds; send it again") from None


def parse_body(body: bytes, model: type[Model]) -> Model:
    """A body as one of our models. Raises: ApiError 400 naming the field."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or None
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        raise ApiError(400, message[:500], param=None if where is None else where[:200]) from None
