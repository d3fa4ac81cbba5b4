"""`losa serve` as a process: how it begins, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from losa_export.cli import main

Start = Callable[..., "Process"]
ADDRESS = re.compile(r"losa: serving (\S+) at (http://\S+)/v1\n")


class Process:
    """A server and where it answers."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "losa_export", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        found = ADDRESS.fullmatch(self.said)
        assert found, (self.said, self.process.communicate()[1])
        self.name, self.url = found[1], found[2]

    def complete(self, **body: object) -> dict[str, object]:
        data = json.dumps({"prompt": "the cat sat", "temperature": 0, "ignore_eos": True} | body).encode()
        request = urllib.request.Request(self.url + "/v1/completions", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)  # type: ignore[no-any-return]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit status and what was written to standard error."""
        self.process.send_signal(number)
        errors = self.process.communicate(timeout=60)[1]
        return self.process.returncode, errors


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []
    # What a killed server leaves behind goes with the test's own files.
    scratch = {"TMPDIR": str(tmp_path)}

    def begin(*arguments: str, **environment: str) -> Process:
        started.append(Process("--port", "0", *arguments, **scratch, **environment))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.communicate()


def post(body: str) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_0(start: Start, served: Path, number: int) -> None:
    server = start(str(served), "--context-tokens", "250")
    assert server.name == "tiny"
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    body = json.dumps({"prompt": "the", "max_tokens": 240, "n": 8, "stream": True, "ignore_eos": True})
    connection.sendall(post(body))
    answer = connection.recv(4096)  # it has begun
    server.process.send_signal(number)
    while data := connection.recv(65536):
        answer += data
    connection.close()
    assert b"data: [DONE]" in answer
    assert b'"finish_reason":"length"' in answer
    status, errors = server.end(0)
    assert status == 0, errors
    events = [json.loads(line) for line in errors.splitlines()]
    assert [event["event"] for event in events] == ["draining", "request", "stopped"]


def test_what_takes_longer_than_the_drain_gets_an_error_and_an_end(start: Start, served: Path) -> None:
    server = start(str(served), "--context-tokens", "256", "--drain-timeout", "0.01s")
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        body = json.dumps({"prompt": "the", "max_tokens": 255, "n": 8, "stream": True, "ignore_eos": True})
        connection.sendall(post(body))
        answer = connection.recv(4096)
        server.process.send_signal(signal.SIGTERM)
        while data := connection.recv(65536):
            answer += data
    assert b'"code":"shutdown"' in answer or b"[DONE]" in answer
    assert server.end(0)[0] == 0


def test_killed_workers_are_replaced_and_the_others_go_on(start: Start, served: Path) -> None:
    server = start(str(served), "--workers", "2", "--threads", "1", "--context-tokens", "64")
    expected = server.complete(max_tokens=5)["choices"]
    for _ in range(4):
        children = workers(server.process.pid)
        settings = Path(f"/proc/{children[0]}/environ").read_bytes().split(b"\0")
        assert b"LOSA_LARGE_PAGES=0" in settings  # they share the weights
        assert len(children) == 2
        os.kill(children[0], signal.SIGKILL)
        # The other one answers meanwhile; a connection that waited at the dead one is lost.
        deadline = time.monotonic() + 30
        while len(workers(server.process.pid)) < 2 or children[0] in workers(server.process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert server.complete(max_tokens=5)["choices"] == expected
    with urllib.request.urlopen(server.url + "/metrics") as response:
        assert b"losa_generated_tokens_total" in response.read()
    status, errors = server.end()
    assert status == 0, errors
    assert errors.count('"event": "worker died", "status": -9') == 4


def workers(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(number) for number in found]


def test_workers_do_not_outlive_a_killed_supervisor(start: Start, served: Path) -> None:
    server = start(str(served), "--workers", "2", "--threads", "1", "--context-tokens", "64")
    children = workers(server.process.pid)
    server.process.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}/exe").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_that_cannot_start_ends_the_whole(served: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(served, folder)
    (folder / "tokenizer.json").write_text("{}")
    found = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "losa_export",
            "serve",
            str(folder),
            "--workers",
            "2",
            "--no-verify",
            "--port",
            "0",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 1
    assert "is not a tokenizer" in found.stderr
    assert "before it was ready" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_changed_folder_is_refused(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(served, folder)
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert main(["serve", str(folder), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert "is not as it was exported" in error
    assert "tokenizer.json" in error
    assert "--no-verify" in error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "99999"], "port is 99999"),
        (["--slots", "many"], "--slots: slots is 'many', but must be a whole number"),
        (["--memory", "1K"], "memory is 1,024; raise memory"),
        (["--memory", "900G", "--slots", "4000000"], "but this machine has"),
        (["--context-tokens", "300"], "the model knows 256 positions"),
        (["--host", "203.0.113.77"], "cannot listen at 203.0.113.77"),
        (["--config", "/nowhere.toml"], "'/nowhere.toml' cannot be read"),
        (["--api-key-file", "/nowhere"], "'/nowhere' cannot be read"),
        (["--threads", "5000"], "threads is 5000"),
    ],
)
def test_a_mistake_is_one_message(
    served: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(served), "--port", "0", *arguments]) == 1
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.startswith("losa: error: ")
    assert captured.out == ""


def test_a_port_in_use_is_told_before_the_model_is_loaded(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "/nowhere", "--port", str(taken.getsockname()[1])]) == 1
    assert "choose another host or port" in capsys.readouterr().err


def test_the_merged_settings_are_printed(
    served: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOSA_SERVE_SLOTS", "7")
    assert main(["serve", str(served), "--print-config", "--no-page"]) == 0
    printed = capsys.readouterr().out
    assert "slots = 7  # LOSA_SERVE_SLOTS\n" in printed
    assert "page = false  # --page\n" in printed
    assert 'host = "127.0.0.1"  # default\n' in printed
