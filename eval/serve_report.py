"""What a load on a server found: dataclasses, the JSON document of docs/serve-bench.md, and tables to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losa_export.eval.machine import MachineRecord
from losa_export.eval.serve_metrics import CountedBy, LoadMetrics, Outcome, RequestRecord
from losa_export.files import write_text_atomic

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA, SCHEMA_VERSION = "losa-serve-bench", 1
_WIDEST_TABLE = 200
# An open loop that sends this much too late is none.
_LATE_MS = 100.0
# Of one core: a client as busy as that may be what is measured.
_BUSY_CLIENT = 0.5
_LOADS = ("rate /s", "at most", "completed", "refused", "failed", "requests/s", "tokens/s", "under way")
_LATENCIES = (
    ("ttft_ms", "TTFT"),
    ("ttft_intended_ms", "TTFT, from intended start"),
    ("tpot_ms", "TPOT"),
    ("itl_ms", "ITL"),
    ("e2el_ms", "E2EL"),
    ("lateness_ms", "lateness of start"),
)


@dataclass(frozen=True)
class CellReport:
    """One request rate and concurrency.

    Attributes:
        request_rate: requests per second that were to be sent; None: all at once.
        max_concurrency: most requests under way; None: no limit.
        interrupted: whether the user ended it.
        not_sent: requests that were not sent because of that.
        client_cpu_fraction: processor time of the client over the cell's duration, of one core.
        metrics: of the requests sent.
        warnings: sentences that belong beside any quotation of them.
        requests: every request sent, in the order intended.
    """

    request_rate: float | None
    max_concurrency: int | None
    interrupted: bool
    not_sent: int
    client_cpu_fraction: float
    metrics: LoadMetrics
    warnings: tuple[str, ...]
    requests: tuple[RequestRecord, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; of each request the chunks' times and tokens are two lists of equal length."""
        return {
            "request_rate": self.request_rate,
            "max_concurrency": self.max_concurrency,
            "interrupted": self.interrupted,
            "not_sent": self.not_sent,
            "client_cpu_fraction": round(self.client_cpu_fraction, 4),
            "metrics": asdict(self.metrics),
            "warnings": list(self.warnings),
            "requests": [_request(record) for record in self.requests],
        }


