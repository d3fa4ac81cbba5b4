from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from losa_export.commands import serve as command
from losa_export.errors import ConfigError, InputError
from losa_export.runtimes.serve.settings import ServeSettings, load_settings, parse, read_api_keys


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('host = "0.0.0.0"\nport = 1\nslots = 2\nqueue_timeout = 5\nmemory = "512M"\n')
    settings, origins = load_settings(
        file,
        {"LOSA_SERVE_PORT": "2", "LOSA_SERVE_SLOTS": "3", "LOSA_SERVE_PREFIX_CACHE": "false", "PATH": "/bin"},
        {"slots": "5", "drain_timeout": "1m"},
    )
    assert (settings.host, settings.port, settings.slots) == ("0.0.0.0", 2, 5)
    assert (settings.queue_timeout, settings.drain_timeout, settings.memory) == (5.0, 60.0, 512 * 2**20)
    assert settings.prefix_cache is False
    assert origins == {
        "host": str(file),
        "port": "LOSA_SERVE_PORT",
        "slots": "--slots",
        "queue_timeout": str(file),
        "memory": str(file),
        "prefix_cache": "LOSA_SERVE_PREFIX_CACHE",
        "drain_timeout": "--drain-timeout",
    }


def test_what_is_printed_is_read_again(tmp_path: Path) -> None:
    settings = ServeSettings(model_name="a", memory=10**9, api_key_file=tmp_path / "keys", queue_timeout=0.5)
    file = tmp_path / "serve.toml"
    file.write_text(settings.as_toml({"memory": "--memory"}))
    assert "memory = 1000000000  # --memory" in file.read_text()
    assert load_settings(file, {}, {})[0] == settings
    assert load_settings(None, settings.as_environment(), {})[0] == settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("slotz = 4", "there is no setting 'slotz'"),
        ("slots = 0", "slots is 0, but must be at least 1"),
        ("slots = 2.5", "slots is 2.5, but must be a whole number"),
        ("slots = true", "slots is True, but must be a whole number"),
        ("verify = 1", "verify is 1, but must be true or false"),
        ("port = 70000", "port is 70000, but must be from 0 to 65535"),
        ('memory = "much"', "memory is 'much', but must be a size such as"),
        ('queue_timeout = "soon"', "queue_timeout is 'soon', but must be a duration"),
        ("queue_timeout = nan", "queue_timeout is nan, but must be at least"),
        ('model_name = "a b"', "model_name is 'a b', but must be letters"),
        ("host = 3", "host is 3, but must be text"),
    ],
)
def test_a_wrong_setting_names_its_field(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_settings(file, {}, {})


@pytest.mark.parametrize(
    ("data", "message"), [(b"slots = ", "are no TOML"), (b"\xff", "are no TOML"), (None, "cannot be read")]
)
def test_a_file_that_is_no_toml_is_an_error(tmp_path: Path, data: bytes | None, message: str) -> None:
    file = tmp_path / "serve.toml"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_settings(file, {}, {})


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("1.5GiB", "bytes", 3 * 2**29),
        ("2K", "bytes", 2048),
        ("1000", "bytes", 1000),
        ("1.5h", "seconds", 5400.0),
        ("10m", "seconds", 600.0),
        ("yes", "flag", True),
        ("-3", "whole", -3),
    ],
)
def test_values_are_written_as_people_write_them(text: str, kind: str, value: object) -> None:
    assert parse(text, kind) == value  # type: ignore[arg-type]


def test_every_setting_has_a_flag_and_every_flag_a_setting() -> None:
    flags = {name.replace("-", "_") for name, _, _ in command._FLAGS} | {field for _, field, _, _ in command._SWITCHES}
    assert flags == {one.name for one in fields(ServeSettings)}


def test_keys_come_from_the_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key-1\n\n  second-key-2  \n")
    settings = ServeSettings(api_key_file=file)
    assert read_api_keys(settings, {"LOSA_API_KEYS": "third-key-3, first-key-1"}) == (
        "third-key-3",
        "first-key-1",
        "second-key-2",
    )
    assert read_api_keys(ServeSettings(), {}) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# nothing", "holds no API key"),
        ("short", "must be 8 to 500 visible"),
        ("with a space", "must be 8 to 500 visible"),
        (None, "cannot be read"),
    ],
)
def test_keys_that_cannot_work_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises((ConfigError, InputError), match=message):
        read_api_keys(ServeSettings(api_key_file=file), {})
