"""Virtual environments of the engines that need one: made whole or not at all, and taken away again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from losa_export.errors import EngineUnavailableError
from losa_export.files import output_folder
from losa_export.runtimes.isolated import ENGINES, MARKER, IsolatedEngine, engines_folder, here, machine

_LAST_LINES = 12
_ASK_VERSION = "import sys, venv, ensurepip; print(*sys.version_info[:2])"


@dataclass(frozen=True)
class EngineState:
    """One engine, as `losa runtimes list` shows it.

    Attributes:
        name: of the engine.
        version: that we pin.
        folder: of its environment, there or to be.
        installed: whether it is there, whole.
        bytes: that it takes on the disk; 0 where it is not.
        obstacle: why it cannot be installed here; None if it can.
    """

    name: str
    version: str
    folder: Path
    installed: bool
    bytes: int
    obstacle: str | None


def engine_states() -> list[EngineState]:
    """All engines with an environment of their own."""
    return [_state(engine) for engine in ENGINES.values()]


def _state(engine: IsolatedEngine) -> EngineState:
    obstacle = None
    if not engine.installed:
        try:
            find_python(engine)
        except EngineUnavailableError as error:
            obstacle = str(error)
    size = _folder_bytes(engine.folder) if engine.installed else 0
    return EngineState(engine.name, engine.version, engine.folder, engine.installed, size, obstacle)


def find_python(engine: IsolatedEngine) -> Path:
    """An interpreter that can run the engine: ours, or one on the path.

    Raises: EngineUnavailableError if the engine is not built for this machine, or there is no such interpreter.
    """
    if (sys.platform, machine()) not in engine.platforms:
        built = ", ".join(f"{system} on {architecture}" for system, architecture in engine.platforms)
        raise EngineUnavailableError(
            f"{engine.name} {engine.version} is built for {built}, and this is {here()}; run it on such a machine",
            engine=engine.name,
        )
    for version in engine.pythons:
        if sys.version_info[:2] == version:
            return Path(sys.executable)
    for version in engine.pythons:
        found = shutil.which("python{}.{}".format(*version))
        if found is not None and _version_of(found) == version:
            return Path(found)
    wanted = " or ".join("{}.{}".format(*version) for version in engine.pythons)
    ours = "{}.{}".format(*sys.version_info[:2])
    raise EngineUnavailableError(
        f"{engine.name} {engine.version} needs Python {wanted}, and this is {ours}; install that Python with its venv "
        "module, and have it on the path",
        engine=engine.name,
    )


def _version_of(python: str) -> tuple[int, ...] | None:
    """What an interpreter says of itself; None if it does not start, or cannot make environments."""
    try:
        done = subprocess.run([python, "-I", "-c", _ASK_VERSION], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return tuple(map(int, done.stdout.split())) if done.returncode == 0 else None


def install_engine(engine: IsolatedEngine, *, say: Callable[[str], None] = lambda _: None) -> Path:
    """Make the engine's environment, unless it is there.

    Args:
        engine: which.
        say: told what happens, a line at a time.
    Returns: its folder.
    Raises:
        EngineUnavailableError: no such interpreter or platform, before anything is fetched; or its packages cannot be
            fetched, or do not work here.
        OutputError: the folder cannot be written.
    """
    if engine.installed:
        say(f"{engine.name} {engine.version} is installed in {engine.folder}")
        return engine.folder
    python = find_python(engine)
    pins = [line for line in engine.pins.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    say(f"licence of {engine.name} {engine.version}: {engine.licence}")
    with output_folder(engine.folder, overwrite=True) as folder:
        say(f"making an environment of {len(pins)} packages")
        _run(engine, [str(python), "-I", "-m", "venv", str(folder)])
        inside = str(folder / "bin" / "python")
        pip = [inside, "-I", "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--quiet"]
        _run(engine, [*pip, "--requirement", str(engine.pins)])
        say("trying it")
        _run(engine, [inside, "-I", "-c", f"import {engine.module}"])
        record = {"engine": engine.name, "version": engine.version, "packages": pins}
        (folder / MARKER).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for path in sorted(engine.folder.glob(f"lib/*/site-packages/{engine.module}-*.dist-info/LICENSE*")):
        say(f"its licence in full: {path}")
    return engine.folder


def _run(engine: IsolatedEngine, command: list[str]) -> None:
    """Run a step of the installation. Raises: EngineUnavailableError with its last lines."""
    done = subprocess.run(
        command,
        env=engine.process_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        last = "\n".join(done.stdout.strip().splitlines()[-_LAST_LINES:])
        raise EngineUnavailableError(
            f"installing {engine.name} {engine.version} failed (code {done.returncode}); check the network and the "
            f"space on the disk, then try again. Its last output was:\n{last}",
            engine=engine.name,
            code=done.returncode,
            output=last,
        )


def remove_engine(engine: IsolatedEngine) -> int:
    """Take away every environment of the engine, of other pins too. Returns: bytes that were freed."""
    folders = sorted(engines_folder().glob(f"{engine.name}-*"))
    freed = sum(_folder_bytes(folder) for folder in folders)
    for folder in folders:
        # Without its mark it counts as absent, should this be cut short.
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)
    return freed


def _folder_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
