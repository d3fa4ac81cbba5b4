"""Token and text generation above any runtime: prompt in, a stream out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from losa_export.chat import ChatTemplate, Message, load_chat_template
from losa_export.errors import ConfigError, InputError
from losa_export.files import input_folder
from losa_export.runtimes.base import Runtime, RuntimeName
from losa_export.runtimes.detokenize import StreamDecoder, load_stop_ids
from losa_export.runtimes.loader import load_runtime
from losa_export.runtimes.sampling import SamplingConfig, choose_token
from losa_export.text import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ChatUse = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class GenerationConfig:
    """How a text is continued.

    Attributes:
        max_new_tokens: most tokens to make; fewer when the model runs out of positions.
        temperature: 0 takes the most likely token each time; above, tokens are drawn.
        top_k, top_p, min_p: which tokens may be drawn, as in SamplingConfig.
        seed: of the draws; None takes a fresh one each time.
        stop_token_ids: ids that end the text; None takes those of the model folder, () never stops.
        chat: whether the prompt goes through the chat template: 'auto' when the folder has one.

    Raises: ConfigError naming the field.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = 0
    stop_token_ids: tuple[int, ...] | None = None
    chat: ChatUse = "auto"

    def __post_init__(self) -> None:
        if not _is_count(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens!r}, but must be a whole number of at least 1",
                field="max_new_tokens",
            )
        if self.seed is not None and (not _is_count(self.seed) or self.seed < 0):
            raise ConfigError(
                f"seed is {self.seed!r}, but must be a whole number of at least 0, or None for a fresh one",
                field="seed",
            )
        stop = self.stop_token_ids
        if stop is not None and not all(_is_count(token) and token >= 0 for token in stop):
            raise ConfigError(
                f"stop_token_ids is {stop!r}, but must hold token ids of at least 0", field="stop_token_ids"
            )
        if self.chat not in get_args(ChatUse):
            raise ConfigError(f"chat is {self.chat!r}, but must be one of {', '.join(get_args(ChatUse))}", field="chat")
        _ = self.sampling  # validates temperature and filters

    @property
    def sampling(self) -> SamplingConfig:
        """The part that chooses one token."""
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p)


def generate_tokens(
    runtime: Runtime,
    prompt_ids: NDArray[np.int64],
    config: GenerationConfig,
    *,
    stop_token_ids: Collection[int] = (),
) -> Iterator[int]:
    """Continue one prompt, token by token.

    Args:
        runtime: loaded, and left open.
        prompt_ids: (S,) integers in [0, V), S ≥ 1.
        config: its own `stop_token_ids`, when not None, replace those given here.
        stop_token_ids: ids that end the text; the one met is not yielded.
    Returns: an iterator; the prompt is read when the first token is asked for.
    Raises: InputError at once when the prompt is empty or leaves no position for a new token.
    """
    prompt = np.asarray(prompt_ids)
    room = runtime.max_positions - prompt.size
    if prompt.size == 0:
        raise InputError("the prompt is empty: give at least one token")
    if room < 1:
        raise InputError(
            f"the prompt has {prompt.size} tokens, and the model knows {runtime.max_positions} positions, "
            "so no new token fits behind it; shorten the prompt",
            max_positions=runtime.max_positions,
        )
    stop = frozenset(stop_token_ids if config.stop_token_ids is None else config.stop_token_ids)
    return _tokens(runtime, prompt, min(config.max_new_tokens, room), config, stop)


def _tokens(
    runtime: Runtime, prompt: NDArray[np.int64], count: int, config: GenerationConfig, stop: frozenset[int]
) -> Iterator[int]:
    generator = np.random.default_rng(config.seed)
    sampling = config.sampling
    # The last new token is never read back, so it needs no place in the cache.
    state = runtime.new_state(1, max(prompt.size, prompt.size + count - 1))
    logits = runtime.prefill(state, 0, prompt, last_only=True)[0]
    for step in range(count):
        token = choose_token(logits, sampling, generator)
        if token in stop:
            return
        yield token
        if step + 1 < count:
            logits = runtime.decode(state, np.array([token], dtype=np.int64))[0]


