"""The small door: what is promised is there, and nothing else is loaded for it."""

from __future__ import annotations

import ast
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
