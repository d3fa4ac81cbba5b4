"""The comparison with llama.cpp's server: turns, what is kept, and what it refuses; on servers that only pretend."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from losa_export.errors import BenchmarkError, ConfigError, InputError, RuntimeFailureError
from losa_export.eval.stats import MIN_BLOCKS
from losa_export.eval.studies import serve_llamacpp
from losa_export.eval.studies.serve_llamacpp import Server, StudyConfig, compare, document_of, main, page, rows_of

# A program that takes llama.cpp's options, notes that it runs, and answers each request after a known time. Only the
# standard library: it is started many times.
PROGRAM = """#!{python} -IS
import json, os, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

if "--version" in sys.argv:
    sys.exit(print("version: 77 (abcdef)", file=sys.stderr))

def note(what):
    with open({log!r}, "a") as log:
        print({name!r}, what, *(name for name in os.environ if name.startswith("L")), file=log)

def stop(*_):
    note("stops")
    os._exit(0)

signal.signal(signal.SIGTERM, stop)
note("starts")
{begin}
seen = []

class Handler(BaseHTTPRequestHandler):
    def answer(self, status, kind, *texts):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        for text in texts:
            self.wfile.write(text.encode())

    def do_GET(self):
        self.answer(200, "application/json", json.dumps({{"data": [{{"id": {name!r}}}]}}))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        seen.append(1)
        if len(seen) > {good}:
            return self.answer(500, "application/json", "{{}}")
        time.sleep({ttft_s})
        chunk = {{"choices": [{{"text": "word", "finish_reason": None}}]}}
        last = {{"choices": [{{"text": "", "finish_reason": "length"}}]}}
        last["usage"] = {{"prompt_tokens": 8, "completion_tokens": {tokens}}}
        events = [chunk] * {tokens} + [last]
        texts = [f"data: {{json.dumps(event)}}\\n\\n" for event in events]
        self.answer(200, "text/event-stream", *texts, "data: [DONE]\\n\\n")

    def log_message(self, *_):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def study(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """Both servers pretend; the real command of ours is held against `losa serve` below."""
    config = StudyConfig(
        write_folder(tmp_path, tiny_checkpoint),
        tmp_path / "model.gguf",
        program(tmp_path, "llamacpp", ttft_s=0.03),
        threads=1,
        concurrencies=(1, 2),
        num_prompts=2,
        input_len=8,
        output_len=3,
        startup_s=60.0,
    )
    config.gguf.write_bytes(b"GGUF")
    pretend(monkeypatch, program(tmp_path, "losa", ttft_s=0.0))
    return config


def write_folder(tmp_path: Path, checkpoint: Path) -> Path:
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    (folder / "model.onnx").write_bytes(b"12345")
    return folder


def program(
    tmp_path: Path, name: str, *, ttft_s: float = 0.0, tokens: int = 3, good: int = 1000, begin: str = ""
) -> Path:
    """Write a server that answers `good` requests."""
    path = tmp_path / f"{name}-server"
    values = {"name": name, "ttft_s": ttft_s, "tokens": tokens, "good": good, "begin": begin}
    path.write_text(PROGRAM.format(python=sys.executable, log=str(tmp_path / "log"), **values))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def pretend(monkeypatch: pytest.MonkeyPatch, ours: Path) -> None:
    """Run `ours` in place of `losa serve`."""
    real = StudyConfig.command

    def command(config: StudyConfig, side: Any, port: int, threads: int) -> list[str]:
        words = real(config, side, port, threads)
        return words if side == "llamacpp" else [str(ours), *words[words.index("--host") :]]

    monkeypatch.setattr(StudyConfig, "command", command)


def words_of(config: StudyConfig, *more: str) -> list[str]:
    return [
        *(str(config.onnx), str(config.gguf), "--llama-server", str(config.llama_server), "--threads", "1"),
        *("--concurrency", "1", "2", "--num-prompts", "2", "--input-len", "8", "--output-len", "3", *more),
    ]


def test_servers_take_turns_and_never_run_together(
    study: StudyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOSA_SERVE_PORT", "LLAMA_ARG_PORT", "LOSA_API_KEYS"):
        monkeypatch.setenv(name, "12345678")
    words = words_of(study, "--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md"))
    assert main(words) == 0
    log = [line.split()[:2] for line in (tmp_path / "log").read_text().splitlines()]
    order = [name for name, what in log if what == "starts"]
    assert log == [[name, what] for name in order for what in ("starts", "stops")]
    assert order == ["losa", "llamacpp", "llamacpp", "losa"] * (MIN_BLOCKS // 2)
    assert "LOSA_SERVE" not in (tmp_path / "log").read_text()
    assert "LLAMA_ARG" not in (tmp_path / "log").read_text()

    text = (tmp_path / "r.json").read_text()
    document = json.loads(text)
    assert (document["schema"], document["schema_version"]) == ("losa-study-serve-llamacpp", 1)
    assert document["llama_server"] == "77 (abcdef)"
    assert (document["gguf_bytes"], document["onnx_bytes"]) == (4, 5)
    assert len(document["rounds"]) == MIN_BLOCKS
    assert [row["concurrency"] for row in document["rows"]] == [1, 2]
    for row in document["rows"]:
        # Three tokens come at once after 30 ms; a busy machine only adds to that.
        assert row["llamacpp"]["tokens_per_s"] <= row["concurrency"] * 3 / 0.0299
        assert row["llamacpp"]["ttft_ms"]["p95"] >= 29.9
    assert str(tmp_path) not in text
    assert (tmp_path / "r.md").read_text() == capsys.readouterr().out == page(document)


def test_a_study_goes_on_where_it_stopped(study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []
    fail_at = 5

    def turn(side: str, config: StudyConfig, threads: int, number: int) -> dict[str, Any]:
        turns.append((side, number))
        if len(turns) == fail_at:
            raise BenchmarkError("the third round breaks")
        return a_round(1.0 + number, 1.0)["losa"] | {"cells": a_round(1.0 + number, 1.0)["losa"]["cells"] * 2}

    monkeypatch.setattr(serve_llamacpp, "_turn", turn)
    kept = tmp_path / "r.json"
    with pytest.raises(BenchmarkError, match="the third round breaks"):
        compare(study, kept, show_progress=False)
    assert len(json.loads(kept.read_text())["rounds"]) == 2
    fail_at, turns[:] = 0, []
    rounds = compare(study, kept, show_progress=False)
    assert [number for _, number in turns] == [2, 2, 3, 3, 4, 4, 5, 5]
    assert [one["losa"]["cells"][0]["tokens_per_s"] for one in rounds] == [1, 2, 3, 4, 5, 6]
    turns.clear()
    assert compare(study, kept, show_progress=False) == rounds
    assert not turns
    with pytest.raises(InputError, match="no record of this study with these settings"):
        compare(replace(study, seed=1), kept, show_progress=False)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": "losa-study-serve-llamacpp", "schema_version": 0}'])
def test_the_record_of_another_study_is_not_overwritten(study: StudyConfig, tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match="no record of this study with these settings; give another file"):
        compare(study, tmp_path / "r.json", show_progress=False)
    assert (tmp_path / "r.json").read_text() == text


def test_an_interrupt_stops_the_server(
    study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(serve_llamacpp, "bench_serve", interrupt)
    assert main(words_of(study)) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()] == ["starts", "stops"]


def test_loads_that_fail_are_not_compared(study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, program(tmp_path, "losa", tokens=2))
    with pytest.raises(
        BenchmarkError, match=r"losa, 1 under way: 2 of 2 .* \(none failed\), 2 not with 3 tokens, so speeds would not"
    ):
        compare(study, show_progress=False)
    pretend(monkeypatch, program(tmp_path, "losa", good=3))
    with pytest.raises(BenchmarkError, match=r"losa, 1 under way: 1 of 2 .* \({'500': 1}\), 1 not with 3 tokens"):
        compare(study, show_progress=False)


@pytest.mark.parametrize(
    ("begin", "startup_s", "message"),
    [
        ("sys.exit('no such tensor')", 60.0, r"losa ended with 1 before it answered:\nno such tensor"),
        ("time.sleep(60)", 0.5, r"the server of losa did not answer within 0.5 s:"),
    ],
)
def test_a_server_that_does_not_start(
    study: StudyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begin: str,
    startup_s: float,
    message: str,
) -> None:
    pretend(monkeypatch, program(tmp_path, "losa", begin=begin))
    config = StudyConfig(study.onnx, study.gguf, study.llama_server, threads=1, startup_s=startup_s)
    with pytest.raises(RuntimeFailureError, match=message):
        compare(config, show_progress=False)


def test_a_program_that_cannot_run(study: StudyConfig, tmp_path: Path) -> None:
    study.llama_server.chmod(0o644)
    with pytest.raises(RuntimeFailureError, match="the server of llamacpp cannot be started: "):
        Server("llamacpp", study, 1).__enter__()
    assert document_of(study, 1, [])["llama_server"] == "unknown"
    with pytest.raises(InputError, match=r"the program '.*none' is no file; check the path"):
        compare(StudyConfig(study.onnx, study.gguf, tmp_path / "none"))
    with pytest.raises(InputError, match=r"the model '.*none' is no file"):
        compare(StudyConfig(study.onnx, tmp_path / "none", study.llama_server))
    with pytest.raises(InputError, match="does not exist"):
        compare(StudyConfig(tmp_path / "none", study.gguf, study.llama_server))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 5}, "rounds is 5; an interval needs at least 6"),
        ({"startup_s": 0.0}, "startup_s is 0.0"),
        ({"concurrencies": ()}, "max_concurrencies is empty"),
        ({"concurrencies": (0,)}, "max_concurrencies holds 0"),
        ({"num_prompts": 0}, "num_prompts is 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudyConfig(tmp_path, tmp_path, tmp_path, **changes)


def test_both_get_the_same_threads_slots_and_context(tmp_path: Path) -> None:
    config = StudyConfig(tmp_path / "onnx", tmp_path / "m.gguf", tmp_path / "s", input_len=100, output_len=50)
    ours, theirs = (" ".join(config.command(side, 1234, 2)) for side in serve_llamacpp.SIDES)
    assert ours.endswith("--port 1234 --threads 2 --slots 8 --context-tokens 166 --no-page")
    assert "--port 1234 --threads 2 --threads-batch 2 --parallel 8 --ctx-size 1328" in theirs


def a_round(ours: float, theirs: float, *, others: float = 0.0, counted: int = 64) -> dict[str, Any]:
    def turn(speed: float, counted: int) -> dict[str, Any]:
        cell = {"tokens_per_s": speed, "ttft_ms": [1000 / speed], "tpot_ms": [], "prompt_tokens": counted}
        return {"other_load": {"others": others, "stolen": 0.0}, "cells": [cell]}

    return {"losa": turn(ours, 64), "llamacpp": turn(theirs, counted)}


def test_rows_and_the_page(study: StudyConfig) -> None:
    config = StudyConfig(study.onnx, study.gguf, study.llama_server, concurrencies=(4,))
    rounds = [a_round(20.0 + number, 10.0 + number / 2) for number in range(6)]
    (row,) = rows_of(config, rounds)
    assert row["ratio"]["ratio"] == pytest.approx(2)
    assert row["ratio"]["verdict"] == "FASTER"
    assert row["losa"]["tokens_per_s"] == 22.5
    assert row["losa"]["tokens_per_s_range"] == [20, 25]
    shown = page(document_of(config, 2, rounds, "command"))
    assert "| 4 | 22.5 (20.0 – 25.0) | 11.2 (10.0 – 12.5) | 2.00x (2.00 – 2.00) | 49 | 99 |  |  |" in shown
    assert shown.endswith("\n    command\n")
    assert "Warning" not in shown
    assert "count alike" not in shown
    assert rows_of(config, [a_round(5.0, 10.0)] * 6)[0]["ratio"]["verdict"] == "SLOWER"


def test_a_busy_machine_gives_no_verdict(study: StudyConfig) -> None:
    config = StudyConfig(study.onnx, study.gguf, study.llama_server, concurrencies=(4,))
    rounds = [a_round(20.0, 10.0, others=0.2 if number == 3 else 0.0, counted=66) for number in range(6)]
    shown = page(document_of(config, 1, rounds))
    assert "2.00x (2.00 – 2.00) NO VERDICT" in shown
    assert "Warning: other processes took up to 20% of the processors" in shown
    assert "The servers do not count alike: 64 and 66 tokens in the same 32 prompts." in shown


def test_the_real_server_starts_with_our_command(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from losa_export.eval.serve_bench import bench_serve
    from losa_export.export import ExportConfig, export_onnx

    pytest.importorskip("uvicorn")
    export_onnx(ExportConfig(source=tiny_checkpoint, output=tmp_path / "onnx", gate=False))
    config = StudyConfig(
        tmp_path / "onnx", tmp_path, tmp_path, threads=1, concurrencies=(2,), num_prompts=2, input_len=8, output_len=3
    )
    with Server("losa", config, 1) as server:
        report = bench_serve(config.load(server.url, 0), show_progress=False)
    (cell,) = report.cells
    assert cell.metrics.outcomes == {"completed": 2}
    assert (cell.metrics.output_tokens, cell.metrics.prompt_tokens) == (6, 16)
    assert report.server["losa"]["threads"] == 1
