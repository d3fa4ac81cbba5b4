"""Does the server keep its promises under abuse? Too many requests for long, clients that leave, workers that die.

Run as `python -m losa_export.eval.studies.serve_soak ONNX -o soak.json`. The greedy answer to each prompt is made
first, without the server. Then requests come at `--overload` times the rate that the server sustained, for
`--seconds`, whole and streamed, some of them left by their client at a random moment. Every answer must equal the one
made alone, every refusal must carry its status and a time to come again, and no stream may end without an end. At
last workers are killed while requests go on: a stream that ran there is cut, which its missing end tells, and nothing
else may go wrong. Memory is what the worker does not share with others (PSS), before the kills.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from losa_export.errors import ConfigError, RuntimeFailureError
from losa_export.eval.machine import machine_record
from losa_export.eval.serve_client import open_session
from losa_export.eval.serve_stream import EventSplitter
from losa_export.eval.stats import median
from losa_export.eval.studies.command_line import exit_code, rerun_command
from losa_export.files import check_output_file, write_text_atomic
from losa_export.progress import Progress
from losa_export.runtimes.generate import GenerationConfig, TextModel

SCHEMA, SCHEMA_VERSION = "losa-serve-soak", 1

WORDS = (
    "the old river town had a small library where people read about ships stars bread machines history and music "
    "every morning before work children asked why water falls how birds find their way who built the bridge"
).split()

# What an overloaded server may say.
REFUSALS = ("queue_full", "queue_timeout", "too_many_connections")

# After a kill, so long may streams of the dead worker be found cut, and connections refused.
_KILL_SHADOW_S = 3.0
_START_S = 120.0


@dataclass(frozen=True)
class SoakConfig:
    """What is done.

    Attributes:
        onnx: exported folder.
        seconds: of overload.
        overload: times the sustained rate.
        calibrate_seconds: how long the sustained rate is measured, with twice as many clients as slots.
        client_kills: clients that leave before their answer is whole, in the time of overload.
        worker_kills: workers that are killed afterwards.
        slots, workers, threads, max_queue: of the server.
        prompts: different prompts.
        new_tokens: of each answer, at most.
        seed: of all that is random.

    Raises: ConfigError naming the field.
    """

    onnx: Path
    seconds: float = 3600.0
    overload: float = 2.0
    calibrate_seconds: float = 30.0
    client_kills: int = 200
    worker_kills: int = 20
    slots: int = 4
    workers: int = 2
    threads: int | None = None
    max_queue: int = 8
    prompts: int = 64
    new_tokens: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seconds", "overload", "calibrate_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be above 0", field=name)
        for name in ("slots", "workers", "prompts", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be at least 1", field=name)
        if self.worker_kills and self.workers < 2:
            raise ConfigError("workers is 1, but a single worker is not replaced; take 2", field="workers")


@dataclass(frozen=True)
class Question:
    """A prompt and the answer to it."""

    prompt: str
    answer: str


@dataclass
class Tally:
    """What became of the requests of one phase.

    Attributes:
        outcomes: how many ended in which way.
        wrong: some of what should not have been.
        memory: (seconds, bytes) of all workers together.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def count(self, kind: str) -> None:
        """Count what may happen."""
        self.outcomes[kind] = self.outcomes.get(kind, 0) + 1

    def fault(self, kind: str, what: str) -> None:
        """Count what must not happen."""
        self.count(kind)
        if len(self.wrong) < 50:
            self.wrong.append(f"{kind}: {what[:300]}")


