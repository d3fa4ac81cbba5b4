"""`losa bench serve` against a server of known latencies: what is found, refused, and left by an interrupt."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest

from losa_export.cli import main
from losa_export.errors import BenchmarkError, ConfigError, InputError, RuntimeFailureError, TextError
from losa_export.eval.serve_bench import ServeBenchConfig, bench_serve, run_load
from losa_export.eval.serve_load import CHAT
from losa_export.eval.serve_metrics import Objective, Outcome, RequestRecord
from losa_export.eval.serve_report import ServeBenchReport
from tests.eval.serve_mock import Answer, MockServer

URL = "http://127.0.0.1:8000"


def bench(server: MockServer, **options: Any) -> ServeBenchReport:
    """A small load."""
    small: dict[str, Any] = {"num_prompts": 6, "input_len": 8, "output_len": 5, "timeout_s": 60.0}
    return bench_serve(ServeBenchConfig(server.url, **(small | options)), show_progress=False)


def test_known_latencies_come_out_of_the_whole() -> None:
    with MockServer(lambda number, body: Answer(ttft_s=0.2, itl_s=0.05)) as server:
        report = bench(server, max_concurrencies=(3,), objective=Objective(ttft_ms=199.0, e2el_ms=1e6))
        (cell,) = report.cells
        metrics = cell.metrics
        assert len(server.bodies) == 7  # one of them to warm up
        assert server.peak == metrics.peak_concurrency == 3
    assert metrics.outcomes == {"completed": 6}
    assert (metrics.output_tokens, metrics.prompt_tokens, metrics.token_chunks) == (30, 42, 30)
    assert metrics.ttft_ms is not None
    assert metrics.e2el_ms is not None
    assert metrics.tpot_ms is not None
    # The server's waits are lower bounds of each request; above them a busy machine may add seconds.
    assert all(199.9 <= value < 5000 for value in metrics.ttft_ms.percentiles.values())
    assert 399.9 <= metrics.e2el_ms.median < 10_000
    # A first token that is read late shortens the rest, so this one has some play downwards.
    assert 25 < metrics.tpot_ms.median < 2000
    # Two rounds of three, each of at least 0.4 s.
    assert metrics.duration_s > 0.799
    assert metrics.requests_per_s < 6 / 0.799
    assert metrics.goodput_requests_per_s == 0  # no first token comes within 199 ms
    assert 0 <= cell.client_cpu_fraction < 2


def test_what_is_sent() -> None:
    with MockServer() as server:
        bench(server, num_prompts=2, warmup=0)
        bench(server, num_prompts=1, warmup=0, endpoint=CHAT, model="mine", ignore_eos=False, continuous_usage=False)
    assert server.paths == ["/v1/completions"] * 2 + ["/v1/chat/completions"]
    body, other, chat = server.bodies
    assert body.pop("prompt") != other["prompt"]
    assert body == {
        "model": "mock",
        "max_tokens": 5,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "ignore_eos": True,
    }
    (message,) = chat.pop("messages")
    assert message["role"] == "user"
    assert len(message["content"].split()) == 8
    assert chat == {
        "model": "mine",
        "max_tokens": 5,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_every_failure_is_counted_and_named() -> None:
    answers = [
        Answer(),
        Answer(status=429),
        Answer(status=503),
        Answer(status=500),
        Answer(done=False),
        Answer(break_after=1),
        Answer(error="kernel lost"),
        Answer(hang_s=60.0),
    ]
    with MockServer(lambda number, body: answers[number % 8]) as server:
        report = bench(server, num_prompts=8, warmup=0, timeout_s=2.0)
    (cell,) = report.cells
    assert cell.metrics.outcomes == {
        "completed": 1,
        "refused": 2,
        "http_error": 1,
        "truncated": 2,
        "stream_error": 1,
        "timed_out": 1,
    }
    assert len(cell.requests) == 8
    assert cell.warnings[0].startswith(
        "5 of 8 requests failed (1 429, 1 500, 1 503, 1 stream_error, 1 timed_out, 2 truncated)"
    )


def test_a_sweep_has_a_cell_for_each_rate_and_concurrency() -> None:
    with MockServer() as server:
        report = bench(server, num_prompts=3, request_rates=(inf, 100.0), max_concurrencies=(1, 2), warmup=2)
        prompts = [body["prompt"] for body in server.bodies]
    assert [(cell.request_rate, cell.max_concurrency) for cell in report.cells] == [
        (None, 1),
        (None, 2),
        (100.0, 1),
        (100.0, 2),
    ]
    assert len(prompts) == len(set(prompts)) == 4 * 5  # a prefix cache must not know a prompt from the cell before
    assert [cell.metrics.peak_concurrency for cell in report.cells[:2]] == [1, 2]


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_url_may_end_with_the_version(end: str) -> None:
    with MockServer() as server:
        config = ServeBenchConfig(server.url + end, num_prompts=1, warmup=0)
        assert bench_serve(config, show_progress=False).cells[0].metrics.completed == 1


def test_the_same_seed_sends_the_same_prompts() -> None:
    def prompts(seed: int) -> list[str]:
        with MockServer() as server:
            bench(server, num_prompts=3, seed=seed, prefix_len=3, max_concurrencies=(1,))
        return [body["prompt"] for body in server.bodies]

    first = prompts(1)
    assert first == prompts(1) != prompts(2)
    assert len({tuple(text.split()[:3]) for text in first}) == 1
    assert {len(text.split()) for text in first} == {11}


def test_prompts_of_an_exact_number_of_tokens(tiny_checkpoint: Path) -> None:
    from losa_export.text import load_tokenizer

    tokenizer = load_tokenizer(tiny_checkpoint)
    with MockServer() as server:
        report = bench(server, num_prompts=4, tokenizer=tiny_checkpoint, input_len=20, prefix_len=5)
        prompts = [body["prompt"] for body in server.bodies]
    assert {len(tokenizer.encode(text).ids) for text in prompts} == {25}
    assert any("counts 7 to 7 tokens in a prompt that has 25" in warning for warning in report.cells[0].warnings)


def test_special_tokens_are_no_part_of_a_shared_prefix(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    from losa_export.text import load_tokenizer

    tokenizer = load_tokenizer(tiny_checkpoint)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with MockServer() as server:
        bench(server, num_prompts=8, tokenizer=tmp_path, input_len=20, prefix_len=5)
    texts = [body["prompt"].split() for body in server.bodies]
    assert {len(words) for words in texts} == {24}  # and <s>
    assert len({tuple(words[:5]) for words in texts}) == 1
    assert len({words[5] for words in texts}) > 1


def test_prompts_of_a_file(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": name}]} for name in "ab"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with MockServer() as server:
        report = bench(server, num_prompts=3, endpoint=CHAT, prompts=path, warmup=0, max_concurrencies=(1,))
    assert [body["messages"] for body in server.bodies] == [rows[place]["messages"] for place in (0, 1, 0)]
    assert all("ignore_eos" not in body for body in server.bodies)
    assert any("prompts occur more than once" in warning for warning in report.cells[0].warnings)
    with pytest.raises(TextError, match="takes no conversation"):
        bench_serve(ServeBenchConfig(URL, prompts=path))
    with pytest.raises(InputError, match=r"cannot be read: .*; give a JSONL file in UTF-8"):
        bench_serve(ServeBenchConfig(URL, prompts=tmp_path / "none.jsonl"))


def test_lateness_shows_what_a_limit_of_concurrency_hides() -> None:
    with MockServer(lambda number, body: Answer(ttft_s=0.15, chunks=(1,))) as server:
        report = bench(server, num_prompts=5, request_rates=(1000.0,), max_concurrencies=(1,), warmup=0)
    (cell,) = report.cells
    assert cell.metrics.ttft_intended_ms is not None
    # All five are wanted within milliseconds, and the last one waits for four others.
    last = cell.requests[-1]
    assert 1000 * (last.chunks[0].at_s - last.intended_s) > 5 * 150 - 50
    assert cell.metrics.ttft_intended_ms.percentiles["p99"] > 500
    assert any("they waited for the limit of concurrency" in warning for warning in cell.warnings)


def test_answers_that_are_too_short_are_told() -> None:
    with MockServer(lambda number, body: Answer(chunks=(2, 1))) as server:
        report = bench(server)
    assert "6 answers have fewer tokens than the 5 asked for" in report.cells[0].warnings


def test_a_server_that_refuses_all() -> None:
    with MockServer(lambda number, body: Answer(status=400)) as server:
        with pytest.raises(
            RuntimeFailureError,
            match=r"no request of the warm-up: 1 http_error \(400: told .* out with --no-ignore-eos",
        ):
            bench(server)
        with pytest.raises(
            BenchmarkError, match=r"no request brought tokens: 6 http_error \(400: told to answer 400\)"
        ):
            bench(server, warmup=0)
    with (
        MockServer(lambda number, body: Answer(status=503)) as server,
        pytest.raises(RuntimeFailureError, match="see the server's log"),
    ):
        bench(server)


def test_a_server_without_models() -> None:
    with MockServer(models={"data": []}) as server, pytest.raises(RuntimeFailureError, match="has no model; load one"):
        bench(server)
    with MockServer(models={"oops": []}) as server:
        assert bench(server, model="/models/file.gguf").server["model"] == "file.gguf"


def test_an_overload_in_a_later_cell_does_not_lose_the_cells_before() -> None:
    with MockServer(lambda number, body: Answer(status=200 if number < 7 else 429)) as server:
        report = bench(server, max_concurrencies=(2, 4))
    assert [cell.metrics.completed for cell in report.cells] == [6, 0]
    assert report.cells[1].metrics.refused == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url is '127.0.0.1:8000'; write for example"),
        ({"url": "ftp://host"}, "url is 'ftp://host'; write for example"),
        ({"url": "http://"}, "url is 'http://'; write"),
        ({"url": "http://host:99999"}, "url is 'http://host:99999': Port out of range"),
        ({"url": "http://host/?a=b"}, "write for example"),
        ({"url": "http://user:word@host"}, "holds a user or password; give a key with --api-key-env"),
        ({"url": "http://host/v1/completions"}, "leave off what follows /v1, which --endpoint names"),
        ({"endpoint": "/v1/embeddings"}, "endpoint is '/v1/embeddings'; choose one of /v1/completions, "),
        ({"num_prompts": 0}, "num_prompts is 0; give a whole number of at least 1"),
        ({"input_len": 0}, "input_len is 0"),
        ({"output_len": True}, "output_len is True"),
        ({"prefix_len": -1}, "prefix_len is -1; give a whole number of at least 0"),
        ({"seed": -1}, "seed is -1"),
        ({"warmup": -1}, "warmup is -1"),
        ({"request_rates": ()}, "request_rates is empty"),
        ({"request_rates": (1.0, 0.0)}, "request_rates holds 0.0; give requests per second above 0, or inf"),
        ({"request_rates": (float("nan"),)}, "request_rates holds nan"),
        ({"max_concurrencies": (0,)}, "max_concurrencies holds 0; give whole numbers of at least 1"),
        ({"percentiles": (100.0,)}, "percentiles holds 100.0; give numbers above 0 and below 100"),
        ({"percentiles": (50.0, 50.0)}, "percentiles holds a number twice"),
        ({"burstiness": 0.0}, "burstiness is 0.0; give a number above 0"),
        ({"timeout_s": inf}, "timeout_s is inf; give seconds above 0"),
        ({"objective": Objective(tpot_ms=0.0)}, "goodput's tpot_ms is 0.0; give milliseconds above 0"),
        ({"prompts": Path("p"), "prefix_len": 1}, "prefix_len is of random prompts; leave it out"),
        ({"prompts": Path("p"), "tokenizer": Path("t")}, "tokenizer is of random prompts"),
    ],
)
def test_what_makes_no_load_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        ServeBenchConfig(**({"url": URL} | changes))


def test_a_load_in_order_and_within_its_limit() -> None:
    running = peak = 0
    order: list[int] = []

    async def send(index: int, intended_s: float) -> RequestRecord:
        nonlocal running, peak
        order.append(index)
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.01)
        running -= 1
        now = clock()
        assert now >= intended_s
        return RequestRecord(index, intended_s, now, now, Outcome.COMPLETED)

    began = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - began

    records, interrupted = asyncio.run(run_load(send, [0.0] * 9 + [0.2], 4, clock))
    assert not interrupted
    assert [record.index for record in records] == order == list(range(10))
    assert records[-1].started_s >= 0.2
    assert peak == 4


def interrupt_at(count: int) -> Any:
    """A server's plan that interrupts this process at a request, and answers no more."""

    def plan(number: int, body: dict[str, Any]) -> Answer:
        if number + 1 == count:
            os.kill(os.getpid(), signal.SIGINT)
        return Answer() if number + 1 < count else Answer(hang_s=60.0)

    return plan


