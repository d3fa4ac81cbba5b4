"""The server's page in a real browser, against a server whose streams are written here byte for byte."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the 'serve' extra")

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from losa_export.runtimes.serve.page import FILES, page_routes
from tests.eval.browser import Browser, find_chromium

MODEL: dict[str, Any] = {
    "id": "stories-60",
    "object": "model",
    "created": 1,
    "owned_by": "losa-export",
    "losa": {
        "kernel_row": "avx2",
        "threads": 2,
        "slots": 4,
        "context_tokens": 2048,
        "sparsity_fraction": 0.6,
        "values": "int8",
        "weights_bytes": 61_500_000,
    },
}
HOSTILE = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script><b>bold</b> &amp;"
WIDE = "awordthatgoesonandonwithoutanyspace" * 8
KEY = "correct-horse-battery"

# A minute, for a machine that does other work.
PATIENCE_SECONDS = 60.0

WORDS = "[...document.querySelectorAll('.turn.answer .words')].map(one => one.textContent)"
NOTES = "[...document.querySelectorAll('.turn.answer .note')].map(one => one.textContent)"
FIGURES = "[...document.querySelectorAll('.turn.answer .figures')].map(one => one.textContent)"
IDLE = "document.getElementById('stop').hidden"

# Whatever stands beyond the page's edge.
BEYOND = """
[...document.querySelectorAll('body *:not(.unseen)')]
  .filter(one => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(one => one.outerHTML.slice(0, 80))
"""


def chunk(text: str, tokens: int | None, *, plain: bool = False, finish: str | None = None) -> bytes:
    """An event as the server writes it; `tokens` so far, None without usage."""
    said = {"text": text} if plain else {"delta": {"content": text}}
    usage = None if tokens is None else {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
    event = {"choices": [{"index": 0, **said, "finish_reason": finish}], "usage": usage}
    return b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"


def refused(status: int, message: str, code: str | None = None, **headers: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)


DONE = b"data: [DONE]\n\n"
HELLO = (chunk("Hello", 1), chunk(" you", 2, finish="stop"), DONE)


@dataclass
class Script:
    """What the server does next, and what it has seen.

    Attributes:
        pieces: the stream, one network write each; a number waits so many seconds, None until the client leaves.
        refusal: answered instead.
        key: asked for, if not None.
        chat_template: whether the model has one.
        model: what /v1/models tells.
        requests: path, body and Authorization of each request to answer.
        left: set when a client has left in mid-stream.
    """

    pieces: list[bytes | float | None] = field(default_factory=lambda: [*HELLO])
    refusal: Response | None = None
    key: str | None = None
    chat_template: bool = True
    model: dict[str, Any] = field(default_factory=lambda: MODEL)
    requests: list[tuple[str, dict[str, Any], str | None]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)


class Server:
    """The page's routes beside scripted endpoints, in a thread of its own."""

    def __init__(self) -> None:
        self.script = Script()
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._answer, methods=["POST"]),
            Route("/v1/completions", self._answer, methods=["POST"]),
            *page_routes(),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_config=None, lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> Server:
        self._thread.start()
        end = time.monotonic() + PATIENCE_SECONDS
        while not self._server.started:
            assert time.monotonic() < end, "the test's server did not start"
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    async def _models(self, request: Request) -> Response:
        if self._locked(request):
            return refused(401, "the API key is missing or wrong", "invalid_api_key")
        return JSONResponse({"object": "list", "data": [self.script.model]})

    async def _answer(self, request: Request) -> Response:
        script = self.script
        script.requests.append((request.url.path, await request.json(), request.headers.get("authorization")))
        if self._locked(request):
            return refused(401, "the API key is missing or wrong", "invalid_api_key")
        if request.url.path == "/v1/chat/completions" and not script.chat_template:
            return refused(400, "this model has no chat template", "no_chat_template")
        return script.refusal or StreamingResponse(self._stream(script), media_type="text/event-stream")

    async def _stream(self, script: Script) -> AsyncIterator[bytes]:
        try:
            for piece in script.pieces:
                if not isinstance(piece, bytes):
                    await asyncio.sleep(PATIENCE_SECONDS if piece is None else piece)
                else:
                    yield piece
                    await asyncio.sleep(0.02)  # else several writes arrive as one
        except asyncio.CancelledError:
            script.left.set()
            raise

    def _locked(self, request: Request) -> bool:
        return self.script.key is not None and request.headers.get("authorization") != f"Bearer {self.script.key}"


