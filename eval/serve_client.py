"""A client of OpenAI-compatible servers that takes little of the processor it may share with the server.

While a stream runs, bytes are cut into events and stamped with the time of their arrival; they are parsed when it has
ended. Bodies are encoded before the load begins. Connections are kept and used again, as users' clients do; nothing is
sent again but what met one that the server had just closed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp

from losa_export.errors import RuntimeFailureError
from losa_export.eval.serve_metrics import Outcome, RequestRecord
from losa_export.eval.serve_stream import EventSplitter, StreamFacts, error_message, read_stream

Clock = Callable[[], float]

_REFUSED = (429, 503)
# Shorter than what servers keep an idle connection for, lest a request is sent into one that is being closed.
_KEEP_ALIVE_S = 2.0
# Of an answer that tells why a request failed.
_MOST_ERROR_BYTES = 64 * 1024


def open_session(api_key: str | None) -> aiohttp.ClientSession:
    """A session without a limit of connections, cookies or proxies. Close it after use."""
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_note_reuse)
    headers = {"Accept": "text/event-stream, application/json", "Accept-Encoding": "identity"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
        trace_configs=[trace],
    )


@dataclass
class _Attempt:
    """Whether a request went out on a connection that had served another one."""

    reused: bool = False


async def _note_reuse(_session: object, context: SimpleNamespace, _parameters: object) -> None:
    if isinstance(context.trace_request_ctx, _Attempt):
        context.trace_request_ctx.reused = True


async def list_models(session: aiohttp.ClientSession, url: str, timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """The server's models, and what it calls itself ('' if it does not say).

    Args:
        session: of `open_session`.
        url: of the server, without a path of the interface.
        timeout_s: longest wait.
    Raises: RuntimeFailureError if nothing answers there, or not in the interface's form.
    """
    where = f"{url}/v1/models"
    try:
        async with asyncio.timeout(timeout_s), session.get(where, allow_redirects=False) as response:
            body = await response.content.read(16 * _MOST_ERROR_BYTES)
            status, name = response.status, response.headers.get("Server", "")
    except TimeoutError:
        raise RuntimeFailureError(
            f"'{where}' did not answer within {timeout_s:g} s; is the server busy, or is something else there?", url=url
        ) from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise RuntimeFailureError(
            f"no server answers at '{url}' ({_reason(error)}); start it, or correct --url", url=url
        ) from error
    document = _json(body)
    if status in (401, 403):
        raise RuntimeFailureError(
            f"'{where}' answered {status}: {error_message(document)}; name the variable that holds a key with "
            "--api-key-env",
            status=status,
        )
    models = document.get("data") if status == 200 and isinstance(document, dict) else None
    if not isinstance(models, list) or not all(
        isinstance(one, dict) and isinstance(one.get("id"), str) for one in models
    ):
        raise RuntimeFailureError(
            f"'{where}' answered {status} without a list of models; correct --url, or name a --model",
            status=status,
        )
    return models, name


async def send(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    *,
    index: int,
    intended_s: float,
    clock: Clock,
    timeout_s: float,
) -> RequestRecord:
    """Send one request and read its stream. A failure is an outcome, not an error.

    Args:
        session: of `open_session`.
        url: of the endpoint.
        body: JSON with `stream` on.
        index: for the record.
        intended_s: likewise.
        clock: seconds since the load began.
        timeout_s: longest time from sending the request to the end of its stream.
    """
    started_s = clock()
    events: list[tuple[float, bytes]] = []
    status: int | None = None

    def record(outcome: Outcome | None = None, detail: str = "") -> RequestRecord:
        ended_s = clock()
        facts = read_stream(events)
        if outcome is None:
            outcome, detail = _verdict(facts)
        return RequestRecord(
            index=index,
            intended_s=intended_s,
            started_s=started_s,
            ended_s=ended_s,
            outcome=outcome,
            status=status,
            detail=detail,
            chunks=facts.chunks,
            finished_s=facts.finished_s,
            prompt_tokens=facts.prompt_tokens,
            output_tokens=facts.output_tokens,
            counted_by=facts.counted_by,
            finish_reason=facts.finish_reason,
        )

    try:
        async with asyncio.timeout(timeout_s), await _post(session, url, body) as response:
            status = response.status
            if status != 200:
                why = error_message(_json(await response.content.read(_MOST_ERROR_BYTES)))
                return record(Outcome.REFUSED if status in _REFUSED else Outcome.HTTP_ERROR, f"{status}: {why}")
            if response.content_type != "text/event-stream":
                return record(Outcome.MALFORMED, f"the answer is {response.content_type}, not a stream of events")
            splitter = EventSplitter()
            async for piece in response.content.iter_any():
                now = clock()
                events += [(now, data) for data in splitter.feed(piece)]
            now = clock()
            events += [(now, data) for data in splitter.end()]
    except TimeoutError:
        return record(Outcome.TIMED_OUT, f"not finished within {timeout_s:g} s")
    except asyncio.CancelledError:
        # The caller cancels when the user interrupts, and wants to know how far this one came.
        return record(Outcome.INTERRUPTED)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        # An answer that had begun was cut off; without one there was no connection, or it broke.
        return record(Outcome.CONNECTION_ERROR if status is None else Outcome.TRUNCATED, _reason(error))
    return record()


async def _post(session: aiohttp.ClientSession, url: str, body: bytes) -> aiohttp.ClientResponse:
    """The answer, once its head has come.

    A server may close an idle connection at the moment at which it is used again. It has not seen the request then,
    which goes out on another one. Each attempt takes a connection from the pool, so there is an end to them.
    """
    while True:
        attempt = _Attempt()
        try:
            return await session.post(
                url,
                data=body,
                headers={"Content-Type": "application/json"},
                allow_redirects=False,
                trace_request_ctx=attempt,
            )
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not attempt.reused:
                raise


def _verdict(facts: StreamFacts) -> tuple[Outcome, str]:
    """How an answer ended whose connection did not break, and what is wrong with it."""
    if facts.error is not None:
        return Outcome.STREAM_ERROR, facts.error
    if facts.malformed is not None:
        return Outcome.MALFORMED, facts.malformed
    if not facts.done or facts.finish_reason is None:
        return Outcome.TRUNCATED, "the stream ended without " + ("finish_reason" if facts.done else "[DONE]")
    if not facts.chunks:
        return Outcome.EMPTY, "no chunk brought a token"
    return Outcome.COMPLETED, ""


def _json(body: bytes) -> object:
    """The document in `body`, or its text if it is none."""
    try:
        found: object = json.loads(body)
    except (ValueError, RecursionError):
        return body.decode(errors="replace")
    return found


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
