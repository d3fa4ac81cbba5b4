"""The model 'losa' in lm-evaluation-harness: the same answers as its Hugging Face backend, to every kind of request."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_export.errors import ConfigError, InputError, MissingDependencyError, TextError
from losa_export.eval import lm_eval_bridge


def test_without_lm_eval_the_mend_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'losa-export\[lm-eval\]'"):
        lm_eval_bridge.run(["--model", "losa"])
    assert lm_eval_bridge.main(["--model", "losa"]) == 1
    assert "losa: error: lm-eval's command line needs" in capsys.readouterr().err


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'losa-export[lm-eval]'")


@pytest.fixture(scope="module")
def exported(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx_ir", reason="needs the extra 'export'")
    from losa_export.export import ExportConfig, export_onnx

    folder = tmp_path_factory.mktemp("bridge") / "onnx"
    export_onnx(ExportConfig(stories260k, folder, gate=False, progress=False))
    return folder


@pytest.fixture(scope="module")
def ours(lm_eval: Any, exported: Path) -> Any:
    from losa_export.eval.lm_eval_model import LosaLM

    return LosaLM(str(exported), runtime="ort-stock", threads=1)


@pytest.fixture(scope="module")
def peer(lm_eval: Any, stories260k: Path) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    # Its cache scores the wrong tokens where two requests are the same text, cut at other places (0.4.13).
    return HFLM(pretrained=str(stories260k), device="cpu", dtype="float32", batch_size=4, logits_cache=False)


@pytest.fixture(scope="module")
def texts(shared_data: Path) -> list[str]:
    rows = (shared_data / "text" / "wiki_leads" / "valid.jsonl").read_text(encoding="utf-8").split("\n")[:8]
    return [json.loads(row)["text"] for row in rows]


# What other packages warn of while lm-eval is loaded and run is theirs.
theirs = pytest.mark.filterwarnings("ignore")


@theirs
def test_log_likelihoods_and_greediness_are_those_of_the_hf_backend(ours: Any, peer: Any, texts: list[str]) -> None:
    pairs = [(text[:cut], text[cut : cut + 30]) for text in texts for cut in (40, 41, 120)]
    pairs += [(texts[0][:40], text[:20]) for text in texts]
    pairs += [("", "Once upon a time"), ("<s>Once upon a", " time"), ("Once upon a ", "time"), ("Once", " upon a time")]
    pairs += [(texts[0] * 9, " end")]  # longer than the model's positions
    mine, other = (model.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True) for model in (ours, peer))
    # 1e-4: float32 in two engines
    assert [likelihood for likelihood, _ in mine] == pytest.approx([likelihood for likelihood, _ in other], rel=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    assert {greedy for _, greedy in mine} == {True, False}


@theirs
def test_rolling_log_likelihoods_are_those_of_the_hf_backend(ours: Any, peer: Any, texts: list[str]) -> None:
    requests = [Request(text) for text in [*texts, texts[0] * 9]]
    mine, other = (model.loglikelihood_rolling(requests, disable_tqdm=True) for model in (ours, peer))
    assert mine == pytest.approx(other, rel=1e-4)


@theirs
def test_texts_made_are_those_of_the_hf_backend(ours: Any, peer: Any) -> None:
    prompts = ["Once upon a time", "Lily saw a dog.", "The cat", "One day, Tom said"]
    settings: list[dict[str, Any]] = [
        {"until": [".", "!"], "max_gen_toks": 40},
        {"until": "\n", "max_gen_toks": 12, "do_sample": False},
    ]
    requests = [Request(prompt, one) for one in settings for prompt in prompts]
    mine, other = (model.generate_until(requests, disable_tqdm=True) for model in (ours, peer))
    assert mine == other
    assert all(mine)


@theirs
def test_what_it_cannot_do_is_refused(ours: Any) -> None:
    with pytest.raises(ConfigError, match="tokens drawn at random"):
        ours.generate_until([Request("Once", {"temperature": 0.7})], disable_tqdm=True)
    with pytest.raises(ConfigError, match="600 new tokens are wanted, but the model has 512"):
        ours.generate_until([Request("Once", {"max_gen_toks": 600})], disable_tqdm=True)
    with pytest.raises(InputError, match="has no chat template"):
        ours.apply_chat_template([{"role": "user", "content": "Hi"}])
    with pytest.raises(TextError, match="the model has 512 positions and needs some of both"):
        ours.loglikelihood([Request("Once", " upon" * 600)], disable_tqdm=True)


@theirs
def test_a_chat_template_is_applied_as_the_model_brings_it(lm_eval: Any, exported: Path, tmp_path: Path) -> None:
    import shutil

    from losa_export.eval.lm_eval_model import LosaLM

    folder = tmp_path / "chat"
    shutil.copytree(exported, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}>")
    model = LosaLM(str(folder), runtime="ort-stock", threads=1)
    assert model.apply_chat_template([{"role": "user", "content": "Hi"}]) == "[Hi]>"
    assert model.chat_template(True) == "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    with pytest.raises(InputError, match="cannot go on from a begun answer"):
        model.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=False)


@pytest.fixture
def task_folder(shared_data: Path, tmp_path: Path) -> Path:
    """A task file over local rows, as a user would write one."""
    rows = (shared_data / "tasks" / "wiki_continuation.jsonl").read_text(encoding="utf-8").split("\n")[:20]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "local.yaml").write_text(
        f"""task: local_continuation
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {tmp_path / "rows.jsonl"}
  cache_dir: {tmp_path / "cache"}
output_type: multiple_choice
validation_split: validation
doc_to_text: ctx
doc_to_choice: endings
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    return tmp_path


@theirs
@pytest.mark.slow
def test_the_command_line_is_lm_evals_with_one_model_more(
    lm_eval: Any, exported: Path, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = task_folder / "out"
    words = ["--model", "losa", "--model_args", f"onnx={exported},runtime=ort-stock,threads=1"]
    words += ["--tasks", "local_continuation", "--include_path", str(task_folder)]
    words += ["--output_path", str(output), "--log_samples"]
    before = list(sys.argv)
    assert lm_eval_bridge.main(words) == 0
    assert sys.argv == before
    assert "local_continuation" in capsys.readouterr().out
    (results,) = output.rglob("results_*.json")
    record = json.loads(results.read_text(encoding="utf-8"))
    (samples,) = output.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 20
    assert record["results"]["local_continuation"]["acc,none"] == np.mean([row["acc"] for row in rows])
    assert record["config"]["losa_runtime"]["name"] == "ort-stock"


@theirs
@pytest.mark.slow
def test_our_errors_are_told_without_a_traceback(
    lm_eval: Any, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "losa", "--model_args", f"onnx={task_folder / 'missing'}"]
    words += ["--tasks", "local_continuation", "--include_path", str(task_folder)]
    assert lm_eval_bridge.main(words) == 1
    assert "losa: error:" in capsys.readouterr().err