class Tab(Browser):
    """A browser that opens addresses, types, and waits for what a page does."""

    def open(self, address: str, width: int = 1000, *, dark: bool = False) -> None:
        """The page at an address, and its module run."""
        self.problems.clear()
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self._loaded = False
        self._call("Page.navigate", url=address)
        while not self._loaded:
            self._notice(self._read())
        self.wait("document.getElementById('model').textContent !== 'losa serve' || !trouble.hidden")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"still not: {expression}; {self.problems}; {self.evaluate(NOTES)}"
            time.sleep(0.02)

    def press(self, key: str, *, shift: bool = False) -> None:
        """A real key, into what has the focus."""
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        facts = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self._call("Input.dispatchKeyEvent", type="keyDown", **facts, **text)
        self._call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def type(self, name: str, text: str) -> None:
        """Text into a field, in place of what it holds."""
        self.evaluate(f"document.getElementById({name!r}).focus(); document.getElementById({name!r}).select()")
        self._call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({selector!r}).click()")

    def say(self, text: str) -> None:
        """A message, sent by Enter, and the end of its answer."""
        self.type("prompt", text)
        self.press("Enter")
        self.wait(IDLE)

    def names(self) -> list[tuple[str, str]]:
        """Role and name of everything that can be operated, as a screen reader sees it."""
        nodes = [node for node in self._call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
        roles = {"button", "textbox", "spinbutton", "switch", "checkbox", "DisclosureTriangle", "log"}
        return [(node["role"]["value"], node["name"]["value"]) for node in nodes if node["role"]["value"] in roles]

    def outside(self, address: str) -> list[str]:
        """Complaints, but for requests to the server itself."""
        return [problem for problem in self.problems if not problem.startswith(f"request: {address}/")]


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    with Server() as found:
        yield found


@pytest.fixture
def server(served: Server) -> Server:
    served.script = Script()
    return served


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    program = find_chromium()
    if program is None:
        pytest.skip("needs Chromium or Chrome, which is not on the path")
    with Tab(program) as found:
        yield found


# ---- over HTTP ----


@pytest.mark.parametrize("path", FILES)
def test_each_file_comes_with_a_strict_policy_and_can_be_kept(server: Server, path: str) -> None:
    with urllib.request.urlopen(server.address + path) as answer:
        headers, content = answer.headers, answer.read()
    assert content
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-type"] == FILES[path][1]
    for known in (headers["etag"], f'"other", W/{headers["etag"]}'):
        again = urllib.request.Request(server.address + path, headers={"If-None-Match": known})
        with pytest.raises(urllib.error.HTTPError) as unchanged:
            urllib.request.urlopen(again)
        assert unchanged.value.code == 304
        assert unchanged.value.headers["content-security-policy"] == headers["content-security-policy"]
        unchanged.value.close()
    changed = urllib.request.Request(server.address + path, headers={"If-None-Match": '"other"'})
    with urllib.request.urlopen(changed) as answer:
        assert answer.read() == content


# ---- how it looks ----


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_and_nothing_complains(tab: Tab, server: Server, width: int, dark: bool) -> None:
    server.script.model = MODEL | {"id": WIDE[:200]}
    server.script.pieces = [chunk(f"{WIDE}\n" * 12, 5, finish="length"), DONE]
    tab.open(server.address, width, dark=dark)
    tab.say(WIDE)
    for is_open in ("true", "false"):
        tab.evaluate(f"settings.open = {is_open}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("document.documentElement.scrollHeight") <= 900
        assert tab.evaluate(BEYOND) == []
        for inner in ("conversation", "document.querySelector('aside')", "document.querySelector('header')"):
            assert tab.evaluate(f"{inner}.scrollWidth - {inner}.clientWidth") <= 0
        # The end of the conversation and the field below it are in sight.
        assert tab.evaluate("conversation.clientHeight") > 100
        assert 0 < tab.evaluate("document.getElementById('prompt').getBoundingClientRect().bottom") < 900
    assert tab.evaluate("conversation.scrollHeight > conversation.clientHeight")
    ink, paper = (
        brightness(tab.evaluate(f"getComputedStyle(document.body).{one}")) for one in ("color", "backgroundColor")
    )
    assert (ink > 200 and paper < 50) if dark else (ink < 50 and paper > 200)
    assert tab.outside(server.address) == []


def brightness(colour: str) -> float:
    """Of 'rgb(r, g, b)', 0 to 255."""
    return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3


def test_everything_that_can_be_operated_has_a_name(tab: Tab, server: Server) -> None:
    tab.open(server.address)
    tab.evaluate("settings.open = true")
    found = tab.names()
    assert {name for _, name in found} >= {
        *("Message", "Send", "New conversation", "Temperature", "Top-p", "Max tokens", "Seed", "System prompt"),
        *("API key", "Plain completion", "Conversation", "Settings"),
    }
    assert all(name for _, name in found)
    assert ("switch", "Plain completion") in found
    assert tab.evaluate("document.documentElement.lang") == "en"


# ---- what is served ----


def test_the_head_tells_what_is_served(tab: Tab, server: Server) -> None:
    tab.open(server.address)
    facts = "[...document.querySelectorAll('dl div')].map(one => [...one.children].map(part => part.textContent))"
    assert tab.evaluate("document.querySelector('h1').textContent") == "stories-60"
    assert dict(tab.evaluate(facts)) == {
        "Kernel": "avx2",
        "Sparsity": "60 %",
        "Values": "int8",
        "Weights": "61.5 MB",
        "Context": "2,048 tokens",
        "Threads": "2",
    }
    dense = {"kernel_row": None, "sparsity_fraction": None, "values": None, "context_tokens": 64}
    server.script.model = MODEL | {"losa": dense}
    tab.open(server.address)
    assert dict(tab.evaluate(facts)) == {
        "Kernel": "none",
        "Sparsity": "dense",
        "Values": "–",
        "Weights": "–",
        "Context": "64 tokens",
        "Threads": "–",
    }
    # A model that small could not give the page's usual 256.
    tab.say("hello")
    assert server.script.requests[-1][1]["max_tokens"] == 32


# ---- streams ----


def test_an_answer_is_whole_wherever_its_bytes_are_cut(tab: Tab, server: Server) -> None:
    text = "Zähl: 一 二 🙂 “ok”\nnext\u2028line\r\nlast"
    for line_break in (b"\n", b"\r\n", b"\r"):
        stream = b": a comment" + line_break * 2
        for number, letter in enumerate(text, start=1):
            stream += chunk(letter, number).replace(b"\n", line_break)
        # Several lines of data make one event, and other fields none.
        stream += b'event: x\ndata: {"choices":\ndata:[]}\n\n'.replace(b"\n", line_break)
        stream += DONE.replace(b"\n", line_break)
        # Byte by byte through a character of four bytes, from an event into the next, from a line of data into the
        # next, and at the end.
        inside = stream.index("🙂".encode())
        border = stream.index(line_break * 2, inside)
        between = stream.index(line_break, stream.index(b"event: x") + 10)
        at = [0, *range(inside, inside + 5), *range(border - 1, border + 9), *range(between - 1, between + 5)]
        at += range(len(stream) - 6, len(stream) + 1)
        pieces = [stream[start:stop] for start, stop in itertools.pairwise(at)]
        assert b"".join(pieces) == stream
        server.script = Script(pieces=[*pieces])
        tab.open(server.address)
        tab.say("count")
        assert tab.evaluate(NOTES) == []
        assert tab.evaluate(WORDS) == [text]


def test_tokens_are_counted_by_usage_and_not_by_chunks(tab: Tab, server: Server) -> None:
    server.script.pieces = [chunk("", 0), chunk("one two", 4), chunk("", 6), 0.5, chunk(" 3", 9, finish="stop"), DONE]
    tab.open(server.address)
    tab.say("count")
    (figures,) = tab.evaluate(FIGURES)
    found = re.fullmatch(r"first token after \d+\.\d\d s · (\d+\.\d) tokens/s · 9 tokens", figures)
    assert found
    # Five tokens after the first four, in at least half a second.
    assert 0 < float(found[1]) <= 10


def test_figures_appear_while_the_answer_comes(tab: Tab, server: Server) -> None:
    server.script.pieces = [chunk("a", 1), 0.5, chunk("b", 2), None]
    tab.open(server.address)
    tab.type("prompt", "count")
    tab.press("Enter")
    tab.wait(f"{FIGURES}[0]?.endsWith(' tokens/s · 2 tokens')")
    assert tab.evaluate("conversation.getAttribute('aria-busy')") == "true"
    tab.press("Escape")
    tab.wait(IDLE)
    assert tab.evaluate("conversation.getAttribute('aria-busy')") == "false"


def test_no_rate_is_made_up_where_usage_comes_late_or_never(tab: Tab, server: Server) -> None:
    tab.open(server.address)
    server.script.pieces = [chunk("a", None), chunk("b", None, finish="stop"), DONE]
    tab.say("count")
    server.script.pieces = [chunk("a", None), chunk("b", None), chunk("", 2, finish="stop"), DONE]
    tab.say("count")
    never, late = tab.evaluate(FIGURES)
    assert re.fullmatch(r"first token after \d+\.\d\d s", never)
    assert re.fullmatch(r"first token after \d+\.\d\d s · 2 tokens", late)


def test_an_answer_cut_by_its_length_says_so(tab: Tab, server: Server) -> None:
    server.script.pieces = [chunk("a", 1, finish="length"), DONE]
    tab.open(server.address)
    tab.say("go")
    assert tab.evaluate(NOTES) == ["Ended by its greatest length."]


def test_html_in_any_text_stays_text(tab: Tab, server: Server) -> None:
    server.script.model = MODEL | {"id": HOSTILE, "losa": MODEL["losa"] | {"kernel_row": HOSTILE, "values": HOSTILE}}
    server.script.pieces = [
        chunk(HOSTILE[:20], 1),
        chunk(HOSTILE[20:], 2),
        b'data: {"error": {"message": "<i>x</i>"}}\n\n',
    ]
    tab.open(server.address)
    tab.say(HOSTILE)
    assert tab.evaluate(WORDS) == [HOSTILE]
    assert tab.evaluate("document.querySelector('.question .words').textContent") == HOSTILE
    assert tab.evaluate("document.querySelector('h1').textContent") == HOSTILE
    assert tab.evaluate(NOTES) == ["The answer broke off: <i>x</i>."]
    assert tab.evaluate("document.querySelectorAll('img, b, i, body script').length") == 0
    assert tab.evaluate("typeof window.hacked") == "undefined"
    assert tab.outside(server.address) == []


def test_the_policy_would_stop_html_that_got_in(tab: Tab, server: Server) -> None:
    tab.open(server.address)
    tab.evaluate("""new Promise(done => {
      document.addEventListener('securitypolicyviolation', done);
      const script = document.createElement('script');
      script.append('window.hacked = 1');
      document.body.append(script);
    })""")
    refuses = "(() => { try { conversation.innerHTML = '<b>x</b>'; return false } catch { return true } })()"
    assert tab.evaluate(refuses)
    assert tab.evaluate("typeof window.hacked") == "undefined"


# ---- failures ----


def test_an_error_in_mid_stream_keeps_what_came(tab: Tab, server: Server) -> None:
    error = {"error": {"message": "the answer took longer than the server allows", "code": "request_timeout"}}
    server.script.pieces = [chunk("Once", 1), b"data: " + json.dumps(error).encode() + b"\n\n"]
    tab.open(server.address)
    tab.say("tell")
    assert tab.evaluate(WORDS) == ["Once"]
    assert tab.evaluate(NOTES) == ["The answer broke off: the answer took longer than the server allows."]
    assert tab.evaluate("document.querySelector('.note').getAttribute('role')") == "alert"
    assert tab.evaluate("document.getElementById('status').textContent") == "The answer failed."


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([chunk("Once", 1)], "The answer broke off: the connection ended before the answer was complete."),
        ([b"data: <html>\n\n"], "The server sent something that is no answer; is another program at this address?"),
    ],
)
def test_a_stream_that_is_none_is_told(tab: Tab, server: Server, pieces: list[bytes | None], words: str) -> None:
    server.script.pieces = pieces
    tab.open(server.address)
    tab.say("tell")
    assert tab.evaluate(NOTES) == [words]


