"""Our runtimes as a model of lm-evaluation-harness, under the name 'losa'; importing this registers it.

Texts are cut into tokens and windows by lm-eval's own rules, those of its Hugging Face backend; only the tokens are
scored here. See `losa_export.eval.lm_eval_bridge` for its command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from losa_export.chat import load_chat_template
from losa_export.errors import ConfigError, InputError, TextError
from losa_export.eval.scorer import open_scorer
from losa_export.eval.special_tokens import load_special_ids
from losa_export.eval.zero_shot import Choice, shortened
from losa_export.files import input_folder
from losa_export.progress import Progress
from losa_export.runtimes.base import RuntimeName
from losa_export.runtimes.detokenize import load_stop_ids
from losa_export.runtimes.generate import GenerationConfig, generate_tokens
from losa_export.runtimes.loader import load_runtime
from losa_export.text import load_tokenizer

# Tokens made where a task does not say how many, as lm-eval's Hugging Face backend has it.
_NEW_TOKENS = 256
# Items scored between two steps of the progress line.
_BLOCK = 16

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("losa")
class LosaLM(TemplateLM):  # type: ignore[misc]
    """A model folder in one of our runtimes.

    Args:
        onnx: an exported folder; for the runtime 'torch' a checkpoint.
        runtime: as in `losa_export.runtimes.base.RUNTIME_NAMES`.
        threads: compute threads; None takes what the machine offers.
        device: given by lm-eval, whose default is a GPU, and of no effect: the runtimes compute on the CPU.
        batch_size: likewise of no effect: items are packed as they fit.
        max_batch_size: likewise.

    Raises: what loading the runtime raises.
    """

    def __init__(
        self,
        onnx: str,
        runtime: RuntimeName = "ort",
        threads: int | None = None,
        device: str | None = None,  # noqa: ARG002
        batch_size: int | str | None = None,  # noqa: ARG002
        max_batch_size: int | None = None,  # noqa: ARG002
    ) -> None:
        super().__init__()
        folder = input_folder(Path(onnx), what="model")
        self._tokenizer = load_tokenizer(folder)
        self._special = load_special_ids(folder, self._tokenizer)
        self._stop = load_stop_ids(folder)
        self._template = load_chat_template(folder)
        self._folder = folder
        self._runtime = load_runtime(runtime, folder, threads=threads)
        self._scorer = open_scorer(self._runtime, folder)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises: InputError if the folder names none."""
        for token in (self._special.eos, *self._stop):
            if token is not None:
                return token
        raise InputError(f"'{self._folder}' names no end-of-text token; give one in tokenizer_config.json (eos_token)")

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: beginning-of-text, else end-of-text."""
        return self.eot_token_id if self._special.bos is None else self._special.bos

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self._runtime.max_positions

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any) -> list[int]:
        """Ids of a text, with the tokenizer's own special tokens unless it brings a beginning-of-text itself."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._text([self.prefix_token_id]))
        ids: list[int] = self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids
        return ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows as long as the model's positions."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The likeliest continuation of each text, token by token, up to one of its stops.

        Raises: ConfigError for a request that wants tokens drawn, or more of them than the model has positions.
        """
        texts = []
        with Progress("generating", len(requests), "texts", enabled=not disable_tqdm) as progress:
            for request in requests:
                texts.append(self._continued(*request.args))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
                progress.advance()
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text. Raises: InputError without a template, or if its last answer is only begun."""
        if self._template is None or not add_generation_prompt:
            why = (
                "has no chat template" if self._template is None else "cannot go on from a begun answer in its template"
            )
            raise InputError(f"'{self._folder}' {why}; ask without --apply_chat_template")
        return self._template.render(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for lm-eval's record."""
        return self._template.source if chat_template and self._template is not None else None

    @property
    def tokenizer_name(self) -> str:
        """For the name of lm-eval's cache."""
        return self._folder.name

    def get_model_info(self) -> dict[str, Any]:
        """What answered, for lm-eval's record."""
        return {"losa_runtime": self._runtime.describe().as_dict(), "losa_scoring": self._scorer.method}

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        items = list(self._items(requests))
        answers: list[tuple[float, bool]] = []
        with Progress("scoring", len(requests), "choices", enabled=not disable_tqdm) as progress:
            for start in range(0, len(items), _BLOCK):
                before = len(answers)
                for scores in self._scorer.score(items[start : start + _BLOCK]):
                    answers += [(score.log_likelihood, score.greedy) for score in scores]
                progress.advance(len(answers) - before)
        for (pair, _, _), answer in zip(requests, answers, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def _items(self, requests: Sequence[Request]) -> Iterator[list[Choice]]:
        """Requests in order; those in a row that share their context are one item."""
        for context, alike in groupby(requests, key=lambda request: request[1]):
            item = []
            for pair, _, continuation in alike:
                if not 0 < len(continuation) <= self.max_length or not context:
                    raise TextError(
                        f"{len(continuation)} tokens are to be scored behind {len(context)}, but the model has "
                        f"{self.max_length} positions and needs some of both: {pair!r:.200}"
                    )
                choice = Choice(np.array([*context, *continuation], np.int64), len(continuation))
                item.append(shortened(choice, self.max_length))
            yield item

    def _continued(self, context: str, settings: dict[str, Any]) -> str:
        wanted = dict(normalize_gen_kwargs(settings, _NEW_TOKENS))
        until = handle_stop_sequences(wanted["until"], eos=self._text([self.eot_token_id]))
        count = wanted["max_gen_toks"]
        if wanted["do_sample"]:
            raise ConfigError("a task wants tokens drawn at random; losa answers greedily, so give do_sample=False")
        if count >= self.max_length:
            raise ConfigError(
                f"{count} new tokens are wanted, but the model has {self.max_length} positions; give --gen_kwargs "
                "max_gen_toks"
            )
        prompt = np.array(self.tok_encode(context)[count - self.max_length :], np.int64)
        stop = {*self._stop, self.eot_token_id}
        made: list[int] = []
        for token in generate_tokens(
            self._runtime, prompt, GenerationConfig(max_new_tokens=count), stop_token_ids=stop
        ):
            made.append(token)
            text = self._tokenizer.decode(made, skip_special_tokens=True)
            if any(term in text for term in until if term):
                break
        answer: str = postprocess_generated_text(self._tokenizer.decode(made, skip_special_tokens=True), until, None)
        return answer

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text
