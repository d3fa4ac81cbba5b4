"""Every setting of the server: defaults, a TOML file, the environment and the command line, merged in that order."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from losa_export.errors import ConfigError, InputError
from losa_export.units import bytes_of, seconds_of

ENVIRONMENT_PREFIX = "LOSA_SERVE_"

Kind = Literal["text", "path", "whole", "seconds", "bytes", "flag"]


def _setting(default: object, kind: Kind, text: str, *, least: float = 0.0, optional: bool = False) -> Any:
    """A field that knows how it is written, and what it means."""
    return field(default=default, metadata={"kind": kind, "text": text, "least": least, "optional": optional})


@dataclass(frozen=True)
class ServeSettings:
    """How `losa serve` runs. Sizes are in bytes, times in seconds; None stands for what the help text says.

    Raises: ConfigError naming the field.
    """

    host: str = _setting("127.0.0.1", "text", "address to listen at; 0.0.0.0 is every interface")
    port: int = _setting(8000, "whole", "TCP port; 0 takes a free one")
    model_name: str | None = _setting(
        None, "text", "name in requests and answers (default: the folder's name)", optional=True
    )
    workers: int = _setting(
        1, "whole", "processes, each with slots and threads of its own; weights are shared", least=1
    )
    threads: int | None = _setting(
        None, "whole", "compute threads of each worker (default: physical cores / workers)", least=1, optional=True
    )
    slots: int = _setting(4, "whole", "requests that are answered together in each worker", least=1)
    context_tokens: int | None = _setting(
        None,
        "whole",
        "tokens of prompt and answer in each slot (default: what --memory holds, else 2048)",
        least=16,
        optional=True,
    )
    memory: int | None = _setting(
        None,
        "bytes",
        "keys and values of all slots of a worker may take this much, such as 512M",
        least=1,
        optional=True,
    )
    prefill_chunk: int = _setting(128, "whole", "prompt tokens read between two steps of running answers", least=2)
    prefix_cache: bool = _setting(True, "flag", "reuse what a prompt has in common with one before it")
    api_key_file: Path | None = _setting(  # noqa: RUF009  (a field, as all of them)
        None, "path", "file with one key a line; keys may also come from LOSA_API_KEYS", optional=True
    )
    max_body_bytes: int = _setting(2**20, "bytes", "largest request", least=1)
    max_prompt_tokens: int | None = _setting(
        None, "whole", "longest prompt (default: the slot's)", least=1, optional=True
    )
    max_new_tokens: int | None = _setting(None, "whole", "longest answer (default: the slot's)", least=1, optional=True)
    max_choices: int = _setting(8, "whole", "answers that one request may ask for", least=1)
    max_queue: int = _setting(64, "whole", "requests that may wait in each worker; more are refused with 429")
    max_connections: int = _setting(512, "whole", "open connections of a worker; more are refused with 503", least=1)
    queue_timeout: float = _setting(60.0, "seconds", "longest wait for a slot", least=0.001)
    request_timeout: float = _setting(600.0, "seconds", "longest time from a request to its last token", least=0.001)
    header_timeout: float = _setting(
        10.0, "seconds", "a connection must have sent a request's head by then", least=0.001
    )
    body_timeout: float = _setting(20.0, "seconds", "a request must have sent its body by then", least=0.001)
    keep_alive: float = _setting(15.0, "seconds", "an idle connection is closed after that", least=0.001)
    drain_timeout: float = _setting(30.0, "seconds", "running answers may take this long after SIGTERM")
    log_prompts: bool = _setting(False, "flag", "write prompts and answers into the log")
    verify: bool = _setting(True, "flag", "check the folder's hashes against export.json before it is opened")
    page: bool = _setting(True, "flag", "serve the web page at /")

    def __post_init__(self) -> None:
        for one in fields(self):
            _check(one.name, getattr(self, one.name), one.metadata)
        if self.port > 65535:
            raise ConfigError(f"port is {self.port}, but must be from 0 to 65535", field="port")
        if self.model_name is not None and not re.fullmatch(r"[\w.:/@+-]{1,200}", self.model_name):
            raise ConfigError(
                f"model_name is {self.model_name!r}, but must be letters, digits and any of . : / @ + - _",
                field="model_name",
            )

    def as_toml(self, origins: Mapping[str, str] | None = None) -> str:
        """The settings as a file that `--config` reads, with where each came from as a comment."""
        lines = []
        for one in fields(self):
            value = getattr(self, one.name)
            written = json.dumps(str(value) if isinstance(value, Path) else value)
            line = f"# {one.name} is not set" if value is None else f"{one.name} = {written}"
            lines.append(f"{line}  # {(origins or {}).get(one.name, 'default')}")
        return "\n".join(lines) + "\n"

    def as_environment(self) -> dict[str, str]:
        """The settings as variables that `load_settings` reads; what is not set is left out."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {ENVIRONMENT_PREFIX + name.upper(): str(value) for name, value in values.items() if value is not None}


