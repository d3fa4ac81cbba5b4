"""How the choices of zero-shot items are scored in a runtime: several items a pass where that can be done."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from losa_export.eval.zero_shot import Choice, Score, score
from losa_export.runtimes.base import Runtime


class Scorer(Protocol):
    """Scores items.

    Attributes:
        method: for the record.
    """

    @property
    def method(self) -> str:
        """'packed', several items in one pass, or 'item by item'."""
        ...

    def score(self, items: Sequence[Sequence[Choice]]) -> list[list[Score]]:
        """What the model makes of the choices of each item. Raises: RuntimeFailureError."""
        ...


class ItemByItem:
    """What any runtime can do: see `zero_shot.score`."""

    method = "item by item"

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def score(self, items: Sequence[Sequence[Choice]]) -> list[list[Score]]:
        """See `Scorer.score`."""
        return [score(self._runtime, item) for item in items]


def open_scorer(runtime: Runtime, folder: Path) -> Scorer:
    """The fastest way to score in `runtime`, which has loaded `folder`.

    Packing takes a second session of the model, with its memory, and the package onnx, which comes with the extra
    'export'; it is done for exports of profile 'ort' in ONNX Runtime. The runtime is left open by whatever comes back.
    """
    if runtime.name in ("ort", "ort-stock") and importlib.util.find_spec("onnx") is not None:
        from losa_export.eval.packed import PackedScorer
        from losa_export.runtimes.ort import OrtRuntime

        if isinstance(runtime, OrtRuntime) and (packed := PackedScorer.open(runtime, folder)) is not None:
            return packed
    return ItemByItem(runtime)
