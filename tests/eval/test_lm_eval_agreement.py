"""Zero-shot scores against lm-evaluation-harness itself: its task files, its code and its Hugging Face backend.

lm-eval reads the same questions through `datasets.load_dataset`, which is replaced here by one that lays the shared
rows out as the hub's data sets do. A model at $LOSA_LM_EVAL_MODEL, a checkpoint folder, takes the place of stories260K.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'losa-export[lm-eval]'")
pytest.importorskip("onnx_ir", reason="needs the extra 'export'")

import datasets

from losa_export.eval.scorer import ItemByItem, open_scorer
from losa_export.eval.task_hub import SOURCES, load_items
from losa_export.eval.tasks import TASKS, Item, find_task, read_items
from losa_export.eval.zero_shot import encode_item, judge
from losa_export.runtimes.base import RuntimeName
from losa_export.runtimes.loader import load_runtime
from losa_export.text import load_tokenizer

ITEMS = 100
LETTERS = "ABCDE"
# Rows as HellaSwag's authors wrote them, which the shared file no longer has: two parts, and marks of WikiHow's pages.
RAW_HELLASWAG = [
    {
        "activity_label": "Home and Garden",
        "ctx": "[header] How to mow [title] Look first. [step] Cut [substeps] low.  then",
        "ctx_a": "[header] How to mow [title] Look first. [step] Cut [substeps] low.",
        "ctx_b": "then The Boy",
        "endings": [" goes  home .", "[title] Sits [step] down.", "runs [substeps] off", "eats   grass."],
        "label": "2",
    }
]
# lm-eval has no such task; it is asked as the shared data's description says.
WIKI_CONTINUATION = {
    "task": "wiki_continuation",
    "dataset_path": "shared/wiki_continuation",
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "ctx",
    "doc_to_choice": "endings",
    "doc_to_target": "label",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
}
# What other packages warn of while lm-eval is loaded and run is theirs.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def hub_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the shared files as the data set on the hub has it."""
    if name in ("arc_easy", "arc_challenge", "openbookqa"):
        labels = list(LETTERS[: len(row["choices"])])
        question = "question_stem" if name == "openbookqa" else "question"
        choices = {"text": row["choices"], "label": labels}
        return {question: row["question"], "choices": choices, "answerKey": labels[row["label"]]}
    if name == "hellaswag":
        return {**row, "ctx_a": row["ctx"], "ctx_b": "", "label": str(row["label"])}
    if name == "boolq":
        return {"passage": row["passage"], "question": row["question"], "label": int(row["answer"])}
    return row


@pytest.fixture(scope="module")
def hub(shared_data: Path) -> Iterator[None]:
    """`datasets.load_dataset` that knows the shared rows by the hub's names."""
    places = {(source.path, source.name): (name, source.split) for name, source in SOURCES.items()}
    places["shared/wiki_continuation", None] = ("wiki_continuation", "validation")

    def load_dataset(path: str, name: str | None = None, *, split: str | None = None, **_: Any) -> Any:
        task, there = places[path, name]
        lines = (shared_data / "tasks" / f"{task}.jsonl").read_text(encoding="utf-8").split("\n")[:ITEMS]
        rows = [hub_row(task, json.loads(line)) for line in lines]
        if task == "hellaswag":
            rows = [{key: row[key] for key in RAW_HELLASWAG[0]} for row in [*RAW_HELLASWAG, *rows]]
        whole = datasets.Dataset.from_list(rows)
        # lm-eval wants every split that its task file names; only one of them is asked.
        return whole if split == there else datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), whole))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        yield


@pytest.fixture(scope="module")
def model(stories260k: Path) -> Path:
    """The checkpoint that is asked."""
    return Path(os.environ.get("LOSA_LM_EVAL_MODEL", stories260k))


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from losa_export.export import ExportConfig, export_onnx

    folder = tmp_path_factory.mktemp("lm-eval") / "onnx"
    export_onnx(ExportConfig(model, folder, gate=False, progress=False))
    return folder


