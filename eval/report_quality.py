"""How good each timed model is: evaluations joined to benchmarks by the SHA-256 of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from losa_export.eval.report_timings import Setting, Timed

_TOKENIZER_FILE = "tokenizer.json"
# Nats below which a difference is that of two engines with the same model: of a divergence, and of a mean loss.
_SAME_KL, _SAME_LOSS = 1e-6, 1e-5


@dataclass(frozen=True)
class Text:
    """What perplexity was measured on. Only figures of one text may stand side by side.

    Attributes:
        name: of its file.
        protocol: how it was read.
        window: tokens in a window.
        tokenizer: SHA-256 of the tokenizer's file: other tokens are other windows.
    """

    name: str
    protocol: str
    window: int
    tokenizer: str


@dataclass(frozen=True)
class Quality:
    """One evaluation of one model on one text.

    Attributes:
        weights: SHA-256 of the files of graph and weights that the engine read.
        runtime: the engine.
        text: what on.
        window_nll: mean loss of each window, nats.
        reference: SHA-256 of the reference's files; empty without one, or where it is not known.
        reference_name: a label.
        kl: mean KL(reference ‖ model), nats a token; None without a reference.
    """

    weights: frozenset[str]
    runtime: str
    text: Text
    window_nll: tuple[float, ...]
    reference: frozenset[str]
    reference_name: str
    kl: float | None

    def perplexity(self, windows: int) -> float:
        """Of the first windows."""
        mean = math.fsum(self.window_nll[:windows]) / windows
        return math.exp(mean) if mean < 709 else math.inf


@dataclass(frozen=True)
class Point:
    """A timed model with its quality.

    Attributes:
        timed: the model and its times.
        quality: of its weights.
        perplexity: over the windows that all points have.
        kl: from the reference that most points share, over equal windows; None if it was not measured so.
        same_files: whether the evaluation read the very files that the engine did. Else it read a checkpoint of the
            same weights that lies beside them, which the engine's answers were checked against.
        on_front: no other point is as good in time and perplexity, and better in one.
        on_kl_front: likewise in time and KL.
    """

    timed: Timed
    quality: Quality
    perplexity: float
    kl: float | None
    same_files: bool
    on_front: bool
    on_kl_front: bool

    @property
    def is_reference(self) -> bool:
        """Whether it predicts what the reference does."""
        return self.kl is not None and abs(self.kl) < _SAME_KL


@dataclass(frozen=True)
class Comparison:
    """All that was timed under one setting and measured on one text.

    Attributes:
        windows: how many all points have, from the text's start.
        reference_name: what KL is taken from; '' where no points share one.
        points: at least two, the fastest first.
    """

    setting: Setting
    text: Text
    windows: int
    reference_name: str
    points: tuple[Point, ...]


def qualities(document: Mapping[str, Any]) -> list[Quality]:
    """Of each text of an evaluation, on both its sides; none of a side that does not tell which files it read."""
    reference = document.get("reference")
    sides = {name: document[name] for name in ("target", "reference") if name in document}
    return [
        Quality(
            weights=weights,
            runtime=side["engine"]["name"],
            text=Text(
                text["name"],
                text["protocol"],
                text["window"],
                # Both sides read the target's tokens.
                document["target"].get("sha256", {}).get(_TOKENIZER_FILE, ""),
            ),
            window_nll=tuple(text[name]["window_nll"]),
            reference=frozenset() if reference is None else _weights(reference),
            reference_name="" if reference is None else side_name(reference),
            kl=0.0 if name == "reference" else text.get("kl_mean"),
        )
        for text in document["texts"]
        for name, side in sides.items()
        if (weights := _weights(side))
    ]


def has_hashes(document: Mapping[str, Any]) -> bool:
    """Whether an evaluation tells which files it read."""
    return bool(_weights(document["target"]))


def side_name(side: Mapping[str, Any]) -> str:
    """How tables call a side of an evaluation."""
    return f"{side['folder']} ({side['engine']['name']})"


def _weights(side: Mapping[str, Any]) -> frozenset[str]:
    """SHA-256 of the files of graph and weights that were read; empty where one is not known."""
    hashes: Mapping[str, str] = side.get("sha256", {})
    names = side["engine"]["model_files"]
    return frozenset(hashes[name] for name in names) if all(name in hashes for name in names) else frozenset()


def compare(timed: Sequence[Timed], found: Sequence[Quality]) -> list[Comparison]:
    """Each setting with each text in which two or more models have both a time and a quality."""
    comparisons = []
    for setting in dict.fromkeys(one.setting for one in timed):
        for text in dict.fromkeys(one.text for one in found):
            pairs = []
            for one in timed:
                match = _quality_of(one, [quality for quality in found if quality.text == text])
                if one.setting == setting and match is not None:
                    pairs.append((one, *match))
            if len(pairs) > 1:
                comparisons.append(_comparison(setting, text, pairs))
    return comparisons


def _quality_of(timed: Timed, found: Sequence[Quality]) -> tuple[Quality, bool] | None:
    """The evaluation of a model's weights, and whether it read the same files. One in the same engine goes first."""
    model = timed.model
    matches = []
    for quality in found:
        if not quality.weights <= model.files:
            continue
        same_files = bool(quality.weights & model.read)
        # Other files of the same folder hold the same weights only if the answers were seen to agree.
        if same_files or timed.checked_kl is not None:
            matches.append((quality, same_files))
    return min(matches, key=lambda match: (not match[1], match[0].runtime != model.runtime), default=None)


