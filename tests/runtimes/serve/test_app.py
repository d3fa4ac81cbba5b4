"""The server over HTTP: by the official client, and by plain requests."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from losa_export.runtimes.generate import GenerationConfig, TextModel
from tests.runtimes.serve.conftest import Running

openai = pytest.importorskip("openai", reason="needs the official client")

Serve = Callable[..., Running]
MESSAGES: list[Any] = [{"role": "user", "content": "the small red cat"}]


@pytest.fixture
def running(serve: Serve) -> Running:
    return serve()


@pytest.fixture
def client(running: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


def post(url: str, body: object, **headers: str) -> tuple[int, Any, Any]:
    """Status, headers and parsed body of a POST. `body` may be bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.headers, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def offline_text(model: TextModel, prompt: Any, count: int) -> str:
    return "".join(
        model.stream(
            prompt, GenerationConfig(max_new_tokens=count, chat="never" if isinstance(prompt, str) else "auto")
        )
    )


def test_chat_answers_as_the_offline_loop_does(client: Any, model: TextModel) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=12)
    assert answer.choices[0].message.content == offline_text(model, MESSAGES, 12)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens == model.prompt_ids(MESSAGES).size
    assert answer.usage.completion_tokens == 12 or answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_joined_is_the_whole_answer(client: Any, model: TextModel) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == offline_text(model, MESSAGES, 12)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    assert chunks[-1].choices == []
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12 or chunks[-2].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_stays_out_of_chunks_unless_asked_for(client: Any) -> None:
    stream = client.completions.create(model="tiny", prompt="the cat", max_tokens=3, stream=True)
    assert all(chunk.usage is None for chunk in stream)


