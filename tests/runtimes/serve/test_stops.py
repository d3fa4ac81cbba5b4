from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from losa_export.runtimes.serve.stops import StopMatcher

TEXTS = st.text(alphabet="ab\n", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: up to where the first stop string begins."""
    places = [text.find(stop) for stop in stops if stop in text]
    return (text[: min(places)], True) if places else (text, False)


@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=8))
def test_a_text_in_any_pieces_ends_where_the_whole_text_would(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher, shown = StopMatcher(stops), ""
    places = sorted({min(place, len(text)) for place in cuts} | {0, len(text)})
    pieces = [text[start:stop] for start, stop in itertools.pairwise(places)]
    for number, piece in enumerate(pieces):
        shown += matcher.push(piece)
        whole = "".join(pieces[: number + 1])
        assert cut(whole, stops)[0].startswith(shown)
    assert matcher.stopped == cut(text, stops)[1]
    shown += matcher.finish()
    assert shown == cut(text, stops)[0]


def test_nothing_is_held_back_that_cannot_become_a_stop_string() -> None:
    matcher = StopMatcher(["\n\nQ:"])
    assert matcher.push("Yes.\n") == "Yes."
    assert matcher.push("No") == "\nNo"
    assert matcher.push("\n\nQ: again") == ""
    assert matcher.stopped
    assert matcher.push("more") == ""
