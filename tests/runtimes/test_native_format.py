"""The example of docs/format.md, as a reader would type it."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from losa_export.runtimes import native

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "format.md"


def test_the_example_of_the_document_is_right(kernels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = doctest.testfile(str(DOCUMENT), module_relative=False)
    assert result.failed == 0, capsys.readouterr().out
    assert result.attempted >= 10


def test_the_document_names_the_numbers_of_the_code() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"layout {native.LAYOUT_N16} " in text
    assert f"blocks** of {native.BLOCK_ROWS}," in text
    assert f"At least {native.VALUE_PADDING} bytes" in text
