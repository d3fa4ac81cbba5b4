"""Engines that cannot share our environment, and how a program of ours runs in theirs.

Such an engine pins packages that contradict ours. It gets a virtual environment of its own in the user's cache folder
(`losa_export.runtimes.environments` makes it), holding what its pin file names and nothing of ours: a worker process
in it borrows our modules from where they are.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from losa_export.errors import ConfigError, EngineUnavailableError
from losa_export.files import cache_folder

MARKER = "losa-engine.json"
# What a worker imports of ours; all of it runs with numpy alone.
_BORROWED = ("losa_export", "losa_export.eval", "losa_export.runtimes")
# These would let packages of our environment into the other one.
_DROPPED_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


@dataclass(frozen=True)
class IsolatedEngine:
    """An engine with an environment of its own.

    Attributes:
        name: as the user knows it; its pins are in `pins/NAME.txt`.
        version: of the engine itself.
        module: what must import once it is installed.
        licence: its name, and what a user must know of it before installing.
        pythons: versions that both its packages and our worker run on.
        platforms: (sys.platform, machine) pairs that its packages are built for.
        variables: environment variables of its processes, installation included.
        package: the one that has this version, where its name is not the engine's.
    """

    name: str
    version: str
    module: str
    licence: str
    pythons: tuple[tuple[int, int], ...]
    platforms: tuple[tuple[str, str], ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    package: str | None = None

    @property
    def pins(self) -> Path:
        """Its packages, one 'name==version' a line."""
        return Path(__file__).parent / "pins" / f"{self.name}.txt"

    @property
    def folder(self) -> Path:
        """Where its environment is, or would be: other pins are another folder."""
        digest = hashlib.sha256(self.pins.read_bytes()).hexdigest()[:12]
        return engines_folder() / f"{self.name}-{digest}"

    @property
    def installed(self) -> bool:
        """Whether its environment is complete."""
        return (self.folder / MARKER).is_file()

    @property
    def interpreter(self) -> Path:
        """Its Python. Raises: EngineUnavailableError if it is not installed."""
        if not self.installed:
            raise EngineUnavailableError(
                f"the engine '{self.name}' is not installed; install it with: losa runtimes install {self.name}",
                engine=self.name,
            )
        return self.folder / "bin" / "python"

    def process_environment(self) -> dict[str, str]:
        """Environment variables of its processes: ours, without what would mix the environments, and its own."""
        kept = {name: value for name, value in os.environ.items() if name not in _DROPPED_VARIABLES}
        return kept | dict(self.variables)


ENGINES: Mapping[str, IsolatedEngine] = {
    engine.name: engine
    for engine in (
        IsolatedEngine(
            name="deepsparse",
            version="1.8.0",
            module="deepsparse",
            licence="Neural Magic DeepSparse Community License: to evaluate in development, not for production",
            # Its wheels end at 3.11, and our worker begins there.
            pythons=((3, 11),),
            platforms=(("linux", "x86_64"),),
            # The engine would report its use over the network otherwise.
            variables={"NM_DISABLE_ANALYTICS": "1"},
        ),
        IsolatedEngine(
            name="llamacpp",
            version="0.3.36",
            module="llama_cpp",
            licence="MIT; built from source for this processor, which needs a C++ compiler and takes minutes",
            pythons=((3, 11), (3, 12), (3, 13)),
            platforms=(("linux", "x86_64"), ("linux", "aarch64")),
            # Nothing of it but the library: no vision, no tools, no downloads.
            variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF"},
            package="llama-cpp-python",
        ),
        IsolatedEngine(
            name="openvino",
            version="2026.4.1",
            module="openvino",
            licence="Apache-2.0",
            pythons=((3, 11), (3, 12), (3, 13)),
            platforms=(("linux", "x86_64"), ("linux", "aarch64")),
        ),
        IsolatedEngine(
            name="optimum",
            version="0.1.0",
            module="optimum.onnxruntime",
            licence="Apache-2.0",
            # As torch and tokenizers are pinned.
            pythons=((3, 11), (3, 12), (3, 13)),
            platforms=(("linux", "x86_64"), ("linux", "aarch64")),
            variables={"HF_HUB_OFFLINE": "1"},
            package="optimum-onnx",
        ),
    )
}


def isolated_engine(name: str) -> IsolatedEngine:
    """The engine of that name. Raises: ConfigError for any other."""
    if name not in ENGINES:
        raise ConfigError(
            f"'{name}' is no engine with an environment of its own; there are {', '.join(ENGINES)}", field="name"
        )
    return ENGINES[name]


def engines_folder() -> Path:
    """Where environments are."""
    return cache_folder() / "engines"


def not_importable(title: str, name: str, error: ImportError) -> EngineUnavailableError:
    """The error of a runtime that was loaded outside of its engine's environment.

    Args:
        title: the engine as its makers spell it.
        name: as `ENGINES` has it.
        error: what its import raised.
    """
    return EngineUnavailableError(
        f"{title} cannot be imported here ({error}); it has an environment of its own, which 'losa bench' uses by "
        f"itself: losa runtimes install {name}",
        engine=name,
    )


def borrowing(program: str) -> str:
    """`program`, Python source, so that it finds our modules in an interpreter whose packages are all its own."""
    places = {name: list(importlib.import_module(name).__path__) for name in _BORROWED}
    return f"{_FINDER.format(places=places)}{program}"


_FINDER = """\
import importlib.util, os, sys
class Borrowed:
    places = {places!r}
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        for folder in cls.places.get(name, ()):
            file = os.path.join(folder, "__init__.py")
            if os.path.isfile(file):
                return importlib.util.spec_from_file_location(
                    name, file, submodule_search_locations=cls.places[name])
sys.meta_path.insert(0, Borrowed)
"""


def here() -> str:
    """System and architecture of this machine, for messages."""
    return f"{sys.platform} on {machine()}"


def machine() -> str:
    """The architecture as `IsolatedEngine.platforms` spells it."""
    import platform

    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)
