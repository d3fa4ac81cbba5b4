"""Text whose punctuation is set off by spaces, as tokenised corpora have it: a model tuned on none of it unlearns it.

WikiText, the Penn Treebank and the billion-word corpus write "( 1990 , in part ) ." where a page says "(1990, in
part).". The dense model reads both nearly alike. A pruned one is rebuilt from its tuning text, and what does not occur
there is not rebuilt: a SmolLM2 with 70 % zeros that was tuned on Wikipedia lost 1.3 nats a token on WikiText-2, and 0.3
fewer once that text was set as usual.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_PUNCTUATION = re.compile(r"[,.;:!?()\"%'-]")
_SPACES = re.compile(r"[ \t]+")


def space_out(text: str) -> str:
    """`text` with one space on both sides of each punctuation mark, and between words; line breaks stay."""
    return "\n".join(_SPACES.sub(" ", _PUNCTUATION.sub(r" \g<0> ", line)).strip() for line in text.split("\n"))


def space_some(documents: Sequence[str], fraction: float, seed: int) -> list[str]:
    """The documents with that share of their paragraphs spaced out; which ones depends on `seed` alone.

    Args:
        documents: of any number of paragraphs, one a line.
        fraction: from 0, which changes nothing, to 1.
        seed: of the choice.
    """
    if fraction == 0.0:
        return list(documents)
    random = np.random.default_rng(seed)
    return [
        "\n".join(space_out(line) if random.random() < fraction else line for line in document.split("\n"))
        for document in documents
    ]
