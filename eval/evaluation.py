"""`losa eval`: perplexity, distance from a reference, and zero-shot accuracy of a model where it will run.

Everything is measured item by item and window by window; each is kept in a work file beside the result as soon as it
is known, so that an evaluation that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from losa_export.errors import ConfigError, InputError, RuntimeFailureError
from losa_export.eval.fidelity import divergences
from losa_export.eval.machine import machine_record
from losa_export.eval.perplexity import cut_windows, read_wikitext, token_nll
from losa_export.eval.remote_runtime import open_runtime
from losa_export.eval.scorer import Scorer, open_scorer
from losa_export.eval.stats import mean_interval
from losa_export.eval.task_hub import find_source, load_items
from losa_export.eval.tasks import Item, find_task, read_items
from losa_export.eval.zero_shot import Choice, ItemScores, accuracy, encode_item, judge, mcnemar
from losa_export.files import check_output_file, input_folder, sha256_of, write_text_atomic
from losa_export.onnx_file import MANIFEST_FILE, MODEL_FILE
from losa_export.progress import Progress
from losa_export.runtimes.base import Runtime, RuntimeName
from losa_export.runtimes.detokenize import load_stop_ids
from losa_export.text import encode_documents, load_tokenizer, read_documents

SCHEMA, SCHEMA_VERSION = "losa-eval", 1

# Of the work file: measures of one version do not go with those of another.
_WORK_VERSION = 2

# Items of a task that are scored at once, and kept once they are: a few passes of a packed scorer.
_BLOCK = 16

Record = dict[str, Any]


@dataclass(frozen=True)
class EvalText:
    """Text to measure perplexity on.

    Attributes:
        path: of the file.
        wikitext: by the protocol of GPTQ, SparseGPT and Wanda, one string; else documents, with the end-of-text token
            between them.
        window: tokens in a window.
        windows: how many of them, from the start; None takes all.
        stride: tokens from one window to the next. Each scores as many of its last tokens, so that none counts twice
            and all have equally many; None is the window's own length, of which all but the first are scored.
    """

    path: Path
    wikitext: bool
    window: int
    windows: int | None
    stride: int | None = None

    @property
    def scored(self) -> int:
        """Tokens that a window scores."""
        return min(self.stride or self.window, self.window - 1)

    @property
    def protocol(self) -> str:
        """How the text becomes windows: figures by another protocol are no match."""
        read = "one string" if self.wikitext else "documents with end-of-text between"
        if self.stride is not None and self.stride < self.window:
            return f"{read}, a window every {self.stride} tokens"
        return f"{read}, windows without overlap" if self.wikitext else read


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate.

    Attributes:
        target: an exported folder, or a checkpoint.
        output: `eval.json` to write.
        runtime: that the target runs in; None: 'ort' for an export, 'torch' for a checkpoint.
        reference: another folder, which the target is held against; None: figures of the target alone.
        reference_runtime: likewise; None: 'ort-stock' for an export, 'torch' for a checkpoint.
        texts: to measure perplexity and divergence on.
        tasks: names of `tasks.TASKS`.
        task_folder: where their files are, NAME.jsonl; None takes them from the hub, through the package `datasets`.
        limit: items of each task, from the start; None takes all.
        threads: of each runtime; None takes what the machine offers.
    """

    target: Path
    output: Path
    runtime: RuntimeName | None = None
    reference: Path | None = None
    reference_runtime: RuntimeName | None = None
    texts: tuple[EvalText, ...] = ()
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    limit: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the field."""
        if not self.texts and not self.tasks:
            raise ConfigError("there is nothing to measure; give --text, --wikitext or --tasks", field="texts")
        for name in self.tasks:
            find_task(name)
            if self.task_folder is None:
                find_source(name)


def evaluate(config: EvalConfig, *, show_progress: bool = True) -> Record:
    """Measure, write `config.output`, and give back what it holds.

    Raises:
        ConfigError, InputError: folders, options, or vocabularies that do not go together.
        TextError: a text or a task's rows are unusable, with the row; before anything is measured.
        MissingDependencyError: tasks are wanted from the hub, and `datasets` is not installed.
        RuntimeFailureError: a runtime gives NaN or infinity.
        OutputError: the result cannot be written.
    """
    check_output_file(config.output)
    folders = {"target": config.target} | ({"reference": config.reference} if config.reference is not None else {})
    for name, folder in folders.items():
        input_folder(folder, what=name)
    names = {"target": config.runtime, "reference": config.reference_runtime}
    with ExitStack() as stack:
        runtimes = {
            side: stack.enter_context(
                closing(open_runtime(names[side] or _default(side, folder), folder, threads=config.threads))
            )
            for side, folder in folders.items()
        }
        if len({runtime.vocab_size for runtime in runtimes.values()}) > 1:
            raise InputError(f"'{config.target}' and '{config.reference}' have other vocabularies: not one family")
        tokenizer = load_tokenizer(config.target)
        texts = [(text, _windows(text, config.target, tokenizer, runtimes["target"])) for text in config.texts]
        tasks = {name: _items(config, name) for name in config.tasks}
        # Both sides read the same tokens, so the one of fewer positions decides.
        shorter = min(runtimes.values(), key=lambda runtime: runtime.max_positions)
        encoded = {
            name: [encode_item(tokenizer, item, shorter, _task_source(config, name)) for item in items]
            for name, items in tasks.items()
        }
        scorers = {side: open_scorer(runtime, folders[side]) for side, runtime in runtimes.items() if tasks}
        identities = {side: _identity(folder, runtimes[side]) for side, folder in folders.items()}
        work = _Work(config.output, _fingerprint(config, folders, tasks))
        total = sum(len(windows) for _, windows in texts) + sum(map(len, tasks.values()))
        with Progress("evaluating", total, "windows and items", enabled=show_progress) as progress:
            measured_texts = []
            for number, (text, windows) in enumerate(texts):
                rows = []
                for place, ids in enumerate(windows):
                    rows.append(
                        work.once(f"text {number} window {place}", partial(_window, runtimes, ids, text.scored))
                    )
                    progress.advance()
                measured_texts.append(_text_record(text, rows, compared="reference" in runtimes))
            measured_tasks = []
            for name, items in tasks.items():
                scores: list[dict[str, list[float]]] = []
                for block in _blocks(items, encoded[name]):
                    keys = [f"{name} row {item.row}" for item, _ in block]
                    scores += work.together(keys, partial(_scores, scorers, [choices for _, choices in block]))
                    progress.advance(len(block))
                measured_tasks.append(_task_record(config, name, items, encoded[name], scores))
                for side, scorer in scorers.items():
                    measured_tasks[-1][side]["scoring"] = scorer.method
        record: Record = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            **{
                side: {
                    "folder": folders[side].name,
                    "sha256": identities[side],
                    "engine": runtime.describe().as_dict(),
                }
                for side, runtime in runtimes.items()
            },
            "texts": measured_texts,
            "tasks": measured_tasks,
            "machine": machine_record().as_dict(),
        }
    write_text_atomic(config.output, json.dumps(record, indent=1, allow_nan=False) + "\n")
    work.remove()
    return record


def _default(side: str, folder: Path) -> RuntimeName:
    if not (folder / MODEL_FILE).is_file():
        return "torch"
    return "ort" if side == "target" else "ort-stock"


def _identity(folder: Path, runtime: Runtime) -> dict[str, str]:
    """SHA-256 of the files that decide a model's answers, by name, for `losa verify` and reports."""
    # The manifest too, so that its figures are bound to this evaluation.
    names = sorted({*runtime.describe().model_files, MANIFEST_FILE, "tokenizer.json"})
    return {name: sha256_of(folder / name) for name in names if (folder / name).is_file()}


