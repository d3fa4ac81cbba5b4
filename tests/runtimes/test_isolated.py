from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from losa_export.cli import main
from losa_export.errors import ConfigError, EngineUnavailableError
from losa_export.eval.engine import EngineProcess
from losa_export.runtimes import environments, isolated
from losa_export.runtimes.environments import engine_states, find_python, install_engine, remove_engine
from losa_export.runtimes.isolated import ENGINES, MARKER, IsolatedEngine, borrowing, isolated_engine

HERE = (sys.platform, isolated.machine())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "losa-export" / "engines"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> IsolatedEngine:
    """An engine of no packages, whose module is one of Python's own; its pins are in the test's folder."""
    (tmp_path / "toy.txt").write_text("# nothing\n", encoding="utf-8")
    monkeypatch.setattr(IsolatedEngine, "pins", property(lambda self: tmp_path / f"{self.name}.txt"))
    engine = IsolatedEngine("toy", "1.0", "json", "none", (sys.version_info[:2],), (HERE,), {"TOY": "yes"})
    monkeypatch.setattr(environments, "ENGINES", {"toy": engine})
    monkeypatch.setattr(isolated, "ENGINES", {"toy": engine})
    return engine


def test_pins_name_one_version_each_and_the_engine_itself() -> None:
    for engine in ENGINES.values():
        lines = [line for line in engine.pins.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert all(line.count("==") == 1 for line in lines)
        assert f"{engine.package or engine.name}=={engine.version}" in lines


def test_an_environment_is_made_used_and_taken_away(
    toy: IsolatedEngine, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runtimes", "list"]) == 0
    assert "not installed; losa runtimes install toy" in capsys.readouterr().out
    with pytest.raises(EngineUnavailableError, match="losa runtimes install toy"):
        EngineProcess("the candidate", timeout_s=5, engine=toy)
    assert main(["runtimes", "install", "toy"]) == 0
    said = capsys.readouterr()
    assert Path(said.out.strip()) == toy.folder
    assert "licence of toy 1.0: none" in said.err
    assert json.loads((toy.folder / MARKER).read_text(encoding="utf-8"))["engine"] == "toy"
    program = (
        "import os, sys\nfrom multiprocessing.connection import Connection\n"
        "pipe = Connection(int(sys.argv[1]))\npipe.recv()\n"
        "from losa_export import errors\n"
        "pipe.send(('ok', (sys.prefix, os.environ['TOY'], errors.__file__)))\n"
    )
    with EngineProcess("the toy", timeout_s=60, program=program, engine=toy) as process:
        prefix, variable, borrowed = process.call("tell")
    assert (Path(prefix), variable) == (toy.folder, "yes")
    assert Path(borrowed) == Path(sys.modules["losa_export.errors"].__file__ or "")
    (state,) = engine_states()
    assert (state.installed, state.obstacle) == (True, None)
    assert state.bytes > 0
    made = (toy.folder / MARKER).stat().st_mtime_ns
    install_engine(toy)
    assert (toy.folder / MARKER).stat().st_mtime_ns == made
    assert main(["runtimes", "remove", "toy"]) == 0
    assert not list(cache.glob("toy-*"))
    assert remove_engine(toy) == 0


def test_other_pins_are_another_environment(toy: IsolatedEngine) -> None:
    before = toy.folder
    toy.pins.write_text("numpy==2.0.0\n", encoding="utf-8")
    assert toy.folder != before


def test_a_failed_installation_leaves_nothing_and_says_why(toy: IsolatedEngine, cache: Path) -> None:
    toy.pins.write_text("./no-such-package==1.0\n", encoding="utf-8")
    with pytest.raises(EngineUnavailableError, match=r"(?s)installing toy 1.0 failed.*no-such-package"):
        install_engine(toy)
    assert not list(cache.iterdir())


def test_an_engine_that_does_not_import_is_not_installed(toy: IsolatedEngine, cache: Path) -> None:
    broken = IsolatedEngine("toy", "1.0", "no_such_module", "none", toy.pythons, toy.platforms)
    with pytest.raises(EngineUnavailableError, match="no_such_module"):
        install_engine(broken)
    assert not list(cache.iterdir())


def test_what_cannot_run_here_is_refused_before_anything_is_fetched(
    toy: IsolatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "_run", lambda *_: pytest.fail("something was started"))
    old = IsolatedEngine("toy", "1.0", "json", "none", ((3, 2),), (HERE,))
    with pytest.raises(EngineUnavailableError, match=r"needs Python 3\.2, and this is"):
        install_engine(old)
    elsewhere = IsolatedEngine("toy", "1.0", "json", "none", toy.pythons, (("plan9", "mips"),))
    with pytest.raises(EngineUnavailableError, match="is built for plan9 on mips, and this is"):
        install_engine(elsewhere)


def test_another_python_on_the_path_is_found(
    toy: IsolatedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "python3.2"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 3 2\n", encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    assert find_python(IsolatedEngine("toy", "1.0", "json", "none", ((3, 2),), (HERE,))) == fake


def test_a_name_that_is_none_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"there are deepsparse, .*openvino"):
        isolated_engine("deepspars")
    assert main(["runtimes", "install", "deepspars"]) == 1
    assert "is no engine with an environment of its own" in capsys.readouterr().err


def test_the_worker_runs_with_numpy_and_our_modules_alone(tmp_path: Path) -> None:
    """What a foreign environment may lack is hidden here, so that an import of it would fail."""
    hidden = "onnxruntime", "torch", "transformers", "rich", "tokenizers", "onnx", "safetensors", "jinja2"
    program = f"import sys\nfor name in {hidden!r}: sys.modules[name] = None\n" + borrowing(
        "import losa_export.eval.worker, losa_export.runtimes.deepsparse"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, cwd=tmp_path)
