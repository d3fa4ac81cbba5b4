"""The page of the study of methods, from its results alone: tables, and a verdict by rule for each component."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from losa_export.eval.stats import mean_interval
from losa_export.eval.studies.methods_table import COMPONENTS, METHODS, Component, parse_sparsity
from losa_export.progress import duration

Record = Mapping[str, Any]
ALL = "all"
_MIB = 2**20


class ComponentVerdict(StrEnum):
    """What paired differences over seeds let one say of a component."""

    HELPED = "HELPED"
    HURT = "HURT"
    NO_DIFFERENCE_SHOWN = "NO DIFFERENCE SHOWN"
    ONE_SEED = "ONE SEED: NO VERDICT"


@dataclass(frozen=True)
class Difference:
    """Log-perplexity of one method less that of another, nats a token, paired by seed.

    Attributes:
        mean: over seeds; below 0 the component lowers perplexity.
        low, high: 95 % interval by Student's t.
        seeds: how many pairs.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def verdict(self) -> ComponentVerdict:
        """HELPED only if the whole interval lies below 0, HURT only if it all lies above."""
        if self.seeds == 1:
            return ComponentVerdict.ONE_SEED
        if self.high < 0:
            return ComponentVerdict.HELPED
        return ComponentVerdict.HURT if self.low > 0 else ComponentVerdict.NO_DIFFERENCE_SHOWN

    def __str__(self) -> str:
        """The figures, for a table."""
        interval = f" ({self.low:+.3f} … {self.high:+.3f})" if self.seeds > 1 else ""
        return f"{self.mean:+.3f}{interval}"


def differences(component: Component, cells: Sequence[Record], text: str) -> dict[str, Difference]:
    """Sparsity → difference, and under `ALL` that of the seeds' means over all sparsities that both methods share.

    A seed counts under `ALL` only if it has every one of those sparsities. Empty without a pair.
    """
    nll = {(cell["method"], cell["sparsity"], cell["seed"]): cell["evaluation"][text]["nll"] for cell in cells}
    seeds = sorted({cell["seed"] for cell in cells})
    found: dict[str, list[tuple[int, float]]] = {}
    for sparsity in ordered_sparsities(cells):
        for seed in seeds:
            ours, theirs = (nll.get((name, sparsity, seed)) for name in (component.method, component.against))
            if ours is not None and theirs is not None:
                found.setdefault(sparsity, []).append((seed, ours - theirs))
    by_seed = [[dict(pairs).get(seed) for pairs in found.values()] for seed in seeds]
    whole = [np.mean(values) for values in by_seed if values and None not in values]  # type: ignore[arg-type]
    result = {sparsity: _difference([value for _, value in pairs]) for sparsity, pairs in found.items()}
    return result | ({ALL: _difference(whole)} if whole else {})


def _difference(values: Sequence[Any]) -> Difference:
    return Difference(*mean_interval(values), len(values))


def gap_closed(cell: Record, cells: Sequence[Record], text: str) -> float | None:
    """Share of the log-perplexity between one-shot Wanda of the same sparsity and seed and the dense model that is won.

    None without that one-shot model.
    """
    for other in cells:
        if (other["method"], other["sparsity"], other["seed"]) == ("wanda", cell["sparsity"], cell["seed"]):
            start, ours = other["evaluation"][text]["nll"], cell["evaluation"][text]
            return float((start - ours["nll"]) / (start - ours["dense_nll"]))
    return None


def ordered_sparsities(cells: Iterable[Record]) -> list[str]:
    """The sparsities of some cells: percentages first, in rising order, then patterns."""
    return sorted({cell["sparsity"] for cell in cells}, key=lambda text: (":" in text, parse_sparsity(text)[0], text))


def page(documents: Sequence[Record]) -> str:
    """The Markdown page of the results of some models."""
    lines = [
        "# What each part of the method is worth",
        "",
        *_INTRODUCTION,
        "",
        "Made by `python -m losa_export.eval.studies.methods`; do not edit by hand. The figures of every run, with its "
        "settings, are in the JSON files beside this page.",
        "",
        "| method | what it is |",
        "|---|---|",
        *(f"| `{name}` | {method.says} |" for name, method in METHODS.items()),
        "",
        *_SCALED,
    ]
    for document in documents:
        lines += ["", *_section(document)]
    return "\n".join(lines) + "\n"


