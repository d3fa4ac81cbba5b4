from __future__ import annotations

import base64
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="needs the 'plot' extra")

from losa_export.cli import main
from losa_export.errors import InputError
from losa_export.eval.bench_report import SCHEMA
from losa_export.eval.html_report import write_report
from losa_export.eval.report_sources import find_sources
from tests.eval.report_records import bench, doctor, eval_side, evaluated, side, sparse, write, write_everything

HOSTILE = "<script>alert(1)</script>$x_{$ | \udc80"


@pytest.fixture
def records(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    write_everything(folder)
    write(folder / "hostile.json", bench(side(HOSTILE, "torch", 30.0)))
    write(folder / "other.json", {"schema": "something else"})
    (folder / "broken.json").write_text("{")
    write(folder / "old.json", {"schema": SCHEMA, "schema_version": 1})
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


def reported(places: list[Path], folder: Path) -> tuple[str, str]:
    """The page and the Markdown of some records."""
    write_report(places, folder / "report.html", folder / "report.md")
    return tuple((folder / f"report.{ending}").read_text(encoding="utf-8") for ending in ("html", "md"))  # type: ignore[return-value]


def section(markdown: str, title: str) -> str:
    """The part of a report below a heading that starts so."""
    return next(part for part in markdown.split("\n## ")[1:] if part.startswith(title))


def cells(markdown: str, start: str) -> list[str]:
    """The cells of the one row of a table that starts so."""
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_is_whole_needs_nothing_else_and_holds_its_data(records: Path, tmp_path: Path) -> None:
    found = write_report([records], tmp_path / "report.html")
    assert (len(found.benches), len(found.evals), len(found.doctors), len(found.runs)) == (4, 3, 1, 1)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert "script" not in parser.tags
    assert all(reference.startswith(("#", "data:")) for reference in parser.references)
    # speed, Pareto, sparsity, roofline, rounds
    assert page.count("<svg") == 5
    assert "old.json: schema version 1" in page


def test_each_file_can_be_taken_out_of_the_page_byte_for_byte(records: Path, tmp_path: Path) -> None:
    page, _ = reported([records], tmp_path)
    data = dict(re.findall(r'<a download="([^"]+)" href="data:[a-z/]+;base64,([^"]*)"', page))
    assert base64.b64decode(data["1-a.json"]) == (records / "a.json").read_bytes()
    assert base64.b64decode(data["2-b.json"]) == (records / "b.json").read_bytes()
    journal = next(name for name in data if name.endswith("-run-q4-rounds.jsonl"))
    assert base64.b64decode(data[journal]) == (records / "run-q4" / "rounds.jsonl").read_bytes()
    assert len(data) == 8


def test_pictures_are_sound_take_the_pages_colour_and_share_no_name(records: Path, tmp_path: Path) -> None:
    # A second run of the same name, and a second number of threads: the same figures twice.
    write_everything(records / "again", name="q4")
    for file in (records / "again").glob("*.json"):
        text = file.read_text().replace('"threads": 2', '"threads": 1')
        file.write_text(text)
    page, _ = reported([records], tmp_path)
    names: list[str] = []
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == 9
    for picture in pictures:
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
    speed = section(text, "Speed")
    assert cells(speed, "half (ort) | decode")[2:] == ["4", "10", "2.50x (2.25 – 2.75)", "FASTER"]
    # What is the same in all rows is said once.
    assert "Every baseline: dense (ort-stock)." in speed
    assert "8 + 4 tokens, 2 threads" in speed
    rows = [line for line in text.splitlines() if line.startswith("|") and "FASTER" in line]
    assert {line.replace("\\|", "").count("|") for line in rows} == {7}


def test_times_stand_beside_zeros_where_nothing_else_differs(records: Path, tmp_path: Path) -> None:
    page, text = reported([records], tmp_path)
    zeros = section(text, "Time against zeros: 8 + 4 tokens, 2 threads")
    assert cells(zeros, "int8 (ort) | half")[2:] == ["50.0 %", "4 (3.9 – 4.1)", "20 (19.8 – 20.2)"]
    assert cells(zeros, "int8 (ort) | sparse")[2:] == ["70.0 %", "2 (1.9 – 2.1)", "10 (9.8 – 10.2)"]
    assert cells(zeros, "baseline (ort-stock) | dense")[2:4] == ["–", "10 (9.9 – 10.1)"]
    assert ">decode, ms a token</text>" in page
    assert ">prefill, ms</text>" in page
    _, text = reported([records / "a.json"], tmp_path)
    assert "Time against zeros" not in text


def test_models_without_known_zeros_are_named(records: Path, tmp_path: Path) -> None:
    write(records / "c.json", bench(side("secret", "ort", 3.0, model=sparse(None))))
    _, text = reported([records], tmp_path)
    assert "export.json tells no zeros: secret (ort)" in section(text, "Time against zeros")


def test_one_name_for_other_files_is_another_model_and_the_same_files_are_one(tmp_path: Path) -> None:
    write(tmp_path / "in" / "1.json", bench(side("same", "ort", 2.0, weights="first")))
    write(tmp_path / "in" / "2.json", bench(side("same", "ort", 3.0, weights="second")))
    write(tmp_path / "in" / "3.json", bench(side("renamed", "ort", 4.0, weights="first")))
    _, text = reported([tmp_path / "in"], tmp_path)
    rows = [line for line in section(text, "Engines and files").splitlines() if re.match(r"\| \d", line)]
    assert [row.split(" | ")[1] for row in rows] == ["same", "dense", "same"]


def test_models_whose_engine_names_no_file_are_told_apart_by_their_folders_files(tmp_path: Path) -> None:
    for number in (1, 2):
        document = bench(side(f"model-{number}", "ort", 2.0))
        document["candidate"]["engine"]["model_files"] = {}
        write(tmp_path / "in" / f"{number}.json", document)
    _, text = reported([tmp_path / "in"], tmp_path)
    assert cells(section(text, "Engines and files"), "1 | model-1")[-1] == "–"
    assert cells(section(text, "Engines and files"), "3 | model-2")[-1] == "–"


def test_the_roofline_is_the_fastest_reading_of_such_a_machine_and_threads(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "a.json", bench(side("sparse", "ort", 2.0, model=sparse(0.7))))
    write(folder / "doctor.json", doctor())
    _, text = reported([folder], tmp_path)
    roofline = section(text, "Memory roofline")
    assert "0.9 GB/s" in roofline
    # 1 MiB at 0.9 GB/s takes 1.165 ms.
    assert cells(roofline, "1 | sparse (ort)")[2:] == ["1.0", "1.17", "2 (1.9 – 2.1)", "58%"]
    for other in (doctor(4), doctor(machine=doctor()["machine"] | {"cpu_model": "another"})):
        write(folder / "doctor.json", other)
        _, text = reported([folder], tmp_path)
        unknown = section(text, "Memory roofline: not known")
        assert "losa doctor --threads 2 --json doctor-2.json" in unknown
        assert "GB/s" not in text
    write(folder / "a.json", bench(side("sparse", "ort", 2.0), threads=1))
    write(folder / "doctor.json", doctor())
    _, text = reported([folder], tmp_path)
    assert "0.4 GB/s" in section(text, "Memory roofline")


def test_evaluations_come_with_errors_and_paired_verdicts(records: Path, tmp_path: Path) -> None:
    _, text = reported([records], tmp_path)
    row = cells(section(text, "Quality on texts"), "sparse (ort)")
    # exp of 4, 4, 5, 5 nats' mean, beside 3, 3, 4, 4 of the reference
    assert row[3:7] == ["90.02", "dense (ort-stock): 33.12", "+1.0000 (+0.9000 … +1.1000)", "WORSE"]
    assert row[7:] == ["0.9000, 8.100", "90.0%"]
    row = cells(section(text, "Zero-shot tasks"), "sparse (ort)")
    assert row[1:5] == ["hellaswag", "20", "50.0% ± 10.0%", "60.0% ± 10.0%"]
    assert row[8:] == ["1, 9", "0.020", "WORSE"]


def test_an_evaluation_without_reference_stands_alone(tmp_path: Path) -> None:
    write(tmp_path / "eval.json", evaluated(eval_side("lone", "ort"), 3.0, tasks=True))
    _, text = reported([tmp_path / "eval.json"], tmp_path)
    assert cells(section(text, "Quality on texts"), "lone (ort)")[4:] == ["–"] * 5
    assert cells(section(text, "Zero-shot tasks"), "lone (ort)")[5:] == ["–"] * 6


def test_blocks_of_a_run_come_with_sparsity_rank_and_errors(records: Path, tmp_path: Path) -> None:
    page, text = reported([records], tmp_path)
    assert cells(section(text, "Blocks after the last round: run-q4"), "0")[1:] == ["50.00%", "4", "0.1", "0.1", "0.05"]
    for label in ("sparsity", "rank", "reconstruction error", "block"):
        assert f">{label}</text>" in page


def test_commands_can_be_given_to_the_command_line(records: Path, tmp_path: Path) -> None:
    from losa_export.cli import _parser

    _, text = reported([records], tmp_path)
    block = re.findall(r"```\n(.*?)\n```", section(text, "How to run it again"), flags=re.DOTALL)[0]
    commands = [shlex.split(line) for line in block.splitlines()]
    assert {words[1] for words in commands} == {"bench", "eval", "doctor", "train", "report"}
    for words in commands:
        assert words[0] == "losa"
        _parser().parse_args(words[1:])
    assert "losa train dense --config run-q4/config.toml -o run-q4-again" in block
    evaluation = next(line for line in block.splitlines() if line.startswith("losa eval sparse"))
    assert "--against dense --against-runtime ort-stock --wikitext wiki.txt --window 64 --windows 4" in evaluation
    assert "--tasks hellaswag --limit 20 --task-folder TASKS" in evaluation
    assert "losa bench half --against dense --runtime ort --against-runtime ort-stock --threads 2" in block


def test_each_figure_is_followed_by_the_commands_that_measure_it_again(records: Path, tmp_path: Path) -> None:
    page, _ = reported([records], tmp_path)
    parts = page.split("<figure ")[1:]
    assert len(parts) == 5
    for part in parts:
        following = part.split("</figure>")[1]
        assert re.match(r"\s*<details class=reruns><summary>[^<]+</summary><pre[^>]*>losa ", following)


def test_nothing_to_report_is_an_error_that_says_what_was_seen(tmp_path: Path, records: Path) -> None:
    with pytest.raises(InputError, match="no record of 'losa bench', 'losa eval' or 'losa train'"):
        find_sources([records / "other.json"])
    with pytest.raises(InputError, match=r"'old\.json': schema version 1"):
        find_sources([records / "old.json"])
    with pytest.raises(InputError, match="does not exist"):
        find_sources([tmp_path / "nowhere"])


def test_a_record_that_lacks_a_field_is_left_out_by_name(tmp_path: Path, records: Path) -> None:
    document = bench(side("sparse", "ort", 2.0))
    del document["candidate"]["decode"]["median_ms"]
    write(records / "cut.json", document)
    sweep = json.loads((records / "b.json").read_text())
    del sweep["runs"][0]["machine"]["cpu_model"]
    sweep["runs"].append(7)
    write(records / "b.json", sweep)
    partial = evaluated(eval_side("sparse", "ort"), 3.0, reference=eval_side("dense", "ort"))
    del partial["texts"][0]["kl_mean"]
    write(records / "eval-cut.json", partial)
    found = find_sources([records])
    assert {(path.name, reason) for path, reason in found.skipped if path.name != "old.json"} == {
        ("cut.json", "it has no field 'candidate.decode.median_ms'; measure again"),
        ("b.json", "run 1: it has no field 'machine.cpu_model'; measure again"),
        ("b.json", "run 3: it is no benchmark"),
        ("eval-cut.json", "it has no field 'texts.kl_mean'; measure again"),
    }
    assert len(found.benches) == 3
    _, text = reported([records], tmp_path)
    assert "cut.json: it has no field" in section(text, "Left out")


def test_a_file_that_two_places_hold_is_read_once(records: Path) -> None:
    assert len(find_sources([records, records / "a.json"]).benches) == len(find_sources([records]).benches)