class TextModel:
    """A runtime with the tokenizer, chat template and stop ids of its folder.

    Args:
        runtime: closed together with this object.
        tokenizer: text to ids and back.
        template: of the model's chat format, if it has one.
        stop_token_ids: ids that end a text.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        stop_token_ids: tuple[int, ...],
    ) -> None:
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.template = template
        self.stop_token_ids = stop_token_ids

    @classmethod
    def open(cls, folder: Path, runtime: RuntimeName | Runtime = "ort", *, threads: int | None = None) -> TextModel:
        """Everything that `folder` needs to speak; a runtime given as an object must have loaded it already.

        Raises: InputError for a missing or empty folder, CheckpointError for missing or malformed files, and
            what load_runtime raises.
        """
        input_folder(folder, what="model")
        tokenizer, template, stop = load_tokenizer(folder), load_chat_template(folder), load_stop_ids(folder)
        if isinstance(runtime, str):
            runtime = load_runtime(runtime, folder, threads=threads)
        return cls(runtime, tokenizer, template, stop)

    def prompt_ids(self, prompt: str | Sequence[Message], *, chat: ChatUse = "auto") -> NDArray[np.int64]:
        """Token ids of a text, or of a conversation of {'role', 'content'} messages.

        Raises: InputError when nothing is left to read, or a chat template is needed and there is none.
        """
        conversation = not isinstance(prompt, str)
        if self.template is None and (conversation or chat == "always"):
            raise InputError("this model folder has no chat template; give plain text, with --raw (chat='never')")
        if self.template is not None and (conversation or chat != "never"):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = self.template.render(messages)
            # The template already wrote the special tokens; the tokenizer must not add them again.
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        else:
            ids = self.tokenizer.encode(str(prompt)).ids
        if not ids:
            raise InputError("the prompt is empty: give at least one word to continue")
        return np.asarray(ids, dtype=np.int64)

    def stream(self, prompt: str | Sequence[Message], config: GenerationConfig) -> Iterator[str]:
        """The continuation as pieces of text, each of whole characters.

        Raises: InputError at once for a prompt that cannot be continued.
        """
        ids = self.prompt_ids(prompt, chat=config.chat)
        return self._pieces(ids, generate_tokens(self.runtime, ids, config, stop_token_ids=self.stop_token_ids))

    def _pieces(self, prompt: NDArray[np.int64], tokens: Iterator[int]) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer, prompt.tolist())
        for token in tokens:
            if piece := decoder.push(token):
                yield piece
        if piece := decoder.finish():
            yield piece

    def close(self) -> None:
        """Close the runtime."""
        self.runtime.close()

    def __enter__(self) -> TextModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def generate_text(
    folder: Path,
    prompt: str | Sequence[Message],
    config: GenerationConfig | None = None,
    *,
    runtime: RuntimeName = "ort",
    threads: int | None = None,
) -> Iterator[str]:
    """Load a folder, continue one prompt as a stream of text, and close again.

    Args:
        folder: an exported `onnx/`, or a checkpoint for the runtime 'torch'.
        prompt: a text, or messages of {'role', 'content'}.
        config: default GenerationConfig().
        runtime: which engine.
        threads: default: what the machine offers.
    Returns: an iterator of pieces of text; the model is loaded, and errors raised, before it is returned.
    """
    model = TextModel.open(folder, runtime, threads=threads)
    try:
        pieces = model.stream(prompt, config or GenerationConfig())
    except BaseException:
        model.close()
        raise
    return _closing_after(model, pieces)


def _closing_after(model: TextModel, pieces: Iterator[str]) -> Iterator[str]:
    with closing(model):
        yield from pieces


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
