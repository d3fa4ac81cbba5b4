from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_export.errors import CheckpointError, EngineUnavailableError, InputError
from losa_export.eval.engine import EngineProcess
from losa_export.eval.remote_runtime import RemoteRuntime, open_runtime
from losa_export.eval.worker import EngineSession
from losa_export.export import ExportConfig, export_onnx
from losa_export.runtimes.base import Runtime
from losa_export.runtimes.ort import OrtRuntime
from losa_export.synth import LlamaShape, SynthConfig, write_random_checkpoint

SHAPE = LlamaShape(64, 176, heads=4, kv_heads=2, blocks=2, vocabulary=128, positions=64)


class SessionEngine:
    """An engine's commands without the process, to look inside."""

    label = "the engine"
    pid = None

    def __init__(self, session: EngineSession) -> None:
        self.session = session
        self.closed = False

    def call(self, command: str, **arguments: Any) -> Any:
        return getattr(self.session, command)(**arguments)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("remote")
    write_random_checkpoint(SHAPE, 2, SynthConfig("llama-2-7b", work / "model", progress=False))
    export_onnx(ExportConfig(work / "model", work / "onnx", weights="dense", gate=False, progress=False))
    return work / "onnx"


@pytest.fixture
def remote(folder: Path) -> Iterator[RemoteRuntime]:
    process = EngineProcess("the engine", timeout_s=120)
    with closing(RemoteRuntime.load(process, "ort-stock", folder, 1)) as runtime:
        yield runtime


def test_it_answers_as_the_runtime_itself(remote: RemoteRuntime, folder: Path) -> None:
    assert isinstance(remote, Runtime)
    ids = np.random.default_rng(0).integers(0, 128, 9)
    with closing(OrtRuntime.load(folder, threads=1, custom_op=False)) as local:
        assert (remote.name, remote.vocab_size, remote.max_positions) == ("ort-stock", 128, 64)
        assert remote.describe() == local.describe()
        there, here = remote.new_state(2, 16), local.new_state(2, 16)
        for row in (0, 1):
            np.testing.assert_array_equal(remote.prefill(there, row, ids), local.prefill(here, row, ids))
        np.testing.assert_array_equal(remote.decode(there, ids[:2]), local.decode(here, ids[:2]))
        assert there.lengths.tolist() == here.lengths.tolist() == [10, 10]
        there.reset(0)
        assert there.lengths.tolist() == [0, 10]
        with pytest.raises(InputError, match=r"the engine: the cache is full|the engine: row 1 .* already holds"):
            remote.prefill(there, 1, ids)


def test_caches_go_when_nobody_holds_them(fake_runtime: Any) -> None:
    session = EngineSession(lambda name, folder, threads: fake_runtime())
    engine = SessionEngine(session)
    with closing(RemoteRuntime.load(engine, "ort", Path("folder"), 1)) as runtime:
        kept = runtime.new_state(1, 4)
        for _ in range(3):
            runtime.prefill(runtime.new_state(1, 4), 0, np.array([1, 2]))
            gc.collect()
        assert runtime.prefill(kept, 0, np.array([3])).shape == (1, 11)
        runtime.new_state(1, 4)
        assert len(session._states) == 2  # the one that is kept, and the last
    assert engine.closed


def test_a_folder_that_is_refused_ends_the_process(tmp_path: Path) -> None:
    process = EngineProcess("the engine", timeout_s=60)
    with pytest.raises(CheckpointError, match=r"model\.onnx"):
        RemoteRuntime.load(process, "ort-stock", tmp_path, 1)
    assert process._process.returncode is not None


def test_engines_of_our_environment_are_loaded_here(folder: Path) -> None:
    with closing(open_runtime("ort-stock", folder, threads=1)) as runtime:
        assert isinstance(runtime, OrtRuntime)


def test_an_engine_that_is_not_installed_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(EngineUnavailableError, match="losa runtimes install openvino"):
        open_runtime("openvino", tmp_path)
