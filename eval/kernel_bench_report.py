"""What a kernel benchmark found: dataclasses, the JSON document of docs/kernel-bench.md, and tables to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losa_export.eval.machine import MachineRecord
from losa_export.eval.stats import RatioEstimate
from losa_export.files import write_text_atomic

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "losa-kernel-bench"
SCHEMA_VERSION = 2
_WIDEST_TABLE = 200
_COLUMNS = ("kernel", "B/weight", "time", "GB/s", "of DRAM", "Gop/s", "vs ORT fp32", "vs dense int4")


@dataclass(frozen=True)
class KernelTiming:
    """One engine on one case.

    Attributes:
        name: 'losa-int8@avx2', 'ort-int4-block128', …
        kernel_row: of ours; None for a peer.
        copies: distinct weights that each run went through.
        weight_bytes: stored bytes of one of them, scales and mask included.
        error: largest difference from the exact product, over the root mean square of the outputs.
        samples_us: block → microseconds per product of each timed run.
        median_us, mad_us: over all of them.
        bytes_per_weight: `weight_bytes` over N · K.
        gigabytes_per_s: `weight_bytes` over the median time, 1e9 bytes.
        bandwidth_share: that over the memory bandwidth of the same run; None where it was not measured.
        gigaops_per_s: 2 · M · N · K, zeros counted like others, over the median time.
        drifts: whether the two halves of its blocks have medians more than a tenth apart.
        against_fp32: ratio to ONNX Runtime's float32 MatMul; None for itself, and where it was not measured.
        against_int4: ratio to the fastest dense int4 of the case, likewise.
    """

    name: str
    kernel_row: str | None
    copies: int
    weight_bytes: int
    error: float
    samples_us: tuple[tuple[float, ...], ...]
    median_us: float
    mad_us: float
    bytes_per_weight: float
    gigabytes_per_s: float
    bandwidth_share: float | None
    gigaops_per_s: float
    drifts: bool
    against_fp32: RatioEstimate | None
    against_int4: RatioEstimate | None


@dataclass(frozen=True)
class KernelCase:
    """One shape, sparsity and number of tokens.

    Attributes:
        names: what has this shape: 'smollm2 qkv', …
        rows, columns: N and K.
        sparsity: of our weights.
        tokens: M.
        strongest_int4: the peer behind `against_int4`; None if no dense int4 was measured.
        bandwidth_samples: bytes a second, read between the turns.
        disturbed_blocks: indices of blocks in which a spin ran slow.
        elapsed_s: of the timed part.
        timings: one of each engine, in the order measured.
    """

    names: tuple[str, ...]
    rows: int
    columns: int
    sparsity: float
    tokens: int
    strongest_int4: str | None
    bandwidth_samples: tuple[float, ...]
    disturbed_blocks: tuple[int, ...]
    elapsed_s: float
    timings: tuple[KernelTiming, ...]

    @property
    def blocks(self) -> int:
        """Blocks measured."""
        return len(self.timings[0].samples_us)


@dataclass(frozen=True)
class KernelBenchReport:
    """Everything the JSON document holds. Ratios are peer time over own time: above 1 the engine is faster."""

    created_utc: str
    config: dict[str, Any]
    threads: int
    ring_bytes: int
    machine: MachineRecord
    kernel: dict[str, Any]
    cases: tuple[KernelCase, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The document: plain dictionaries, lists and numbers."""
        document = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)}
        document["machine"] = self.machine.as_dict()
        for case in document["cases"]:
            for timing in case["timings"]:
                timing["samples_us"] = [[round(value, 3) for value in block] for block in timing["samples_us"]]
        plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
        return plain

    def write(self, path: Path) -> None:
        """Write the document, whole or not at all. Raises: OutputError."""
        write_text_atomic(path, json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")


def kernel_rows(case: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The lines of a case's table, as text."""
    return [
        (
            timing["name"],
            f"{timing['bytes_per_weight']:.3f}",
            microseconds(timing["median_us"]),
            f"{timing['gigabytes_per_s']:.1f}",
            "" if timing["bandwidth_share"] is None else f"{timing['bandwidth_share']:.0%}",
            f"{timing['gigaops_per_s']:.0f}",
            ratio_text(timing["against_fp32"]),
            ratio_text(timing["against_int4"]),
        )
        for timing in case["timings"]
    ]


def case_title(case: Mapping[str, Any]) -> str:
    """Which product the table is about."""
    names = f" ({', '.join(case['names'])})" if case["names"] else ""
    tokens = f"{case['tokens']} token{'s' if case['tokens'] > 1 else ''}"
    return f"{case['rows']} x {case['columns']}{names}, {tokens}, {case['sparsity']:.0%} zeros"


def case_notes(case: Mapping[str, Any]) -> list[str]:
    """What must be said beside the table."""
    blocks = len(case["timings"][0]["samples_us"])
    note = f"{blocks} interleaved blocks in {case['elapsed_s']:.0f} s, {len(case['disturbed_blocks'])} disturbed"
    if case["bandwidth_samples"]:
        ordered = sorted(case["bandwidth_samples"])
        note += f"; memory {ordered[len(ordered) // 2] / 1e9:.1f} GB/s"
    if case["strongest_int4"]:
        note += f"; the fastest dense int4 is {case['strongest_int4']}"
    return [note + "."]


def print_kernel_bench(document: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a table and notes for each case to `console` (None: stdout)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = console or wide_console()
    threads = document["threads"]
    machine = f"{document['machine']['cpu_model']}, {threads} thread{'s' if threads > 1 else ''}"
    for case in document["cases"]:
        out.print(Text(f"{case_title(case)}; {machine}", style="bold"), soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for heading in _COLUMNS:
            left = heading == "kernel" or heading.startswith("vs")
            table.add_column(heading, justify="left" if left else "right", no_wrap=True)
        for row in kernel_rows(case):
            table.add_row(*(Text(cell) for cell in row))
        out.print(table)
        for note in case_notes(case):
            out.print(Text(note), soft_wrap=True)
        out.print()
    for warning in document["warnings"]:
        out.print(Text(f"Warning: {warning}."), soft_wrap=True)


def wide_console() -> Console:
    """Standard output, wide enough for every word of a table: a narrower terminal wraps, and a file wants them all."""
    from rich.console import Console

    return Console(width=_WIDEST_TABLE)


def ratio_text(estimate: Mapping[str, Any] | None) -> str:
    """A ratio with its interval; what is no gain, or may be none, is said in words."""
    if estimate is None:
        return ""
    text = f"{estimate['ratio']:.2f}x ({estimate['low']:.2f}–{estimate['high']:.2f})"
    if estimate["high"] < 1:
        return f"{text} no speed-up"
    if estimate["low"] <= 1:
        return f"{text} no speed-up shown"
    return text


def microseconds(value: float) -> str:
    """Microseconds in three digits or so, as ms from 10,000 on."""
    return f"{value / 1000:.1f} ms" if value >= 10_000 else f"{value:.0f} µs" if value >= 100 else f"{value:.1f} µs"