def _windows(text: EvalText, target: Path, tokenizer: Tokenizer, runtime: Runtime) -> NDArray[np.int64]:
    if text.window > runtime.max_positions:
        raise ConfigError(
            f"windows of {text.window} tokens exceed the model's {runtime.max_positions} positions; give a shorter one",
            field="window",
        )
    if text.wikitext:
        stream = encode_documents([read_wikitext(text.path)], tokenizer, None)
    else:
        ends = load_stop_ids(target)
        stream = encode_documents(read_documents([text.path]), tokenizer, ends[0] if ends else None)
    return cut_windows(stream, text.window, text.windows, text.stride)


def _items(config: EvalConfig, name: str) -> list[Item]:
    task = find_task(name)
    if config.task_folder is None:
        return load_items(task, config.limit)
    return read_items(task, _task_file(config.task_folder, name), config.limit)


def _task_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"


def _task_source(config: EvalConfig, name: str) -> str:
    """Where a task's questions come from, for messages."""
    if config.task_folder is None:
        return str(find_source(name))
    return f"'{_task_file(config.task_folder, name)}'"


def _window(runtimes: Mapping[str, Runtime], ids: NDArray[np.int64], scored: int) -> Record:
    """The last `scored` tokens of a window: mean loss of each side, and divergence of the target at each token."""
    logits = {}
    for side, runtime in runtimes.items():
        logits[side] = runtime.prefill(runtime.new_state(1, len(ids)), 0, ids)[-1 - scored : -1]
        if not np.isfinite(logits[side]).all():
            raise RuntimeFailureError(
                f"runtime '{runtime.name}' gave NaN or infinite logits for the {side}; the model or a kernel is broken"
            )
    row: Record = {side: float(token_nll(found, ids[-scored:]).mean()) for side, found in logits.items()}
    if "reference" in logits:
        exact, other = logits["reference"], logits["target"]
        row["kl"] = [round(value, 9) for value in divergences(exact, other).tolist()]
        row["agreement"] = float((exact.argmax(axis=1) == other.argmax(axis=1)).mean())
    return row


