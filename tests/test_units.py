from __future__ import annotations

import pytest

from losa_export.units import bytes_of, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90.0), ("90s", 90.0), (" 10m ", 600.0), ("10 min", 600.0), ("1.5h", 5400.0), ("0", 0.0)],
)
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("2K", 2048), ("2kb", 2000), ("512M", 2**29), ("1.5GiB", 3 * 2**29), ("3 GB", 3 * 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1d", "1 2", "1e3", "9" * 30])
def test_what_is_no_time_or_size_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="such as 90s, 10m or"):
        seconds_of(text)
    with pytest.raises(ValueError, match="such as 1000000, 512M"):
        bytes_of(text)
