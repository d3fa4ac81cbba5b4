"""Settings from files: the presets that come with the package, and a user's own."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from losa_export.errors import ConfigError, InputError
from losa_export.training.config import typed_fields

_PRESETS = Path(__file__).parent / "presets"
_PATH_FIELDS = ("model", "output", "tuning_text", "calibration_text")


def preset_names() -> tuple[str, ...]:
    """The presets there are."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.toml")))


def preset_file(name: str) -> Path:
    """The file of a preset, to read or to copy. Raises: ConfigError for another name."""
    if name not in preset_names():
        raise ConfigError(f"preset is {name!r}; choose one of {', '.join(preset_names())}", field="preset", value=name)
    return _PRESETS / f"{name}.toml"


def read_settings(path: Path) -> dict[str, Any]:
    """Some fields of a `TrainConfig` from the table [train] of a TOML file; other tables are not looked at.

    A relative path in the file starts from the file's folder.
    Raises: InputError for a file that cannot be read, is not TOML, or has no such table; ConfigError for an unknown
        field or a value of the wrong type.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"the config file '{path}' cannot be read ({error.strerror}); check the path", path=path
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not TOML ({error}); mend it", path=path) from error
    table = tables.get("train")
    if not isinstance(table, dict):
        raise InputError(f"'{path}' has no table [train]; put the settings under that heading", path=path)
    fields = typed_fields(table, path)
    for name in _PATH_FIELDS:
        if name in fields:
            fields[name] = _beside(fields[name], path.parent)
    return fields


def _beside(value: Path | tuple[Path, ...], folder: Path) -> Path | tuple[Path, ...]:
    return tuple(folder / item for item in value) if isinstance(value, tuple) else folder / value
