"""What the body of a request may say: OpenAI's fields that we honour, and nothing that we would silently ignore.

A field whose only harmless value is "do nothing" (penalties of 0, no tools) may be given with that value. Any other
field is an error that names it: an answer that quietly left out what was asked for is worse than none. A null stands
for an absent field, since clients send what they got back.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_MESSAGES = 4096
MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**63 - 1


def _without_nulls(value: Any) -> Any:
    return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value


def _text_of_parts(value: Any) -> Any:
    """Text given as OpenAI's list of parts, as one string."""
    if (
        isinstance(value, list)
        and all(isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text" for part in value)
        and all(isinstance(part["text"], str) for part in value)
    ):
        return "".join(part["text"] for part in value)
    return value


def _refuse_true(value: bool) -> bool:
    if value:
        raise ValueError("must be false, since nothing else is supported")
    return value


class _Body(BaseModel):
    """Strict about names, types and numbers that are none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _absent(cls, value: Any) -> Any:
        return _without_nulls(value)


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of_parts, json_schema_input_type=str | list[dict[str, str]])]
    name: str | None = Field(None, max_length=64, description="given to the chat template")


class StreamOptions(_Body):
    """What a stream tells besides text."""

    include_usage: bool = Field(False, description="a last chunk with the usage of the whole request")
    continuous_usage_stats: bool = Field(False, description="usage so far in each chunk")


class TextFormat(_Body):
    """The one form of answer there is."""

    type: Literal["text"]


class Generate(_Body):
    """Fields of both kinds of request."""

    model: str | None = Field(None, max_length=200, description="name of the model; may be left out")
    stream: bool = Field(False, description="answer as server-sent events, piece by piece")
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0.0, le=100.0, description="0 takes the most likely token each time")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="draw from the smallest set that holds this probability")
    top_k: int = Field(0, ge=-1, le=2**31, description="draw from this many most likely tokens; 0 or -1: from all")
    min_p: float = Field(0.0, ge=0.0, le=1.0, description="draw from tokens this times as likely as the likeliest")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="of the draws; a fresh one if absent")
    stop: (
        Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOPS)]
        | None
    ) = Field(None, description="texts that end the answer and are not part of it")
    n: int = Field(1, ge=1, le=128, description="answers to the same prompt")
    ignore_eos: bool = Field(False, description="go on behind the model's own end of text, for measurements")
    # Accepted with the value that does nothing.
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="only 0")
    presence_penalty: float | None = Field(None, ge=0, le=0, description="only 0")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="only {}")
    # Of no effect on the answer by their meaning.
    user: str | None = Field(None, max_length=512)
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = Field(None, max_length=64)
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk tells the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def final_usage(self) -> bool:
        """Whether a last chunk tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Generate:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self


class ChatRequest(Generate):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=2**31, description="most tokens of the answer (default: what fits)")
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31, description="the newer name of max_tokens")
    logprobs: bool = Field(False, description="tell the logarithm of each token's probability")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="and of so many others")
    response_format: TextFormat | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=0)] | None = Field(None, description="only []")

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one thing, but differ")
        return self

    @property
    def longest(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def logprob_count(self) -> int | None:
        """Most likely tokens to tell with each; None tells nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1)]


class CompletionRequest(Generate):
    """POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1)] = Field(
        description="text, token ids, or a list of either"
    )
    max_tokens: int | None = Field(16, ge=1, le=2**31, description="most tokens of the answer")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="tell so many probabilities of each token"
    )
    echo: Annotated[bool, AfterValidator(_refuse_true), WithJsonSchema({"const": False})] | None = Field(
        None, description="only false"
    )
    suffix: Literal[""] | None = Field(None, description="only empty")
    best_of: int | None = Field(None, ge=1, le=1, description="only 1")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt):
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]

    @property
    def longest(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """Most likely tokens to tell with each; None tells nothing."""
        return self.logprobs
