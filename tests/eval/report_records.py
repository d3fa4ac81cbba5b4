"""Records as `losa bench`, `losa eval`, `losa doctor` and `losa train` write them, small and of invented figures."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from losa_export.eval import bench_report, doctor_report, evaluation
from losa_export.eval.bench_sweep import SweepReport
from losa_export.eval.machine import machine_record
from losa_export.training.journal import RoundRecord, write_journal

MACHINE = machine_record().as_dict()


def sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def side(
    folder: str,
    runtime: str,
    decode: float,
    *,
    weights: str | None = None,
    model: dict[str, Any] | None = None,
    file: str = "model.onnx",
    size: int = 2**20,
    beside: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A side of a benchmark. `weights` names the content of its model file, the folder's name if it is None."""
    files = {file: sha(weights or folder), "tokenizer.json": sha("tokenizer"), **(beside or {})}
    return {
        "folder": folder,
        "runtime": runtime,
        "engine": {
            "name": runtime,
            "engine": runtime.partition("-")[0],
            "version": "1.0",
            "kernel_row": "avx2" if runtime == "ort" else None,
            "model_files": {file: size},
        },
        "model": model or {},
        "files": [{"name": name, "bytes": size, "sha256": digest} for name, digest in files.items()],
        "model_bytes": size,
        "peak_rss_bytes": 2**28,
        "load_median_ms": 40.0,
        "prefill": {"median_ms": 5 * decode, "mad_ms": 0.2, "tokens_per_s": 1.0},
        "decode": {"median_ms": decode, "mad_ms": 0.1, "tokens_per_s": 1000 / decode},
    }


def sparse(zeros: float | None, values: str = "int8") -> dict[str, Any]:
    facts: dict[str, Any] = {"weights": "sparse", "values": values}
    return facts if zeros is None else facts | {"sparsity_fraction": zeros}


DENSE = side("dense", "ort-stock", 10.0, model={"weights": "dense", "values": None}, size=4 * 2**20)


def bench(candidate: dict[str, Any], baseline: dict[str, Any] = DENSE, **changes: Any) -> dict[str, Any]:
    """A benchmark of two samples."""
    ratio = baseline["decode"]["median_ms"] / candidate["decode"]["median_ms"]
    estimate = {"ratio": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio, "verdict": "FASTER", "blocks": 8}
    estimate |= {"confidence": 0.95, "smallest_shown": 1.1}
    figures = {"max_relative_error": 1e-3, "kl_max": 2e-3}
    check = {
        "against": "the same files in another engine",
        "gate": dict.fromkeys(("prefill", "decode", "batch3"), figures) | {"greedy": {"equal": 9, "tokens": 9}},
        "workload": figures,
    }
    config = {"candidate": candidate["folder"], "baseline": baseline["folder"]}
    config |= {"candidate_runtime": candidate["runtime"], "baseline_runtime": baseline["runtime"]}
    config |= {"prompt_tokens": 8, "new_tokens": 4, "batch": 1, "answers": "auto", "max_seconds": 180.0}
    document = {
        "schema": bench_report.SCHEMA,
        "schema_version": bench_report.SCHEMA_VERSION,
        "created_utc": "2026-01-01T00:00:00+00:00",
        "config": config,
        "threads": 2,
        "machine": MACHINE,
        "answers": {"mode": "own", "candidate": check, "baseline": None},
        "candidate": candidate,
        "baseline": baseline,
        "prefill": {"all_blocks": estimate},
        "decode": {"all_blocks": estimate},
        "warmup_blocks": 2,
        "timed_seconds": 12.0,
        "samples": [{"disturbed": False}, {"disturbed": True}],
        "warnings": [],
    }
    return document | changes


def eval_side(folder: str, runtime: str, weights: str | None = None, file: str = "model.onnx") -> dict[str, Any]:
    return {
        "folder": folder,
        "sha256": {file: sha(weights or folder), "tokenizer.json": sha("tokenizer"), "export.json": sha(folder)},
        "engine": {"name": runtime, "threads": 2, "model_files": {file: 2**20}},
    }