@pytest.fixture(scope="module")
def theirs(model: Path, hub: None) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval's own code finds: task → an entry for each item, in order."""
    import torch
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import get_task_dict

    torch.set_num_threads(1)
    backend = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=8)
    tasks = {**get_task_dict(list(SOURCES)), "wiki_continuation": ConfigurableTask(config=dict(WIKI_CONTINUATION))}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, task in tasks.items():
        task.set_config("num_fewshot", 0)
        task.build_all_requests()
        entries: dict[int, dict[str, Any]] = {}
        for request, response in zip(task.instances, backend.loglikelihood(task.instances), strict=True):
            entry = entries.setdefault(request.doc_id, {"doc": request.doc, "arguments": [], "responses": []})
            entry["arguments"].append(request.args)
            entry["responses"].append(response)
        for entry in entries.values():
            entry["scores"] = task.process_results(entry["doc"], entry["responses"])
        found[name] = [entries[number] for number in sorted(entries)]
    return found


def asked(name: str, shared_data: Path) -> list[Item]:
    """The same questions through our own reading: from the hub, where it has them."""
    if name in SOURCES:
        return load_items(find_task(name))
    return read_items(find_task(name), shared_data / "tasks" / f"{name}.jsonl", ITEMS)


@pytest.mark.parametrize("name", TASKS)
def test_what_is_asked_is_the_same_text(theirs: dict[str, Any], shared_data: Path, name: str) -> None:
    ours = asked(name, shared_data)
    assert len(ours) >= ITEMS
    for item, entry in zip(ours, theirs[name], strict=True):
        assert list(zip(item.contexts, item.continuations, strict=True)) == entry["arguments"]
    if name in SOURCES:
        # and the files in the layout of the shared data ask what the hub's rows ask
        files = read_items(find_task(name), shared_data / "tasks" / f"{name}.jsonl", ITEMS)
        plain = [(item.contexts, item.continuations, item.characters, item.gold) for item in ours]
        assert plain[-ITEMS:] == [(item.contexts, item.continuations, item.characters, item.gold) for item in files]


@pytest.mark.parametrize(("runtime", "packed"), [("torch", False), ("ort", True), ("ort", False), ("ort-stock", True)])
@pytest.mark.parametrize("name", TASKS)
def test_scores_and_choices_are_the_same(
    theirs: dict[str, Any],
    model: Path,
    exported: Path,
    shared_data: Path,
    name: str,
    runtime: RuntimeName,
    packed: bool,
) -> None:
    folder, tokenizer, items = (
        model if runtime == "torch" else exported,
        load_tokenizer(model),
        asked(name, shared_data),
    )
    with closing(load_runtime(runtime, folder, threads=1)) as loaded:
        scorer = open_scorer(loaded, folder) if packed else ItemByItem(loaded)
        assert scorer.method == ("packed" if packed else "item by item")
        scores = scorer.score([encode_item(tokenizer, item, loaded, name) for item in items])
    found = [judge(item, [one.log_likelihood for one in row]) for item, row in zip(items, scores, strict=True)]
    ours = np.concatenate([one.log_likelihoods for one in found])
    other = np.array([likelihood for entry in theirs[name] for likelihood, _ in entry["responses"]])
    np.testing.assert_allclose(ours, other, rtol=1e-3)
    greedy = [one.greedy for row in scores for one in row]
    assert greedy == [greedy for entry in theirs[name] for _, greedy in entry["responses"]]
    same = [
        int(np.argmax(one.log_likelihoods)) == int(np.argmax([likelihood for likelihood, _ in entry["responses"]]))
        for one, entry in zip(found, theirs[name], strict=True)
    ]
    assert np.mean(same) >= 0.99
    for metric, correct in (("acc", "correct"), ("acc_norm", "correct_normalised")):
        if metric in theirs[name][0]["scores"]:
            agreed = [
                entry["scores"][metric] == getattr(one, correct) for one, entry in zip(found, theirs[name], strict=True)
            ]
            assert np.mean(agreed) >= 0.99, metric
