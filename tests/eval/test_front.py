from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="needs the extra 'export'")

from losa_export.errors import ConfigError
from losa_export.eval.studies.front import main, paired
from losa_export.eval.studies.front_models import EXACT, variants_of
from losa_export.eval.studies.front_page import on_front, page
from losa_export.runtimes.isolated import ENGINES
from losa_export.synth import LlamaShape, SynthConfig, random_words, write_random_checkpoint

SHAPE = LlamaShape(64, 192, heads=4, kv_heads=4, blocks=1, vocabulary=320, positions=256)


def test_every_model_has_every_form_once() -> None:
    variants = variants_of(Path("dense"), [Path("losa-50"), Path("losa-70")])
    names = [variant.name for variant in variants]
    assert names[0] == EXACT
    assert len(set(names)) == len(names)
    assert [name for name in names if name.startswith("losa-50")] == [
        *("losa-50-fp32", "losa-50-bf16", "losa-50-int8", "losa-50-int4")
    ]
    assert {variant.runtime for variant in variants if variant.name.startswith("dense-Q")} == {"llamacpp"}
    with pytest.raises(ConfigError, match="two models have one name"):
        variants_of(Path("a/dense"), [Path("b/dense")])


@pytest.mark.slow
def test_the_command_measures_goes_on_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, sparsity in (("base", 0.0), ("thin", 0.6)):
        write_random_checkpoint(SHAPE, 1, SynthConfig("llama-2-7b", tmp_path / name, 1, sparsity, progress=False))
    (tmp_path / "text.txt").write_text(random_words(200))
    words = np.array(random_words(60).split()).reshape(6, 10)
    rows = [{"ctx": " ".join(row[:6]), "endings": list(row[6:]), "label": 1} for row in words]
    (tmp_path / "wiki_continuation.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = [str(tmp_path / "base"), "--pruned", str(tmp_path / "thin"), "--text", str(tmp_path / "text.txt")]
    command += ["--window", "32", "--windows", "4", "--tasks", "wiki_continuation", "--task-folder", str(tmp_path)]
    command += ["--threads", "1", "-o", str(tmp_path / "work"), "--page", str(tmp_path / "page")]
    steps = ["--steps", "models", "eval", "tasks"]
    without_llama = 0 if ENGINES["llamacpp"].installed else 1
    assert main([*command, *steps]) == without_llama
    record = json.loads((tmp_path / "page" / "front.json").read_text())
    assert str(tmp_path) not in json.dumps(record)
    rows_of = {row["name"]: row for row in record["variants"]}
    exact, thin = (rows_of[name] for name in (EXACT, "thin-fp32"))
    assert "kl_mean" not in exact["texts"][0]
    assert thin["texts"][0]["kl_mean"] > 0
    (task,) = thin["tasks"]
    # The same model in two engines.
    assert (task["items"], task["only_this"], task["only_source"], task["p"]) == (6, 0, 0, 1.0)
    assert task["median_difference"] < 1e-4
    assert rows_of["thin-int4"]["tasks"][0]["median_difference"] > 1e-4
    assert rows_of["dense-int8"]["tasks"] is None
    text = (tmp_path / "page" / "front.md").read_text()
    assert "| thin | int8 | ours | – | " in text
    capsys.readouterr()
    assert main([*command, *steps]) == without_llama
    assert "study: eval of thin" not in capsys.readouterr().err


def row(name: str, perplexity: float, ratio: float, *, zeros: bool = False) -> dict[str, Any]:
    speed = {"ratio": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio, "verdict": "FASTER"}
    text = {"name": "t", "protocol": "p", "window": 8, "windows": 2, "perplexity": perplexity}
    if name != EXACT:
        text |= {"kl_mean": 0.1, "agreement": 0.9}
    return {
        "name": name,
        "kind": "ours",
        "values": "int8",
        "pure": False,
        "source": name.split("-")[0],
        "zeros": zeros,
        "texts": [text],
        "tasks": None,
        "speed": None if name == EXACT else {"model_bytes": 10**6, "decode": speed, "prefill": speed},
    }


def document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    shared = {"command": "…", "prompt_tokens": 8, "new_tokens": 8, "threads": 2, "failed": {"x": "why"}}
    return shared | {"machine": {"cpu_model": "a processor"}, "variants": rows}


def test_the_front_is_what_nothing_beats_in_both() -> None:
    rows = [row(EXACT, 20.0, 1.0), row("dense-int8", 20.1, 4.0), row("dense-int4", 25.0, 3.9)]
    rows += [row("thin-int8", 30.0, 5.0, zeros=True), row("thin-int4", 33.0, 5.0, zeros=True)]
    assert on_front(rows, 0) == [True, True, False, True, False]
    text = page(document(rows))
    assert "- from perplexity 20.10: dense-int8 (dense), 4.00x\n- from perplexity 30.00: thin-int8 (pruned)" in text
    assert "**Pruned models are the fastest from perplexity 30.00 on; for better, plain rounding wins.**" in text
    assert "**Without a result:** x: why" in text


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([("dense-int8", 20.0, 4.0), ("thin-int8", 30.0, 3.0)], "No pruned model is among them"),
        ([("dense-int8", 20.0, 4.0), ("thin-int8", 19.0, 5.0)], "A pruned model is the fastest at every quality"),
    ],
)
def test_the_verdict_is_as_plain_where_pruning_loses(rows: list[tuple[str, float, float]], verdict: str) -> None:
    made = [row(*one, zeros=one[0].startswith("thin")) for one in rows]
    assert f"**{verdict}" in page(document(made))


def test_tasks_are_paired_item_by_item() -> None:
    def task(likelihoods: dict[str, list[float]], right: list[int]) -> dict[str, Any]:
        share = {"share": len(right) / len(likelihoods)}
        target = {"log_likelihoods": likelihoods, "right": right, "accuracy": share}
        return {"name": "t", "items": len(likelihoods), "usual": "accuracy", "target": target}

    found = paired(
        task({"1": [-1.0, -2.0], "2": [-3.0, -1.0], "3": [-1.0, -9.0]}, [1, 2]),
        task({"1": [-1.5, -2.0], "2": [-3.0, -1.1], "3": [-1.2, -9.0]}, [2, 3]),
    )
    assert (found["only_this"], found["only_source"], found["p"]) == (1, 1, 1.0)
    assert found["accuracy"] == found["source_accuracy"] == pytest.approx(2 / 3)
    assert found["median_difference"] == pytest.approx(0.05)
