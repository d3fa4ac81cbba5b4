"""The document, the tables and the warnings of a load, from invented figures."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from losa_export.eval.machine import machine_record
from losa_export.eval.serve_bench import ServeBenchConfig
from losa_export.eval.serve_metrics import (
    CountedBy,
    Objective,
    Outcome,
    RequestRecord,
    TokenChunk,
    summarise,
)
from losa_export.eval.serve_report import (
    CellReport,
    ServeBenchReport,
    cell_warnings,
    latency_rows,
    load_headings,
    load_rows,
    print_serve_bench,
    serve_markdown,
    serve_notes,
)

LEVELS = (50.0, 90.0)
DONE = RequestRecord(
    index=0,
    intended_s=0.0,
    started_s=0.0,
    ended_s=2.0,
    outcome=Outcome.COMPLETED,
    status=200,
    chunks=(TokenChunk(1.0, 1), TokenChunk(2.0, 1)),
    finished_s=2.0,
    prompt_tokens=8,
    output_tokens=2,
    counted_by=CountedBy.EACH_CHUNK,
    finish_reason="length",
)
REFUSED = RequestRecord(1, 0.0, 0.0, 0.5, Outcome.REFUSED, 429, "429: busy")


def warnings(*records: RequestRecord, **options: Any) -> tuple[str, ...]:
    usual: dict[str, Any] = {
        "rate": None,
        "limit": None,
        "asked_tokens": 2,
        "prompt_tokens": None,
        "repeats": False,
        "levels": (50.0,),
    }
    return cell_warnings(summarise(records), records, **(usual | options))


def cell(rate: float | None = None, limit: int | None = None, *records: RequestRecord) -> CellReport:
    sent = records or (DONE, DONE, REFUSED)
    return CellReport(
        request_rate=rate,
        max_concurrency=limit,
        interrupted=False,
        not_sent=0,
        client_cpu_fraction=0.02,
        metrics=summarise(sent, levels=LEVELS, objective=Objective(ttft_ms=1500.0)),
        warnings=("something to say",),
        requests=sent,
    )


def report(*cells: CellReport) -> ServeBenchReport:
    config = ServeBenchConfig("http://host.example:80", percentiles=LEVELS, objective=Objective(ttft_ms=1500.0))
    return ServeBenchReport(
        created_utc="2026-01-01T00:00:00+00:00",
        config=config.as_dict(),
        server={"model": "model", "name": "server/1", "losa": None, "same_machine": False},
        client={"aiohttp": "3"},
        machine=machine_record(),
        interrupted=False,
        cells=cells or (cell(),),
    )


def test_a_sound_load_needs_no_warning() -> None:
    assert warnings(DONE, DONE) == ()


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([DONE, REFUSED], {}, "1 of 2 requests were refused; latencies are those of the others"),
        (
            [DONE, REFUSED, replace(REFUSED, outcome=Outcome.TRUNCATED)],
            {},
            "1 of 3 requests failed (1 429, 1 truncated); latencies are those of the others",
        ),
        (
            [replace(DONE, counted_by=CountedBy.CHUNKS)],
            {},
            "1 answers came without usage: their tokens are taken to be as many as their chunks",
        ),
        (
            [replace(DONE, counted_by=CountedBy.FINAL_USAGE, output_tokens=9)],
            {},
            "ITL are gaps between chunks: usage came at the end only, 9 tokens of 1 answers in 2 chunks with text",
        ),
        ([DONE], {"asked_tokens": 3}, "1 answers have fewer tokens than the 3 asked for"),
        (
            [DONE],
            {"prompt_tokens": 7},
            "the server counts 8 to 8 tokens in a prompt that has 7 by --tokenizer: it adds special tokens, or has "
            "another tokenizer",
        ),
        ([DONE], {"repeats": True}, "prompts occur more than once, which a server with a prefix cache answers sooner"),
        (
            [replace(DONE, intended_s=-0.2)],
            {"rate": 5.0},
            "1 requests were sent over 100 ms late: the client is late; see TTFT from the intended start",
        ),
        (
            [DONE],
            {"levels": (50.0, 95.0, 99.0)},
            "p50, p95, p99: of 1 requests not one lies above, so it is nearly the largest",
        ),
    ],
)
def test_what_must_be_said_is_said(records: list[RequestRecord], options: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"levels": (0.0,)}
    assert warnings(*records, **(usual | options)) == (message,)


def test_what_need_not_be_said_is_not() -> None:
    one_each = replace(DONE, counted_by=CountedBy.FINAL_USAGE)
    late = replace(DONE, intended_s=-0.2)
    enough = [DONE] * 20
    assert warnings(one_each, one_each) == ()
    assert warnings(late, late) == ()  # all at once: nothing has a moment of its own
    assert warnings(*enough, levels=(95.0,), prompt_tokens=8, rate=5.0) == ()
    assert warnings(*enough[1:], levels=(95.0,)) != ()


def test_the_document_holds_everything_and_names_no_host(tmp_path: Path) -> None:
    report(cell(2.0, 4)).write(tmp_path / "serve.json")
    text = (tmp_path / "serve.json").read_text()
    document = json.loads(text)
    assert (document["schema"], document["schema_version"]) == ("losa-serve-bench", 1)
    assert document["machine"]["packages"]
    assert "host.example" not in text
    assert document["config"]["request_rates"] == [None]
    (written,) = document["cells"]
    assert written["metrics"]["ttft_ms"]["percentiles"] == {"p50": 1000.0, "p90": 1000.0}
    assert written["requests"][0]["chunk_s"] == [1.0, 2.0]
    assert written["requests"][0]["counted_by"] == "usage of each chunk"
    assert written["requests"][2]["detail"] == "429: busy"


def test_the_tables() -> None:
    document = report(cell(None, 4), cell(2.5)).as_dict()
    assert load_rows(document) == [
        ("inf", "4", "2", "1", "0", "1.00", "2.0", "2.2", "1.00"),
        ("2.5", "", "2", "1", "0", "1.00", "2.0", "2.2", "1.00"),
    ]
    rows = latency_rows(document)
    assert rows[:4] == [
        ("inf", "4", "TTFT", "1000", "1000", "1000"),
        ("inf", "4", "TPOT", "1000", "1000", "1000"),
        ("inf", "4", "ITL", "1000", "1000", "1000"),
        ("inf", "4", "E2EL", "2000", "2000", "2000"),
    ]
    assert [row[2] for row in rows[4:]] == [
        "TTFT",
        "TTFT, from intended start",
        "TPOT",
        "ITL",
        "E2EL",
        "lateness of start",
    ]


def test_markdown_and_console_show_the_same() -> None:
    document = report(cell(2.5)).as_dict()
    markdown = serve_markdown(document)
    stream = StringIO()
    print_serve_bench(document, Console(file=stream, width=200))
    for row in [*load_rows(document), *latency_rows(document)]:
        assert f"| {' | '.join(row)} |" in markdown
        assert all(word in stream.getvalue() for word in row)
    for note in serve_notes(document):
        assert f"- {note}\n" in markdown
        assert note in stream.getvalue()
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert widths == {10, 7}


def test_without_an_objective_there_is_no_goodput() -> None:
    with_it = report().as_dict()
    plain = summarise(cell().requests, levels=LEVELS)
    without = report(replace(cell(), metrics=plain)).as_dict()
    without["config"]["objective"] = None
    assert load_headings(with_it) == (*load_headings(without), "goodput /s")
    assert len(load_rows(without)[0]) == len(load_headings(without)) == 8
    assert not any("oodput" in note for note in serve_notes(without))


def test_notes() -> None:
    busy = replace(cell(2.5, 8), client_cpu_fraction=0.75, warnings=("something to say", "and more"))
    assert serve_notes(report(cell(), busy).as_dict()) == [
        "Warning: something to say.",
        "Warning (rate 2.5, at most 8): and more.",
        "Goodput: requests per second with TTFT ≤ 1500 ms.",
        "Goodput from intended starts: 1.00 /s.",
        "The client took up to 75% of a core of its processor.",
        "Warning: the client itself may have been what limits these figures.",
    ]
    cut = replace(report(replace(cell(), interrupted=True, not_sent=7)), interrupted=True).as_dict()
    cut["server"]["same_machine"] = True
    notes = serve_notes(cut)
    assert notes[0] == "Interrupted: this is part of a result; 7 requests of the last line were not sent."
    assert notes[1] == "Warning: something to say."
    assert notes[-1] == "The client took up to 2% of a core of the processor it shares with the server."


def test_a_cell_without_answers_has_no_latencies() -> None:
    document = report(cell(None, None, REFUSED)).as_dict()
    assert latency_rows(document) == []
    assert load_rows(document)[0][2:5] == ("0", "1", "0")
    assert "| inf |  | 0 | 1 | 0 |" in serve_markdown(document)
