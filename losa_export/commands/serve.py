"""`losa serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from losa_export.runtimes.serve.settings import ServeSettings

# Name, what is given, and help; as `losa_export.runtimes.serve.settings.ServeSettings`, which says what each means.
_FLAGS = (
    ("host", "ADDRESS", "where to listen (default: 127.0.0.1; 0.0.0.0 is every interface)"),
    ("port", "N", "TCP port (default: 8000; 0 takes a free one)"),
    ("model-name", "NAME", "in requests and answers (default: the folder's name)"),
    ("workers", "N", "processes that share the weights (default: 1)"),
    ("threads", "N", "compute threads of each worker (default: physical cores / workers)"),
    ("slots", "N", "requests answered together in each worker (default: 4)"),
    ("context-tokens", "N", "prompt and answer of each slot (default: what --memory holds, else 2048)"),
    ("memory", "SIZE", "most that keys and values of all slots of a worker take, such as 512M"),
    ("prefill-chunk", "N", "prompt tokens read between two steps of running answers (default: 128)"),
    ("api-key-file", "FILE", "one key a line; keys may also come from LOSA_API_KEYS"),
    ("max-body-bytes", "SIZE", "largest request (default: 1M)"),
    ("max-prompt-tokens", "N", "longest prompt (default: the slot's)"),
    ("max-new-tokens", "N", "longest answer (default: the slot's)"),
    ("max-choices", "N", "answers that one request may ask for (default: 8)"),
    ("max-queue", "N", "requests that may wait; more are refused (default: 64)"),
    ("max-connections", "N", "open connections; more are refused (default: 512)"),
    ("queue-timeout", "TIME", "longest wait for a slot (default: 60s)"),
    ("request-timeout", "TIME", "longest time to the last token (default: 10m)"),
    ("header-timeout", "TIME", "for the head of a request to arrive (default: 10s)"),
    ("body-timeout", "TIME", "for its body (default: 20s)"),
    ("keep-alive", "TIME", "an idle connection is closed after that (default: 15s)"),
    ("drain-timeout", "TIME", "for running answers after SIGTERM (default: 30s)"),
)
_SWITCHES = (
    ("no-prefix-cache", "prefix_cache", False, "read every prompt anew"),
    ("no-verify", "verify", False, "do not check the folder's hashes first"),
    ("no-page", "page", False, "no web page at /"),
    ("log-prompts", "log_prompts", True, "write prompts and answers into the log"),
)


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa serve`."""
    parser.add_argument("folder", type=Path, metavar="ONNX", help="exported folder")
    parser.add_argument(
        "--config", type=Path, default=None, metavar="FILE", help="settings as TOML; then LOSA_SERVE_NAME, then flags"
    )
    parser.add_argument("--print-config", action="store_true", help="print the merged settings, and stop")
    for name, what, text in _FLAGS:
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=what, help=text)
    for name, field, value, text in _SWITCHES:
        parser.add_argument(
            f"--{name}", dest=field, action="store_const", const=value, default=argparse.SUPPRESS, help=text
        )
    # How the supervisor hands its socket to a worker.
    parser.add_argument("--worker-fds", default=None, help=argparse.SUPPRESS)
    parser.set_defaults(command=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    import os

    from losa_export.runtimes.serve.settings import load_settings, read_api_keys

    names = {name.replace("-", "_") for name, _, _ in _FLAGS} | {field for _, field, _, _ in _SWITCHES}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    settings, origins = load_settings(arguments.config, os.environ, flags)
    if arguments.print_config:
        print(settings.as_toml(origins), end="")
        return 0
    keys = read_api_keys(settings)
    _check_installed()
    if arguments.worker_fds is not None:
        return _work(arguments.folder, settings, keys, arguments.worker_fds)
    if settings.workers > 1:
        return _supervise(arguments.folder, settings, keys)
    from losa_export.runtimes.serve.server import bind, open_service, run

    with bind(settings.host, settings.port) as listener:
        service = open_service(arguments.folder, settings)
        run(service, listener, keys, on_ready=lambda: _announce(listener, settings, service.facts.name, keys))
    return 0


def _work(folder: Path, settings: ServeSettings, keys: tuple[str, ...], descriptors: str) -> int:
    """A worker of a supervisor: its socket, and the line on which to say that it is ready."""
    from losa_export.runtimes.serve.server import open_service, run
    from losa_export.runtimes.serve.supervisor import READY, follow_supervisor

    listening, speaking = (int(number) for number in descriptors.split(","))
    with socket.socket(fileno=listening) as listener, socket.socket(fileno=speaking) as line:
        service = open_service(folder, settings)

        def ready() -> None:
            line.sendall(READY)
            follow_supervisor(line)

        run(service, listener, keys, on_ready=ready)
    return 0


def _supervise(folder: Path, settings: ServeSettings, keys: tuple[str, ...]) -> int:
    import os
    from dataclasses import replace

    from losa_export.runtimes.serve.logs import configure_logs
    from losa_export.runtimes.serve.server import bind, check_files
    from losa_export.runtimes.serve.settings import ENVIRONMENT_PREFIX
    from losa_export.runtimes.serve.supervisor import Supervisor

    configure_logs()
    if settings.verify:
        check_files(folder)
    environment = {name: text for name, text in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    environment.setdefault("LOSA_LARGE_PAGES", "0")  # weights stay in the file, which the workers share
    # The supervisor has compared the hashes: a worker need not, and comes back faster.
    environment |= replace(settings, verify=False).as_environment()
    with bind(settings.host, settings.port) as listener:
        supervisor = Supervisor(
            [sys.executable, "-P", "-m", "losa_export", "serve", str(folder)],
            settings.workers,
            listener,
            environment,
            drain_seconds=settings.drain_timeout + 10,
        )
        name = settings.model_name or folder.resolve().name
        supervisor.run(lambda: _announce(listener, settings, name, keys))
    return 0


def _announce(listener: socket.socket, settings: ServeSettings, name: str, keys: tuple[str, ...]) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"losa: serving {name} at http://{shown}:{port}/v1", flush=True)
    if settings.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        print("losa: no API key is set, and other machines can reach this address: --api-key-file", file=sys.stderr)


def _check_installed() -> None:
    from importlib.util import find_spec

    from losa_export.errors import MissingDependencyError

    for package in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
        if find_spec(package) is None:
            raise MissingDependencyError.for_extra(package, "serve", "losa serve")
