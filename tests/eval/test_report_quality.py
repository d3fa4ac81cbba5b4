"""Which evaluation belongs to which benchmark, and who is on the front."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from losa_export.eval.report_quality import Comparison, compare, front, qualities
from losa_export.eval.report_timings import timings
from tests.eval.report_records import bench, eval_side, evaluated, sha, side, sparse, write_everything


def compared(benches: list[dict[str, Any]], evals: list[dict[str, Any]]) -> list[Comparison]:
    return compare(timings(benches), [quality for one in evals for quality in qualities(one)])


def of(comparison: Comparison) -> dict[str, Any]:
    return {point.timed.model.name: point for point in comparison.points}


SPARSE = side("sparse", "ort", 2.0, model=sparse(0.7))


def test_files_decide_and_not_names() -> None:
    renamed = evaluated(eval_side("any name", "ort", "sparse"), 4.0, reference=eval_side("dense", "ort-stock"))
    (comparison,) = compared([bench(SPARSE)], [renamed])
    assert of(comparison)["sparse (ort)"].perplexity == pytest.approx(math.exp(4.5))
    liar = evaluated(eval_side("sparse", "ort", "other weights"), 4.0, reference=eval_side("dense", "ort-stock"))
    assert compared([bench(SPARSE)], [liar]) == []


def test_a_record_without_hashes_joins_nothing() -> None:
    old = evaluated(eval_side("sparse", "ort"), 4.0, reference=eval_side("dense", "ort-stock"))
    del old["target"]["sha256"]["model.onnx"]
    assert compared([bench(SPARSE)], [old]) == []
    del old["target"]["sha256"]
    assert compared([bench(SPARSE)], [old]) == []


def test_other_tokens_are_another_text() -> None:
    first = evaluated(eval_side("sparse", "ort"), 4.0)
    second = evaluated(eval_side("dense", "ort-stock"), 3.0)
    assert len(compared([bench(SPARSE)], [first, second])) == 1
    second["target"]["sha256"]["tokenizer.json"] = sha("another")
    assert compared([bench(SPARSE)], [first, second]) == []


def test_perplexity_is_that_of_the_windows_that_all_have() -> None:
    first, second = evaluated(eval_side("sparse", "ort"), 4.0, windows=2), evaluated(eval_side("dense", "ort"), 3.0)
    (comparison,) = compared([bench(SPARSE)], [first, second])
    assert comparison.windows == 2
    assert [point.perplexity for point in comparison.points] == [pytest.approx(math.exp(n)) for n in (4.0, 3.0)]


def test_an_evaluation_in_the_same_engine_goes_before_one_in_another() -> None:
    stock, ours = evaluated(eval_side("sparse", "ort-stock"), 4.0), evaluated(eval_side("sparse", "ort"), 4.1)
    dense = evaluated(eval_side("dense", "ort"), 3.0)
    for order in ([stock, ours, dense], [ours, stock, dense]):
        (comparison,) = compared([bench(SPARSE)], order)
        assert of(comparison)["sparse (ort)"].quality.runtime == "ort"


def gguf_bench(**changes: Any) -> dict[str, Any]:
    beside = {"model.safetensors": sha("rounded")}
    return bench(side("q4", "llamacpp", 3.0, file="model.gguf", beside=beside), **changes)


def test_weights_beside_a_gguf_file_stand_for_it_only_if_the_answers_were_checked() -> None:
    rounded = evaluated(eval_side("q4", "torch", "rounded", "model.safetensors"), 3.3)
    dense = evaluated(eval_side("dense", "ort"), 3.0)
    (comparison,) = compared([gguf_bench()], [rounded, dense])
    point = of(comparison)["q4 (llamacpp)"]
    assert not point.same_files
    assert point.timed.checked_kl == 2e-3
    unchecked = {"mode": "own", "candidate": None, "baseline": None}
    assert compared([gguf_bench(answers=unchecked)], [rounded, dense]) == []


def test_an_evaluation_of_the_gguf_file_itself_goes_before_one_of_the_weights_beside_it() -> None:
    own = evaluated(eval_side("q4", "llamacpp", file="model.gguf"), 3.4)
    rounded = evaluated(eval_side("q4", "torch", "rounded", "model.safetensors"), 3.3)
    dense = evaluated(eval_side("dense", "ort"), 3.0)
    (comparison,) = compared([gguf_bench()], [rounded, own, dense])
    point = of(comparison)["q4 (llamacpp)"]
    assert (point.same_files, point.quality.runtime) == (True, "llamacpp")
    own["target"]["sha256"]["model.gguf"] = sha("other bytes")
    assert compared([gguf_bench()], [own, dense]) == []


def test_kl_needs_one_reference_and_equal_windows() -> None:
    dense = eval_side("dense", "ort-stock")
    benches = [bench(SPARSE), bench(side("half", "ort", 4.0))]
    sparse_one = evaluated(eval_side("sparse", "ort"), 4.0, reference=dense, kl=0.9)
    half = evaluated(eval_side("half", "ort"), 3.2, reference=dense, kl=0.1)
    (comparison,) = compared(benches, [sparse_one, half])
    assert comparison.reference_name == "dense (ort-stock)"
    assert {name: point.kl for name, point in of(comparison).items()} == {
        "sparse (ort)": 0.9,
        "half (ort)": 0.1,
        "dense (ort-stock)": 0.0,
    }
    assert [point.timed.model.folder for point in comparison.points if point.is_reference] == ["dense"]
    for other in (
        evaluated(eval_side("half", "ort"), 3.2, reference=dense, kl=0.1, windows=3),
        evaluated(eval_side("half", "ort"), 3.2, reference=eval_side("another", "ort"), kl=0.1),
    ):
        (comparison,) = compared(benches, [sparse_one, other])
        assert comparison.reference_name == ""
        assert {point.kl for point in comparison.points} == {None}


def test_settings_do_not_mix() -> None:
    evals = [evaluated(eval_side("sparse", "ort"), 4.0), evaluated(eval_side("dense", "ort"), 3.0)]
    found = compared([bench(SPARSE), bench(SPARSE, threads=1)], evals)
    assert [comparison.setting.threads for comparison in found] == [2, 1]
    assert all(len(comparison.points) == 2 for comparison in found)


def test_several_runs_of_one_model_are_one_point_with_the_outermost_whiskers() -> None:
    found = timings([bench(side("sparse", "ort", decode)) for decode in (2.0, 3.0, 2.2)])
    decode = next(one.decode for one in found if one.model.folder == "sparse")
    assert (decode.middle, decode.low, decode.high) == (2.2, 1.9, 3.1)


@pytest.mark.parametrize(
    ("times", "losses", "expected"),
    [
        ([1.0, 2.0, 3.0], [5.0, 3.0, 4.0], [True, True, False]),
        ([1.0, 1.0], [2.0, 3.0], [True, False]),
        ([1.0, 2.0], [3.0, 3.0], [True, False]),
        ([1.0, 1.0], [3.0, 3.0], [True, True]),
        # A difference below rounding wins nothing.
        ([1.0, 2.0], [3.0, 2.999], [True, False]),
        ([1.0, 2.0], [3.0, 2.9], [True, True]),
        ([1.0, 2.0], [None, 3.0], [False, True]),
        ([1.0, 2.0], [math.inf, 3.0], [True, True]),
    ],
)
def test_front(times: list[float], losses: list[float | None], expected: list[bool]) -> None:
    assert front(times, losses, 0.01) == expected


def test_the_page_shows_the_front_and_says_what_is_compared(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the 'plot' extra")
    from losa_export.eval.html_report import write_report

    folder = tmp_path / "in"
    write_everything(folder)
    # As fast as 'half' and worse.
    (folder / "slow.json").write_text(json.dumps(bench(side("slow", "ort", 4.5))))
    (folder / "eval-slow.json").write_text(json.dumps(evaluated(eval_side("slow", "ort"), 3.9)))
    old = evaluated(eval_side("old", "ort"), 3.9)
    del old["target"]["sha256"]
    (folder / "eval-old.json").write_text(json.dumps(old))
    write_report([folder], tmp_path / "report.html", tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    part = text.split("\n## Quality against latency: wiki.txt, 8 + 4 tokens, 2 threads")[1].split("\n## ")[0]
    assert "first 4 windows of 64 tokens of wiki.txt" in part
    assert "KL is the mean divergence of a model's next tokens from those of dense (ort-stock)" in part
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in part.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        ["sparse (ort)", "sparse int8", "2 (1.9 – 2.1)", "90.02", "0.9", "yes", "ort"],
        ["q4 (llamacpp)", "GGUF Q4_0", "3 (2.9 – 3.1)", "44.70", "0.2", "yes", "torch"],
        ["half (ort)", "sparse int8", "4 (3.9 – 4.1)", "40.45", "0.1", "yes", "ort"],
        ["slow (ort)", "fp32", "4.5 (4.4 – 4.6)", "81.45", "–", "", "ort"],
        ["dense (ort-stock)", "dense fp32", "10 (9.9 – 10.1)", "33.12", "0", "yes", "ort-stock"],
    ]
    assert "q4 (llamacpp): evaluated was the checkpoint of the same weights" in part
    assert "eval-old.json does not tell the SHA-256" in text
    page = (tmp_path / "report.html").read_text()
    assert ">perplexity</text>" in page
    assert ">KL, nats a token</text>" in page
    assert ">dense (ort-stock): KL 0</text>" in page


def test_what_cannot_be_joined_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the 'plot' extra")
    from losa_export.eval.html_report import write_report

    (tmp_path / "a.json").write_text(json.dumps(bench(SPARSE)))
    (tmp_path / "b.json").write_text(json.dumps(evaluated(eval_side("sparse", "ort", "other weights"), 3.0)))
    write_report([tmp_path], tmp_path / "report.html", tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "No two models here were both timed under one setting and evaluated on one text" in text
    assert "SHA-256 of what it evaluated" not in text