def test_completions_take_text_ids_and_lists(client: Any, model: TextModel) -> None:
    ids = model.tokenizer.encode("the cat sat").ids
    expected = offline_text(model, "the cat sat", 6)
    for prompt in ("the cat sat", ids, ["the cat sat", "a dog"], [ids, ids]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
        assert answer.choices[0].text == expected
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    assert len(answer.choices) == 2
    assert answer.usage.prompt_tokens == 6


def test_several_answers_differ_and_come_again_with_the_seed(client: Any) -> None:
    def texts() -> list[str]:
        answer = client.completions.create(model="tiny", prompt="the cat", n=3, seed=7, max_tokens=10, temperature=1.5)
        assert answer.usage.prompt_tokens == 2
        return [choice.text for choice in answer.choices]

    assert len(set(texts())) == 3
    assert texts() == texts()


def test_stop_strings_end_an_answer_and_are_left_out(client: Any, model: TextModel) -> None:
    whole = offline_text(model, "the cat sat", 20)
    words = whole.split()
    stop = words[3]
    expected = whole[: whole.find(stop)]
    answer = client.completions.create(
        model="tiny", prompt="the cat sat", max_tokens=20, temperature=0, stop=[stop, "zzz"]
    )
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "stop"
    streamed = client.completions.create(
        model="tiny", prompt="the cat sat", max_tokens=20, temperature=0, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected


def test_log_probabilities_of_both_kinds(client: Any, model: TextModel) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    entries = chat.choices[0].logprobs.content
    assert len(entries) == chat.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob < 0
        assert bytes(entry.bytes).decode() == entry.token
    plain = client.completions.create(model="tiny", prompt="the cat", temperature=0, max_tokens=4, logprobs=2)
    found = plain.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == plain.usage.completion_tokens
    assert all(len(likely) == 2 for likely in found.top_logprobs)
    streamed = client.completions.create(
        model="tiny", prompt="the cat", temperature=0, max_tokens=4, logprobs=2, stream=True
    )
    tokens = [token for chunk in streamed if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens]
    assert tokens == found.tokens


def test_parts_of_text_and_nulls_are_understood(running: Running) -> None:
    body = {
        "messages": [
            {"role": "developer", "content": "big"},
            {"role": "assistant", "content": "the cat", "refusal": None, "tool_calls": None},
            {"role": "user", "content": [{"type": "text", "text": "a dog"}, {"type": "text", "text": " sat"}]},
        ],
        "max_tokens": 2,
        "seed": None,
        "tools": [],
        "frequency_penalty": 0,
        "logit_bias": {},
        "user": "someone",
    }
    status, _, answer = post(running.url + "/v1/chat/completions", body)
    assert (status, answer["object"]) == (200, "chat.completion"), answer


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content"),
        ({"model": "gpt-4"}, 404, "'tiny'"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"min_p": 1.5}, 400, "min_p"),
        ({"n": 9}, 400, "at most 8"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 1000}, 400, "at most 8"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, 400, "two names of one thing"),
        ({"seed": -1}, 400, "seed"),
        ({"seed": 1e99}, 400, "seed"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options needs stream"),
        ({"top_logprobs": 3}, 400, "top_logprobs needs logprobs"),
        ({"temprature": 1}, 400, "temprature"),
        ({"messages": [{"role": "user", "content": "cat " * 200}]}, 400, "at most 95"),
    ],
)
def test_a_wrong_field_is_named(running: Running, change: dict[str, Any], status: int, told: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2} | change
    found, _, answer = post(running.url + "/v1/chat/completions", body)
    assert found == status, answer
    assert told in answer["error"]["message"]
    assert answer["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe\x00",
        b'{"messages": "\xc3\x28"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": NaN}',
        b'{"max_tokens": 1' + b"0" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "a\\u0000b"}], "max_tokens": 1, "temperature": Infinity}',
    ],
    ids=range(13),
)
def test_bodies_that_mean_harm_are_refused(running: Running, data: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        status, _, answer = post(running.url + path, data)
        assert status == 400
        assert answer["error"]["type"] == "invalid_request_error"


def test_prompts_that_cannot_be_read_are_refused(running: Running) -> None:
    for prompt, told in (
        ("", "empty"),
        ([], "prompt"),
        ([999], "token id 999"),
        ([-1], "prompt"),
        ([[]], "prompt"),
        ([1.5], "prompt"),
    ):
        status, _, answer = post(running.url + "/v1/completions", {"prompt": prompt})
        assert (status, told in answer["error"]["message"]) == (400, True), answer


def test_a_body_beyond_the_limit_or_of_another_type(serve: Serve) -> None:
    url = serve(max_body_bytes=1000).url + "/v1/completions"
    status, headers, answer = post(url, {"prompt": "x" * 1000})
    assert (status, headers["Connection"]) == (413, "close")
    assert "1000 bytes" in answer["error"]["message"]
    status, _, answer = post(url, {"prompt": "the"}, **{"Content-Type": "text/plain"})
    assert status == 415
    assert "Content-Type: application/json" in answer["error"]["message"]


def test_keys_open_the_door_of_v1_alone(serve: Serve) -> None:
    url = serve(keys=("secret-key-1", "secret-key-2")).url
    for authorization in (None, "Bearer wrong-key-00", "Basic secret-key-1", "Bearer ", "Bearer secret-key-1x"):
        headers = {} if authorization is None else {"Authorization": authorization}
        status, found, answer = post(url + "/v1/completions", {"prompt": "the"}, **headers)
        assert (status, found["WWW-Authenticate"]) == (401, "Bearer")
        assert answer["error"]["code"] == "invalid_api_key"
    assert get(url + "/v1/models")[0] == 401
    assert get(url + "/health/ready")[0] == get(url + "/metrics")[0] == 200
    status, _, _ = post(url + "/v1/completions", {"prompt": "the"}, Authorization="Bearer secret-key-2")
    assert status == 200
    with (
        openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0) as wrong,
        pytest.raises(openai.AuthenticationError),
    ):
        wrong.models.list()


