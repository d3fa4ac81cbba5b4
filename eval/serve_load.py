"""The load of a server benchmark: when requests arrive, and what they ask. Pure functions of their generators."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from losa_export.errors import TextError

Endpoint = Literal["/v1/completions", "/v1/chat/completions"]
CHAT: Endpoint = "/v1/chat/completions"

# How many words in a row may fail to fit before we give up.
_TRIES = 200
# A word of a vocabulary, with the mark of a word's start that byte-level BPE (Ġ) or SentencePiece (▁) gives it.
_WORD = re.compile(r"([Ġ▁]?)([A-Za-z]{2,})")
_FEWEST_WORDS = 8
# What random prompts consist of where no tokenizer is given: common words, most of them one token each.
WORDS = (
    "the of and to in that was his with for had you not be her on at by which have or from this him but all she they "
    "were my are me one their so an said them we who would been will no when there if more out up into do any your "
    "what has man could other than our some very time upon about may its only now like little then can made should did "
    "us such great before must two these see know over much down after first good men own never most old shall day "
    "where those came come himself way work life without go make well through being long say might how am too even "
    "again many back here think every people went same last thought away under take found hand place while just"
).split()

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Prompt:
    """What a request asks: a text, or the messages of a conversation."""

    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()

    def fields(self, endpoint: Endpoint) -> dict[str, Any]:
        """As the body of a request to `endpoint` holds it; a text is a user's only message in a conversation.

        Raises: TextError for a conversation where only a text can be sent.
        """
        if endpoint == CHAT:
            return {"messages": list(self.messages) or [{"role": "user", "content": self.text}]}
        if self.text is None:
            raise TextError(f"{endpoint} takes no conversation; give rows with 'prompt', or --endpoint {CHAT}")
        return {"prompt": self.text}


def arrival_times(count: int, rate: float, burstiness: float, generator: np.random.Generator) -> tuple[float, ...]:
    """Moments at which `count` requests are to be sent, in seconds, ascending from 0.

    Gaps are drawn from a gamma distribution of mean 1 / rate and variance 1 / (burstiness · rate²): exponential, and
    so a Poisson process, at burstiness 1; burstier below, more even above, and all equal for inf.

    Args:
        count: at least 1.
        rate: requests per second, above 0; inf sends all at once.
        burstiness: shape of the gamma distribution, above 0.
        generator: of the gaps.
    Source: the definition of `vllm bench serve`, with shape = burstiness, scale = 1 / (rate · burstiness).
    """
    if math.isinf(rate):
        return (0.0,) * count
    if math.isinf(burstiness):
        gaps = np.full(count - 1, 1 / rate)
    else:
        gaps = generator.gamma(burstiness, 1 / (rate * burstiness), count - 1)
    return (0.0, *np.cumsum(gaps).tolist())


def count_words(text: str) -> int:
    """Words between white space, which stand for tokens where no tokenizer is given."""
    return len(text.split())


def vocabulary_words(vocabulary: Iterable[str]) -> tuple[str, ...]:
    """The plain words of a tokenizer's vocabulary, sorted: those that start a word, where it marks these.

    Raises: TextError if there are too few to make prompts of.
    """
    found = [match for match in map(_WORD.fullmatch, vocabulary) if match]
    marked = {match[2] for match in found if match[1]}
    words = marked or {match[2] for match in found}
    if len(words) < _FEWEST_WORDS:
        raise TextError(
            f"the tokenizer's vocabulary holds {len(words)} plain words, too few for random prompts; leave --tokenizer "
            "out, or give --prompts"
        )
    return tuple(sorted(words))


def random_text(
    tokens: int,
    generator: np.random.Generator,
    *,
    words: Sequence[str] = WORDS,
    count: CountTokens = count_words,
    start: str = "",
) -> str:
    """Random words that together with `start`, which they follow, count exactly `tokens`.

    Args:
        tokens: wanted, special tokens that `count` adds included.
        generator: of the words.
        words: to draw from.
        count: tokens of a text.
        start: what the text begins with.
    Raises: TextError if `start` alone has more tokens, no word fits in, or no mixture of words comes to that number.
    """
    text, have = start, count(start)
    tries = 0
    while have < tokens or not text:
        # Most words are a token each, so that one draw nearly always fills the gap; a smaller one follows if not.
        more = max(1, (tokens - have) >> min(tries, 32))
        longer = " ".join([*([text] if text else []), *generator.choice(words, more).tolist()])
        length = count(longer)
        if have < length <= tokens:
            text, have, tries = longer, length, 0
            continue
        tries += 1
        if tries > _TRIES:
            raise TextError(f"no text of exactly {tokens} tokens was found; ask for more tokens", tokens=tokens)
    if have > tokens:
        raise TextError(f"the shared prefix has {have} tokens, more than the {tokens} of a prompt", tokens=tokens)
    return text


def parse_prompts(text: str, where: str) -> tuple[Prompt, ...]:
    """Prompts of a JSONL file: rows with a string `prompt`, or with `messages` of a conversation.

    Args:
        text: the file's.
        where: its name, for messages.
    Raises: TextError naming the row.
    """
    prompts = []
    # Not splitlines(): that also splits at U+2028 and its like, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise TextError(f"row {number} of '{where}' is not JSON ({error}); mend it", row=number) from error
        prompt = _prompt(row) if isinstance(row, dict) else None
        if prompt is None:
            raise TextError(
                f"row {number} of '{where}' holds neither a 'prompt' nor 'messages'; each row must look like "
                '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}',
                row=number,
            )
        prompts.append(prompt)
    if not prompts:
        raise TextError(f"'{where}' holds no prompt; write one a line", path=where)
    return tuple(prompts)


def _prompt(row: Mapping[str, Any]) -> Prompt | None:
    """The prompt of a row; None if there is none."""
    text, messages = row.get("prompt"), row.get("messages")
    if isinstance(text, str) and text:
        return Prompt(text=text)
    if isinstance(messages, list) and messages:
        whole = all(isinstance(one, dict) and isinstance(one.get("role"), str) and "content" in one for one in messages)
        return Prompt(messages=tuple(messages)) if whole else None
    return None
