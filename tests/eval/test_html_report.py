from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="needs the 'plot' extra")

from losa_export.cli import main
from losa_export.errors import InputError
from losa_export.eval.bench_report import SCHEMA, SCHEMA_VERSION
from losa_export.eval.bench_sweep import SweepReport
from losa_export.eval.figures import rounds_figure, sparsity_figure
from losa_export.eval.html_report import write_report
from losa_export.eval.machine import machine_record
from losa_export.eval.report_sources import find_sources
from losa_export.training.journal import RoundRecord, write_journal

HOSTILE = "<script>alert(1)</script>"


def bench_document(name: str = "sparse", zeros: float | None = 0.7, *, decode: float = 2.0) -> dict[str, Any]:
    """A record as `losa bench` writes it, of two samples."""
    estimate = {"ratio": decode, "low": 0.9 * decode, "high": 1.1 * decode, "verdict": "FASTER", "blocks": 8}
    estimate |= {"confidence": 0.95, "smallest_shown": 1.1}

    def engine(folder: str, runtime: str, milliseconds: float, model: dict[str, Any]) -> dict[str, Any]:
        timing = {"median_ms": milliseconds, "mad_ms": 0.1, "tokens_per_s": 1000 / milliseconds}
        return {
            "folder": folder,
            "runtime": runtime,
            "engine": {"engine": "onnxruntime", "version": "1.0", "kernel_row": None},
            "model": model,
            "model_bytes": 2**20,
            "peak_rss_bytes": 2**28,
            "load_median_ms": 40.0,
            "prefill": timing,
            "decode": timing,
        }

    model = {} if zeros is None else {"weights": "sparse", "values": "int8", "sparsity_fraction": zeros}
    config = {"candidate": name, "baseline": "dense", "candidate_runtime": "ort", "baseline_runtime": "ort-stock"}
    config |= {"prompt_tokens": 8, "new_tokens": 4, "batch": 1, "answers": "auto", "max_seconds": 180.0}  # type: ignore[dict-item]
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created_utc": "2026-01-01T00:00:00+00:00",
        "config": config,
        "threads": 2,
        "machine": machine_record().as_dict(),
        "answers": {"mode": "own", "candidate": None, "baseline": None},
        "candidate": engine(name, "ort", 10 / decode, model),
        "baseline": engine("dense", "ort-stock", 10.0, {}),
        "prefill": {"all_blocks": estimate},
        "decode": {"all_blocks": estimate},
        "warmup_blocks": 2,
        "timed_seconds": 12.0,
        "samples": [{"disturbed": False}, {"disturbed": True}],
        "warnings": [],
    }


def a_round(number: int) -> RoundRecord:
    return RoundRecord(
        number, 0.6, 0.599, (0.5, 0.7), (4, 6), {}, 3, 96, (4.0, 3.5, 3.0), 1e-4, 1.0, 2.0, 2**28,
        block_errors=(0.1, 0.2), block_fits=((0.1, 0.05), (0.2, 0.1)),
    )  # fmt: skip


@pytest.fixture
def records(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    (folder / "run").mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps(bench_document()))
    sweep = SweepReport([bench_document("half", 0.5, decode=1.4), bench_document(HOSTILE, None)])
    sweep.write(folder / "b.json")
    write_journal(folder / "run", [a_round(1), a_round(2)])
    (folder / "other.json").write_text('{"schema": "something else"}')
    (folder / "broken.json").write_text("{")
    (folder / "old.json").write_text(json.dumps({"schema": SCHEMA, "schema_version": 1}))
    return folder


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order, and notes what a page would fetch."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_needs_nothing_else_and_holds_its_data(records: Path, tmp_path: Path) -> None:
    found = write_report([records], tmp_path / "report.html", tmp_path / "report.md")
    assert (len(found.benches), len(found.runs), len(found.skipped)) == (3, 1, 1)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert "script" not in parser.tags
    assert all(reference.startswith(("#", "data:")) for reference in parser.references)
    assert page.count("<svg") == 3
    data = re.findall(r'href="data:application/json;base64,([^"]+)"', page)
    assert json.loads(base64.b64decode(data[0])) == json.loads((records / "a.json").read_text())
    assert "old.json: schema version 1" in page


def test_pictures_are_sound_take_the_pages_colour_and_share_no_name(records: Path, tmp_path: Path) -> None:
    write_report([records], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    names: list[str] = []
    for picture in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        root = ElementTree.fromstring(picture)
        assert "viewBox" in root.attrib
        assert "width" not in root.attrib
        assert "currentColor" in picture
        assert "#010203" not in picture
        own = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert all(name in own for name in re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", picture)[0] if name)
        names += own
    assert len(names) == len(set(names))


def test_markdown_has_the_same_tables(records: Path, tmp_path: Path) -> None:
    assert main(["report", str(records), "-o", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "r.md")]) == 0
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "2.00x (1.80 – 2.20) | FASTER" in text
    assert "## Training: run" in text
    assert "losa bench half --against dense --runtime ort" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines if "FASTER" in line} == {8}


def test_zeros_are_compared_where_nothing_else_differs(records: Path, tmp_path: Path) -> None:
    write_report([records], tmp_path / "report.html")
    assert "Decode time against sparsity" in (tmp_path / "report.html").read_text(encoding="utf-8")
    write_report([records / "a.json"], tmp_path / "report.html")
    assert "Decode time against sparsity" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_nothing_to_report_is_an_error_that_says_what_was_seen(tmp_path: Path, records: Path) -> None:
    with pytest.raises(InputError, match="no record of 'losa bench' or 'losa train'"):
        find_sources([tmp_path / "records" / "other.json"])
    with pytest.raises(InputError, match=r"'old\.json': schema version 1"):
        find_sources([records / "old.json"])
    with pytest.raises(InputError, match="does not exist"):
        find_sources([tmp_path / "nowhere"])


def test_figures_with_one_line_or_many_are_drawn() -> None:
    many = {f"line {number}": [(0.0, 1.0, 0.1), (50.0, 0.5, 0.1)] for number in range(7)}
    ElementTree.fromstring(sparsity_figure(many))
    ElementTree.fromstring(rounds_figure([a_round(1)], "one"))