@dataclass(frozen=True)
class ServeBenchReport:
    """Everything the JSON document holds.

    Attributes:
        created_utc: ISO 8601.
        config: the options, without host and folders.
        server: `model`, `name` (what it calls itself), `losa` (what `losa serve` says of its model, or None),
            `same_machine` (whether the URL names this machine).
        client: versions of what sent the requests.
        machine: that the client ran on.
        interrupted: whether the user ended the run before its last cell was done.
        cells: in the order measured.
    """

    created_utc: str
    config: dict[str, Any]
    server: dict[str, Any]
    client: dict[str, str]
    machine: MachineRecord
    interrupted: bool
    cells: tuple[CellReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """The document: plain dictionaries, lists and numbers."""
        document = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "created_utc": self.created_utc,
            "config": self.config,
            "server": self.server,
            "client": self.client,
            "machine": self.machine.as_dict(),
            "interrupted": self.interrupted,
            "cells": [cell.as_dict() for cell in self.cells],
        }
        plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False, default=asdict))
        return plain

    def write(self, path: Path) -> None:
        """Write the document, whole or not at all. Raises: OutputError."""
        write_text_atomic(path, json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")


def cell_warnings(
    metrics: LoadMetrics,
    records: Sequence[RequestRecord],
    *,
    rate: float | None,
    limit: int | None,
    asked_tokens: int | None,
    prompt_tokens: int | None,
    repeats: bool,
    levels: Sequence[float],
) -> tuple[str, ...]:
    """What must be said beside the figures of a cell.

    Args:
        metrics: of `records`.
        records: requests sent.
        rate: requests per second that were to be sent; None: all at once.
        limit: most requests under way; None: no limit.
        asked_tokens: that each answer should have had; None: as many as the model liked.
        prompt_tokens: that each prompt should have had; None: not known.
        repeats: whether prompts occur more than once.
        levels: percentiles shown.
    """
    done = [record for record in records if record.outcome is Outcome.COMPLETED]
    found = []
    if metrics.failed:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(metrics.failures.items()))
        found.append(f"{metrics.failed} of {len(records)} requests failed ({kinds}); latencies are those of the others")
    elif metrics.refused:
        found.append(f"{metrics.refused} of {len(records)} requests were refused; latencies are those of the others")
    if metrics.counted_by.get(CountedBy.CHUNKS):
        found.append(
            f"{metrics.counted_by[CountedBy.CHUNKS]} answers came without usage: their tokens are taken to be as many "
            "as their chunks"
        )
    final = [record for record in done if record.counted_by is CountedBy.FINAL_USAGE]
    tokens, chunks = sum(record.output_tokens for record in final), sum(len(record.chunks) for record in final)
    if tokens != chunks:
        found.append(
            f"ITL are gaps between chunks: usage came at the end only, {tokens} tokens of {len(final)} answers in "
            f"{chunks} chunks with text"
        )
    short = sum(record.output_tokens < asked_tokens for record in done) if asked_tokens is not None else 0
    if short:
        found.append(f"{short} answers have fewer tokens than the {asked_tokens} asked for")
    counts = {record.prompt_tokens for record in done if record.prompt_tokens is not None}
    if prompt_tokens is not None and counts and counts != {prompt_tokens}:
        found.append(
            f"the server counts {min(counts)} to {max(counts)} tokens in a prompt that has {prompt_tokens} by "
            "--tokenizer: it adds special tokens, or has another tokenizer"
        )
    if repeats:
        found.append("prompts occur more than once, which a server with a prefix cache answers sooner")
    if rate is not None and metrics.lateness_ms is not None:
        late = sum(1000 * (record.started_s - record.intended_s) > _LATE_MS for record in records)
        cause = "the client is late" if limit is None else "they waited for the limit of concurrency"
        if late:
            found.append(
                f"{late} requests were sent over {_LATE_MS:g} ms late: {cause}; see TTFT from the intended start"
            )
    above = [level for level in levels if len(done) * (100 - level) < 100]
    if above:
        names = ", ".join(f"p{level:g}" for level in above)
        found.append(f"{names}: of {len(done)} requests not one lies above, so it is nearly the largest")
    return tuple(found)


