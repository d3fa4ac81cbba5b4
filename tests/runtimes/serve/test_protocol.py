"""Connections that bring no request, or one that never ends."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import pytest

from tests.runtimes.serve.conftest import Running

Serve = Callable[..., Running]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def connect(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=20)


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes."""
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


def read_until(connection: socket.socket, end: bytes) -> None:
    found = b""
    while not found.endswith(end):
        data = connection.recv(65536)
        assert data, f"closed after {found!r}"
        found += data


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_never_ends_is_closed(serve: Serve, sent: bytes) -> None:
    running = serve(header_timeout=0.3)
    with connect(running) as connection:
        started = time.monotonic()
        connection.sendall(sent)
        answer = read_all(connection)
        assert time.monotonic() - started >= 0.25
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"did not arrive in time" in answer


def test_a_second_head_that_never_ends_is_closed_too(serve: Serve) -> None:
    running = serve(header_timeout=0.3, keep_alive=5.0)
    with connect(running) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(connection, b'{"status":"live"}')
        connection.sendall(b"GET /health/live HT")
        assert b"did not arrive in time" in read_all(connection)


def test_an_idle_connection_is_closed_after_its_time_and_not_before(serve: Serve) -> None:
    running = serve(header_timeout=0.2, keep_alive=1.0)
    with connect(running) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            read_until(connection, b'{"status":"live"}')
            time.sleep(0.5)
        assert read_all(connection) == b""


def test_a_body_that_never_ends_is_408(serve: Serve) -> None:
    running = serve(body_timeout=0.3)
    with connect(running) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"within 0.3 seconds" in answer


def test_a_body_without_end_is_cut_at_the_limit(serve: Serve) -> None:
    running = serve(max_body_bytes=1000)
    with connect(running) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(11):  # no byte more than it reads: closing with some left would reset the connection
            connection.sendall(b"64\r\n" + b"x" * 100 + b"\r\n")
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"".join(b"H%d: x\r\n" % number for number in range(20_000)),
        b"\x00\xff\x16\x03\x01" * 10 + b"\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / JTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
    ids=range(7),
)
def test_what_is_no_http_is_refused_and_the_server_goes_on(serve: Serve, sent: bytes) -> None:
    running = serve()
    with connect(running) as connection:
        try:
            connection.sendall(sent)
            answer = read_all(connection)
        except ConnectionError:
            answer = b"HTTP/1.1 400 "  # it closed while we were still sending
    assert answer.split(b" ")[1].startswith(b"4")
    with connect(running) as connection:
        connection.sendall(b"GET /health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in read_all(connection)


def test_connections_beyond_the_limit_are_told_to_come_back(serve: Serve) -> None:
    running = serve(max_connections=3)
    held = [connect(running) for _ in range(3)]
    time.sleep(0.3)
    with connect(running) as connection:
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: 5" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
    for connection in held:
        connection.close()
    time.sleep(0.3)
    with connect(running) as connection:
        connection.sendall(b"GET /health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in read_all(connection)