def test_a_busy_server_is_told_and_the_text_comes_back(tab: Tab, server: Server) -> None:
    busy = refused(429, "64 requests are waiting already", "queue_full", **{"Retry-After": "7"})
    server.script.refusal = busy
    tab.open(server.address)
    tab.say("first")
    assert tab.evaluate(NOTES) == ["The server is busy: 64 requests are waiting already. Try again in 7 s."]
    assert tab.evaluate("document.getElementById('prompt').value") == "first"
    server.script.refusal = refused(503, "the server is shutting down")
    tab.press("Enter")
    tab.wait(f"{IDLE} && {NOTES}.length === 2")
    assert tab.evaluate(NOTES)[-1] == "The server takes no requests now: the server is shutting down."
    server.script.refusal = Response("<html>Bad gateway", 502)
    tab.press("Enter")
    tab.wait(f"{IDLE} && {NOTES}.length === 3")
    assert tab.evaluate(NOTES)[-1] == "The server refused (502): Bad Gateway."
    # What was never answered is no part of the conversation.
    server.script.refusal = None
    tab.press("Enter")
    tab.wait(f"{IDLE} && {WORDS}.at(-1) === 'Hello you'")
    assert server.script.requests[-1][1]["messages"] == [{"role": "user", "content": "first"}]


