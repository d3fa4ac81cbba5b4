"""What benchmarks timed, sorted by what it really was: the bytes an engine read, the engine, and the work.

A folder's name says nothing: two exports may bear the same one. So records are joined by the SHA-256 of their files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from losa_export.eval.stats import median

Metric = Literal["decode", "prefill"]
SIDES = ("candidate", "baseline")
# torch's names, of a checkpoint, and ours.
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Setting:
    """Where what was timed. Only times of one setting may stand side by side."""

    processor: str
    cores: int
    threads: int
    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def work(self) -> str:
        """The work in words."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.prompt_tokens} + {self.new_tokens} tokens, {threads}{batch}"

    def __str__(self) -> str:
        return f"{self.work}, on {self.processor} ({self.cores} core{'s' if self.cores > 1 else ''})"


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median, and how far it is uncertain: by the median deviation of the run or, of several runs
    of the same, the outermost.
    """

    middle: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """Such as '2.51 (2.48 – 2.55)'."""
        return f"{self.middle:.4g} ({self.low:.4g} – {self.high:.4g})"


@dataclass(frozen=True)
class Model:
    """Files in an engine.

    Attributes:
        number: that figures call it by, from 1.
        folder: the last name of its folder, a label and no more.
        runtime: the engine.
        engine: with its version and our kernels' row, if one ran.
        weights: 'sparse' or 'dense', as far as export.json tells; else ''.
        values: type of the weights' values.
        zeros: fraction of zeros in the linears; None if export.json does not tell.
        read: SHA-256 of the files that the engine read; of all in the folder where it does not tell which.
        files: SHA-256 of all files of the folder.
        model_bytes: of graph and weights.
        fingerprint: the start of the SHA-256 of the largest file read.
    """

    number: int
    folder: str
    runtime: str
    engine: str
    weights: str
    values: str
    zeros: float | None
    read: frozenset[str]
    files: frozenset[str]
    model_bytes: int
    fingerprint: str

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.folder} ({self.runtime})"

    @property
    def bits(self) -> int | None:
        """Bits of a value by its type's name, such as 8 of 'int8' and 4 of 'GGUF Q4_K_M'; None if that tells none."""
        found = re.search(r"(?<!\d)(32|16|[2-8])(?!\d)", self.values)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Timed:
    """One model under one setting, over all benchmarks of it.

    Attributes:
        is_baseline: whether another was held against it.
        checked_kl: largest KL, nats, of its answers from those of another engine with the same weights, before it was
            timed; None where no other engine can read its files.
    """

    model: Model
    setting: Setting
    decode: Spread
    prefill: Spread
    peak_rss_bytes: int | None
    load_ms: float
    is_baseline: bool
    checked_kl: float | None

    def spread(self, metric: Metric) -> Spread:
        """Of decoding or of prefill."""
        return self.decode if metric == "decode" else self.prefill


def timings(documents: Sequence[Mapping[str, Any]]) -> list[Timed]:
    """Everything that was timed, each model under each setting once; models numbered as they first appear."""
    numbers: dict[tuple[frozenset[str], str], Model] = {}
    found: dict[tuple[int, Setting], list[tuple[Mapping[str, Any], str]]] = {}
    for document in documents:
        for side in SIDES:
            model = _model(len(numbers) + 1, document[side])
            model = numbers.setdefault((model.read, model.runtime), model)
            found.setdefault((model.number, setting_of(document)), []).append((document, side))
    models = {model.number: model for model in numbers.values()}
    return [_timed(models[number], setting, runs) for (number, setting), runs in found.items()]


def setting_of(document: Mapping[str, Any]) -> Setting:
    """What a benchmark timed, and where."""
    machine, config = document["machine"], document["config"]
    return Setting(
        machine["cpu_model"],
        machine["physical_cores"],
        document["threads"],
        config["batch"],
        config["prompt_tokens"],
        config["new_tokens"],
    )


def _model(number: int, side: Mapping[str, Any]) -> Model:
    facts, engine = side["model"], side["engine"]
    hashes = {file["name"]: file["sha256"] for file in side["files"]}
    sizes = {name: size for name, size in engine["model_files"].items() if name in hashes}
    kernel = f", kernels {engine['kernel_row']}" if engine["kernel_row"] else ""
    dtype = engine.get("details", {}).get("dtype")
    return Model(
        number=number,
        folder=side["folder"],
        runtime=side["runtime"],
        engine=f"{engine['engine']} {engine['version']}{kernel}",
        weights=facts.get("weights") or "",
        values=facts.get("values") or _DTYPES.get(dtype, dtype) or "fp32",
        zeros=facts.get("sparsity_fraction"),
        read=frozenset(hashes[name] for name in sizes) or frozenset(hashes.values()),
        files=frozenset(hashes.values()),
        model_bytes=side["model_bytes"],
        fingerprint=hashes[max(sizes, key=lambda name: sizes[name])][:12] if sizes else "",
    )


def _timed(model: Model, setting: Setting, runs: Sequence[tuple[Mapping[str, Any], str]]) -> Timed:
    peaks = [document[side]["peak_rss_bytes"] for document, side in runs]
    known = [peak for peak in peaks if peak is not None]
    checks = [kl for document, side in runs if (kl := _checked_kl(document["answers"], side)) is not None]
    return Timed(
        model=model,
        setting=setting,
        decode=_spread([document[side]["decode"] for document, side in runs]),
        prefill=_spread([document[side]["prefill"] for document, side in runs]),
        peak_rss_bytes=max(known, default=None),
        load_ms=median([document[side]["load_median_ms"] for document, side in runs]),
        is_baseline=any(side == "baseline" for _, side in runs),
        checked_kl=max(checks, default=None),
    )


def _spread(found: Sequence[Mapping[str, float]]) -> Spread:
    return Spread(
        median([one["median_ms"] for one in found]),
        min(one["median_ms"] - one["mad_ms"] for one in found),
        max(one["median_ms"] + one["mad_ms"] for one in found),
    )


def _checked_kl(answers: Mapping[str, Any], side: str) -> float | None:
    """Of a side that was held against another engine on the files of its own folder."""
    check = answers[side]
    if check is None or answers["mode"] != "own":
        return None
    figures = [check["gate"][part] for part in ("prefill", "decode", "batch3")] + [check["workload"]]
    return float(max(one["kl_max"] for one in figures))
