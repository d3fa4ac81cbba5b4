"""One model being served: its text, its engine, its pool, and the answers under way."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from losa_export.checkpoint import read_json_if_any
from losa_export.errors import InputError
from losa_export.onnx_file import MANIFEST_FILE
from losa_export.runtimes.base import RuntimeDescription
from losa_export.runtimes.generate import TextModel
from losa_export.runtimes.ort import OrtRuntime
from losa_export.runtimes.sampling import SamplingConfig
from losa_export.runtimes.serve.engine import DrainingError, Engine, Event, Failed, Job, QueueFullError, Token
from losa_export.runtimes.serve.generation import Answer, Generation, answer_of
from losa_export.runtimes.serve.limits import ApiError
from losa_export.runtimes.serve.memory import PoolPlan, available_bytes, plan_pool
from losa_export.runtimes.serve.metrics import Metrics
from losa_export.runtimes.serve.requests import ChatRequest, CompletionRequest
from losa_export.runtimes.serve.settings import ServeSettings
from losa_export.runtimes.serve.slots import SlotPool
from losa_export.runtimes.serve.wire import TokenTexts

Int64 = NDArray[np.int64]

# A step takes milliseconds; an engine that says nothing for so long hangs.
HUNG_SECONDS = 60.0
_MOST_RETRY = 60


@dataclass(frozen=True)
class ModelFacts:
    """What is told about the model.

    Attributes:
        name: in requests and answers.
        created: seconds since 1970 at which it was loaded.
        runtime: as the runtime describes itself.
        sparsity_fraction: zeros among the block's weights; None for a dense model.
        values: how kept weights are stored, None if unknown.
    """

    name: str
    created: int
    runtime: RuntimeDescription
    sparsity_fraction: float | None
    values: str | None

    def as_dict(self, plan: PoolPlan) -> dict[str, object]:
        """OpenAI's object for /v1/models, with ours under 'losa'."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "losa-export",
            "losa": {
                "kernel_row": self.runtime.kernel_row,
                "threads": self.runtime.threads,
                "slots": plan.slots,
                "context_tokens": plan.context_tokens,
                "sparsity_fraction": self.sparsity_fraction,
                "values": self.values,
                "weights_bytes": sum(self.runtime.model_files.values()),
            },
        }