class Soak:
    """One server and what is sent to it."""

    def __init__(
        self, config: SoakConfig, questions: Sequence[Question], server: subprocess.Popen[str], url: str
    ) -> None:
        self._config, self._questions, self._server, self._url = config, questions, server, url
        self._random = np.random.default_rng(config.seed)
        self._last_kill = -1e9
        self._stayed = 0  # clients that were to leave and did not come to it

    async def run(self) -> dict[str, Any]:
        """All phases. Returns: the record's findings."""
        config = self._config
        async with open_session(None) as session:
            rate = await self._sustained(session)
            overload = await self._load(
                session, "overload", config.seconds, rate * config.overload, config.client_kills
            )
            kills = Tally()
            if config.worker_kills:
                # Slower than it can: what goes wrong is then the kill's fault, not the queue's.
                kills = await self._load(session, "kills", 4.0 * config.worker_kills, rate / 2, 0, config.worker_kills)
        return {
            "sustained_requests_per_second": rate,
            "overload": asdict(overload) | {"memory_growth": memory_growth(overload.memory)},
            "kills": asdict(kills),
        }

    async def _sustained(self, session: aiohttp.ClientSession) -> float:
        """Requests a second with as many clients as the server has slots."""
        config, tally = self._config, Tally()
        clients = config.slots * config.workers
        end = time.monotonic() + config.calibrate_seconds

        async def client() -> None:
            while time.monotonic() < end:
                await self._ask(session, tally, leave=False)

        started = time.monotonic()
        await asyncio.gather(*(client() for _ in range(clients)))
        if set(tally.outcomes) != {"answered"}:
            raise RuntimeFailureError(
                f"the server did not answer at its own pace: {dict(tally.outcomes)}, {tally.wrong[:1]}"
            )
        return tally.outcomes["answered"] / (time.monotonic() - started)

    async def _load(
        self,
        session: aiohttp.ClientSession,
        phase: str,
        seconds: float,
        rate: float,
        client_kills: int,
        worker_kills: int = 0,
    ) -> Tally:
        tally, tasks = Tally(), set[asyncio.Task[None]]()
        self._stayed = 0
        count = max(1, int(seconds * rate))
        arrivals = np.sort(self._random.uniform(0, seconds, count))  # Poisson, given how many there are
        leaving = set(self._random.choice(count, min(client_kills, count), replace=False).tolist())
        helpers = [asyncio.create_task(self._watch_memory(tally))]
        if worker_kills:
            helpers.append(asyncio.create_task(self._kill_workers(worker_kills, seconds)))
        started = time.monotonic()
        with Progress(f"soak: {phase}", seconds, "s") as progress:
            for index, arrival in enumerate(arrivals.tolist()):
                wait = started + arrival - time.monotonic()
                if wait > 0:
                    await asyncio.sleep(wait)
                leave = index in leaving or self._stayed > 0
                self._stayed -= leave and index not in leaving
                task = asyncio.create_task(self._ask(session, tally, leave=leave))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                progress.advance(max(0.0, min(seconds, time.monotonic() - started) - progress.done))
            await asyncio.gather(*tasks)
        for helper in helpers:
            helper.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)
        return tally

    async def _ask(self, session: aiohttp.ClientSession, tally: Tally, *, leave: bool) -> None:
        question = self._questions[int(self._random.integers(len(self._questions)))]
        stream = leave or bool(self._random.integers(2))
        patience = float(self._random.exponential(0.5)) if leave else 300.0
        body = {"prompt": question.prompt, "max_tokens": self._config.new_tokens, "temperature": 0, "stream": stream}
        sent = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                async with session.post(f"{self._url}/v1/completions", json=body) as response:
                    await self._judge(response, question, stream, tally, sent)
            self._stayed += leave  # refused, or answered at once: another one leaves in its place
        except TimeoutError:
            if leave:
                tally.count("left")
            else:
                tally.fault("lost", f"nothing came within {patience:.0f} s")
        except (aiohttp.ClientError, OSError) as error:
            if self._near_a_kill(sent):
                tally.count("refused by a kill")
            else:
                tally.fault("lost", f"{type(error).__name__}: {error}")

    async def _judge(
        self, response: aiohttp.ClientResponse, question: Question, stream: bool, tally: Tally, sent: float
    ) -> None:
        if response.status in (429, 503):
            told = await response.json()
            if int(response.headers.get("Retry-After", "0")) >= 1 and told["error"]["code"] in REFUSALS:
                tally.count("refused")
            else:
                tally.fault("badly refused", json.dumps(told))
            return
        if response.status != 200:
            tally.fault("failed", f"{response.status}: {(await response.text())[:200]}")
            return
        text, ended = "", not stream
        try:
            if stream:
                splitter = EventSplitter()
                async for piece in response.content.iter_any():
                    for data in splitter.feed(piece):
                        if data == b"[DONE]":
                            ended = True
                            continue
                        told = json.loads(data)
                        if "error" in told:
                            tally.fault("failed", json.dumps(told))
                            return
                        text += told["choices"][0]["text"]
            else:
                text = (await response.json())["choices"][0]["text"]
        except aiohttp.ClientPayloadError:
            ended = False
        if ended and text == question.answer:
            tally.count("answered")
        elif not ended and self._near_a_kill(sent) and question.answer.startswith(text):
            tally.count("cut by a kill")
        else:
            tally.fault("wrong" if ended else "truncated", f"{text!r} instead of {question.answer!r}")

    def _near_a_kill(self, sent: float) -> bool:
        return self._last_kill > sent - _KILL_SHADOW_S

    async def _watch_memory(self, tally: Tally) -> None:
        started = time.monotonic()
        while True:
            tally.memory.append(
                (time.monotonic() - started, memory_of(workers_of(self._server.pid) or [self._server.pid]))
            )
            await asyncio.sleep(2.0)

    async def _kill_workers(self, count: int, seconds: float) -> None:
        for _ in range(count):
            await asyncio.sleep(seconds / count * float(self._random.uniform(0.8, 1.0)))
            victims = workers_of(self._server.pid)
            if victims:
                self._last_kill = time.monotonic()
                os.kill(victims[int(self._random.integers(len(victims)))], signal.SIGKILL)