def test_a_server_that_is_gone_is_told(tab: Tab) -> None:
    with Server() as server:
        tab.open(server.address)
    tab.say("anybody?")
    assert tab.evaluate(NOTES) == ["The server cannot be reached; is it still running?"]


def test_a_key_is_asked_for_and_never_stored(tab: Tab, server: Server) -> None:
    server.script.key = KEY
    tab.open(server.address, 400)
    wanted = "The server asks for an API key; enter it under Settings. It said: the API key is missing or wrong."
    assert tab.evaluate("trouble.textContent") == wanted
    assert tab.evaluate("settings.open")
    tab.evaluate("settings.open = false")
    tab.say("hello")
    assert tab.evaluate(NOTES) == [wanted]
    assert tab.evaluate("settings.open && document.activeElement.id === 'key'")
    tab.type("key", KEY)
    tab.press("Tab")
    tab.wait("trouble.hidden && document.getElementById('model').textContent === 'stories-60'")
    tab.evaluate("document.getElementById('prompt').focus()")
    tab.press("Enter")
    tab.wait(f"{WORDS}.at(-1) === 'Hello you'")
    assert server.script.requests[-1][2] == f"Bearer {KEY}"
    assert tab.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert tab.evaluate("indexedDB.databases().then(found => found.length)") == 0
    tab.open(server.address)
    assert tab.evaluate("key.value") == ""


