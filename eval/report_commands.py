"""The commands that measure again what a report shows. Records name folders by their last names only."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path

from losa_export.eval.report_sources import RunSource, Source

# Stands for a folder that no record names.
_TASK_FOLDER, _MODEL = "TASKS", "MODEL"


def bench_commands(sources: Sequence[Source]) -> tuple[str, ...]:
    """A command for each benchmark, those that are the same once."""
    return tuple(dict.fromkeys(_bench_command(source) for source in sources))


def _bench_command(source: Source) -> str:
    document = source.document
    config = document["config"]
    words = ["losa", "bench", config["candidate"], "--against", config["baseline"]]
    words += ["--runtime", config["candidate_runtime"], "--against-runtime", config["baseline_runtime"]]
    words += ["--threads", document["threads"], "--batch", config["batch"], "--prompt", config["prompt_tokens"]]
    words += ["--gen", config["new_tokens"], "--answers", config["answers"]]
    return _joined([*words, "--max-time", f"{config['max_seconds']:.10g}s"])


def eval_commands(sources: Sequence[Source]) -> tuple[str, ...]:
    """A command for each evaluation."""
    return tuple(dict.fromkeys(_eval_command(source) for source in sources))


def _eval_command(source: Source) -> str:
    document = source.document
    target, reference = document["target"], document.get("reference")
    words = ["losa", "eval", target["folder"], "--runtime", target["engine"]["name"]]
    if reference is not None:
        words += ["--against", reference["folder"], "--against-runtime", reference["engine"]["name"]]
    texts, tasks = document["texts"], document["tasks"]
    for option, wikitext in (("--wikitext", True), ("--text", False)):
        names = [text["name"] for text in texts if text["protocol"].startswith("one string") == wikitext]
        words += [option, *names] if names else []
    if texts:
        words += ["--window", texts[0]["window"], "--windows", max(text["windows"] for text in texts)]
        stride = texts[0].get("stride", texts[0]["window"])
        words += ["--stride", stride] if stride != texts[0]["window"] else []
    if tasks:
        ours = any(task.get("source", "").endswith(".jsonl") or "source" not in task for task in tasks)
        # A file with fewer items than the limit is read whole, as it was.
        limit = max(task["items"] for task in tasks)
        words += ["--tasks", *(task["name"] for task in tasks), "--limit", limit]
        words += ["--task-folder", _TASK_FOLDER] if ours else []
    words += ["--threads", target["engine"]["threads"]] if "threads" in target["engine"] else []
    return _joined([*words, "--json", source.file.name])


def doctor_commands(sources: Sequence[Source]) -> tuple[str, ...]:
    """A command for each examination of a machine."""
    return tuple(
        _joined(["losa", "doctor", "--threads", source.document["threads"], "--json", source.file.name])
        for source in sources
    )


def train_command(run: RunSource) -> str:
    """The run anew, by the settings that it left."""
    name = run.folder.resolve().name
    return _joined(
        ["losa", "train", _trained_model(run.folder), "--config", f"{name}/config.toml", "-o", f"{name}-again"]
    )


def _trained_model(run: Path) -> str:
    """Last name of the checkpoint that a run pruned."""
    try:
        model = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["train"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return _MODEL
    return Path(str(model)).name or _MODEL


def report_command(places: Sequence[Path], html: Path) -> str:
    """The page anew from the same records."""
    return _joined(["losa", "report", *(place.resolve().name for place in places), "-o", html.name])


def _joined(words: Sequence[object]) -> str:
    return shlex.join(str(word) for word in words)