_INTRODUCTION = (
    "Within a section every method gets the same tokens to tune on, or the same time where the section says so, the "
    "same windows to calibrate on, and adapters of the same mean rank in the last round. Figures are mean ± standard "
    "deviation over seeds. In brackets is the share of the gap in log-perplexity between one-shot Wanda and the dense "
    "model that a method closes: 100 % is the dense model's perplexity.",
)
_SCALED = (
    "The presets keep their own rounds, allocators, losses, learning rates and schedules. Scaled to the common "
    "budget are steps, batch, window, and number and length of calibration windows; ranks are shifted so that their "
    "mean ends where that of the others does. `faithful` is made for 1,250 steps of 8 documents of up to 1,024 "
    "tokens, with 128 windows of 2,048 to calibrate on; here it reads the same packed windows as all others, "
    "without beginning-of-text tokens, and measures mutual information on half of the calibration windows, as the "
    "preset does. Its learning rate, 2e-4, was chosen for a model of 7 billion weights and far more steps. Under a "
    "pattern such as 2:4 every block ends with the same sparsity, so allocators act on the way there only. "
    "Reconstruction reads the calibration windows several times more, block by block; these tokens are not counted. No "
    "learning rate was searched for: methods that are no preset have the default of 1e-3, and another rate can turn a "
    "small difference round.",
)


def _section(document: Record) -> list[str]:
    cells, budget = document["cells"], document["budget"]
    sparsities = ordered_sparsities(cells)
    names = [name for name in METHODS if any(cell["method"] == name for cell in cells)]
    seeds = sorted({cell["seed"] for cell in cells})
    lines = [
        f"## {document['model']}",
        "",
        f"{_extent(budget)} of {', '.join(document['tuning_text'])}; "
        f"{budget['calibration_windows']} calibration windows of {budget['calibration_window']} of "
        f"{', '.join(document['calibration_text'])}; mean rank {budget['rank']} at "
        f"the end; seeds {', '.join(map(str, seeds))}; PyTorch threads: {document['threads']}.",
        "",
        "```",
        document["command"],
        "```",
    ]
    if document["failed"]:
        lines += [
            "",
            "**Without a result:** " + "; ".join(f"{row['cell']}: {row['error']}" for row in document["failed"]),
        ]
    for text in document["texts"]:
        lines += ["", *_quality(text, cells, names, sparsities), "", *_components(text, cells, sparsities)]
    return [*lines, "", *_costs(cells, names)]


def _extent(budget: Record) -> str:
    """How much every method is tuned."""
    step = f"{budget['batch_size']} windows of {budget['window']} tokens"
    spaced = budget.get("spaced_fraction", 0.0)  # older results have none
    form = f", punctuation set off by spaces in {spaced:.0%} of the paragraphs," if spaced else ""
    if budget["steps"] is None:
        return f"{duration(budget['time_budget_seconds'])} for pruning and tuning together, in steps of {step}{form}"
    tokens = budget["steps"] * budget["batch_size"] * budget["window"]
    return f"{budget['steps']} steps of {step} ({tokens:,} tokens){form}"


def _quality(text: str, cells: Sequence[Record], names: Sequence[str], sparsities: Sequence[str]) -> list[str]:
    first = cells[0]["evaluation"][text]
    header = ["| method | " + " | ".join(sparsities) + " |", "|---" * (len(sparsities) + 1) + "|"]
    perplexity = [
        f"| `{name}` | " + " | ".join(_perplexity(text, cells, name, s) for s in sparsities) for name in names
    ]
    distance = [f"| `{name}` | " + " | ".join(_distance(text, cells, name, s) for s in sparsities) for name in names]
    return [
        f"### Perplexity on {text}",
        "",
        f"{first['windows']} windows of {first['window']} tokens; dense {math.exp(first['dense_nll']):.2f}.",
        "",
        *header,
        *(f"{row} |" for row in perplexity),
        "",
        "KL(dense ‖ sparse) in nats a token, and how often both have the same most likely token:",
        "",
        *header,
        *(f"{row} |" for row in distance),
    ]


def _chosen(cells: Sequence[Record], name: str, sparsity: str) -> list[Record]:
    return [cell for cell in cells if (cell["method"], cell["sparsity"]) == (name, sparsity)]