# ---- operation ----


def test_stop_reaches_the_server_and_keeps_what_came(tab: Tab, server: Server) -> None:
    server.script.pieces = [chunk("Once", 1), None]
    tab.open(server.address)
    tab.type("prompt", "tell")
    tab.press("Enter")
    tab.wait(f"{WORDS}[0] === 'Once'")
    assert not server.script.left.is_set()
    assert tab.evaluate("send.hidden && !document.getElementById('stop').hidden")
    tab.evaluate("document.getElementById('stop').focus()")
    tab.click("#stop")
    assert server.script.left.wait(PATIENCE_SECONDS)
    tab.wait(IDLE)
    assert tab.evaluate(NOTES) == ["Stopped."]
    assert tab.evaluate("document.activeElement.id") == "prompt"
    server.script = Script()
    tab.say("go on")
    assert [(message["role"], message["content"]) for message in server.script.requests[-1][1]["messages"]] == [
        ("user", "tell"),
        ("assistant", "Once"),
        ("user", "go on"),
    ]


def test_a_new_conversation_forgets_the_old_one_even_in_mid_answer(tab: Tab, server: Server) -> None:
    tab.open(server.address)
    tab.say("one")
    server.script.pieces = [chunk("Once", 1), None]
    tab.type("prompt", "two")
    tab.press("Enter")
    tab.wait(f"{WORDS}[1] === 'Once'")
    tab.click("#clear")
    assert server.script.left.wait(PATIENCE_SECONDS)
    assert tab.evaluate("document.querySelectorAll('.turn').length") == 0
    server.script = Script()
    tab.say("three")
    assert server.script.requests[-1][1]["messages"] == [{"role": "user", "content": "three"}]