def _blocks(items: Sequence[Item], encoded: Sequence[list[Choice]]) -> Iterator[list[tuple[Item, list[Choice]]]]:
    pairs = list(zip(items, encoded, strict=True))
    for start in range(0, len(pairs), _BLOCK):
        yield pairs[start : start + _BLOCK]


def _scores(
    scorers: Mapping[str, Scorer], items: Sequence[Sequence[Choice]], places: Sequence[int]
) -> list[dict[str, list[float]]]:
    """Those of the items that are at `places`: log-likelihoods of their choices on each side."""
    asked = [items[place] for place in places]
    found = {side: scorer.score(asked) for side, scorer in scorers.items()}
    return [
        {side: [score.log_likelihood for score in scores[number]] for side, scores in found.items()}
        for number in range(len(asked))
    ]


def _text_record(text: EvalText, rows: Sequence[Record], *, compared: bool) -> Record:
    sides = ("target", "reference") if compared else ("target",)
    record: Record = {
        "name": text.path.name,
        "protocol": text.protocol,
        "window": text.window,
        "stride": text.stride or text.window,
        "windows": len(rows),
        **{side: _loss([row[side] for row in rows]) for side in sides},
    }
    if compared:
        values = np.concatenate([row["kl"] for row in rows])
        difference = mean_interval([row["target"] - row["reference"] for row in rows])
        record |= {
            "kl_mean": float(values.mean()),
            "kl_p99": float(np.quantile(values, 0.99)),
            "agreement": float(np.mean([row["agreement"] for row in rows])),
            "nll_difference": dict(zip(("mean", "low", "high"), map(_finite, difference), strict=True)),
        }
    return record


def _loss(nll: Sequence[float]) -> Record:
    mean = math.fsum(nll) / len(nll)
    error = float(np.std(nll, ddof=1)) / math.sqrt(len(nll)) if len(nll) > 1 else math.nan
    return {
        "perplexity": _finite(math.exp(mean) if mean < 709 else math.inf),
        "nll": mean,
        "nll_standard_error": _finite(error),
        "window_nll": list(nll),
    }