def test_what_does_not_exist_is_told_in_the_same_form(running: Running) -> None:
    status, body = get(running.url + "/v1/nothing")
    assert (status, json.loads(body)["error"]["message"]) == (404, "there is nothing at /v1/nothing")
    status, body = get(running.url + "/v1/completions")
    assert (status, json.loads(body)["error"]["message"]) == (405, "GET is not possible here")


def test_the_models_are_told_with_kernel_and_sparsity(running: Running, client: Any) -> None:
    (found,) = client.models.list().data
    assert found.id == "tiny"
    facts = found.losa
    assert facts["values"] == "int8"
    assert facts["kernel_row"]
    assert 0.5 < facts["sparsity_fraction"] < 0.7
    assert (facts["slots"], facts["context_tokens"], facts["threads"]) == (4, 96, 1)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_many_at_once_get_each_its_own_answer(client: Any, model: TextModel) -> None:
    generator = np.random.default_rng(0)
    shared = "the cat sat on the big road and then the dog ran "
    prompts = [shared + " ".join(generator.choice(["the", "a", "old", "red", "bird"], size=5)) for _ in range(24)]
    expected = [offline_text(model, prompt, 16) for prompt in prompts]

    def ask(prompt: str) -> str:
        stream = client.completions.create(model="tiny", prompt=prompt, max_tokens=16, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, prompts)) == expected


def test_beyond_the_queue_is_429_with_a_time_to_come_again(serve: Serve) -> None:
    running = serve(slots=1, max_queue=1)
    url = running.url + "/v1/completions"
    body = {"prompt": "the cat", "max_tokens": 90, "ignore_eos": True}
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: post(url, body), range(12)))
    statuses = [status for status, _, _ in found]
    assert set(statuses) == {200, 429}
    for status, headers, answer in found:
        if status == 429:
            assert 1 <= int(headers["Retry-After"]) <= 60
            assert answer["error"]["code"] == "queue_full"
        else:
            assert answer["usage"]["completion_tokens"] == 90
    assert statuses.count(200) >= 2


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_too_long_is_told_503(serve: Serve, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(slots=1, queue_timeout=0.05, request_timeout=30.0)
    slow_down(running, monkeypatch, 0.02)
    body = {"prompt": "the cat", "max_tokens": 60, "ignore_eos": True, "stream": stream}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, running.url + "/v1/completions", body | {"stream": False})
        time.sleep(0.3)
        status, headers, answer = post(running.url + "/v1/completions", body)
        assert (status, answer["error"]["code"]) == (503, "queue_timeout")
        assert int(headers["Retry-After"]) >= 1
        assert first.result()[0] == 200