def test_enter_sends_and_shift_enter_breaks_the_line(tab: Tab, server: Server) -> None:
    tab.open(server.address)
    tab.press("Enter")
    tab.type("prompt", "  ")
    tab.press("Enter")
    assert server.script.requests == []
    tab.type("prompt", "one")
    tab.press("Enter", shift=True)
    tab._call("Input.insertText", text="two")
    assert tab.evaluate("document.getElementById('prompt').value") == "one\ntwo"
    chooses = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    tab.evaluate(f"document.getElementById('prompt').dispatchEvent({chooses})")
    assert tab.evaluate("document.getElementById('prompt').value") == "one\ntwo"
    assert server.script.requests == []
    tab.press("Enter")
    tab.wait(f"{WORDS}.at(-1) === 'Hello you'")
    assert tab.evaluate("document.getElementById('prompt').value") == ""
    assert server.script.requests[0][1]["messages"] == [{"role": "user", "content": "one\ntwo"}]


def test_settings_go_into_requests_and_empty_ones_do_not(tab: Tab, server: Server) -> None:
    tab.open(server.address)
    tab.say("one")
    path, body, key = server.script.requests[-1]
    assert (path, key) == ("/v1/chat/completions", None)
    assert body == {
        "model": "stories-60",
        "max_tokens": 256,
        "messages": [{"role": "user", "content": "one"}],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    for name, text in {
        "temperature": "0.7",
        "top-p": "0.9",
        "max-tokens": "12",
        "seed": "5",
        "system": "Be kind.",
    }.items():
        tab.type(name, text)
    tab.say("two")
    body = server.script.requests[-1][1]
    assert [body[name] for name in ("temperature", "top_p", "max_tokens", "seed")] == [0.7, 0.9, 12, 5]
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][0]["content"] == "Be kind."


@pytest.mark.parametrize(
    ("name", "text"), [("top-p", "1.5"), ("temperature", "-1"), ("max-tokens", "0"), ("seed", "1.5")]
)
def test_a_setting_out_of_range_is_shown_and_not_sent(tab: Tab, server: Server, name: str, text: str) -> None:
    tab.open(server.address, 400)
    tab.evaluate("settings.open = true")
    tab.type(name, text)
    tab.evaluate("settings.open = false")
    tab.say("hello")
    assert server.script.requests == []
    assert tab.evaluate("settings.open")
    assert tab.evaluate("document.activeElement.id") == name
    assert tab.evaluate("document.getElementById('prompt').value") == "hello"


def test_without_a_chat_template_plain_completion_is_offered(tab: Tab, server: Server) -> None:
    server.script.chat_template = False
    server.script.pieces = [chunk(" upon", 1, plain=True), chunk(" a time", 3, plain=True, finish="stop"), DONE]
    tab.open(server.address)
    tab.type("system", "Be kind.")
    tab.say("Once")
    (note,) = tab.evaluate(NOTES)
    assert note == "The server refused (400): this model has no chat template.Use plain completion"
    tab.click(".note button")
    tab.wait(f"{WORDS}.at(-1) === ' upon a time'")
    tab.wait(IDLE)
    path, body, _ = server.script.requests[-1]
    assert path == "/v1/completions"
    assert body["prompt"] == "Once"
    assert "messages" not in body
    assert tab.evaluate("plain.checked && system.disabled")
    # Each prompt stands alone.
    tab.say("Then")
    assert server.script.requests[-1][1]["prompt"] == "Then"
    tab.click("#plain")
    assert tab.evaluate("!system.disabled")
