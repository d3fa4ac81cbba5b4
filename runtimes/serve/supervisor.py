"""Several worker processes at one socket: those that die are replaced.

uvicorn's own supervisor starts a worker again without end or pause, also one that cannot load its model. Here a
worker that fails before it was ever ready ends the whole, with the worker's message, and one that dies later comes
back at once, but no more than a few times a minute.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.multiprocess import mark_process_dead

from losa_export.errors import RuntimeFailureError
from losa_export.runtimes.serve.metrics import SHARED_FOLDER

_LOG = logging.getLogger("losa.serve")

READY = b"r"
# So many deaths within a minute for each worker are bad luck; more are a fault that starting again does not mend.
MAX_DEATHS_A_MINUTE = 30
_TICK = 0.1


@dataclass
class _Worker:
    """A process, and a line to it: the worker says there that it is ready, and ends when the line does."""

    process: subprocess.Popen[bytes]
    line: socket.socket
    ready: bool = False


def follow_supervisor(line: socket.socket) -> None:
    """In a worker: end in good order when the supervisor is gone, even if it was killed."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while line.recv(1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="losa-supervisor-line", daemon=True).start()


class Supervisor:
    """Keeps workers alive.

    Args:
        command: starts a worker; `--worker-fds LISTENER,LINE` is appended.
        workers: how many.
        listener: bound; every worker listens at it.
        environment: of the workers.
        drain_seconds: a worker that has not ended by then after SIGTERM is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        workers: int,
        listener: socket.socket,
        environment: Mapping[str, str],
        drain_seconds: float,
    ) -> None:
        self._command, self._count, self._listener = list(command), workers, listener
        self._environment, self._drain_seconds = dict(environment), drain_seconds
        self._workers: list[_Worker] = []
        self._deaths: deque[float] = deque()
        self._stopping = False
        self._announced = False

    def run(self, on_ready: Callable[[], None]) -> None:
        """Until SIGTERM or SIGINT; returns when all workers have drained.

        Args:
            on_ready: called once, when every worker answers.
        Raises: RuntimeFailureError when a worker fails to start, or workers die again and again.
        """
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        with tempfile.TemporaryDirectory(prefix="losa-metrics-", ignore_cleanup_errors=True) as folder:
            self._environment[SHARED_FOLDER] = folder
            try:
                self._workers = [self._start() for _ in range(self._count)]
                while not self._stopping:
                    self._watch(on_ready)
                self._drain()
            finally:
                for worker in self._workers:
                    worker.process.kill()
                    worker.process.wait()
                    worker.line.close()
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        descriptors = (self._listener.fileno(), theirs.fileno())
        process = subprocess.Popen(
            [*self._command, "--worker-fds", ",".join(map(str, descriptors))],
            env=self._environment,
            pass_fds=descriptors,
            # Ctrl-C reaches the supervisor alone, which then drains the workers.
            start_new_session=True,
        )
        theirs.close()
        return _Worker(process, ours)

    def _watch(self, on_ready: Callable[[], None]) -> None:
        readable, _, _ = select.select([worker.line for worker in self._workers if not worker.ready], [], [], _TICK)
        for index, worker in enumerate(self._workers):
            if worker.line in readable and worker.line.recv(1) == READY:
                worker.ready = True
            status = worker.process.poll()
            if status is None:
                continue
            if not worker.ready:
                raise RuntimeFailureError(
                    f"a worker ended with status {status} before it was ready; its message is above"
                )
            self._count_death(status)
            # Else its last load would be counted for ever.
            mark_process_dead(worker.process.pid, self._environment[SHARED_FOLDER])  # type: ignore[no-untyped-call]
            worker.line.close()
            self._workers[index] = self._start()
        if not self._announced and all(worker.ready for worker in self._workers):
            self._announced = True
            on_ready()

    def _count_death(self, status: int) -> None:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths and self._deaths[0] < now - 60:
            self._deaths.popleft()
        _LOG.warning("worker died", extra={"facts": {"status": status}})
        if len(self._deaths) > MAX_DEATHS_A_MINUTE * self._count:
            raise RuntimeFailureError(
                f"workers died {len(self._deaths)} times within a minute, the last with status {status}; see the log"
            )

    def _drain(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        deadline = time.monotonic() + self._drain_seconds
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