def loss(nll: float, windows: int) -> dict[str, Any]:
    # The first two windows are alike in all records, so that it shows how many were taken.
    each = [nll, nll, *[nll + 1.0] * (windows - 2)]
    mean = sum(each) / windows
    return {"perplexity": math.exp(mean), "nll": mean, "nll_standard_error": 0.1, "window_nll": each}


def evaluated(
    target: dict[str, Any],
    nll: float,
    *,
    reference: dict[str, Any] | None = None,
    windows: int = 4,
    kl: float = 0.1,
    tasks: bool = False,
) -> dict[str, Any]:
    """An evaluation on a text, of which the reference has a loss of 3 nats."""
    text: dict[str, Any] = {"name": "wiki.txt", "protocol": "one string, windows without overlap", "window": 64}
    text |= {"windows": windows, "target": loss(nll, windows)}
    share = {"accuracy": {"share": 0.5, "standard_error": 0.1}}
    share |= {"accuracy_normalised": {"share": 0.6, "standard_error": 0.1}}
    task: dict[str, Any] = {"name": "hellaswag", "items": 20, "usual": "accuracy_normalised", "target": share}
    document = {
        "schema": evaluation.SCHEMA,
        "schema_version": evaluation.SCHEMA_VERSION,
        "target": target,
        "texts": [text],
        "tasks": [task] if tasks else [],
        "machine": MACHINE,
    }
    if reference is not None:
        document["reference"] = reference
        text |= {"reference": loss(3.0, windows), "kl_mean": kl, "kl_p99": 9 * kl, "agreement": 0.9}
        text["nll_difference"] = {"mean": nll - 3.0, "low": nll - 3.1, "high": nll - 2.9}
        task |= {"reference": share, "mcnemar": {"only_target": 1, "only_reference": 9, "p": 0.02}}
    return document


def doctor(threads: int = 2, **changes: Any) -> dict[str, Any]:
    document = {
        "schema": doctor_report.SCHEMA,
        "schema_version": doctor_report.SCHEMA_VERSION,
        "threads": threads,
        "bandwidth_one": 4e8,
        "bandwidth_all": 8e8,
        "bandwidth_samples": [7e8, 9e8],
        "machine": MACHINE,
    }
    return document | changes


def a_round(number: int, blocks: int = 2) -> RoundRecord:
    return RoundRecord(
        number, 0.6, 0.599, (0.5, 0.7) * (blocks // 2), (4, 6) * (blocks // 2), {}, 3, 96, (4.0, 3.5, 3.0), 1e-4, 1.0,
        2.0, 2**28, block_errors=(0.1, 0.2) * (blocks // 2), block_fits=((0.1, 0.05), (0.2, 0.1)) * (blocks // 2),
    )  # fmt: skip


def write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def write_everything(folder: Path, *, name: str = "q4") -> None:
    """Records of every kind: a sweep with two sparsities and a GGUF file, evaluations of all, a machine, a run."""
    dense = eval_side("dense", "ort-stock")
    gguf = side(
        name,
        "llamacpp",
        3.0,
        model={"values": "GGUF Q4_0"},
        file="model.gguf",
        beside={"model.safetensors": sha("rounded")},
    )
    write(folder / "a.json", bench(side("sparse", "ort", 2.0, model=sparse(0.7))))
    runs = [bench(side("half", "ort", 4.0, model=sparse(0.5), size=2 * 2**20)), bench(gguf)]
    SweepReport(runs).write(folder / "b.json")
    write(folder / "eval-sparse.json", evaluated(eval_side("sparse", "ort"), 4.0, reference=dense, kl=0.9, tasks=True))
    write(folder / "eval-half.json", evaluated(eval_side("half", "ort"), 3.2, reference=dense, kl=0.1))
    rounded = eval_side(name, "torch", "rounded", "model.safetensors")
    write(folder / "eval-q4.json", evaluated(rounded, 3.3, reference=dense, kl=0.2))
    write(folder / "doctor.json", doctor())
    run = folder / f"run-{name}"
    run.mkdir()
    write_journal(run, [a_round(1, 24), a_round(2, 24)])
    (run / "config.toml").write_text('[train]\nmodel = "models/dense"\n')
