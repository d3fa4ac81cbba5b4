"""A runtime in another process, for engines that cannot share our environment: the same protocol, over a pipe."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from losa_export.eval.engine import Engine, EngineProcess
from losa_export.eval.worker import Loaded, StateMethod
from losa_export.runtimes.base import DecodeState, Runtime, RuntimeDescription, RuntimeName
from losa_export.runtimes.isolated import ENGINES
from losa_export.runtimes.loader import load_runtime
from losa_export.runtimes.threads import resolve_threads

# A window of a long text on a slow engine; one that takes longer hangs.
_TIMEOUT_S = 900.0


def open_runtime(name: RuntimeName, folder: Path, *, threads: int | None = None) -> Runtime:
    """Load `folder` on any engine: here, or in a process of the engine's own environment if it has one.

    Raises: what `load_runtime` raises; RuntimeFailureError where the process dies or hangs.
    """
    if name not in ENGINES:
        return load_runtime(name, folder, threads=threads)
    label = f"'{folder.name}' in {name}"
    return RemoteRuntime.load(EngineProcess(label, timeout_s=_TIMEOUT_S, engine=ENGINES[name]), name, folder, threads)


class RemoteState:
    """A key/value cache in the other process. Attributes as of `DecodeState`."""

    def __init__(self, number: int, batch: int, capacity: int, runtime: RemoteRuntime) -> None:
        self.number = number
        self.lengths: NDArray[np.int64] = np.zeros(batch, np.int64)
        self.capacity = capacity
        self._runtime = runtime

    def reset(self, row: int) -> None:
        """Empty one row."""
        self._runtime.ask(self, "reset", row=row)


class RemoteRuntime:
    """A loaded decoder in another process.

    Args:
        engine: the process; it is this object's from now on.
        name: of the runtime there.
        loaded: what the process said once the model was ready.
    """

    def __init__(self, engine: Engine, name: RuntimeName, loaded: Loaded) -> None:
        self.name: str = name
        self.vocab_size = loaded.vocab_size
        self.max_positions = loaded.max_positions
        self._engine = engine
        self._description = loaded.description
        # Caches that nobody holds any more. They are told with the next command: the collector may find one in the
        # middle of another.
        self._dropped: list[int] = []

    @classmethod
    def load(cls, engine: Engine, name: RuntimeName, folder: Path, threads: int | None) -> Self:
        """Load `folder` in the process, which is ended if that fails. Raises: what `Engine.call` raises."""
        try:
            return cls(engine, name, engine.call("load", name=name, folder=folder, threads=resolve_threads(threads)))
        except BaseException:
            engine.close()
            raise

    def new_state(self, batch: int, capacity: int) -> RemoteState:
        """An empty cache, as `Runtime.new_state`."""
        dropped = [self._dropped.pop() for _ in range(len(self._dropped))]
        number: int = self._engine.call("new_state", batch=batch, capacity=capacity, dropped=dropped)
        state = RemoteState(number, batch, capacity, self)
        weakref.finalize(state, self._dropped.append, number)
        return state

    def prefill(
        self, state: DecodeState, row: int, token_ids: NDArray[np.int64], *, last_only: bool = False
    ) -> NDArray[np.float32]:
        """As `Runtime.prefill`."""
        logits: NDArray[np.float32] = self.ask(state, "prefill", row=row, token_ids=token_ids, last_only=last_only)
        return logits

    def decode(self, state: DecodeState, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `Runtime.decode`."""
        logits: NDArray[np.float32] = self.ask(state, "decode", token_ids=token_ids)
        return logits

    def ask(self, state: DecodeState, method: StateMethod, **arguments: Any) -> Any:
        """Run a method on a cache, and note how long its rows are afterwards."""
        assert isinstance(state, RemoteState)
        answer, lengths = self._engine.call("on_state", number=state.number, method=method, arguments=arguments)
        state.lengths = lengths
        return answer

    def describe(self) -> RuntimeDescription:
        """As `Runtime.describe`."""
        return self._description

    def close(self) -> None:
        """End the process."""
        self._engine.close()
