"""The small door: what is promised is there, and nothing else is loaded for it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import losa_export


def test_every_public_name_can_be_had() -> None:
    for name in losa_export.__all__:
        assert getattr(losa_export, name).__name__ == name
    assert dir(losa_export) == losa_export.__all__ == sorted(losa_export.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = losa_export.nonsense


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(str(losa_export.__file__)).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    names = [
        alias.asname for statement in typed.body if isinstance(statement, ast.ImportFrom) for alias in statement.names
    ]
    assert sorted(map(str, names)) == losa_export.__all__


def test_onnxruntime_leaves_nothing_behind_in_the_users_folders(tmp_path: Path) -> None:
    code = "import losa_export, onnxruntime, time; time.sleep(1)"
    environment = {name: text for name, text in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    folders = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-P", "-B", "-c", code], env=environment | folders, check=True)
    assert list(tmp_path.iterdir()) == []
