"""Many benchmarks in one command: every combination of runtimes, threads, batch and lengths, against one baseline."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from losa_export.errors import LosaError
from losa_export.eval.bench import BenchConfig, bench
from losa_export.eval.bench_report import BenchReport
from losa_export.files import write_text_atomic
from losa_export.runtimes.base import RuntimeName

SCHEMA = "losa-bench-sweep"
SCHEMA_VERSION = 1

COLUMNS = (
    "candidate",
    "runtime",
    "baseline",
    "baseline_runtime",
    "threads",
    "batch",
    "prompt_tokens",
    "new_tokens",
    "prefill_ms",
    "baseline_prefill_ms",
    "prefill_ratio",
    "prefill_low",
    "prefill_high",
    "prefill_verdict",
    "decode_ms",
    "baseline_decode_ms",
    "decode_ratio",
    "decode_low",
    "decode_high",
    "decode_verdict",
    "decode_tokens_per_s",
    "disturbed_fraction",
)


@dataclass
class SweepReport:
    """What a sweep found.

    Attributes:
        runs: documents of the benchmarks that came to an end, as `BenchReport.as_dict` gives them.
        failed: options and message of those that did not.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The document."""
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "runs": self.runs, "failed": self.failed}

    def write(self, path: Path) -> None:
        """Write the document, whole or not at all. Raises: OutputError."""
        write_text_atomic(path, json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")

    def csv(self) -> str:
        """A line for each run, with a header; times in milliseconds."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sweep_row(run) for run in self.runs)
        return text.getvalue()

    def markdown(self) -> str:
        """A table of all runs, and what failed."""
        headings = ("candidate", "threads", "batch", "prompt + new", "prefill", "decode", "decode, tokens/s")
        lines = ["| " + " | ".join(headings) + " |", "|---|---:|---:|---:|---|---|---:|"]
        for run in self.runs:
            row = sweep_row(run)
            lines.append(
                f"| {row['candidate']} ({row['runtime']}) | {row['threads']} | {row['batch']} | "
                f"{row['prompt_tokens']} + {row['new_tokens']} | {_judged(row, 'prefill')} | "
                f"{_judged(row, 'decode')} | {row['decode_tokens_per_s']:.1f} |"
            )
        if self.runs:
            against = self.runs[0]["baseline"]
            lines += ["", f"Ratios against {against['folder']} ({against['runtime']}) at the same settings, same run."]
        lines += [f"\nFailed: {one['runtime']}, {one['threads']} threads: {one['error']}" for one in self.failed]
        return "\n".join(lines) + "\n"


def _judged(row: Mapping[str, Any], metric: str) -> str:
    ratio, low, high = (row[f"{metric}_{part}"] for part in ("ratio", "low", "high"))
    return f"{ratio:.2f}x ({low:.2f}–{high:.2f}) {row[f'{metric}_verdict']}"


def sweep_row(run: Mapping[str, Any]) -> dict[str, Any]:
    """One run's figures by the names of `COLUMNS`."""
    candidate, baseline, config = run["candidate"], run["baseline"], run["config"]
    row = {
        "candidate": candidate["folder"],
        "runtime": candidate["runtime"],
        "baseline": baseline["folder"],
        "baseline_runtime": baseline["runtime"],
        "threads": run["threads"],
        "batch": config["batch"],
        "prompt_tokens": config["prompt_tokens"],
        "new_tokens": config["new_tokens"],
        "decode_tokens_per_s": candidate["decode"]["tokens_per_s"],
        "disturbed_fraction": sum(sample["disturbed"] for sample in run["samples"]) / len(run["samples"]),
    }
    for metric in ("prefill", "decode"):
        estimate = run[metric]["all_blocks"]
        row[f"{metric}_ms"] = candidate[metric]["median_ms"]
        row[f"baseline_{metric}_ms"] = baseline[metric]["median_ms"]
        row |= {f"{metric}_{name}": estimate[name] for name in ("ratio", "low", "high", "verdict")}
    return row


def combinations(
    config: BenchConfig,
    *,
    engines: Sequence[tuple[RuntimeName, Path | None]],
    threads: Sequence[int | None],
    batches: Sequence[int],
    prompts: Sequence[int],
    news: Sequence[int],
) -> list[BenchConfig]:
    """`config` with every combination of these in place of its own, the last changing fastest.

    An engine is a runtime and the folder it opens, None for the one of `config`: not every engine reads every folder.
    """
    return [
        replace(
            config,
            candidate=folder or config.candidate,
            candidate_runtime=runtime,
            threads=count,
            batch=batch,
            prompt_tokens=prompt,
            new_tokens=new,
        )
        for (runtime, folder), count, batch, prompt, new in product(engines, threads, batches, prompts, news)
    ]


def sweep(
    configs: Sequence[BenchConfig],
    *,
    keep: Callable[[SweepReport], None] = lambda _: None,
    run: Callable[[BenchConfig], BenchReport] | None = None,
) -> SweepReport:
    """Run them one after the other. One that fails is noted, and costs no other.

    Args:
        configs: what to run.
        keep: told after each run, so that an interruption loses the one under way alone.
        run: does one of them; None: `bench`, which checks once what several of them would.
    """
    run = run or partial(bench, passed={})
    report = SweepReport()
    for number, config in enumerate(configs, start=1):
        sys.stderr.write(
            f"[{number}/{len(configs)}] {config.candidate_runtime}, threads {config.threads or 'auto'}, batch "
            f"{config.batch}, {config.prompt_tokens} + {config.new_tokens} tokens\n"
        )
        try:
            report.runs.append(run(config).as_dict())
        except LosaError as error:
            sys.stderr.write(f"losa: error: {error}\n")
            report.failed.append(
                {
                    "runtime": config.candidate_runtime,
                    "threads": config.threads or "auto",
                    "batch": config.batch,
                    "prompt_tokens": config.prompt_tokens,
                    "new_tokens": config.new_tokens,
                    "error": str(error),
                }
            )
        keep(report)
    return report