def slow_down(running: Running, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let each step of the engine take a while."""
    real = running.service.engine._pool.decode

    def slow(*given: Any) -> Any:
        time.sleep(seconds)
        return real(*given)

    monkeypatch.setattr(running.service.engine._pool, "decode", slow)


def test_an_answer_beyond_its_time_ends_in_an_error(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(request_timeout=0.3)
    slow_down(running, monkeypatch, 0.02)
    body = {"prompt": "the cat", "max_tokens": 90, "ignore_eos": True}
    status, _, answer = post(running.url + "/v1/completions", body)
    assert (status, answer["error"]["code"]) == (503, "request_timeout")
    with (
        openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="longer than the server allows"),
    ):
        list(
            client.completions.create(
                model="tiny", prompt="a", max_tokens=90, stream=True, extra_body={"ignore_eos": True}
            )
        )


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_slot(serve: Serve, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import http.client

    running = serve(slots=1)
    slow_down(running, monkeypatch, 0.05)
    connection = http.client.HTTPConnection("127.0.0.1", running.port)
    body = json.dumps({"prompt": "the cat", "max_tokens": 90, "ignore_eos": True, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    until(lambda: running.service.engine.load.running == 1)
    if stream:
        assert connection.getresponse().read(10)
    connection.close()
    connection.sock = None
    until(lambda: running.service.engine.idle, seconds=2.0)
    assert running.service.engine._decoding == []


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_metrics_count_what_happened(running: Running, client: Any) -> None:
    for _ in range(3):
        client.completions.create(
            model="tiny",
            prompt="the cat sat on the big road and then the",
            max_tokens=5,
            extra_body={"ignore_eos": True},
        )
    post(running.url + "/v1/completions", {"prompt": ""})
    page = get(running.url + "/metrics")[1].decode()
    values = dict(re.findall(r"^(losa_\S+) (\S+)$", page, re.MULTILINE))
    assert float(values["losa_generated_tokens_total"]) == 15
    assert float(values["losa_prompt_tokens_total"]) == 30
    assert float(values["losa_prompt_tokens_cached_total"]) == 18
    assert float(values['losa_requests_total{endpoint="/v1/completions",status="200"}']) == 3
    assert float(values['losa_requests_total{endpoint="/v1/completions",status="400"}']) == 1
    assert float(values["losa_time_to_first_token_seconds_count"]) == 3
    assert float(values["losa_time_per_output_token_seconds_count"]) == 3
    assert float(values["losa_requests_running"]) == float(values["losa_requests_waiting"]) == 0
    assert 'values="int8"' in page


def test_a_request_keeps_its_name_in_the_log_and_no_prompt_gets_there(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve()
    with caplog.at_level("INFO", "losa.serve"):
        secret = {"prompt": "the secret cat", "max_tokens": 3, "ignore_eos": True}
        _, headers, _ = post(running.url + "/v1/completions", secret, **{"X-Request-ID": "abc-1"})
        _, other, _ = post(
            running.url + "/v1/completions", {"prompt": "a", "max_tokens": 3}, **{"X-Request-ID": "bad id!"}
        )
        until(lambda: len(caplog.records) >= 2)
    assert headers["X-Request-ID"] == "abc-1"
    assert re.fullmatch(r"[0-9a-f]{24}", other["X-Request-ID"])
    # A line is written when its answer has gone: the second one may be the first.
    by_name = {record.facts["request"]: record.facts for record in caplog.records}  # type: ignore[attr-defined]
    assert (by_name["abc-1"]["status"], by_name["abc-1"]["completion_tokens"]) == (200, 3)
    assert "secret" not in json.dumps([record.__dict__ for record in caplog.records], default=str)


def test_health_tells_when_the_engine_hangs_or_drains(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert get(running.url + "/health/live") == (200, b'{"status":"live"}')
    assert get(running.url + "/health/ready") == (200, b'{"status":"ready"}')
    with monkeypatch.context() as patch:
        patch.setattr(type(running.service.engine), "seconds_since_step", property(lambda _: 100.0))
        assert get(running.url + "/health/live")[0] == get(running.url + "/health/ready")[0] == 503
    running.service.drain()
    assert get(running.url + "/health/ready") == (503, b'{"status":"draining"}')
    status, headers, answer = post(running.url + "/v1/completions", {"prompt": "the"})
    assert (status, answer["error"]["code"]) == (503, "draining")
    assert headers["Retry-After"]


def test_an_error_of_ours_is_500_and_told_in_the_log_alone(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(type(running.service), "plain_prompts", lambda *_: 1 / 0)
    status, _, answer = post(running.url + "/v1/completions", {"prompt": "the"})
    assert (status, answer["error"]["message"]) == (500, "the server failed on this request; see its log")
    assert "ZeroDivisionError" in caplog.text


def test_a_model_without_a_template_says_so(serve: Serve, served: Any, tmp_path: Any) -> None:
    import shutil

    folder = tmp_path / "plain"
    shutil.copytree(served, folder)
    (folder / "chat_template.jinja").unlink()
    running = serve(folder=folder, verify=False)
    status, _, answer = post(running.url + "/v1/chat/completions", {"messages": MESSAGES})
    assert (status, answer["error"]["code"]) == (400, "no_chat_template")
    assert post(running.url + "/v1/completions", {"prompt": "the"})[0] == 200