def load_headings(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the table of loads; goodput is last, where there is an objective."""
    return (*_LOADS, *(() if document["config"]["objective"] is None else ("goodput /s",)))


def load_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line for each cell: the load, what became of it, and throughput, as text."""
    rows: list[tuple[str, ...]] = []
    for cell in document["cells"]:
        metrics = cell["metrics"]
        outcomes = metrics["outcomes"]
        completed, refused, cut = (
            outcomes.get(name, 0) for name in (Outcome.COMPLETED, Outcome.REFUSED, Outcome.INTERRUPTED)
        )
        good = metrics["goodput_requests_per_s"]
        rows.append(
            (
                *_load(cell),
                str(completed),
                str(refused),
                str(sum(outcomes.values()) - completed - refused - cut),
                f"{metrics['requests_per_s']:.2f}",
                f"{metrics['output_tokens_per_s']:.1f}",
                f"{metrics['mean_concurrency']:.1f}",
                *(() if good is None else (f"{good:.2f}",)),
            )
        )
    return rows


def latency_headings(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the table of latencies."""
    levels = (f"p{level:g}" for level in document["config"]["percentiles"])
    return ("rate /s", "at most", "ms", "mean", *levels)


def latency_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line for each cell and latency, in milliseconds, as text.

    Where all were to be sent at once nothing has an intended start of its own, and what is measured from it is left
    out.
    """
    rows = []
    for cell in document["cells"]:
        for name, label in _LATENCIES:
            spread = cell["metrics"][name]
            if spread is None or (cell["request_rate"] is None and name in ("ttft_intended_ms", "lateness_ms")):
                continue
            figures = (spread["mean"], *spread["percentiles"].values())
            rows.append((*_load(cell), label, *map(_ms, figures)))
    return rows


def serve_title(document: Mapping[str, Any]) -> str:
    """What was loaded, with what."""
    config, server = document["config"], document["server"]
    source = f"prompts of {config['prompts']}"
    if config["prompts"] is None:
        shared = f" after {config['prefix_len']} shared" if config["prefix_len"] else ""
        source = f"{config['input_len']} {'words' if config['tokenizer'] is None else 'tokens'}{shared}"
    return (
        f"{server['model']} at {config['endpoint']}, {config['num_prompts']} requests: {source} in, "
        f"{config['output_len']} tokens out; {document['machine']['cpu_model']}"
    )


def serve_notes(document: Mapping[str, Any]) -> list[str]:
    """What must be said beside the tables."""
    notes = []
    if document["interrupted"]:
        left = sum(cell["not_sent"] for cell in document["cells"])
        notes.append(f"Interrupted: this is part of a result; {left} requests of the last line were not sent.")
    cells = document["cells"]
    loads: dict[str, list[str]] = {}
    for cell in cells:
        for warning in cell["warnings"]:
            loads.setdefault(warning, []).append(_words(cell))
    for warning, where in loads.items():
        # What holds everywhere is said once, and without a place.
        place = "" if len(where) == len(cells) else f" ({'; '.join(where)})"
        notes.append(f"Warning{place}: {warning}.")
    objective = document["config"]["objective"]
    if objective is not None:
        limits = ", ".join(
            f"{name.removesuffix('_ms').upper()} ≤ {limit:g} ms"
            for name, limit in objective.items()
            if limit is not None
        )
        notes.append(f"Goodput: requests per second with {limits}.")
        intended = [cell["metrics"]["goodput_intended_requests_per_s"] for cell in cells if cell["request_rate"]]
        if intended:
            notes.append(f"Goodput from intended starts: {', '.join(f'{value:.2f}' for value in intended)} /s.")
    busiest = max(cell["client_cpu_fraction"] for cell in cells)
    shares = "the processor it shares with the server" if document["server"]["same_machine"] else "its processor"
    notes.append(f"The client took up to {busiest:.0%} of a core of {shares}.")
    if busiest > _BUSY_CLIENT:
        notes.append("Warning: the client itself may have been what limits these figures.")
    return notes


def serve_markdown(document: Mapping[str, Any]) -> str:
    """Title, tables and notes as Markdown."""
    parts = [serve_title(document)]
    for headings, rows in (
        (load_headings(document), load_rows(document)),
        (latency_headings(document), latency_rows(document)),
    ):
        lines = ["| " + " | ".join(headings) + " |", "|" + " ---: |" * len(headings)]
        parts.append("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]))
    parts.append("\n".join(f"- {note}" for note in serve_notes(document)))
    return "\n\n".join(parts) + "\n"


def print_serve_bench(document: Mapping[str, Any], console: Console | None = None) -> None:
    """Print title, tables and notes to `console` (None: stdout)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A narrower terminal wraps, and a file wants every column.
    out = console or Console(width=_WIDEST_TABLE)
    out.print(Text(serve_title(document), style="bold"), soft_wrap=True)
    for headings, rows in (
        (load_headings(document), load_rows(document)),
        (latency_headings(document), latency_rows(document)),
    ):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "ms" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        out.print(table)
    for note in serve_notes(document):
        out.print(Text(note), soft_wrap=True)


def _request(record: RequestRecord) -> dict[str, Any]:
    """A request of the document; times in seconds, to the microsecond."""
    plain = asdict(record)
    for name in ("intended_s", "started_s", "ended_s", "finished_s"):
        plain[name] = None if plain[name] is None else round(plain[name], 6)
    del plain["chunks"]
    return plain | {
        "chunk_s": [round(chunk.at_s, 6) for chunk in record.chunks],
        "chunk_tokens": [chunk.tokens for chunk in record.chunks],
    }


def _load(cell: Mapping[str, Any]) -> tuple[str, str]:
    rate, limit = cell["request_rate"], cell["max_concurrency"]
    return ("inf" if rate is None else f"{rate:g}", "" if limit is None else str(limit))


def _words(cell: Mapping[str, Any]) -> str:
    rate, limit = _load(cell)
    return f"rate {rate}" + (f", at most {limit}" if limit else "")


def _ms(value: float) -> str:
    """Milliseconds in three digits or so."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
