"""What `losa doctor` found: dataclasses, advice, the JSON document of docs/kernel-bench.md, and tables to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losa_export.errors import MissingDependencyError
from losa_export.eval.kernel_bench_report import microseconds, wide_console
from losa_export.eval.kernel_bench_roofline import Crossing, Pays
from losa_export.eval.kernel_bench_weights import value_kind
from losa_export.eval.machine import MachineRecord
from losa_export.eval.stats import RatioEstimate
from losa_export.files import write_text_atomic
from losa_export.runtimes.native import VALUE_TYPES

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "losa-doctor"
SCHEMA_VERSION = 2
# What a user would run instead, and the engines that stand for it: the fastest of them counts.
RIVALS: Mapping[str, str] = {"dense fp32": "ort-fp32", "dense int8": "ort-int8", "dense int4": "ort-int4"}
# A rounder kind of value is advised only if it is this much faster than a more exact one.
_WORTH_ROUNDING = 1.05


@dataclass(frozen=True)
class Product:
    """One engine at one sparsity (of a peer: 0), one token.

    Attributes:
        name: as in the kernel benchmark.
        value: kind of our values; None for a peer.
        copies: distinct weights that each run went through.
        weight_bytes: that a product reads.
        median_us: measured.
        limit_us: reading the weight at the memory bandwidth of the same run.
        against: ratio to 'dense fp32', 'dense int8' and 'dense int4'; empty for a peer.
        samples_us: block → microseconds of each product.
    """

    name: str
    value: str | None
    sparsity: float
    copies: int
    weight_bytes: int
    median_us: float
    limit_us: float
    against: dict[str, RatioEstimate]
    samples_us: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Payoff:
    """From which sparsity one kind of value pays against one rival.

    Attributes:
        measured: on this machine.
        by_bytes: from where ours takes fewer bytes: the limit where memory is; None if it never does.
    """

    value: str
    rival: str
    rival_engine: str
    measured: Crossing
    by_bytes: float | None


@dataclass(frozen=True)
class DoctorReport:
    """Everything found. Without the package onnx, `products` and what follows from it are empty.

    Attributes:
        bandwidth_one: bytes a second that one thread reads.
        bandwidth_all: that all `threads` read together.
        bandwidth_samples: the latter again, between the products measured.
        missing: why nothing was multiplied; None if it was.
    """

    created_utc: str
    config: dict[str, Any]
    threads: int
    machine: MachineRecord
    kernel: dict[str, Any]
    ring_bytes: int
    bandwidth_one: float
    bandwidth_all: float
    bandwidth_samples: tuple[float, ...]
    products: tuple[Product, ...]
    payoffs: tuple[Payoff, ...]
    blocks: int
    disturbed_blocks: tuple[int, ...]
    advice: tuple[str, ...]
    warnings: tuple[str, ...]
    elapsed_s: float
    missing: MissingDependencyError | None = None

    def as_dict(self) -> dict[str, Any]:
        """The document: plain dictionaries, lists and numbers."""
        fields = {name: value for name, value in vars(self).items() if name not in ("missing", "machine")}
        fields["products"] = [asdict(product) for product in self.products]
        fields["payoffs"] = [asdict(payoff) for payoff in self.payoffs]
        document = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            **fields,
            "machine": self.machine.as_dict(),
            "missing": None if self.missing is None else str(self.missing),
        }
        for product in document["products"]:
            product["samples_us"] = [[round(value, 3) for value in block] for block in product["samples_us"]]
        plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
        return plain

    def write(self, path: Path) -> None:
        """Write the document, whole or not at all. Raises: OutputError."""
        write_text_atomic(path, json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")


def advise(products: Sequence[Product]) -> list[str]:
    """Which kind of value to store at which sparsity, in sentences.

    At each sparsity the most exact kind is chosen that is within a twentieth of the fastest one's time.
    """
    order = {name: rank for rank, name in enumerate(VALUE_TYPES)}
    choices: list[tuple[float, Product]] = []
    for sparsity in sorted({product.sparsity for product in products if product.value and product.sparsity > 0}):
        ours = [product for product in products if product.value and product.sparsity == sparsity]
        fastest = min(product.median_us for product in ours)
        near = [product for product in ours if product.median_us <= _WORTH_ROUNDING * fastest]
        choices.append((sparsity, min(near, key=lambda one: (order[value_kind(str(one.value)).type], one.median_us))))
    found = []
    while choices:
        gains = _gains(choices[0][1])
        count = next(
            (i for i, (_, one) in enumerate(choices) if (one.value, _gains(one)) != (choices[0][1].value, gains)),
            len(choices),
        )
        group, choices = choices[:count], choices[count:]
        found.append(_sentence(group))
    return found


def doctor_lines(document: Mapping[str, Any]) -> list[str]:
    """What is known of the machine, before any table."""
    machine, kernel = document["machine"], document["kernel"]
    one, every = document["bandwidth_one"] / 1e9, document["bandwidth_all"] / 1e9
    threads = document["threads"]
    caches = ", ".join(
        f"L{cache['level']} {cache['size_bytes'] >> 10} KiB"
        for cache in machine["caches"]
        if cache["kind"] != "Instruction"
    )
    bandwidth = f"{one:.1f} GB/s with 1 thread"
    if threads > 1:
        bandwidth += f", {every:.1f} GB/s with {threads}"
    return [
        f"Processor: {machine['cpu_model']}, {machine['physical_cores']} cores{f', {caches}' if caches else ''}",
        f"Kernels: {kernel['row']} (this CPU runs {', '.join(kernel['available_rows'])}), version {kernel['version']}",
        f"Memory: {bandwidth}{', in large pages' if kernel.get('large_pages') else ''}",
    ]


def payoff_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table of crossings: kind of value, then a cell for each rival."""
    cells = {(payoff["value"], payoff["rival"]): payoff_text(payoff) for payoff in document["payoffs"]}
    values = dict.fromkeys(value for value, _ in cells)
    return [(value, *(cells.get((value, rival), "") for rival in RIVALS)) for value in values]