def words_for(server: MockServer, tmp_path: Path, *more: str) -> list[str]:
    return [
        *("bench", "serve", "--url", server.url, "--num-prompts", "6", "--input-len", "8", "--output-len", "5"),
        *("--json", str(tmp_path / "found.json"), *more),
    ]


def test_an_interrupt_leaves_what_was_found_by_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MockServer(interrupt_at(4)) as server:
        assert main(words_for(server, tmp_path, "--warmup", "0", "--max-concurrency", "1,2")) == 130
    captured = capsys.readouterr()
    assert "Interrupted: this is part of a result; 2 requests of the last line were not sent." in captured.out
    assert "losa: interrupted; what was measured by then is kept" in captured.err
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["interrupted"]
    (cell,) = document["cells"]
    assert cell["metrics"]["outcomes"] == {"completed": 3, "interrupted": 1}
    assert cell["not_sent"] == 2


def test_an_interrupt_in_a_later_warm_up_keeps_the_cells_before(tmp_path: Path) -> None:
    with MockServer(interrupt_at(8)) as server:
        assert main(words_for(server, tmp_path, "--max-concurrency", "1,2")) == 130
    document = json.loads((tmp_path / "found.json").read_text())
    assert [cell["metrics"]["outcomes"] for cell in document["cells"]] == [{"completed": 6}]
    assert document["interrupted"]


