"""Stacked weights come apart again, row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa_export.errors import FormatError
from losa_export.graph.stacking import Part, describe, interleave, parse, parts_of


@given(rows=st.integers(1, 40), columns=st.integers(1, 5))
def test_interleaved_rows_alternate_in_blocks_of_16_and_come_apart(rows: int, columns: int) -> None:
    gate = np.arange(1, rows * columns + 1, dtype=np.float32).reshape(rows, columns)
    both = interleave(gate, -gate)
    assert both.shape == (32 * -(-rows // 16), columns)
    np.testing.assert_array_equal(both[: min(rows, 16)], gate[:16])
    np.testing.assert_array_equal(both[16 : 16 + min(rows, 16)], -gate[:16])
    apart = parts_of(both, [rows, rows], interleaved=True)
    np.testing.assert_array_equal(apart[0], gate)
    np.testing.assert_array_equal(apart[1], -gate)


@given(rows=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_rows_that_follow_each_other_come_apart(rows: list[int]) -> None:
    parts = [np.full((count, 3), number) for number, count in enumerate(rows)]
    for part, apart in zip(parts, parts_of(np.concatenate(parts), rows, interleaved=False), strict=True):
        np.testing.assert_array_equal(part, apart)


def test_rows_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(FormatError, match=r"a node of 5 rows says that it holds \[2, 2\]: export again"):
        parts_of(np.zeros((5, 1)), [2, 2], interleaved=False)
    with pytest.raises(FormatError, match=r"a SwiGLU node of 32 rows says that it holds \[16, 15\]"):
        parts_of(np.zeros((32, 1)), [16, 15], interleaved=True)
    with pytest.raises(FormatError, match="keeps rows that neither of its weights has"):
        parts_of(np.ones((32, 1)), [15, 15], interleaved=True)


def test_the_description_reads_back() -> None:
    parts = (Part("a.weight", 3), Part("b.weight", 4))
    assert parse(describe(parts), "node") == parts
    for text in (None, "", "{", "[1]"):
        with pytest.raises(FormatError, match="node 'node' does not say which weights it holds"):
            parse(text, "node")