def payoff_text(payoff: Mapping[str, Any]) -> str:
    """One crossing in words, with what bytes alone allow."""
    measured = payoff["measured"]
    sparsity, earliest, latest = (measured[name] for name in ("sparsity", "earliest", "latest"))
    match measured["pays"]:
        case Pays.EVERYWHERE:
            text = "at any sparsity"
        case Pays.NOWHERE:
            text = "no speed-up"
        case Pays.FROM:
            text = f"from {sparsity:.0%} ({earliest:.0%}–{latest:.0%})"
        case _:
            text = f"undecided, not before {earliest:.0%}"
    limit = payoff["by_bytes"]
    return f"{text}; bytes: {'never' if limit is None else 'any' if limit == 0 else f'{limit:.0%}'}"


def time_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table of times: ours over the sparsities, then the peers."""
    products = document["products"]
    sparsities = _sparsities(document)
    ours = {(product["value"], product["sparsity"]): product for product in products if product["value"]}
    rows = []
    for value in dict.fromkeys(value for value, _ in ours):
        cells = [ours.get((value, sparsity)) for sparsity in sparsities]
        rows.append((value, *("" if cell is None else _time_text(cell) for cell in cells)))
    rows += [(one["name"], _time_text(one), *[""] * (len(sparsities) - 1)) for one in products if not one["value"]]
    return rows


def print_doctor(document: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what was found to `console` (None: stdout)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = console or wide_console()
    for line in doctor_lines(document):
        out.print(Text(line), soft_wrap=True)
    if document["products"]:
        shape = document["config"]["shape"].replace("x", " x ")
        tables = (
            (
                f"Share of zeros from which one token is faster ({shape}); bytes: from which fewer bytes are read",
                ("values", *(f"against {rival}" for rival in RIVALS)),
                payoff_rows(document),
            ),
            (
                "Time of a product, and the part that reading its bytes from memory would take",
                ("", *(f"{sparsity:.0%} zeros" for sparsity in _sparsities(document))),
                time_rows(document),
            ),
        )
        for title, headings, rows in tables:
            out.print()
            out.print(Text(title, style="bold"), soft_wrap=True)
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
            for heading in headings:
                table.add_column(heading, no_wrap=True)
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            out.print(table)
        out.print(
            Text(
                f"{document['blocks']} interleaved blocks, {len(document['disturbed_blocks'])} disturbed; "
                f"{document['elapsed_s']:.0f} s in all."
            ),
            soft_wrap=True,
        )
    for line in document["advice"]:
        out.print(Text(f"Advice: {line}."), soft_wrap=True)
    for warning in document["warnings"]:
        out.print(Text(f"Warning: {warning}."), soft_wrap=True)


def _gains(product: Product) -> bool:
    """Whether it is shown to beat dense int4, which a user would pick instead of zeros."""
    return product.against["dense int4"].low > 1


def _stored(product: Product) -> str:
    """What to ask `losa export` for."""
    kind = value_kind(str(product.value))
    return f"{kind.type} (8-bit activations)" if kind.activation_bits == 8 else kind.type


def _sentence(group: Sequence[tuple[float, Product]]) -> str:
    first, last = group[0], group[-1]
    where = f"{first[0]:.0%}" if len(group) == 1 else f"{first[0]:.0%} to {last[0]:.0%}"
    ratios = [product.against["dense int4"].ratio for _, product in group]
    low, high = min(ratios), max(ratios)
    times = f"{low:.2f}x" if len(group) == 1 else f"{low:.2f}x to {high:.2f}x"
    if _gains(first[1]):
        return f"at {where} zeros store {_stored(first[1])}: {times} the speed of dense int4"
    nothing = "no speed-up over dense int4 is shown"
    return f"at {where} zeros {nothing}: {_stored(first[1])}, the best, runs at {times} its speed"


def _sparsities(document: Mapping[str, Any]) -> list[float]:
    return sorted({product["sparsity"] for product in document["products"] if product["value"]})


def _time_text(product: Mapping[str, Any]) -> str:
    return f"{microseconds(product['median_us'])} ({product['limit_us'] / product['median_us']:.0%})"
