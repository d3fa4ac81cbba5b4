"""The parent side of a benchmark's child process: start it, ask it, notice when it dies or hangs, end it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe
from typing import Any, Protocol, Self

from losa_export import errors
from losa_export.errors import LosaError, RuntimeFailureError
from losa_export.runtimes.isolated import IsolatedEngine, borrowing

# Not `-m`: that would import the module twice, once as __main__.
WORKER_PROGRAM = "from losa_export.eval.worker import main; main()"
_LAST_BYTES = 2000
_LONGEST_WAIT_S = 0.5


class Engine(Protocol):
    """Something that carries out the commands of `worker.EngineSession`."""

    label: str

    @property
    def pid(self) -> int | None:
        """Of the process that computes; None if it is this one."""
        ...

    def call(self, command: str, **arguments: Any) -> Any:
        """Run one command and give back its value."""
        ...

    def close(self) -> None:
        """End it; never raises, and may be called twice."""
        ...


class EngineProcess:
    """An engine in a child process of its own.

    Args:
        label: how messages call it, for example "the candidate (ort)".
        timeout_s: longest time one command may take.
        program: Python source the child runs.
        engine: whose environment the child runs in; None is ours.
    Raises: EngineUnavailableError if that engine is not installed.
    """

    def __init__(
        self,
        label: str,
        *,
        timeout_s: float,
        program: str = WORKER_PROGRAM,
        engine: IsolatedEngine | None = None,
    ) -> None:
        self.label = label
        if engine is None:
            command, environment = [sys.executable, "-P", "-c", program], None
        else:
            command = [str(engine.interpreter), "-I", "-c", borrowing(program)]
            environment = engine.process_environment()
        self._timeout_s = timeout_s
        self._connection, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        try:
            # A session of its own: Ctrl-C reaches the parent alone, which then ends the child.
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except BaseException:
            self._connection.close()
            self._log.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int | None:
        """Of the child."""
        return self._process.pid

    def call(self, command: str, **arguments: Any) -> Any:
        """Run `command` in the child.

        Raises:
            LosaError: the same class that the child raised.
            RuntimeFailureError: the child failed otherwise, died, or gave no answer in time.
        """
        try:
            self._connection.send((command, arguments))
            if not self._answered():
                self.close()
                raise RuntimeFailureError(
                    f"{self.label} gave no answer to '{command}' within {self._timeout_s:g} s and was ended; "
                    "raise the time limit if the model is that slow",
                    command=command,
                )
            status, *rest = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._death(command) from error
        if status == "ok":
            return rest[0]
        name, message, trace = rest
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, LosaError):
            raise kind(f"{self.label}: {message}")
        last = trace.strip().splitlines()[-1] if trace else message
        raise RuntimeFailureError(f"{self.label} failed in '{command}': {last}", command=command, trace=trace)

    def close(self) -> None:
        """End the child: by closing its pipe, then by force."""
        self._connection.close()
        process = self._process
        for patience_s, harsher in ((0.5, process.terminate), (2, process.kill), (None, None)):
            try:
                process.wait(timeout=patience_s)
                break
            except subprocess.TimeoutExpired:
                if harsher is not None:
                    harsher()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _answered(self) -> bool:
        # In short waits: an interrupt between Python's last look at its signals and the system's wait is seen only
        # when that wait ends.
        deadline = time.monotonic() + self._timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if self._connection.poll(min(left, _LONGEST_WAIT_S)):
                return True
        return False

    def _death(self, command: str) -> RuntimeFailureError:
        try:
            code: int | None = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        how = (
            "closed its pipe" if code is None else f"died of signal {-code}" if code < 0 else f"ended with code {code}"
        )
        output = self._last_output()
        return RuntimeFailureError(
            f"{self.label} {how} during '{command}'"
            + (f"; its last output was:\n{output}" if output else " without a word")
            + ("\nthe system may have run out of memory; try a smaller model" if code == -9 else ""),
            command=command,
            code=code,
            output=output,
        )

    def _last_output(self) -> str:
        if self._log.closed:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        self._log.seek(max(0, size - _LAST_BYTES))
        return self._log.read().decode("utf-8", errors="replace").strip()
