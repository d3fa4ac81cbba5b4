"""`losa bench serve`: loads an OpenAI-compatible server at several request rates and concurrencies.

A request is sent when the arrival process says so, whatever became of those before it (an open loop), unless a limit of
concurrency holds it back. Both moments are kept, so that what such a limit hides can be seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import urlsplit

import numpy as np

from losa_export.errors import BenchmarkError, ConfigError, InputError, MissingDependencyError, RuntimeFailureError
from losa_export.eval.machine import machine_record, package_versions
from losa_export.eval.serve_load import (
    CHAT,
    WORDS,
    CountTokens,
    Endpoint,
    Prompt,
    arrival_times,
    count_words,
    parse_prompts,
    random_text,
    vocabulary_words,
)
from losa_export.eval.serve_metrics import Objective, Outcome, RequestRecord, summarise
from losa_export.eval.serve_report import CellReport, ServeBenchReport, cell_warnings
from losa_export.eval.stats import PERCENTILES
from losa_export.progress import Progress
from losa_export.text import load_tokenizer

if TYPE_CHECKING:
    from types import ModuleType

    from aiohttp import ClientSession

_MODELS_TIMEOUT_S = 30.0
_LOCAL = ("localhost", "127.0.0.1", "::1")
# Sends the request of an index, which was to be sent at a moment, and tells what became of it.
Send = Callable[[int, float], Awaitable[RequestRecord]]
Clock = Callable[[], float]


@dataclass(frozen=True)
class ServeBenchConfig:
    """What to send where.

    Attributes:
        url: of the server, with or without /v1 at its end.
        endpoint: '/v1/completions' or '/v1/chat/completions'.
        model: name in the requests; None: the first one that the server lists.
        num_prompts: requests of each cell.
        request_rates: requests per second, one cell after the other; inf sends all at once.
        burstiness: of the arrivals; 1: a Poisson process.
        max_concurrencies: requests under way at most, for each rate; None: no limit.
        input_len: tokens (without a tokenizer: words) of a random prompt, after the shared prefix.
        output_len: tokens that each request asks for.
        prefix_len: tokens (or words) that all random prompts begin with.
        prompts: JSONL file of prompts; None: random ones.
        tokenizer: folder with the tokenizer.json that counts the tokens of random prompts.
        ignore_eos: ask for `output_len` tokens whatever the model says; None: for random prompts only.
        continuous_usage: ask for usage in each chunk, which is not in OpenAI's own interface.
        objective: what makes a request good; None: no goodput.
        percentiles: to report, each above 0 and below 100.
        seed: of prompts and arrivals.
        warmup: untimed requests before each cell; of those before the first one at least one must be completed.
        timeout_s: longest time a request may take.
    """

    url: str
    endpoint: Endpoint = "/v1/completions"
    model: str | None = None
    num_prompts: int = 100
    request_rates: tuple[float, ...] = (math.inf,)
    burstiness: float = 1.0
    max_concurrencies: tuple[int | None, ...] = (None,)
    input_len: int = 128
    output_len: int = 128
    prefix_len: int = 0
    prompts: Path | None = None
    tokenizer: Path | None = None
    ignore_eos: bool | None = None
    continuous_usage: bool = True
    objective: Objective | None = None
    percentiles: tuple[float, ...] = field(default=PERCENTILES)
    seed: int = 0
    warmup: int = 1
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the field."""
        _check_url(self.url)
        if self.endpoint not in get_args(Endpoint):
            raise ConfigError(
                f"endpoint is {self.endpoint!r}; choose one of {', '.join(get_args(Endpoint))}", field="endpoint"
            )
        least = {"num_prompts": 1, "input_len": 1, "output_len": 1, "prefix_len": 0, "seed": 0, "warmup": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if not _is_whole(value) or value < lowest:
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least {lowest}", field=name)
        for name in ("request_rates", "max_concurrencies", "percentiles"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; name at least one", field=name)
        for rate in self.request_rates:
            if not rate > 0:
                raise ConfigError(
                    f"request_rates holds {rate!r}; give requests per second above 0, or inf", field="request_rates"
                )
        for limit in self.max_concurrencies:
            if limit is not None and (not _is_whole(limit) or limit < 1):
                raise ConfigError(
                    f"max_concurrencies holds {limit!r}; give whole numbers of at least 1", field="max_concurrencies"
                )
        for level in self.percentiles:
            if not 0 < level < 100:
                raise ConfigError(
                    f"percentiles holds {level!r}; give numbers above 0 and below 100", field="percentiles"
                )
        if len(set(self.percentiles)) < len(self.percentiles):
            raise ConfigError("percentiles holds a number twice; name each once", field="percentiles")
        if not self.burstiness > 0:
            raise ConfigError(f"burstiness is {self.burstiness!r}; give a number above 0", field="burstiness")
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError(f"timeout_s is {self.timeout_s!r}; give seconds above 0", field="timeout_s")
        for name, limit_ms in asdict(self.objective or Objective()).items():
            if limit_ms is not None and not 0 < limit_ms < math.inf:
                raise ConfigError(f"goodput's {name} is {limit_ms!r}; give milliseconds above 0", field="objective")
        if self.prompts is not None and (self.tokenizer is not None or self.prefix_len):
            name = "prefix_len" if self.prefix_len else "tokenizer"
            raise ConfigError(f"{name} is of random prompts; leave it out, or leave --prompts out", field=name)

    @property
    def base_url(self) -> str:
        """`url` without /v1, with which endpoints begin."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def cells(self) -> tuple[tuple[float, int | None], ...]:
        """(request rate, most requests under way) of each cell, in the order of measuring."""
        return tuple(itertools.product(self.request_rates, self.max_concurrencies))

    @property
    def ignores_eos(self) -> bool:
        """`ignore_eos`, settled."""
        return self.prompts is None if self.ignore_eos is None else self.ignore_eos

    def as_dict(self) -> dict[str, Any]:
        """For the record, which names no host and no folder; an infinite rate is None."""
        return {
            **asdict(self),
            "url": None,
            "model": None if self.model is None else PurePath(self.model).name,
            "request_rates": [_finite(rate) for rate in self.request_rates],
            "burstiness": _finite(self.burstiness),
            "prompts": None if self.prompts is None else self.prompts.name,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.name,
            "ignore_eos": self.ignores_eos,
        }


def bench_serve(
    config: ServeBenchConfig, *, api_key: str | None = None, show_progress: bool = True
) -> ServeBenchReport:
    """Load the server at each rate and concurrency of `config`.

    An interrupt (Ctrl-C) while a cell is measured ends the run with what there is by then, marked as such.

    Args:
        config: what to send where.
        api_key: sent as a bearer token; never recorded.
        show_progress: on standard error.
    Raises:
        MissingDependencyError: aiohttp is not installed.
        InputError, TextError: the file of prompts cannot be used, or no prompt of that many tokens can be made.
        CheckpointError: the tokenizer cannot be read.
        RuntimeFailureError: no server answers, or no request of a warm-up was completed.
        BenchmarkError: no request of the whole run brought tokens.
    """
    client = _client()
    source = _PromptSource(config)
    return asyncio.run(_Run(config, source, client, show_progress).measure(api_key))


async def run_load(
    send: Send, intended: Sequence[float], limit: int | None, clock: Clock
) -> tuple[list[RequestRecord], bool]:
    """Send a request at each of the `intended` moments, at most `limit` at once.

    Args:
        send: sends one request; if it is cancelled it returns what it has.
        intended: seconds of `clock`, ascending.
        limit: of requests under way; those that wait for others are sent in order. None: no limit.
        clock: seconds since the load began.
    Returns: a record of each request that was sent, and whether an interrupt ended the load.
    """
    gate: contextlib.AbstractAsyncContextManager[Any] = (
        contextlib.nullcontext() if limit is None else asyncio.Semaphore(limit)
    )

    async def one(index: int) -> RequestRecord:
        async with gate:
            return await send(index, intended[index])

    tasks: list[asyncio.Task[RequestRecord]] = []
    interrupted = False
    try:
        for index, at_s in enumerate(intended):
            wait_s = at_s - clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(one(index)))
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        interrupted = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [task.result() for task in tasks if not task.cancelled()], interrupted


class _Run:
    """One sweep."""

    def __init__(
        self, config: ServeBenchConfig, source: _PromptSource, client: ModuleType, show_progress: bool
    ) -> None:
        self._config, self._source, self._client = config, source, client
        self._show_progress = show_progress
        self._url = config.base_url + config.endpoint

    async def measure(self, api_key: str | None) -> ServeBenchReport:
        """All cells, one after the other."""
        config = self._config
        machine = machine_record()
        cells: list[CellReport] = []
        async with self._client.open_session(api_key) as session:
            model, server = await self._server(session)
            interrupted = False
            for number in range(len(config.cells)):
                try:
                    cells.append(await self._cell(session, number, model))
                except asyncio.CancelledError:
                    if not cells:
                        raise
                    interrupted = True
                interrupted = interrupted or cells[-1].interrupted
                if interrupted:
                    break
        if not any(cell.metrics.completed for cell in cells) and not interrupted:
            raise BenchmarkError(
                f"no request brought tokens: {_reasons(cells[-1].requests)}; lower the load, or see the server's log"
            )
        return ServeBenchReport(
            created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            config=config.as_dict(),
            server=server,
            client=package_versions(("aiohttp",)),
            machine=machine,
            interrupted=interrupted,
            cells=tuple(cells),
        )

    async def _server(self, session: ClientSession) -> tuple[str, dict[str, Any]]:
        """The model's name in requests, and what the record says of the server."""
        config = self._config
        listed: list[dict[str, Any]] = []
        name = ""
        try:
            listed, name = await self._client.list_models(session, config.base_url, _MODELS_TIMEOUT_S)
        except RuntimeFailureError as error:
            # A server that answers, but lists no models, can do all the same where we need no list.
            if config.model is None or "status" not in error.facts:
                raise
        if config.model is None and not listed:
            raise RuntimeFailureError(f"the server at '{config.url}' has no model; load one", url=config.url)
        model = config.model or str(listed[0]["id"])
        facts = next((one for one in listed if one["id"] == model), {})
        return model, {
            # Some servers name a model by its path.
            "model": PurePath(model).name,
            "name": name,
            "losa": facts.get("losa"),
            "same_machine": urlsplit(config.url).hostname in _LOCAL,
        }

    async def _cell(self, session: ClientSession, number: int, model: str) -> CellReport:
        config = self._config
        rate, limit = config.cells[number]
        arrivals, warm, prompts = (
            np.random.default_rng(seed) for seed in np.random.SeedSequence((config.seed, number)).spawn(3)
        )
        warmed = await self._warm_up(session, self._bodies(model, config.warmup, warm), limit)
        if number == 0:
            self._check_warm_up(warmed)
        bodies = self._bodies(model, config.num_prompts, prompts)
        intended = arrival_times(config.num_prompts, rate, config.burstiness, arrivals)
        title = f"{'all at once' if math.isinf(rate) else f'{rate:g} requests/s'}" + (
            "" if limit is None else f", at most {limit} under way"
        )
        with Progress(title, config.num_prompts, "requests", enabled=self._show_progress) as progress:
            tally: dict[Outcome, int] = {}

            def show(record: RequestRecord) -> None:
                tally[record.outcome] = tally.get(record.outcome, 0) + 1
                others = {str(name): str(count) for name, count in tally.items() if name is not Outcome.COMPLETED}
                progress.advance(1, **others)

            cpu_s, began = time.process_time(), time.perf_counter()
            records, interrupted = await run_load(
                self._sender(session, bodies, began, show), intended, limit, lambda: time.perf_counter() - began
            )
            elapsed_s = time.perf_counter() - began
            cpu_s = time.process_time() - cpu_s
        if not records:
            raise asyncio.CancelledError  # before anything was sent, so there is nothing to report
        metrics = summarise(records, levels=config.percentiles, objective=config.objective)
        return CellReport(
            request_rate=_finite(rate),
            max_concurrency=limit,
            interrupted=interrupted,
            not_sent=config.num_prompts - len(records),
            client_cpu_fraction=cpu_s / elapsed_s,
            metrics=metrics,
            warnings=cell_warnings(
                metrics,
                records,
                rate=_finite(rate),
                limit=limit,
                asked_tokens=config.output_len if config.ignores_eos else None,
                prompt_tokens=self._source.exact_tokens,
                repeats=self._source.repeats,
                levels=config.percentiles,
            ),
            requests=tuple(records),
        )

    async def _warm_up(self, session: ClientSession, bodies: Sequence[bytes], limit: int | None) -> list[RequestRecord]:
        began = time.perf_counter()
        records, interrupted = await run_load(
            self._sender(session, bodies, began), (0.0,) * len(bodies), limit, lambda: time.perf_counter() - began
        )
        if interrupted:
            raise asyncio.CancelledError
        return records

    def _check_warm_up(self, records: Sequence[RequestRecord]) -> None:
        """Raises: RuntimeFailureError unless one of the requests, if there are any, was completed."""
        if not records or any(record.outcome is Outcome.COMPLETED for record in records):
            return
        mend = "see the server's log"
        if any(record.status in (400, 422) for record in records):
            mend = (
                "if it does not know 'ignore_eos' or 'continuous_usage_stats', leave them out with --no-ignore-eos "
                "or --no-continuous-usage"
            )
        raise RuntimeFailureError(
            f"{self._config.endpoint} completed no request of the warm-up: {_reasons(records)}; {mend}",
            url=self._config.url,
        )

    def _sender(
        self,
        session: ClientSession,
        bodies: Sequence[bytes],
        began: float,
        seen: Callable[[RequestRecord], None] | None = None,
    ) -> Send:
        async def send(index: int, intended_s: float) -> RequestRecord:
            record: RequestRecord = await self._client.send(
                session,
                self._url,
                bodies[index],
                index=index,
                intended_s=intended_s,
                clock=lambda: time.perf_counter() - began,
                timeout_s=self._config.timeout_s,
            )
            if seen is not None:
                seen(record)
            return record

        return send

    def _bodies(self, model: str, count: int, generator: np.random.Generator) -> list[bytes]:
        """Requests as JSON. Greedy: with sampling the lengths of answers would be a matter of luck."""
        config = self._config
        usage = {"include_usage": True} | ({"continuous_usage_stats": True} if config.continuous_usage else {})
        common = {
            "model": model,
            "max_tokens": config.output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": usage,
        } | ({"ignore_eos": True} if config.ignores_eos else {})
        return [
            json.dumps(common | prompt.fields(config.endpoint)).encode()
            for prompt in self._source.take(count, generator)
        ]


class _PromptSource:
    """Where the prompts of all cells come from."""

    def __init__(self, config: ServeBenchConfig) -> None:
        """Raises: InputError, TextError, CheckpointError as `bench_serve`."""
        self._config = config
        self._listed = None if config.prompts is None else _read_prompts(config.prompts)
        for prompt in self._listed or ():
            prompt.fields(config.endpoint)
        self._words: Sequence[str] = WORDS
        self._count: CountTokens = count_words
        if config.tokenizer is not None:
            tokenizer = load_tokenizer(config.tokenizer)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self._words = vocabulary_words(tokenizer.get_vocab(with_added_tokens=False))
            self._count = lambda text: len(tokenizer.encode(text).ids)
        self._prefix = ""
        if self._listed is None and config.prefix_len:
            # Special tokens, which `input_len` includes, would otherwise be taken from the prefix.
            self._prefix = self._text(config.prefix_len + self._count(""), np.random.default_rng(config.seed))

    @property
    def exact_tokens(self) -> int | None:
        """Tokens that the server should find in each prompt; None where we cannot know."""
        if self._config.tokenizer is None or self._config.endpoint == CHAT:
            return None
        return self._config.prefix_len + self._config.input_len

    @property
    def repeats(self) -> bool:
        """Whether a prompt of a cell occurs more than once in a sweep."""
        if self._listed is None:
            return False
        return len(self._listed) < self._config.num_prompts or len(self._config.cells) > 1 or self._config.warmup > 0

    def take(self, count: int, generator: np.random.Generator) -> list[Prompt]:
        """Prompts of a cell: those of the file from its start, again if they do not suffice, or random ones."""
        if self._listed is not None:
            return list(itertools.islice(itertools.cycle(self._listed), count))
        tokens = self._config.prefix_len + self._config.input_len
        return [Prompt(text=self._text(tokens, generator, self._prefix)) for _ in range(count)]

    def _text(self, tokens: int, generator: np.random.Generator, start: str = "") -> str:
        return random_text(tokens, generator, words=self._words, count=self._count, start=start)


def _read_prompts(path: Path) -> tuple[Prompt, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the prompts in '{path}' cannot be read: {error}; give a JSONL file in UTF-8", path=path
        ) from error
    return parse_prompts(text, str(path))


def _client() -> ModuleType:
    try:
        from losa_export.eval import serve_client
    except ImportError as error:
        raise MissingDependencyError.for_extra("aiohttp", "bench-serve", "'losa bench serve'") from error
    return serve_client


def _reasons(records: Sequence[RequestRecord]) -> str:
    """Outcomes with an example each."""
    examples: dict[Outcome, list[str]] = {}
    for record in records:
        examples.setdefault(record.outcome, []).append(record.detail)
    return "; ".join(f"{len(details)} {outcome} ({details[0]})" for outcome, details in examples.items())


def _check_url(url: str) -> None:
    """Raise ConfigError unless `url` is that of a server, without an endpoint."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"url is {url!r}: {error}; write for example http://127.0.0.1:8000", field="url") from None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ConfigError(f"url is {url!r}; write for example http://127.0.0.1:8000", field="url")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("url holds a user or password; give a key with --api-key-env", field="url")
    if "/v1/" in parts.path.rstrip("/"):
        raise ConfigError(f"url is {url!r}; leave off what follows /v1, which --endpoint names", field="url")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value
