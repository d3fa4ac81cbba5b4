"""From the JSON document of a benchmark to something a person reads. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_HEADINGS = ("", "candidate", "baseline", "ratio (95 %)", "verdict")


@dataclass(frozen=True)
class Row:
    """One line of the table, as text."""

    metric: str
    candidate: str
    baseline: str
    ratio: str = ""
    verdict: str = ""

    def cells(self) -> tuple[str, ...]:
        """The five cells, in the order of the headings."""
        return self.metric, self.candidate, self.baseline, self.ratio, self.verdict


def bench_rows(document: Mapping[str, Any]) -> list[Row]:
    """The lines of the table of a bench document.

    Ratios of time are baseline over candidate, those of size and memory candidate over baseline.
    """
    candidate, baseline, config = document["candidate"], document["baseline"], document["config"]
    rows = [
        Row(
            f"prefill, {_rows(config)}{config['prompt_tokens']} tokens",
            _ms(candidate["prefill"]["median_ms"]),
            _ms(baseline["prefill"]["median_ms"]),
            *_judged(document["prefill"]),
        ),
        Row(
            "decode, per token" if config["batch"] == 1 else f"decode, per step of {config['batch']} rows",
            _ms(candidate["decode"]["median_ms"]),
            _ms(baseline["decode"]["median_ms"]),
            *_judged(document["decode"]),
        ),
        Row(
            "decode, tokens/s",
            f"{candidate['decode']['tokens_per_s']:.1f}",
            f"{baseline['decode']['tokens_per_s']:.1f}",
        ),
    ]
    rows += [
        Row(f"decode, {level}", *(_ms(side["decode"]["percentiles_ms"][level]) for side in (candidate, baseline)))
        for level in ("p90", "p95", "p99")
    ]
    rows += [
        Row(
            "load",
            _ms(candidate["load_median_ms"]),
            _ms(baseline["load_median_ms"]),
            f"{document['load_ratio']:.2f}x",
        ),
        Row(
            "peak memory, VmHWM",
            _mib(candidate["peak_rss_bytes"]),
            _mib(baseline["peak_rss_bytes"]),
            "" if document["memory_ratio"] is None else f"{document['memory_ratio']:.2f} of it",
        ),
        Row(
            "model files",
            _mib(candidate["model_bytes"]),
            _mib(baseline["model_bytes"]),
            f"{document['size_ratio']:.2f} of it",
        ),
    ]
    return rows


def _rows(config: Mapping[str, Any]) -> str:
    return f"{config['batch']} rows of " if config["batch"] > 1 else ""


def bench_title(document: Mapping[str, Any]) -> str:
    """What was compared, with which engines, kernels and threads, on what."""
    sides = [_side(document[side]) for side in ("candidate", "baseline")]
    threads = document["threads"]
    return (
        f"{sides[0]} against {sides[1]}, {threads} thread{'s' if threads > 1 else ''}, "
        f"{document['machine']['cpu_model']}"
    )


def bench_notes(document: Mapping[str, Any]) -> list[str]:
    """What must be said beside the table: the answers, the samples, a difference not shown, warnings."""
    notes = [_answers(document["answers"])]
    samples = document["samples"]
    disturbed = sum(sample["disturbed"] for sample in samples)
    notes.append(
        f"{len(samples)} generations in {document['decode']['all_blocks']['blocks']} interleaved blocks, "
        f"{document['timed_seconds']:.0f} s, after {document['warmup_blocks']} of warm-up; {disturbed} disturbed."
    )
    for name in ("prefill", "decode"):
        estimate = document[name]["all_blocks"]
        if estimate["verdict"] == "NO DIFFERENCE SHOWN":
            notes.append(
                f"{name}: this run could not have shown a difference smaller than {estimate['smallest_shown']:.3f}x."
            )
    notes += [f"Warning: {warning}." for warning in document["warnings"]]
    return notes


def bench_markdown(document: Mapping[str, Any]) -> str:
    """Title, table and notes as Markdown."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "| --- | ---: | ---: | ---: | --- |"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in bench_rows(document)]
    notes = "\n".join(f"- {note}" for note in bench_notes(document))
    return f"{bench_title(document)}\n\n" + "\n".join(lines) + f"\n\n{notes}\n"


def print_bench(document: Mapping[str, Any], console: Console | None = None) -> None:
    """Print title, table and notes to `console` (None: stdout)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = console or Console()
    out.print(Text(bench_title(document), style="bold"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in ("", "verdict") else "right", no_wrap=True)
    for row in bench_rows(document):
        table.add_row(*(Text(cell) for cell in row.cells()))
    out.print(table)
    for note in bench_notes(document):
        out.print(Text(note), soft_wrap=True)


def _judged(comparison: Mapping[str, Any]) -> tuple[str, str]:
    estimate = comparison["all_blocks"]
    return f"{estimate['ratio']:.2f}x ({estimate['low']:.2f}–{estimate['high']:.2f})", str(estimate["verdict"])


def _side(result: Mapping[str, Any]) -> str:
    kernel = result["engine"]["kernel_row"]
    return f"{result['folder']} ({result['runtime']}{f', kernel {kernel}' if kernel else ''})"


def _answers(answers: Mapping[str, Any]) -> str:
    checks = [(side, answers[side]) for side in ("candidate", "baseline") if answers[side] is not None]
    parts = []
    for side, check in checks:
        gate, workload = check["gate"], check["workload"]
        worst = max(
            workload["max_relative_error"], *(gate[s]["max_relative_error"] for s in ("prefill", "decode", "batch3"))
        )
        kl = max(workload["kl_max"], *(gate[s]["kl_max"] for s in ("prefill", "decode", "batch3")))
        parts.append(
            f"the {side} against {check['against']}: relative error {worst:.1e}, KL {kl:.1e}, "
            f"{gate['greedy']['equal']} of {gate['greedy']['tokens']} greedy tokens equal"
        )
    if answers["mode"] == "same":
        return f"Answers agree: {'; '.join(parts)}."
    different = "The two hold different weights, so their answers differ by design"
    return (
        f"{different}; each was checked apart: {'; '.join(parts)}."
        if parts
        else f"{different}; no second engine can open them."
    )


def _ms(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 10_000 else f"{milliseconds:.4g} ms"


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.1f} MiB"
