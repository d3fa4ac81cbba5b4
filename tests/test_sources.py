"""Model names are folders first, hub ids second."""

from __future__ import annotations

from pathlib import Path

import pytest

from losa_export.errors import CheckpointError, InputError
from losa_export.sources import resolve_model


def test_an_existing_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_what_is_neither_folder_nor_id_is_refused() -> None:
    with pytest.raises(InputError, match="model 'no such thing' is no folder; give a checkpoint folder or a hub id"):
        resolve_model("no such thing")


def test_an_unreachable_hub_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"could not be fetched from the hub \(ConnectionError: no route\)"):
        resolve_model("owner/model")
