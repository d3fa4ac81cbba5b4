"""Progress is plain lines where nobody watches a terminal."""

from __future__ import annotations

import pytest

from losa_export import progress
from losa_export.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (3900, "1 h 5 min"), (-1, "0 s")],
)
def test_durations_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plain_lines_carry_count_fields_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 20.0, 20.0, 20.0, 40.0, 40.0, 40.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress("tuning", 4, "steps") as bar:
        bar.advance(2, loss="3.2")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tuning: 2/4 steps, loss 3.2, 20 s left"
    assert "done in" in lines[1]


def test_amounts_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("reading", 12345.678, "tokens") as bar:
        bar.advance(12.3456)
    assert capsys.readouterr().err.startswith("reading: 12.3/12346 tokens")


def test_silent_when_disabled(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tuning", 1, enabled=False) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""
    assert bar.seconds_left() is not None
