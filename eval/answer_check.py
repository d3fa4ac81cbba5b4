"""No timing without an answer: the two engines, or each engine and a second opinion, must agree first."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from losa_export.errors import BenchmarkError, GateError
from losa_export.eval.answers import Answers, Workload
from losa_export.eval.bench_report import AnswerCheck, AnswerMode, FileRecord, Side, SideCheck
from losa_export.eval.engine import Engine
from losa_export.eval.parity import GateReport, GateThresholds, position_errors, summarise, thresholds_for
from losa_export.onnx_file import MANIFEST_FILE
from losa_export.runtimes.base import RuntimeName

if TYPE_CHECKING:
    from losa_export.eval.bench import AnswerOption, BenchConfig

# The same weights on another engine. A checkpoint in torch has no second opinion: it is the definition. Beside a GGUF
# file lies a checkpoint of the very weights in it.
SECOND_ENGINE: dict[RuntimeName, RuntimeName] = {
    "ort": "ort-stock",
    "ort-stock": "ort",
    "genai": "ort-stock",
    "deepsparse": "ort-stock",
    "openvino": "ort-stock",
    "optimum": "ort-stock",
    "llamacpp": "torch",
}

# What engines have passed on their own, by all that a check depends on: the benchmarks of a sweep or a study share one,
# since a check may take far longer than the timing.
PassedChecks = MutableMapping[Hashable, SideCheck]

_MODEL_FACTS: tuple[str, ...] = ("weights", "values", "head", "sparsity_fraction")


def choose_mode(option: AnswerOption, candidate: Path, baseline: Path) -> tuple[AnswerMode, str]:
    """Whether the two folders must answer alike, and what decided it.

    'same' and 'own' hold as given; 'auto' looks at what both folders' export.json record: it is 'own' where their
    weights are of different types or sources, and 'same' where one does not say.

    Returns: the mode, and 'option', 'value types', 'weights digest' or 'default'.
    """
    if option != "auto":
        return option, "option"
    if _rounding(candidate) != _rounding(baseline):
        return "own", "value types"
    digests = [source_digest(folder) for folder in (candidate, baseline)]
    if None in digests:
        return "same", "default"
    return ("same" if digests[0] == digests[1] else "own"), "weights digest"


def source_digest(folder: Path) -> str | None:
    """Digest of the weights an export was made from, by its export.json; None if it does not say."""
    source = _manifest(folder).get("source")
    digest = source.get("weights_sha256") if isinstance(source, dict) else None
    return digest if isinstance(digest, str) else None


def model_facts(folder: Path) -> dict[str, object]:
    """What an export holds, by its export.json; empty if it has none."""
    manifest = _manifest(folder)
    return {name: manifest[name] for name in _MODEL_FACTS if name in manifest}


def _manifest(folder: Path) -> dict[str, object]:
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _rounding(folder: Path) -> tuple[object, ...]:
    """How an export rounded its weights; nothing but 'fp32' for one that did not, or does not say."""
    manifest = _manifest(folder)
    types = manifest.get("values") or "fp32", manifest.get("head") or "fp32"
    return ("fp32",) if types == ("fp32", "fp32") else (*types, manifest.get("group"))


def _thresholds(config: BenchConfig, side: Side) -> GateThresholds:
    """What counts as the same answer of a side's folder in two engines, one of which may round activations."""
    activations = _manifest(config.folder(side)).get("activations")
    return thresholds_for(activations) if isinstance(activations, str) else config.thresholds


def check_answers(
    mode: AnswerMode,
    decided_by: str,
    config: BenchConfig,
    engines: Mapping[Side, Engine],
    workload: Workload,
    another: Callable[[Side, RuntimeName], Engine],
    *,
    files: Mapping[Side, tuple[FileRecord, ...]],
    threads: int,
    passed: PassedChecks,
) -> AnswerCheck:
    """Hold the engines against their references, on the check's prompts and on the work to be timed.

    Args:
        mode: 'same': the baseline is the reference; 'own': each side's folder in another engine is.
        decided_by: what decided the mode, for the record.
        config: names, runtimes and thresholds.
        engines: loaded, one a side.
        workload: token ids of the check and of the timed work.
        another: loads a side's folder in a second engine; closed here.
        files: of each side's folder, by name and digest.
        threads: of each engine.
        passed: what a side in mode 'own' need not show again; what it shows here is added.

    Raises:
        BenchmarkError: answers differ; the message names the first output that diverges.
    """
    if mode == "same":
        hint = "; if the two hold different weights on purpose, say --answers own"
        side_check = _hold(
            engines["candidate"],
            engines["baseline"],
            config.label("baseline"),
            workload,
            _thresholds(config, "candidate"),
            hint,
        )
        return AnswerCheck(mode, decided_by, candidate=side_check, baseline=None)
    checks: dict[Side, SideCheck | None] = {"candidate": None, "baseline": None}
    for side, engine in engines.items():
        name = SECOND_ENGINE.get(config.runtime(side))
        if name is None:
            continue
        thresholds = _thresholds(config, side)
        key = (config.runtime(side), files[side], threads, workload.key(), thresholds)
        if key not in passed:
            with closing(another(side, name)) as second:
                passed[key] = _hold(engine, second, f"the same files in {name}", workload, thresholds, "")
        checks[side] = passed[key]
    return AnswerCheck(mode, decided_by, candidate=checks["candidate"], baseline=checks["baseline"])


def _hold(
    engine: Engine, reference: Engine, against: str, workload: Workload, thresholds: GateThresholds, hint: str
) -> SideCheck:
    answers: Answers = reference.call("answers", prompts=workload.check_prompts, new_tokens=workload.check_new_tokens)
    try:
        report: GateReport = engine.call("gate", answers=answers, thresholds=thresholds)
        errors = position_errors(
            reference.call("workload_logits", workload=workload), engine.call("workload_logits", workload=workload)
        )
    except GateError as error:
        raise BenchmarkError(f"nothing was timed, since the answers differ from {against}: {error}{hint}") from error
    figures = summarise([errors])
    diverging, allowed = int(np.count_nonzero(thresholds.diverge(errors))), thresholds.strays(figures.positions)
    if diverging > allowed:
        raise BenchmarkError(
            f"nothing was timed, since {engine.label} differs from {against} on the prompt to be timed, in "
            f"{diverging} of {figures.positions} positions, of which {allowed} may: "
            f"relative error {figures.max_relative_error:.3g} (limit {thresholds.max_relative_error:.3g}), "
            f"KL {figures.kl_max:.3g} (limit {thresholds.max_kl:.3g}){hint}"
        )
    return SideCheck(against, report, figures)