class Service:
    """Takes parsed requests, gives generations.

    Args:
        settings: how to serve.
        model: with a runtime that has a shared cache.
        facts: about it.
        workers: processes like this one on the machine.

    Raises: ConfigError when the slots do not fit into memory; InputError for a cache that grows.
    """

    def __init__(self, settings: ServeSettings, model: TextModel, facts: ModelFacts, *, workers: int = 1) -> None:
        runtime = model.runtime
        if not isinstance(runtime, OrtRuntime):
            raise InputError(f"'{runtime.name}' cannot serve; give a folder that 'losa export' made")
        layout = runtime.layout
        self.plan = plan_pool(
            slots=settings.slots,
            context_tokens=settings.context_tokens,
            memory=settings.memory,
            token_bytes=len(layout.inputs) * layout.kv_heads * layout.head_dim * 4,
            max_positions=runtime.max_positions,
            workers=workers,
            available=available_bytes(),
        )
        self.settings, self.model, self.facts = settings, model, facts
        pool = SlotPool(runtime, self.plan.slots, self.plan.context_tokens, share_prefixes=settings.prefix_cache)
        self.engine = Engine(pool, chunk=settings.prefill_chunk, max_queue=settings.max_queue, deliver=self._deliver)
        self.metrics = Metrics(
            {"model": facts.name, "kernel_row": facts.runtime.kernel_row or "none", "values": facts.values or "unknown"}
        )
        self.texts = TokenTexts(model.tokenizer)
        self.draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._mean_seconds = 1.0  # of recent answers, for Retry-After

    # ---- life ----

    def start(self) -> None:
        """Begin to answer, from the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def drain(self) -> None:
        """Refuse new requests and finish those under way."""
        self.draining = True
        self.engine.drain()

    def close(self) -> None:
        """Fail what is left and release the model."""
        self.engine.close()
        self.model.close()

    @property
    def is_live(self) -> bool:
        """Whether the engine still moves."""
        return self.engine.alive and self.engine.seconds_since_step < HUNG_SECONDS

    @property
    def condition(self) -> str:
        """'ready' for new requests, 'draining' or 'hung'."""
        return "draining" if self.draining else "ready" if self.is_live else "hung"

    # ---- requests ----

    def chat_prompt(self, request: ChatRequest) -> list[Int64]:
        """Token ids of a conversation. Raises: ApiError when the model has no chat template, or it refuses."""
        messages = []
        for message in request.messages:
            role = "system" if message.role == "developer" else message.role
            named = {} if message.name is None else {"name": message.name}
            messages.append({"role": role, "content": message.content, **named})
        if self.model.template is None:
            raise ApiError(
                400, "this model has no chat template; use /v1/completions with a prompt", code="no_chat_template"
            )
        try:
            return [self.model.prompt_ids(messages)]
        except InputError as error:
            # The whole message names a file of this machine.
            reason = str(error.__cause__ or error)
            raise ApiError(400, f"the chat template refused these messages: {reason}", param="messages") from None

    def plain_prompts(self, request: CompletionRequest) -> list[Int64]:
        """Token ids of each prompt. Raises: ApiError for an empty one, or ids that the model lacks."""
        found = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                ids = np.asarray(self.model.tokenizer.encode(prompt).ids, dtype=np.int64)
            else:
                ids = np.asarray(prompt, dtype=np.int64)
                if ids.max() >= self.model.runtime.vocab_size:
                    raise ApiError(
                        400,
                        f"prompt: token id {int(ids.max())} is not among 0 to {self.model.runtime.vocab_size - 1}",
                        param="prompt",
                    )
            if ids.size == 0:
                raise ApiError(400, "prompt: is empty; give at least one token", param="prompt")
            found.append(ids)
        return found

    def submit(self, prompts: Sequence[Int64], request: ChatRequest | CompletionRequest) -> Generation:
        """Begin to answer.

        Args:
            prompts: of one request; each gets `request.n` answers.
            request: how to answer.
        Raises: ApiError 400, 429 or 503.
        """
        count = len(prompts) * request.n
        if count > self.settings.max_choices:
            raise ApiError(
                400, f"n: {count} answers were asked for, but this server makes at most {self.settings.max_choices}",
                param="n",
            )  # fmt: skip
        inbox: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        now = monotonic()
        answers: list[Answer] = []
        for prompt in prompts:
            new_tokens = self._new_tokens(prompt.size, request.longest)
            for _ in range(request.n):
                choice = len(answers)
                job = Job(
                    prompt=prompt,
                    max_new_tokens=new_tokens,
                    sampling=SamplingConfig(
                        temperature=request.temperature,
                        top_k=max(request.top_k, 0),
                        top_p=request.top_p,
                        min_p=request.min_p,
                    ),
                    sink=functools.partial(_put, inbox, choice),
                    # Answers to one prompt must differ, and yet come again with the same seed.
                    seed=None if request.seed is None else request.seed + choice,
                    stop_ids=frozenset() if request.ignore_eos else frozenset(self.model.stop_token_ids),
                    top_logprobs=request.logprob_count,
                    queue_deadline=now + self.settings.queue_timeout,
                    deadline=now + self.settings.request_timeout,
                )
                answers.append(answer_of(job, self.model.tokenizer, request.stops))
        try:
            self.engine.submit([answer.job for answer in answers])
        except QueueFullError as error:
            raise ApiError(429, str(error), "rate_limit_error", code="queue_full", retry_after=self._retry()) from None
        except DrainingError as error:
            raise ApiError(503, str(error), "server_error", code="draining", retry_after=self._retry()) from None
        return Generation(answers, self.engine.cancel, inbox)

    def refusal(self, failed: Failed) -> ApiError:
        """What a client is told when its answer will not be finished."""
        if failed.cause == "engine":
            return ApiError(500, f"the model failed: {failed.message}", "server_error", code="engine")
        return ApiError(503, failed.message, "server_error", code=failed.cause, retry_after=self._retry())

    def ended(self, answer: Answer, reason: str) -> None:
        """Count an answer that is over."""
        self.metrics.ended(answer, reason)
        timing = answer.timing
        if reason in ("stop", "length") and timing.started and timing.last_token:
            self._mean_seconds += 0.1 * (timing.last_token - timing.started - self._mean_seconds)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for another model's name."""
        if name is not None and name != self.facts.name:
            raise ApiError(
                404,
                f"model: there is no model {name[:100]!r} here, but {self.facts.name!r}",
                param="model",
                code="model_not_found",
            )

    def _new_tokens(self, prompt: int, longest: int | None) -> int:
        """Tokens that an answer may have. Raises: ApiError 400 when prompt and answer do not fit."""
        most_prompt = min(self.settings.max_prompt_tokens or prompt, self.plan.context_tokens - 1)
        if prompt > most_prompt:
            raise ApiError(
                400,
                f"the prompt has {prompt} tokens, but this server reads at most {most_prompt}; shorten it",
                code="context_length_exceeded",
            )
        room = self.plan.context_tokens - prompt
        cap = self.settings.max_new_tokens or room
        if longest is None:
            return min(room, cap)
        if longest > min(room, cap):
            raise ApiError(
                400,
                f"max_tokens: {longest} were asked for, but behind a prompt of {prompt} this server makes at most "
                f"{min(room, cap)}; ask for fewer",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return longest

    def _retry(self) -> int:
        """Seconds until a place is likely to be free: what waits, at the pace of recent answers."""
        waiting = self.engine.load.waiting
        return min(_MOST_RETRY, max(1, math.ceil(self._mean_seconds * (waiting + 1) / self.plan.slots)))

    # ---- events, from the engine's thread into the event loop's ----

    def _deliver(self, events: Sequence[tuple[Job, Event]]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends, and nobody listens
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: Sequence[tuple[Job, Event]]) -> None:
        for job, event in events:
            job.sink(event)
        self.metrics.new_tokens.inc(sum(isinstance(event, Token) for _, event in events))
        self.metrics.load(self.engine.load)


def _put(inbox: asyncio.Queue[tuple[int, Event]], choice: int, event: Event) -> None:
    inbox.put_nowait((choice, event))


def read_facts(folder: Path, name: str | None, runtime: RuntimeDescription, created: int) -> ModelFacts:
    """What export.json and the runtime tell. Raises: CheckpointError when export.json is no JSON object."""
    record = read_json_if_any(folder / MANIFEST_FILE, mend="export again")
    values = record.get("values")
    return ModelFacts(
        name=name or folder.resolve().name,
        created=created,
        runtime=runtime,
        sparsity_fraction=_sparsity(record.get("tensors")),
        values=values if isinstance(values, str) else None,
    )


def _sparsity(tensors: object) -> float | None:
    """Zeros among all weights that are stored sparse; None if there are none."""
    zeros = total = 0
    for entry in tensors.values() if isinstance(tensors, dict) else ():
        match entry:
            case {"shape": [int(rows), int(columns)], "zeros": int(count)}:
                zeros, total = zeros + count, total + rows * columns
    return zeros / total if zeros else None
