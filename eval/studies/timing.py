"""How studies time a model beside another, and what they keep and show of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from losa_export.eval.bench import BenchConfig
from losa_export.runtimes.base import RuntimeName


def timing_config(
    candidate: tuple[RuntimeName, Path],
    baseline: tuple[RuntimeName, Path],
    *,
    threads: int | None,
    prompt_tokens: int,
    new_tokens: int,
    max_seconds: float,
) -> BenchConfig:
    """A benchmark of two models whose weights differ on purpose, each an engine and a folder; both are loaded once."""
    return BenchConfig(
        candidate=candidate[1],
        baseline=baseline[1],
        candidate_runtime=candidate[0],
        baseline_runtime=baseline[0],
        threads=threads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        answers="own",
        min_seconds=min(10.0, max_seconds),
        max_seconds=max_seconds,
        load_samples=1,
    )


def judged(bench: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Ratio, ends of its interval and verdict of 'decode' or 'prefill', from a record of `losa bench`."""
    return {name: bench[metric]["all_blocks"][name] for name in ("ratio", "low", "high", "verdict")}


def ratio_text(one: Mapping[str, Any]) -> str:
    """A ratio with its interval, and the verdict where that is not FASTER."""
    verdict = "" if one["verdict"] == "FASTER" else f" {one['verdict']}"
    return f"{one['ratio']:.2f}x ({one['low']:.2f} – {one['high']:.2f}){verdict}"
