from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_export.cli import main
from losa_export.errors import BenchmarkError, InputError
from losa_export.eval.bench_compare import compare_records
from losa_export.eval.bench_report import SCHEMA, SCHEMA_VERSION
from losa_export.eval.stats import Verdict, change_of_ratio

BLOCKS = 12


def record(speed: float, seed: int, *, machine: float = 1.0) -> dict[str, Any]:
    """As much of a bench.json as is read: a baseline of 10 ms, a candidate `speed` times as fast, and noise of 1 %."""
    generator = np.random.default_rng(seed)
    samples = []
    for block in range(BLOCKS):
        for side in ("candidate", "baseline", "baseline", "candidate"):
            scale = machine * 10.0 / (speed if side == "candidate" else 1.0)
            times = scale * generator.normal(1.0, 0.01, 4)
            samples.append({"block": block, "side": side, "prefill_ms": times[0], "decode_ms": times[1:].tolist()})
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "threads": 2,
        "config": {"prompt_tokens": 8, "new_tokens": 3, "batch": 1, "baseline_runtime": "ort-stock"},
        "machine": {"cpu_model": "a processor"},
        "baseline": {
            "files": [{"name": "model.onnx", "bytes": 5, "sha256": "ab"}],
            "engine": {"engine": "onnxruntime", "version": "1.0"},
        },
        "prefill": {"all_blocks": {"ratio": speed, "verdict": "FASTER"}},
        "decode": {"all_blocks": {"ratio": speed, "verdict": "FASTER"}},
        "samples": samples,
    }


def write(folder: Path, *documents: dict[str, Any]) -> list[str]:
    paths = [folder / f"{number}.json" for number in range(len(documents))]
    for path, document in zip(paths, documents, strict=True):
        path.write_text(json.dumps(document), encoding="utf-8")
    return [str(path) for path in paths]


def test_a_slower_candidate_fails_and_says_by_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write(tmp_path, record(2.0, 0), record(1.8, 1))
    assert main(["bench", "compare", *paths]) == 0
    assert main(["bench", "compare", *paths, "--fail-if-slower", "15%"]) == 0
    assert main(["bench", "compare", *paths, "--fail-if-slower", "3%"]) == 1
    said = capsys.readouterr()
    assert "decode  2.00x → 1.80x of the baseline: change 0.89" in said.out
    assert "SLOWER" in said.out
    assert "slower by more than 3.0%: prefill, decode" in said.err
    assert main(["bench", "compare", *reversed(paths), "--fail-if-slower", "3%"]) == 0


def test_a_slower_machine_is_no_slower_candidate(tmp_path: Path) -> None:
    before, after = map(Path, write(tmp_path, record(2.0, 0), record(2.0, 1, machine=1.7)))
    for change in compare_records(before, after):
        assert change.change.verdict == Verdict.NO_DIFFERENCE_SHOWN
        assert not change.slower_than(0.0)
        assert "would not have shown" in str(change)


def test_the_change_turns_over_with_the_records(tmp_path: Path) -> None:
    before, after = map(Path, write(tmp_path, record(1.0, 0), record(1.3, 1)))
    there, back = compare_records(before, after)[1].change, compare_records(after, before)[1].change
    assert there.ratio == pytest.approx(1.3, rel=0.02)
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert there.low > 1.0 > back.high


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("baseline", "files"), [{"name": "model.onnx", "bytes": 5, "sha256": "cd"}], "differ in baseline's files"),
        (("baseline", "engine"), {"engine": "onnxruntime", "version": "2.0"}, "differ in baseline's engine"),
        (("config", "new_tokens"), 4, "differ in new_tokens: 3 and 4"),
        (("machine", "cpu_model"), "another", "differ in processor: a processor and another"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, place: tuple[str, str], value: object, message: str
) -> None:
    other = copy.deepcopy(record(1.0, 1))
    other[place[0]][place[1]] = value
    before, after = map(Path, write(tmp_path, record(1.0, 0), other))
    with pytest.raises(BenchmarkError, match=message):
        compare_records(before, after)


def test_a_record_without_a_verdict_is_no_ground_for_one(tmp_path: Path) -> None:
    busy = record(1.0, 1)
    busy["decode"]["all_blocks"]["verdict"] = "NO VERDICT"
    before, after = map(Path, write(tmp_path, record(1.0, 0), busy))
    with pytest.raises(BenchmarkError, match=r"1\.json' was measured on a machine too busy"):
        compare_records(before, after)


def test_a_file_that_is_no_record_is_an_error(tmp_path: Path) -> None:
    (path,) = map(Path, write(tmp_path, {"schema": "other"}))
    with pytest.raises(InputError, match="run 'losa bench' again"):
        compare_records(path, path)


@pytest.mark.parametrize("blocks", [(6, 6), (8, 20), (40, 40)])
def test_intervals_of_a_change_cover_it_as_often_as_they_claim(blocks: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    trials, covered = 2000, 0
    for _ in range(trials):
        runs = []
        for count, speed in zip(blocks, (1.5, 1.8), strict=True):
            slow = generator.lognormal(0.0, 0.1, (count, 1))
            runs.append(tuple(slow * generator.lognormal(0.0, 0.03, (count, 2)) / by for by in (1.0, speed)))
        found = change_of_ratio(*runs)  # type: ignore[arg-type]
        covered += found.low <= 1.2 <= found.high
    assert 0.93 <= covered / trials <= 0.97