def test_an_interrupt_before_the_first_cell_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MockServer(interrupt_at(1)) as server:
        assert main(words_for(server, tmp_path)) == 130
    assert "losa: interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-key")
    with MockServer(key="secret-key") as server:
        words = words_for(server, tmp_path, "--api-key-env", "MY_KEY", "--request-rate", "inf,200", "--seed", "3")
        words += ["--goodput", "ttft:60000", "e2el:60000", "--metric-percentiles", "50,75"]
        words += ["--markdown", str(tmp_path / "found.md")]
        assert main(words) == 0
    captured = capsys.readouterr()
    text = (tmp_path / "found.json").read_text()
    document = json.loads(text)
    assert document["schema"] == "losa-serve-bench"
    assert [cell["request_rate"] for cell in document["cells"]] == [None, 200.0]
    assert document["config"]["percentiles"] == [50.0, 75.0]
    assert document["config"]["objective"] == {"ttft_ms": 60000.0, "tpot_ms": None, "e2el_ms": 60000.0}
    assert document["server"]["losa"] == {"slots": 4}
    assert document["server"]["same_machine"] is True
    for private in ("secret-key", "127.0.0.1", str(tmp_path)):
        assert private not in text
    assert "mock at /v1/completions, 6 requests: 8 words in, 5 tokens out" in captured.out
    assert "p75" in captured.out
    assert (tmp_path / "found.md").read_text().startswith("mock at /v1/completions, 6 requests")
    assert "all at once: 6/6 requests" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--goodput", "ttft"], "goodput holds 'ttft'; write each of ttft, tpot, e2el at most once"),
        (["--goodput", "itl:5"], "goodput holds 'itl:5'"),
        (["--goodput", "ttft:5", "ttft:6"], "goodput holds 'ttft:6'"),
        (["--goodput", "ttft:-1"], "goodput holds 'ttft:-1'"),
        (["--goodput", "ttft:nan"], "goodput holds 'ttft:nan'"),
        (["--api-key-env", "NO_SUCH_KEY"], "the variable NO_SUCH_KEY holds no key of visible ASCII characters; set it"),
        (["--num-prompts", "0"], "num_prompts is 0"),
        (["--json", "/no/such/folder/f.json"], "there is no folder '/no/such/folder'"),
    ],
)
def test_wrong_options_cost_one_message(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--url", URL, "--json", str(tmp_path / "f.json"), *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--request-rate", "fast"], "write for example 0.5,2"),
        (["--timeout", "soon"], "such as 90s, 10m or 1.5h"),
        (["--max-concurrency", "1.5"], "write for example"),
    ],
)
def test_what_cannot_be_read_is_bad_usage(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", "--url", URL, *words])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_without_aiohttp_the_mend_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import losa_export.eval

    monkeypatch.delattr(losa_export.eval, "serve_client", raising=False)
    monkeypatch.delitem(sys.modules, "losa_export.eval.serve_client", raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert main(["bench", "serve", "--url", URL, "--json", str(tmp_path / "f.json")]) == 1
    assert "pip install 'losa-export[bench-serve]'" in capsys.readouterr().err


def test_figures_can_be_computed_again_from_the_record() -> None:
    from losa_export.eval.serve_metrics import summarise

    with MockServer(lambda number, body: Answer(itl_s=0.01)) as server:
        report = bench(server)
    (cell,) = report.cells
    assert summarise(cell.requests) == cell.metrics
    (written,) = report.as_dict()["cells"]
    for request, record in zip(written["requests"], cell.requests, strict=True):
        assert request["chunk_tokens"] == [chunk.tokens for chunk in record.chunks]
        assert request["chunk_s"] == pytest.approx([chunk.at_s for chunk in record.chunks], abs=1e-6)
        assert request["outcome"] == "completed"
    assert replace(report, interrupted=True).as_dict()["interrupted"]