def load_settings(
    config: Path | None, environment: Mapping[str, str], flags: Mapping[str, object]
) -> tuple[ServeSettings, dict[str, str]]:
    """Merge a TOML file, variables LOSA_SERVE_NAME, and flags; the later win.

    Args:
        config: TOML with the names of ServeSettings at the top level.
        environment: such as os.environ.
        flags: name → value as text or typed; only those that were given.
    Returns: the settings, and for each one that is no default where it came from.
    Raises: InputError when the file cannot be read; ConfigError naming file, variable or flag and the field.
    """
    known = {one.name: one for one in fields(ServeSettings)}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def take(name: str, value: object, origin: str) -> None:
        if name not in known:
            raise ConfigError(f"{origin}: there is no setting '{name}'; choose among {', '.join(known)}", field=name)
        try:
            values[name] = parse(value, known[name].metadata["kind"])
        except ValueError as error:
            raise ConfigError(f"{origin}: {name} is {value!r}, but {error}", field=name) from None
        origins[name] = origin

    for name, value in ({} if config is None else _read_toml(config)).items():
        take(name, value, str(config))
    for variable, text in environment.items():
        if variable.startswith(ENVIRONMENT_PREFIX):
            take(variable.removeprefix(ENVIRONMENT_PREFIX).lower(), text, variable)
    for name, value in flags.items():
        take(name, value, "--" + name.replace("_", "-"))
    return ServeSettings(**values), origins


def parse(value: object, kind: Kind) -> object:
    """A value as TOML, the environment or a flag gives it. Raises: ValueError saying what it must be."""
    if not isinstance(value, str):
        if kind == "seconds" and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return value
    match kind:
        case "text":
            return value
        case "path":
            return Path(value)
        case "whole":
            if not re.fullmatch(r"[+-]?\d{1,18}", value.strip()):
                raise ValueError("must be a whole number")
            return int(value)
        case "flag":
            if value.strip().lower() not in ("true", "false", "1", "0", "yes", "no"):
                raise ValueError("must be true or false")
            return value.strip().lower() in ("true", "1", "yes")
        case "seconds":
            return seconds_of(value)
        case "bytes":
            return bytes_of(value)


def read_api_keys(settings: ServeSettings, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Keys of the file and of LOSA_API_KEYS (separated by commas or white space); () leaves the server open.

    Raises: InputError when the file cannot be read or holds no key; ConfigError for a key with other characters than
    visible ASCII, which no header could carry.
    """
    keys = [key for key in re.split(r"[,\s]+", environment.get("LOSA_API_KEYS", "")) if key]
    path = settings.api_key_file
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"the API keys in '{path}' cannot be read: {error}; check the path", path=path) from error
        found = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        if not found:
            raise InputError(f"'{path}' holds no API key; write one a line, or leave api_key_file out", path=path)
        keys += found
    for number, key in enumerate(keys, start=1):
        if not re.fullmatch(r"[!-~]{8,500}", key):
            raise ConfigError(
                f"API key {number} must be 8 to 500 visible ASCII characters without spaces", field="api_key_file"
            )
    return tuple(dict.fromkeys(keys))


def _read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"the settings '{path}' cannot be read: {error.strerror}; check the path", path=path
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the settings '{path}' are no TOML: {error}; mend the file", path=path) from error


def _check(name: str, value: object, meta: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `value` has the type and range of its field."""
    if value is None and meta["optional"]:
        return
    kind: Kind = meta["kind"]
    wanted: dict[str, tuple[tuple[type, ...], str]] = {
        "text": ((str,), "text"),
        "path": ((Path,), "a path"),
        "whole": ((int,), "a whole number"),
        "bytes": ((int,), "a size in bytes"),
        "seconds": ((int, float), "a time in seconds"),
        "flag": ((bool,), "true or false"),
    }
    types, words = wanted[kind]
    if not isinstance(value, types) or (kind != "flag" and isinstance(value, bool)):
        raise ConfigError(f"{name} is {value!r}, but must be {words}", field=name)
    if isinstance(value, (int, float)) and kind != "flag" and not meta["least"] <= value < 2**53:
        raise ConfigError(f"{name} is {value!r}, but must be at least {meta['least']:g}", field=name)