def memory_growth(samples: Sequence[tuple[float, int]]) -> float | None:
    """Median of the last tenth over that of the second tenth, minus 1; the first tenth warms up."""
    tenth = len(samples) // 10
    if tenth < 3:
        return None
    sizes = [float(size) for _, size in samples]
    return median(sizes[-tenth:]) / median(sizes[tenth : 2 * tenth]) - 1.0


def workers_of(pid: int) -> list[int]:
    """Processes that a process has started."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def memory_of(pids: Sequence[int]) -> int:
    """Bytes in memory, of pages shared by several processes only each one's part; 0 for those that are gone."""
    total = 0
    for pid in pids:
        try:
            found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        except OSError:
            continue
        total += int(found[1]) * 1024 if found else 0
    return total


def make_questions(config: SoakConfig) -> list[Question]:
    """Prompts, a third of which begin alike, with the greedy answers of the export alone."""
    generator = np.random.default_rng(config.seed)
    shared = " ".join(generator.choice(WORDS, size=30))
    questions = []
    with (
        closing(TextModel.open(config.onnx, "ort", threads=config.threads)) as model,
        Progress("soak: answers alone", config.prompts, "prompts") as progress,
    ):
        for index in range(config.prompts):
            own = " ".join(generator.choice(WORDS, size=int(generator.integers(4, 60))))
            prompt = f"{shared} {own}" if index % 3 == 0 else own
            limits = GenerationConfig(max_new_tokens=config.new_tokens, chat="never")
            questions.append(Question(prompt, "".join(model.stream(prompt, limits))))
            progress.advance(1)
    return questions


def start_server(config: SoakConfig, log: Path) -> tuple[subprocess.Popen[str], str]:
    """The server and its address. Raises: RuntimeFailureError if it does not come up."""
    options = {"slots": config.slots, "workers": config.workers, "max-queue": config.max_queue, "port": 0}
    options |= {} if config.threads is None else {"threads": config.threads}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with log.open("w") as errors:
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "losa_export", "serve", str(config.onnx), *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert server.stdout is not None
    with server.stdout as said:
        found = re.search(r"(http://\S+)/v1", said.readline())
    if found is None:
        server.wait(_START_S)
        raise RuntimeFailureError(f"the server did not start; see '{log}'", path=log)
    return server, found[1]


def soak(config: SoakConfig, log: Path) -> dict[str, Any]:
    """Everything. Returns: the record, with `passed`.

    Raises: RuntimeFailureError if the server does not come up, or fails without any load; what TextModel.open raises.
    """
    questions = make_questions(config)
    server, url = start_server(config, log)
    try:
        found = asyncio.run(Soak(config, questions, server, url).run())
    finally:
        server.terminate()
        status = server.wait(_START_S)
    faults = found["overload"]["wrong"] + found["kills"]["wrong"]
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "passed": not faults and status == 0,
        "exit_status": status,
        "config": {
            name: value if not isinstance(value, Path) else value.name for name, value in asdict(config).items()
        },
        "machine": machine_record().as_dict(),
        **found,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path, metavar="ONNX")
    for name, kind in (
        ("seconds", float),
        ("overload", float),
        ("calibrate-seconds", float),
        ("client-kills", int),
        ("worker-kills", int),
        ("slots", int),
        ("workers", int),
        ("threads", int),
        ("max-queue", int),
        ("prompts", int),
        ("new-tokens", int),
        ("seed", int),
    ):
        default = getattr(SoakConfig, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help="default: %(default)s")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="record to write")
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = vars(parser.parse_args(words))
    output: Path = arguments.pop("output")

    def run() -> bool:
        check_output_file(output)
        record = soak(SoakConfig(**arguments), output.with_suffix(".log"))
        record["command"] = rerun_command("serve_soak", words)
        write_text_atomic(output, json.dumps(record, indent=1) + "\n")
        sys.stdout.write(summary(record))
        return bool(record["passed"])

    return exit_code(run)


def summary(record: dict[str, Any]) -> str:
    """A few lines for people."""
    growth = record["overload"]["memory_growth"]
    lines = [
        f"{'PASSED' if record['passed'] else 'FAILED'}: {record['sustained_requests_per_second']:.2f} requests/s "
        f"sustained, {record['config']['overload']:g} times as many sent for {record['config']['seconds']:g} s",
        f"overload: {record['overload']['outcomes']}",
        f"memory growth: {'too short to tell' if growth is None else f'{growth:+.2%}'}",
        f"worker kills: {record['kills']['outcomes']}",
        *record["overload"]["wrong"][:5],
        *record["kills"]["wrong"][:5],
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
