"""The soak of `losa_export.eval.studies.serve_soak`, for seconds: it passes here, and would notice faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="needs the extra 'bench-serve'")

from losa_export.errors import ConfigError
from losa_export.eval.studies import serve_soak
from losa_export.eval.studies.serve_soak import Question, SoakConfig, memory_growth, memory_of, soak


def brief(served: Path, **changes: object) -> SoakConfig:
    given = {
        "seconds": 4.0,
        "calibrate_seconds": 1.0,
        "client_kills": 6,
        "worker_kills": 1,
        "threads": 1,
        "prompts": 9,
        "new_tokens": 24,
    }
    return SoakConfig(served, **given | changes)  # type: ignore[arg-type]


def test_an_overloaded_server_keeps_every_answer(served: Path, tmp_path: Path) -> None:
    record = soak(brief(served), tmp_path / "log")
    assert record["passed"], (record["overload"]["wrong"], record["kills"]["wrong"])
    outcomes = record["overload"]["outcomes"]
    assert set(outcomes) <= {"answered", "refused", "left"}
    assert outcomes["answered"] > 10, outcomes
    assert outcomes.get("left", 0) <= 6
    assert set(record["kills"]["outcomes"]) <= {"answered", "refused", "cut by a kill", "refused by a kill"}
    json.dumps(record)
    log = (tmp_path / "log").read_text()  # a killed worker may leave half a line
    assert log.count('"event": "worker died"') == 1
    assert "request failed" not in log


def test_one_wrong_answer_is_noticed(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = serve_soak.make_questions

    def spoiled(config: SoakConfig) -> list[Question]:
        return [Question(one.prompt, one.answer + "!") for one in real(config)]

    monkeypatch.setattr(serve_soak, "make_questions", spoiled)
    with pytest.raises(Exception, match=r"did not answer at its own pace.*instead of"):
        soak(brief(served, seconds=1.0, worker_kills=0), tmp_path / "log")


def test_memory_is_measured_and_its_growth() -> None:
    import os

    assert memory_of([os.getpid()]) > 10**7
    assert memory_of([2**22 + 1]) == 0
    flat = [(float(second), 1000 + second % 2) for second in range(100)]
    assert memory_growth(flat) == pytest.approx(0.0, abs=0.001)
    assert memory_growth([(second, int(1000 + 10 * second)) for second, _ in flat]) == pytest.approx(0.7, abs=0.1)
    assert memory_growth(flat[:20]) is None


@pytest.mark.parametrize(
    "changes", [{"seconds": 0}, {"overload": -1}, {"slots": 0}, {"workers": 1, "worker_kills": 1}, {"prompts": 0}]
)
def test_impossible_soaks_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SoakConfig(Path("onnx"), **changes)  # type: ignore[arg-type]
