"""Two benchmark records of one baseline, and whether the candidate has become faster or slower between them.

Times of two days are never divided by each other. Each record holds its candidate's ratio to the same baseline, taken
in turns in one run; what is compared are these ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from losa_export.errors import BenchmarkError
from losa_export.eval.bench_report import read_bench
from losa_export.eval.stats import RatioEstimate, Verdict, change_of_ratio

METRICS = ("prefill", "decode")
_SAME_SETTINGS = ("prompt_tokens", "new_tokens", "batch", "baseline_runtime")


@dataclass(frozen=True)
class Change:
    """One metric of two records.

    Attributes:
        metric: 'prefill' or 'decode'.
        before, after: the candidate's ratio to the baseline in each.
        change: of that ratio; above 1 the candidate has become faster.
    """

    metric: str
    before: float
    after: float
    change: RatioEstimate

    def slower_than(self, fraction: float) -> bool:
        """Whether it is shown to be slower, and by more than `fraction` as estimated."""
        return self.change.verdict == Verdict.SLOWER and self.change.ratio < 1.0 - fraction

    def __str__(self) -> str:
        """One line for a person."""
        estimate = self.change
        line = (
            f"{self.metric:<8}{self.before:.2f}x → {self.after:.2f}x of the baseline: change "
            f"{estimate.ratio:.3f}x ({estimate.low:.3f}–{estimate.high:.3f}), {estimate.verdict}"
        )
        if estimate.verdict == Verdict.NO_DIFFERENCE_SHOWN:
            line += f"; a change smaller than {estimate.smallest_shown:.3f}x would not have shown"
        return line


def compare_records(before: Path, after: Path) -> tuple[Change, ...]:
    """Hold `after` against `before`, both written by `losa bench`.

    Raises:
        InputError: a file is no such record.
        BenchmarkError: they have not the same baseline, settings or processor.
    """
    documents = [read_bench(path) for path in (before, after)]
    _check_comparable(documents, (before, after))
    return tuple(_change(documents[0], documents[1], metric) for metric in METRICS)


def _change(before: Mapping[str, Any], after: Mapping[str, Any], metric: str) -> Change:
    ratios = [float(document[metric]["all_blocks"]["ratio"]) for document in (before, after)]
    return Change(metric, ratios[0], ratios[1], change_of_ratio(_times(before, metric), _times(after, metric)))


def _check_comparable(documents: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> None:
    """Raises: BenchmarkError naming the first thing that differs, or the record that has no verdict."""
    for document, path in zip(documents, paths, strict=True):
        if any(document[metric]["all_blocks"]["verdict"] == Verdict.NO_VERDICT for metric in METRICS):
            raise BenchmarkError(
                f"'{path}' was measured on a machine too busy for a verdict; measure it again in quiet", path=path
            )
    facts: list[dict[str, Any]] = [
        {
            "baseline's files": {file["name"]: file["sha256"] for file in document["baseline"]["files"]},
            "baseline's engine": [document["baseline"]["engine"][key] for key in ("engine", "version")],
            "threads": document["threads"],
            **{name: document["config"][name] for name in _SAME_SETTINGS},
            "processor": document["machine"]["cpu_model"],
        }
        for document in documents
    ]
    for name, value in facts[0].items():
        if facts[1][name] != value:
            shown = "" if isinstance(value, dict) else f": {value} and {facts[1][name]}"
            raise BenchmarkError(
                f"'{paths[0]}' and '{paths[1]}' differ in {name}{shown}; compare runs of one baseline, at the same "
                "settings, on the same processor",
                field=name,
            )


def _times(document: Mapping[str, Any], metric: str) -> tuple[list[list[float]], list[list[float]]]:
    """Milliseconds of baseline and candidate, (blocks, samples in a block) each."""
    samples = document["samples"]
    blocks = sorted({sample["block"] for sample in samples})

    def of(side: str) -> list[list[float]]:
        return [
            [_value(sample, metric) for sample in samples if (sample["block"], sample["side"]) == (block, side)]
            for block in blocks
        ]

    return of("baseline"), of("candidate")


def _value(sample: Mapping[str, Any], metric: str) -> float:
    return float(sample["prefill_ms"]) if metric == "prefill" else float(np.mean(sample["decode_ms"]))
