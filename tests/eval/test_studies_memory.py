"""The memory study writes models that the commands accept, reads memory, and clears up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the 'train' extra")

from losa_export.errors import RuntimeFailureError
from losa_export.eval.studies import memory
from losa_export.eval.studies.memory import Row, Usage, measure, study, table
from losa_export.synth import LlamaShape

SMALL = LlamaShape(64, 176, heads=4, kv_heads=4, blocks=2, vocabulary=512, positions=256)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_a_small_model_is_pruned_merged_and_cleared_away(tmp_path: Path) -> None:
    row = study(SMALL, 2, tmp_path, ["--window", "16", "--calibration-windows", "2"])
    assert row.blocks == 2
    assert row.merge is not None
    for usage in (row.train, row.merge):
        # An interpreter with torch takes more than this, and the model next to nothing.
        assert 50e6 < usage.peak_anonymous_bytes <= usage.peak_resident_bytes
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_fails_is_quoted_and_cleared_away(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailureError, match=r"'losa train .*' failed: .*criterion is 'none'"):
        study(SMALL, 1, tmp_path, ["--window", "16", "--criterion", "none"])
    assert list(tmp_path.iterdir()) == []


def test_memory_that_a_process_takes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, time; held = bytearray(300_000_000); time.sleep(0.5)"
    monkeypatch.setattr(memory, "_CODE", code)
    usage = measure([])
    # Beyond the bytes, an interpreter's few megabytes.
    assert 300e6 < usage.peak_anonymous_bytes < 350e6
    assert usage.seconds > 0.5


def test_the_table_has_a_row_for_each_checkpoint() -> None:
    usage = Usage(peak_anonymous_bytes=3 << 30, peak_resident_bytes=5 << 30, seconds=61.4)
    text = table([Row(2, 1 << 30, usage, usage), Row(4, 2 << 30, usage, None)])
    assert text.splitlines()[-2:] == [
        "| 2 | 1.00 | 3.00 | 5.00 | 61 | 3.00 | 5.00 | 61 |",
        "| 4 | 2.00 | 3.00 | 5.00 | 61 |  |  |  |",
    ]
