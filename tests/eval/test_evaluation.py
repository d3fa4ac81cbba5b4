"""`losa eval` on small real files: figures, the record, going on after a stop, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="needs the extra 'export'")

from losa_export.cli import main
from losa_export.commands.arguments import RUNTIMES
from losa_export.errors import ConfigError, InputError, TextError
from losa_export.eval import evaluation
from losa_export.eval.evaluation import EvalConfig, EvalText, evaluate
from losa_export.eval.fidelity import divergences
from losa_export.eval.perplexity import perplexity
from losa_export.eval.scorer import ItemByItem
from losa_export.export import ExportConfig, export_onnx
from losa_export.runtimes.base import RUNTIME_NAMES
from losa_export.runtimes.isolated import ENGINES
from losa_export.runtimes.loader import load_runtime
from losa_export.text import load_tokenizer
from tests.conftest import WORDS, write_tiny_checkpoint


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Two exports of other weights, a file of questions, and a text."""
    root = tmp_path_factory.mktemp("eval")
    export_onnx(ExportConfig(tiny_checkpoint, root / "onnx", gate=False, progress=False))
    write_tiny_checkpoint(root / "other-model", seed=5)
    export_onnx(ExportConfig(root / "other-model", root / "other", gate=False, progress=False))
    generator = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(generator.choice(WORDS, size=count))

    rows = [{"ctx": words(6), "endings": [words(3) for _ in range(4)], "label": n % 4} for n in range(12)]
    (root / "wiki_continuation.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (root / "text.txt").write_text("\n\n".join(words(20) for _ in range(20)), encoding="utf-8")
    return root


def config(work: Path, output: Path, **changes: Any) -> EvalConfig:
    settings: dict[str, Any] = {
        "target": work / "onnx",
        "output": output,
        "runtime": "ort-stock",
        "reference": work / "other",
        "texts": (EvalText(work / "text.txt", False, 32, 4),),
        "tasks": ("wiki_continuation",),
        "task_folder": work,
        "threads": 1,
    }
    return EvalConfig(**(settings | changes))


@pytest.fixture(scope="module")
def record(work: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("out") / "eval.json"
    found = evaluate(config(work, output), show_progress=False)
    assert json.loads(output.read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    assert [path.name for path in output.parent.iterdir()] == ["eval.json"]
    return found


def test_a_stride_scores_the_last_tokens_of_overlapping_windows(work: Path, tmp_path: Path) -> None:
    text = EvalText(work / "text.txt", False, 32, 3, 8)
    found = evaluate(config(work, tmp_path / "eval.json", texts=(text,), tasks=()), show_progress=False)["texts"][0]
    assert (found["window"], found["windows"], found["stride"]) == (32, 3, 8)
    assert found["protocol"] == "documents with end-of-text between, a window every 8 tokens"
    runtime = _runtime(work / "onnx")
    windows = evaluation._windows(text, work / "onnx", load_tokenizer(work / "onnx"), runtime)
    np.testing.assert_array_equal(windows[0, 8:], windows[1, :-8])
    for ids, nll in zip(windows, found["target"]["window_nll"], strict=True):
        logits = runtime.prefill(runtime.new_state(1, 32), 0, ids).astype(np.float64)
        every = np.log(np.exp(logits[:-1]).sum(axis=1)) - np.take_along_axis(logits[:-1], ids[1:, None], axis=1)[:, 0]
        assert nll == pytest.approx(every[-8:].mean(), rel=1e-5)


def test_losses_are_those_of_each_side_alone(work: Path, record: dict[str, Any]) -> None:
    (text,) = record["texts"]
    windows = evaluation._windows(
        EvalText(work / "text.txt", False, 32, 4), work / "onnx", load_tokenizer(work / "onnx"), _runtime(work / "onnx")
    )
    for side, folder in (("target", "onnx"), ("reference", "other")):
        alone = perplexity(_runtime(work / folder), windows, show_progress=False)
        assert text[side]["perplexity"] == pytest.approx(alone.ppl, rel=1e-6)
        assert text[side]["nll_standard_error"] == pytest.approx(alone.standard_error, rel=1e-6)
    mean = text["target"]["nll"] - text["reference"]["nll"]
    assert text["nll_difference"]["mean"] == pytest.approx(mean)
    assert text["nll_difference"]["low"] < mean < text["nll_difference"]["high"]
    assert 0 < text["kl_mean"] < text["kl_p99"]
    assert 0 <= text["agreement"] < 1


def _runtime(folder: Path) -> Any:
    return load_runtime("ort-stock", folder, threads=1)


def test_divergence_is_that_of_the_definition() -> None:
    generator = np.random.default_rng(0)
    exact, other = generator.standard_normal((2, 200, 7)).astype(np.float32)
    p, q = (
        np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(axis=1, keepdims=True) for x in (exact, other)
    )
    np.testing.assert_allclose(divergences(exact, other), (p * np.log(p / q)).sum(axis=1), rtol=1e-4, atol=1e-6)


def test_tasks_count_right_answers_and_keep_every_score(record: dict[str, Any]) -> None:
    (task,) = record["tasks"]
    assert (task["name"], task["items"], task["usual"]) == ("wiki_continuation", 12, "accuracy_normalised")
    scores = task["target"]["log_likelihoods"]
    right = sum(int(np.argmax(scores[row])) == (row - 1) % 4 for row in scores)
    assert task["target"]["accuracy"]["share"] == right / 12
    assert len(scores) == 12
    assert 0 < task["mcnemar"]["p"] <= 1


def test_a_model_is_at_no_distance_from_itself_in_another_engine(
    work: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    found = evaluate(config(work, tmp_path / "eval.json", reference=tiny_checkpoint), show_progress=False)
    assert found["reference"]["engine"]["name"] == "torch"
    assert found["texts"][0]["kl_mean"] < 1e-6
    assert found["texts"][0]["agreement"] == 1.0
    (task,) = found["tasks"]
    assert task["mcnemar"] == {"only_target": 0, "only_reference": 0, "p": 1.0}
    for row, scores in task["target"]["log_likelihoods"].items():
        assert scores == pytest.approx(task["reference"]["log_likelihoods"][row], rel=1e-4)


def test_an_evaluation_that_was_stopped_goes_on_to_the_same_record(
    work: Path, tmp_path: Path, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, asked, stops = tmp_path / "eval.json", 0, True

    class Stopping(ItemByItem):
        def score(self, items: Any) -> Any:
            nonlocal asked
            asked += len(items)
            if stops and asked >= 12:
                raise KeyboardInterrupt
            return super().score(items)

    monkeypatch.setattr(evaluation, "open_scorer", lambda runtime, _: Stopping(runtime))
    monkeypatch.setattr(evaluation, "_BLOCK", 2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(work, output), show_progress=False)
    assert not output.exists()
    kept = tmp_path / ".eval.json.work"
    kept.write_text(kept.read_text(encoding="utf-8")[:-20], encoding="utf-8")  # and its last line is cut off
    asked, stops = 0, False
    found = evaluate(config(work, output), show_progress=False)
    # two blocks of the first stretch are kept; the item whose line is cut off is asked again, on both sides
    assert asked == 2 * (12 - 3)
    for side in ("target", "reference"):
        once, again = (one["tasks"][0][side]["log_likelihoods"] for one in (record, found))
        # 1e-5: float32, other shapes of the same products
        assert all(again[row] == pytest.approx(once[row], rel=1e-5) for row in once)
    assert found["texts"] == record["texts"]
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_work_of_other_settings_is_not_gone_on_from(work: Path, tmp_path: Path) -> None:
    output = tmp_path / "eval.json"
    (tmp_path / ".eval.json.work").write_text('{"version": 0}\n["wiki_continuation row 1", {"target": [0, 0, 0, 0]}]\n')
    found = evaluate(config(work, output, reference=None, texts=()), show_progress=False)
    assert all(min(map(abs, row)) > 0 for row in found["tasks"][0]["target"]["log_likelihoods"].values())
    assert "mcnemar" not in found["tasks"][0]
    assert "reference" not in found


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"texts": (), "tasks": ()}, ConfigError, "there is nothing to measure"),
        ({"task_folder": None}, ConfigError, "'wiki_continuation' is not on the hub; give --task-folder"),
        ({"tasks": ("mmlu",)}, ConfigError, "task 'mmlu' is not known"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    work: Path, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        config(work, tmp_path / "eval.json", **changes)


def test_every_runtime_can_be_asked_for_on_the_command_line() -> None:
    assert RUNTIMES == RUNTIME_NAMES


@pytest.mark.skipif(not ENGINES["llamacpp"].installed, reason="needs: losa runtimes install llamacpp")
def test_an_engine_of_another_environment_is_evaluated_through_its_process(work: Path, tmp_path: Path) -> None:
    from losa_export.eval.gguf_peer import write_gguf_peer

    write_gguf_peer(work / "other-model", tmp_path / "gguf", values="F32")
    settings = {"target": tmp_path / "gguf", "runtime": "llamacpp", "reference": work / "other"}
    found = evaluate(config(work, tmp_path / "eval.json", **settings), show_progress=False)
    (text,), (task,) = found["texts"], found["tasks"]
    assert found["target"]["engine"]["name"] == "llamacpp"
    # The same weights; llama.cpp keeps its cache in float16.
    assert text["kl_mean"] < 1e-6
    assert text["target"]["nll"] == pytest.approx(text["reference"]["nll"], rel=1e-4)
    assert task["items"] == 12


def test_texts_and_tasks_are_checked_before_anything_is_measured(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_window", lambda *_: pytest.fail("something was measured"))
    (tmp_path / "piqa.jsonl").write_text("{}\n")
    with pytest.raises(TextError, match=r"piqa\.jsonl', row 1"):
        evaluate(config(work, tmp_path / "e.json", tasks=("piqa",), task_folder=tmp_path), show_progress=False)
    long = EvalText(work / "text.txt", False, 4096, 1)
    with pytest.raises(ConfigError, match="windows of 4096 tokens exceed"):
        evaluate(config(work, tmp_path / "e.json", texts=(long,)), show_progress=False)
    with pytest.raises(InputError, match="missing"):
        evaluate(config(work, tmp_path / "e.json", target=tmp_path / "missing"), show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["piqa.jsonl"]


def test_the_command_prints_tables(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "eval",
        work / "onnx",
        "--runtime",
        "ort-stock",
        "--against",
        work / "other",
        "--window",
        32,
        "--windows",
        2,
    ]
    words += ["--wikitext", work / "text.txt", "--tasks", "wiki_continuation", "--task-folder", work, "--limit", 3]
    assert main([str(word) for word in [*words, "--threads", 1, "--json", tmp_path / "eval.json"]]) == 0
    out = capsys.readouterr().out
    assert "| text.txt | 2 of 32 |" in out
    assert "| wiki_continuation | 3 |" in out
    assert "McNemar" in out
    assert main(["eval", str(work / "onnx"), "--json", str(tmp_path / "eval.json")]) == 1
    assert "losa: error: there is nothing to measure" in capsys.readouterr().err


def test_a_ruined_model_has_an_infinite_perplexity_in_the_table() -> None:
    from losa_export.eval.eval_report import eval_markdown

    loss = evaluation._loss([1000.0, 1000.0])
    assert loss["perplexity"] is None
    text = {"name": "t", "windows": 2, "window": 8, "target": loss}
    assert "| t | 2 of 8 | ∞ |" in eval_markdown({"target": {"folder": "m"}, "texts": [text], "tasks": []})