def _perplexity(text: str, cells: Sequence[Record], name: str, sparsity: str) -> str:
    chosen = _chosen(cells, name, sparsity)
    if not chosen:
        return "–"
    closed = [gap_closed(cell, cells, text) for cell in chosen]
    shares = [share for share in closed if share is not None]
    share = f" ({np.mean(shares):.0%})" if shares and name != "wanda" else ""
    return _mean_and_spread([math.exp(cell["evaluation"][text]["nll"]) for cell in chosen], 2) + share


def _distance(text: str, cells: Sequence[Record], name: str, sparsity: str) -> str:
    chosen = [cell["evaluation"][text] for cell in _chosen(cells, name, sparsity)]
    if not chosen:
        return "–"
    agreement = float(np.mean([one["agreement"] for one in chosen]))
    return f"{_mean_and_spread([one['kl_divergence'] for one in chosen], 3)}; {agreement:.1%}"


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def _components(text: str, cells: Sequence[Record], sparsities: Sequence[str]) -> list[str]:
    found = [(component, differences(component, cells, text)) for component in COMPONENTS]
    shown = [(component, by) for component, by in found if by]
    if not shown:
        return []
    columns = [*sparsities, ALL]
    table = [
        f"| {component.says} | "
        + " | ".join(f"{by[name]}{_mark(by[name].verdict)}" if name in by else "–" for name in columns)
        + " |"
        for component, by in shown
    ]
    return [
        f"### What each part does, on {text}",
        "",
        "Change of log-perplexity in nats a token when the part is added, with a 95 % interval over paired seeds; "
        "below 0 is better, and −0.01 is 1 % less perplexity. ▼ (helped) and ▲ (hurt) say that the whole interval lies "
        f"on one side of 0. '{ALL}' is the seeds' mean over all sparsities, and what the sentences below go by.",
        "",
        "| part | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *table,
        "",
        *(_sentence(component, by) for component, by in shown),
        *_unhelpful(shown),
    ]


def _unhelpful(shown: Sequence[tuple[Component, Mapping[str, Difference]]]) -> list[str]:
    """By name, what the seeds show no gain of."""
    plain = {ComponentVerdict.NO_DIFFERENCE_SHOWN: "no difference shown", ComponentVerdict.HURT: "hurt"}
    named = [
        f"{component.says} ({plain[by[ALL].verdict]})"
        for component, by in shown
        if ALL in by and by[ALL].verdict in plain
    ]
    return ["", f"**What did not help here:** {'; '.join(named)}."] if named else []


_MARKS = {ComponentVerdict.HELPED: " ▼", ComponentVerdict.HURT: " ▲"}


def _mark(verdict: ComponentVerdict) -> str:
    return _MARKS.get(verdict, "")


def _sentence(component: Component, by: Mapping[str, Difference]) -> str:
    pair = f"`{component.method}` against `{component.against}`"
    if ALL not in by:
        return f"- {component.says} ({pair}): no seed has all sparsities yet."
    overall = by[ALL]
    elsewhere = [
        f"{name} {difference.verdict.value}"
        for name, difference in by.items()
        if name != ALL and difference.verdict != overall.verdict
    ]
    change = math.expm1(overall.mean)
    but = f"; but {', '.join(elsewhere)}" if elsewhere else ""
    return f"- {component.says} ({pair}): **{overall.verdict.value}**, perplexity {change:+.1%}{but}."


def _costs(cells: Sequence[Record], names: Sequence[str]) -> list[str]:
    lines = [
        "### Cost",
        "",
        "Means over all runs of a method. Seconds are of a machine that did other work too; they compare roughly.",
        "",
        "| method | zeros asked − reached, largest | rank | tokens | pruning, s | tuning, s | peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        chosen = [cell for cell in cells if cell["method"] == name]
        off = max((parse_sparsity(cell["sparsity"])[0] - cell["zeros"] for cell in chosen), key=abs)
        seconds = [f"{np.mean([cell[key] for cell in chosen]):.1f}" for key in ("prune_seconds", "tune_seconds")]
        memory = max(cell["peak_memory_bytes"] for cell in chosen) / _MIB
        rank = f"{chosen[0]['mean_rank']:.1f}" if chosen[0]["mean_rank"] is not None else "–"
        tokens = f"{np.mean([cell['tokens'] for cell in chosen]):,.0f}"
        lines.append(f"| `{name}` | {off:+.2%} | {rank} | {tokens} | {seconds[0]} | {seconds[1]} | {memory:.0f} |")
    return lines
