"""A tiny exported chat model, and servers of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from losa_export.export import ExportConfig, export_onnx
from losa_export.runtimes.generate import GenerationConfig, TextModel, generate_tokens
from losa_export.runtimes.serve.server import bind, build_server, open_service
from losa_export.runtimes.serve.service import Service
from losa_export.runtimes.serve.settings import ServeSettings

CHAT = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<s> {% endif %}"
)


def export_served(checkpoint: Path, folder: Path, values: str) -> Path:
    """Export a checkpoint for serving, with a chat template beside it."""
    (checkpoint / "chat_template.jinja").write_text(CHAT)
    export_onnx(ExportConfig(checkpoint, folder, values=values, smoothing=0, gate=False, progress=False))  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="session")
def served(pruned: Path, kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pruned tiny model with int8 values, named 'tiny'."""
    return export_served(pruned, tmp_path_factory.mktemp("served") / "tiny", "int8")


@pytest.fixture(scope="session")
def model(served: Path) -> Iterator[TextModel]:
    with closing(TextModel.open(served, "ort", threads=1)) as opened:
        yield opened


@pytest.fixture(scope="session")
def offline(model: TextModel) -> Callable[[NDArray[np.int64], int], list[int]]:
    """The greedy answer of `losa generate`'s own loop."""

    def answer(prompt: NDArray[np.int64], count: int) -> list[int]:
        config = GenerationConfig(max_new_tokens=count)
        return list(generate_tokens(model.runtime, prompt, config, stop_token_ids=model.stop_token_ids))

    return answer


@dataclass
class Running:
    """A server in a thread."""

    service: Service
    url: str
    port: int


@pytest.fixture
def serve(served: Path) -> Iterator[Callable[..., Running]]:
    """Start servers in threads: `serve(keys=(), folder=served, **settings)`; they end with the test."""
    ends: list[Callable[[], None]] = []

    def start(*, keys: tuple[str, ...] = (), folder: Path = served, **settings: object) -> Running:
        chosen = ServeSettings(**{"port": 0, "threads": 1, "context_tokens": 96, "drain_timeout": 2.0} | settings)  # type: ignore[arg-type]
        service, listener = open_service(folder, chosen), bind(chosen.host, chosen.port)
        port = listener.getsockname()[1]
        ready = threading.Event()
        server = build_server(service, keys, on_ready=ready.set)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        assert ready.wait(30)

        def end() -> None:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()

        ends.append(end)
        return Running(service, f"http://127.0.0.1:{port}", port)

    yield start
    for end in ends:
        end()
