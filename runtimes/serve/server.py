"""From a folder and settings to a process that answers until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from losa_export.errors import CheckpointError, ConfigError
from losa_export.runtimes.generate import TextModel
from losa_export.runtimes.ort import OrtRuntime
from losa_export.runtimes.serve.app import create_app
from losa_export.runtimes.serve.limits import Keys
from losa_export.runtimes.serve.logs import configure_logs
from losa_export.runtimes.serve.protocol import MAX_HEAD_BYTES, guarded_protocol
from losa_export.runtimes.serve.service import Service, read_facts
from losa_export.runtimes.serve.settings import ServeSettings
from losa_export.runtimes.threads import default_threads
from losa_export.verify import verify

_LOG = logging.getLogger("losa.serve")

# Beyond the drain time, for the last events to reach their readers.
_GRACE_SECONDS = 5


def open_service(folder: Path, settings: ServeSettings) -> Service:
    """Load a folder's model for serving.

    Raises: CheckpointError when the folder's files are not those of its export.json, and what OrtRuntime.load,
    TextModel.open and Service raise.
    """
    if settings.verify:
        check_files(folder)
    threads = settings.threads or max(1, default_threads() // settings.workers)
    model = TextModel.open(folder, OrtRuntime.load(folder, threads=threads, stop_spinning=True))
    try:
        facts = read_facts(folder, settings.model_name, model.runtime.describe(), int(time.time()))
        return Service(settings, model, facts, workers=settings.workers)
    except BaseException:
        model.close()
        raise


def check_files(folder: Path) -> None:
    """Raise CheckpointError unless each file of `folder` is the one that its export.json lists."""
    found = verify(folder, files_only=True, show_progress=False)
    if not found.confirmed:
        raise CheckpointError(
            f"'{folder}' is not as it was exported:\n{found}\ncopy it again, or serve it all the same with --no-verify",
            path=folder,
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, and does not listen yet. Raises: ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named asyncio switches off the delay of small packets, which would hold each token for 40 ms.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except (OSError, UnicodeError, OverflowError) as error:
        found.close()
        raise ConfigError(
            f"cannot listen at {host} port {port}: {error}; choose another host or port", field="port"
        ) from error
    found.set_inheritable(True)
    return found


def build_server(
    service: Service, keys: Sequence[str], *, on_ready: Callable[[], None] = lambda: None
) -> uvicorn.Server:
    """A server that is not started. `on_ready` is called once it listens."""
    settings = service.settings
    config = uvicorn.Config(
        create_app(service, Keys(keys)),
        http=guarded_protocol(settings.header_timeout, settings.max_connections),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]  # seconds of call_later, whole or not
        timeout_graceful_shutdown=int(settings.drain_timeout) + _GRACE_SECONDS,
    )
    return _Server(config, service, on_ready)


def run(
    service: Service, listener: socket.socket, keys: Sequence[str], *, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Answer at `listener` until SIGTERM or SIGINT, then finish what is under way. A second SIGINT ends it at once."""
    configure_logs()
    # uvicorn raises the signal again once it is done: an orderly end is then no death by signal.
    previous = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(build_server(service, keys, on_ready=on_ready).serve([listener]))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    """uvicorn, with our service told of beginning and end."""

    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._on_ready = service, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        _LOG.info("draining", extra={"facts": {"running": self._service.engine.load.running}})
        self._service.drain()
        # Late answers get an error in their stream, which a cut connection would not tell.
        late = asyncio.get_running_loop().call_later(self._service.settings.drain_timeout, self._service.engine.abandon)
        await super().shutdown(sockets)
        late.cancel()
        _LOG.info("stopped")


def _ignore(*_: object) -> None:
    pass