def _comparison(setting: Setting, text: Text, pairs: Sequence[tuple[Timed, Quality, bool]]) -> Comparison:
    found = [quality for _, quality, _ in pairs]
    windows = min(len(quality.window_nll) for quality in found)
    shared = _shared_reference(found)
    times = [timed.decode.middle for timed, _, _ in pairs]
    perplexities = [quality.perplexity(windows) for quality in found]
    divergences = [quality.kl if _kind(quality) == shared else None for quality in found]
    losses = [math.log(perplexity) for perplexity in perplexities]
    fronts = front(times, losses, _SAME_LOSS), front(times, divergences, _SAME_KL)
    points = [
        Point(timed, quality, perplexities[place], divergences[place], same_files, fronts[0][place], fronts[1][place])
        for place, (timed, quality, same_files) in enumerate(pairs)
    ]
    points.sort(key=lambda point: point.timed.decode.middle)
    name = next((quality.reference_name for quality in found if _kind(quality) == shared), "") if shared else ""
    return Comparison(setting, text, windows, name, tuple(points))


def _kind(quality: Quality) -> tuple[frozenset[str], int]:
    """What KL figures must share to stand side by side: the reference, and the windows."""
    return quality.reference, len(quality.window_nll)


def _shared_reference(found: Sequence[Quality]) -> tuple[frozenset[str], int] | None:
    """The kind that most models' KL is of; None if no two models' are of one kind: there is nothing to compare."""
    kinds = [_kind(one) for one in set(found) if one.reference and one.kl is not None and one.kl > _SAME_KL]
    best = max(kinds, key=kinds.count, default=None)
    return best if best is not None and kinds.count(best) > 1 else None


def front(times: Sequence[float], losses: Sequence[float | None], same: float) -> list[bool]:
    """Of each (time, loss): whether no other one is as low in both and lower in one. One without a loss is not.

    Losses that differ by at most `same` are taken as equal.
    """
    known = [(time, loss) for time, loss in zip(times, losses, strict=True) if loss is not None]

    def beaten(time: float, loss: float) -> bool:
        return any(
            other_time <= time and other_loss <= loss + same and (other_time < time or other_loss < loss - same)
            for other_time, other_loss in known
        )

    return [loss is not None and not beaten(time, loss) for time, loss in zip(times, losses, strict=True)]