def _task_record(
    config: EvalConfig,
    name: str,
    items: Sequence[Item],
    encoded: Sequence[Sequence[Choice]],
    scores: Sequence[dict[str, list[float]]],
) -> Record:
    task = find_task(name)
    record: Record = {
        "name": name,
        "source": f"{name}.jsonl" if config.task_folder is not None else str(find_source(name)),
        "items": len(items),
        "items_cut": sum(any(choice.cut for choice in choices) for choices in encoded),
        "usual": "accuracy_normalised" if task.normalised else "accuracy",
    }
    judged = {side: [judge(item, row[side]) for item, row in zip(items, scores, strict=True)] for side in scores[0]}
    for side, found in judged.items():
        record[side] = {
            "accuracy": dict(zip(("share", "standard_error"), _accuracy([one.correct for one in found]), strict=True)),
            "accuracy_normalised": dict(
                zip(("share", "standard_error"), _accuracy([one.correct_normalised for one in found]), strict=True)
            ),
            "log_likelihoods": {one.row: list(one.log_likelihoods) for one in found},
            "right": [one.row for one in found if _usual(one, task.normalised)],
        }
    if "reference" in judged:
        ours, theirs = ([_usual(one, task.normalised) for one in judged[side]] for side in ("target", "reference"))
        record["mcnemar"] = dict(zip(("only_target", "only_reference", "p"), mcnemar(ours, theirs), strict=True))
    return record


def _usual(scores: ItemScores, normalised: bool) -> bool:
    return scores.correct_normalised if normalised else scores.correct


def _accuracy(correct: Sequence[bool]) -> tuple[float, float | None]:
    share, error = accuracy(correct)
    return share, _finite(error)


def _finite(value: float) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return value if math.isfinite(value) else None


def _fingerprint(config: EvalConfig, folders: dict[str, Path], tasks: Mapping[str, Sequence[Item]]) -> Record:
    """What earlier work must agree in to be gone on with."""
    files = {
        side: [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.*"))]
        for side, folder in folders.items()
    }
    paths = [text.path for text in config.texts]
    sources = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return {
        "version": _WORK_VERSION,
        "files": files,
        "sources": sources,
        "tasks": {name: hashlib.sha256(repr(items).encode()).hexdigest() for name, items in tasks.items()},
        "runtimes": [config.runtime, config.reference_runtime],
        "texts": [[text.wikitext, text.window, text.windows, text.stride] for text in config.texts],
    }


class _Work:
    """What is measured so far, a JSON line each, in a hidden file beside the result."""

    def __init__(self, output: Path, fingerprint: Record) -> None:
        self._path = output.with_name(f".{output.name}.work")
        self._found: dict[str, Any] = {}
        try:
            first, *lines = self._path.read_text(encoding="utf-8").splitlines()
            if json.loads(first) == fingerprint:
                self._found = _whole(lines)
        except (OSError, ValueError):
            pass  # there is none, or it was cut off in its first line
        # Written anew, without a line that was cut off.
        lines = [json.dumps(entry) for entry in self._found.items()]
        write_text_atomic(self._path, "\n".join([json.dumps(fingerprint), *lines]) + "\n")

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value of `key`: from earlier work, or measured and kept now."""
        return self.together([key], lambda _: [measure()])[0]

    def together(self, keys: Sequence[str], measure: Callable[[list[int]], list[Any]]) -> list[Any]:
        """The value of each key; `measure` is given the places of those that are not known, to measure at once."""
        missing = [place for place, key in enumerate(keys) if key not in self._found]
        if missing:
            fresh = {keys[place]: value for place, value in zip(missing, measure(missing), strict=True)}
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in fresh.items())
            self._found |= fresh
        return [self._found[key] for key in keys]

    def remove(self) -> None:
        """The result is written."""
        self._path.unlink(missing_ok=True)


def _whole(lines: Sequence[str]) -> dict[str, Any]:
    """Keys and values of the lines up to one that was cut off."""
    found: dict[str, Any] = {}
    for line in lines:
        try:
            key, value = json.loads(line)
        except ValueError:
            break
        found[key] = value
    return found
