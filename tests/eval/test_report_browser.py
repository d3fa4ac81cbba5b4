"""The report in a real browser: no complaint, nothing that does not fit, and every label to be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs the 'plot' extra")

from losa_export.eval.html_report import write_report
from tests.eval.browser import Browser, find_chromium
from tests.eval.report_records import bench, eval_side, evaluated, side, sparse, write, write_everything

LONG = "a-folder-with-a-name-that-goes-on-and-on-and-has-no-space-anywhere-" * 2 + "x" * 60

# Pixels, for what a browser rounds.
SLACK = 1.0

# Each line of text of each picture: where it stands, and how high its letters are.
TEXTS = """
[...document.querySelectorAll('figure')].map(figure => {
  const frame = figure.querySelector('svg').getBoundingClientRect();
  return {
    frame: [frame.left, frame.top, frame.right, frame.bottom],
    texts: [...figure.querySelectorAll('svg text')].map(text => {
      const box = text.getBoundingClientRect();
      const scale = frame.width / figure.querySelector('svg').viewBox.baseVal.width;
      return {
        words: text.textContent,
        box: [box.left, box.top, box.right, box.bottom],
        size: parseFloat(getComputedStyle(text).fontSize) * scale,
        colour: getComputedStyle(text).fill,
      };
    }),
  };
})
"""

# Whatever stands beyond the page's edge, outside boxes that scroll.
BEYOND = """
[...document.querySelectorAll('main *')]
  .filter(one => !one.closest('.wide, figure'))
  .filter(one => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(one => one.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of records of every kind, with very long names, many engines, and many marks close together."""
    root = tmp_path_factory.mktemp("browser")
    folder = root / "records"
    write_everything(folder, name=LONG)
    for number in range(12):
        name = f"model-{number}"
        write(
            folder / f"bench-{number}.json",
            bench(side(name, "genai", 2.0 + 0.1 * number, model=sparse(None, "int4"), size=2**20 + 2**12 * number)),
        )
        write(folder / f"eval-{number}.json", evaluated(eval_side(name, "ort"), 3.9 + 0.02 * number))
    write_report([folder], root / "report.html")
    return root / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("needs Chromium or Chrome, which is not on the path")
    with Browser(program) as found:
        yield found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_and_nothing_complains(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.problems.clear()
    browser.show(page, width, dark=dark)
    assert browser.problems == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(BEYOND) == []
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    # The page's own colour, which the pictures' text takes, is a light one in the dark and a dark one in the light.
    ink = brightness(browser.evaluate("getComputedStyle(document.body).color"))
    assert ink > 200 if dark else ink < 50
    for figure in browser.evaluate(TEXTS):
        assert {brightness(text["colour"]) for text in figure["texts"]} == {ink}


@pytest.mark.parametrize("width", [400, 1400])
def test_labels_in_pictures_can_be_read(browser: Browser, page: Path, width: int) -> None:
    browser.show(page, width)
    figures = browser.evaluate(TEXTS)
    assert len(figures) == 5
    for figure in figures:
        assert_readable(figure)


def assert_readable(figure: dict[str, Any]) -> None:
    """Letters of a height to be read, inside the picture, and none over another."""
    left, top, right, bottom = figure["frame"]
    texts = figure["texts"]
    assert texts
    for number, text in enumerate(texts):
        box = text["box"]
        assert text["size"] >= 8, text
        assert box[0] >= left - SLACK, text
        assert box[1] >= top - SLACK, text
        assert box[2] <= right + SLACK, text
        assert box[3] <= bottom + SLACK, text
        for other in texts[number + 1 :]:
            assert not overlap(box, other["box"]), (text["words"], other["words"])


def overlap(one: list[float], other: list[float]) -> bool:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    # Boxes are as high as a line, letters are not.
    return across > SLACK and down > 4 * SLACK


def brightness(colour: str) -> float:
    """Of 'rgb(r, g, b)', 0 to 255."""
    parts = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(parts) / 3


def test_everything_fits_on_paper(browser: Browser, page: Path) -> None:
    # A sheet of A4 without its margins, at 96 pixels an inch.
    browser.show(page, 718, dark=True, media="print")
    assert browser.problems == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= 718
    cut = "[...document.querySelectorAll('table, pre, figure svg')].map(one => one.getBoundingClientRect())"
    assert browser.evaluate(f"Math.max(...{cut}.map(box => box.right))") <= 718
    # Dark text though the screen is dark, and what was folded up, but for the commands that stand at the end anyway.
    assert brightness(browser.evaluate("getComputedStyle(document.body).color")) < 50
    assert browser.evaluate("document.querySelector('details table').getBoundingClientRect().height") > 100
    assert browser.evaluate("document.querySelector('.reruns').getBoundingClientRect().height") == 0
    assert browser.printed().startswith(b"%PDF")


def test_records_can_be_fetched_out_of_the_page(browser: Browser, page: Path) -> None:
    browser.show(page, 1400)
    schema = "fetch(document.querySelector('a[download$=\"a.json\"]').href).then(r => r.json()).then(r => r.schema)"
    assert browser.evaluate(schema) == "losa-bench"


def test_the_browser_sees_what_these_tests_look_for(browser: Browser, tmp_path: Path) -> None:
    """Else a page would pass that was never looked at."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><main><p style='width: 3000px'>wide</p>"
        "<figure><svg viewBox='0 0 100 50' style='width: 100%'>"
        "<text x='10' y='20' style='font-size: 10px'>one</text><text x='12' y='21' style='font-size: 10px'>two</text>"
        "</svg></figure></main><script>console.error('x'); missing()</script><img src='http://127.0.0.1:9/a.png'>"
    )
    browser.problems.clear()
    browser.show(bad, 400)
    found = " ".join(browser.problems)
    assert "console: " in found
    assert "exception: " in found
    assert "request: http://127.0.0.1:9/a.png" in found
    browser.problems.clear()
    assert browser.evaluate("document.documentElement.scrollWidth") > 400
    assert any("wide" in element for element in browser.evaluate(BEYOND))
    (figure,) = browser.evaluate(TEXTS)
    with pytest.raises(AssertionError, match="one"):
        assert_readable(figure)
