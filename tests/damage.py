"""Files as they come when something broke."""

from __future__ import annotations

from hypothesis import strategies as st


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` with up to three bytes changed and up to 400 missing at its end."""
    data = bytearray(whole)
    for place, byte in draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=3)):
        data[place % len(data)] = byte
    del data[len(data) - min(draw(st.integers(0, 400)), len(data)) :]
    return bytes(data)
