"""The study of methods: equal budgets, cells that survive interruption and failure, and verdicts by rule."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_export.errors import CheckpointError, ConfigError
from losa_export.eval.studies import methods, methods_cell
from losa_export.eval.studies.methods import document, main, results, run_study, write_page
from losa_export.eval.studies.methods_cell import CellTask, EvaluationText, Study, identity, run_cell
from losa_export.eval.studies.methods_page import (
    ALL,
    ComponentVerdict,
    differences,
    gap_closed,
    ordered_sparsities,
    page,
)
from losa_export.eval.studies.methods_table import (
    COMPONENTS,
    METHODS,
    Budget,
    Cell,
    Component,
    parse_sparsity,
    plain_lora_config,
    train_config,
)
from losa_export.training import train as train_module
from losa_export.training.train import train

TEXT = "text/sentences.txt"


@pytest.fixture
def budget(tiny_checkpoint: Path, tiny_text: Path) -> Budget:
    return Budget(
        model=tiny_checkpoint,
        tuning_text=(tiny_text,),
        steps=10,
        batch_size=2,
        window=16,
        calibration_windows=8,
        calibration_window=16,
        rank=4,
    )


@pytest.fixture
def study(budget: Budget, tiny_text: Path, tmp_path: Path) -> Study:
    texts = (EvaluationText(tiny_text, wikitext=False, window=32, windows=3),)
    return Study("tiny", budget, texts, tmp_path / "work", 1, identity(budget.model, [tiny_text]), show_progress=False)


# ---- equal budgets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sparsity", ["60%", "2:4"])
def test_every_method_gets_the_same_tokens_windows_and_final_rank(budget: Budget, name: str, sparsity: str) -> None:
    cell = Cell(name, sparsity, 3)
    configs = [train_config(cell, budget, Path("run"))]
    if METHODS[name].procedure == "tune, then prune":
        configs.append(plain_lora_config(cell, budget, Path("run")))
    assert sum(config.steps or 0 for config in configs) == (0 if METHODS[name].procedure == "prune" else 10)
    for config in configs:
        assert (config.batch_size, config.window, config.packing, config.add_bos) == (2, 16, True, False)
        assert (config.calibration_windows, config.calibration_window, config.seed) == (8, 16, 3)
        assert config.mean_rank(config.rounds) == pytest.approx(4)
        assert config.time_budget_seconds is None
    assert (configs[0].sparsity_fraction, configs[0].pattern) == parse_sparsity(sparsity)


def test_a_time_budget_takes_the_place_of_steps(budget: Budget) -> None:
    timed = dataclasses.replace(budget, steps=None, time_budget_seconds=90.0)
    tuned, pruned = (train_config(Cell(name, "60%", 0), timed, Path("run")) for name in ("recommended", "wanda"))
    assert (tuned.steps, tuned.time_budget_seconds) == (None, 90.0)
    assert (pruned.steps, pruned.time_budget_seconds) == (0, None)


def test_presets_keep_what_makes_them_themselves(budget: Budget) -> None:
    faithful = train_config(Cell("faithful", "70%", 0), budget, Path("run"))
    assert (faithful.rounds, faithful.learning_rate, faithful.adapter_dropout) == (5, 2e-4, 0.1)
    assert (faithful.learning_rate_schedule, faithful.dtype, faithful.rmi_windows) == ("per_round", "bf16", 4)
    recommended = train_config(Cell("recommended", "70%", 0), budget, Path("run"))
    lors = train_config(Cell("lors", "70%", 0), budget, Path("run"))
    assert lors == dataclasses.replace(recommended, operator="lors")


def test_ranks_that_grow_end_where_the_others_are(budget: Budget) -> None:
    wide = dataclasses.replace(budget, rank=10)
    faithful = train_config(Cell("faithful", "70%", 0), wide, Path("run"))
    assert (faithful.rank, faithful.rank_growth) == (6, 1.0)  # as released


def test_the_plain_lora_of_all_sparsities_is_one(budget: Budget) -> None:
    first, second = (plain_lora_config(Cell("lora-remasked", s, 0), budget, Path("run")) for s in ("50%", "2:4"))
    assert first == second
    assert first.sparsity_fraction == 0.0


@pytest.mark.parametrize("text", ["70", "0%", "100%", "x%", "mixed:8", "-5%", "4:2"])
def test_a_sparsity_that_makes_no_sense_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"give a percentage such as 70%|give a fixed pattern|write N:M"):
        Cell("wanda", text, 0)


def test_an_unknown_method_is_an_error() -> None:
    with pytest.raises(ConfigError, match="method is 'dora'; choose one of wanda, sparsegpt"):
        Cell("dora", "70%", 0)


def test_every_component_compares_methods_that_there_are() -> None:
    assert {name for one in COMPONENTS for name in (one.method, one.against)} <= set(METHODS)


# ---- cells --------------------------------------------------------------------------------------------------------


def test_a_cell_is_trained_merged_and_judged(study: Study) -> None:
    task = study.task(Cell("ramp", "60%", 0))
    record = run_cell(task)
    assert record == task.finished()
    assert (record["steps"], record["tokens"], record["mean_rank"]) == (10, 10 * 2 * 16, 4.0)
    assert 0.6 - 1 / 64 < record["zeros"] <= 0.6
    (found,) = record["evaluation"].values()
    assert found["windows"] == 3
    # A random model: predictions near even over 128 words, and sparse ones near those.
    assert found["nll"] == pytest.approx(math.log(128), abs=1.0)
    assert 0 < found["kl_divergence"] < 1
    assert 0 <= found["agreement"] <= 1
    assert not list((study.work / "runs").iterdir())


def test_plain_lora_is_tuned_once_and_pruned_for_each_sparsity(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[Path] = []

    def spy(config: Any, **options: Any) -> Any:
        if not options.get("resume"):
            outputs.append(config.output)
        return train(config, **options)

    monkeypatch.setattr(train_module, "train", spy)
    records = [run_cell(study.task(Cell("lora-remasked", sparsity, 0))) for sparsity in ("50%", "2:4")]
    assert [record["steps"] for record in records] == [10, 10]
    assert [path.parent.name.split("-")[0] for path in outputs] == ["plain", "lora", "lora"]
    assert records[1]["zeros"] == 0.5
    base = run_cell(study.task(Cell("wanda", "2:4", 0)))
    assert base["steps"] == 0
    assert base["mean_rank"] is None
    assert base["evaluation"] != records[1]["evaluation"]  # the tuning left its mark


def test_another_budget_or_text_makes_a_result_void(study: Study) -> None:
    cell = Cell("wanda", "50%", 0)
    run_cell(study.task(cell))
    assert study.task(cell).finished() is not None
    others = (
        dataclasses.replace(study, budget=dataclasses.replace(study.budget, calibration_windows=9)),
        dataclasses.replace(study, texts=(dataclasses.replace(study.texts[0], windows=2),)),
        dataclasses.replace(study, identity={**study.identity, "weights": "0"}),
    )
    assert [other.task(cell).finished() for other in others] == [None] * 3
    assert results(others[0]) == []


def test_a_setting_that_came_later_voids_results_only_if_it_is_used(study: Study) -> None:
    cell = Cell("wanda", "50%", 0)
    run_cell(study.task(cell))
    path = study.task(cell).result_file
    record = json.loads(path.read_text())
    (settings,) = record["recipe"]["runs"]

    def without(name: str) -> Any:
        recipe = record["recipe"] | {"runs": [{key: value for key, value in settings.items() if key != name}]}
        path.write_text(json.dumps(record | {"recipe": recipe}))
        return study.task(cell).finished()

    assert without("damping") is not None  # at its default
    assert without("max_rank") is not None
    assert without("window") is None  # 16, where 256 is the default


def test_an_interrupted_cell_goes_on_to_the_same_result(study: Study, tmp_path: Path) -> None:
    cell = Cell("teacher", "60%", 0)
    whole = run_cell(study.task(cell))
    again = dataclasses.replace(study, work=tmp_path / "again")
    calls: list[bool] = []

    def interrupted(config: Any, **options: Any) -> Any:
        def stop(record: Any) -> None:
            if (record.round_number, record.step) == (2, 0) and not calls:
                calls.append(True)
                os.kill(os.getpid(), signal.SIGTERM)

        return train(config, on_step=stop, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "train", interrupted)
        with pytest.raises(methods_cell.InterruptedCellError):
            run_cell(again.task(cell))
        assert again.task(cell).finished() is None
        resumed = run_cell(again.task(cell))
    assert calls
    assert resumed["evaluation"] == whole["evaluation"]


def test_what_is_left_of_other_settings_does_not_stop_a_cell(study: Study) -> None:
    cell = Cell("masked-lora", "50%", 0)
    leftover = train_config(cell, dataclasses.replace(study.budget, steps=2), study.work / "runs" / cell.name / "run")
    train(leftover, show_progress=False)
    assert run_cell(study.task(cell))["steps"] == 10


def test_wikitext_is_read_by_its_protocol(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_text("the cat ran \n \n a dog sat \n" * 4)
    windows = EvaluationText(path, wikitext=True, window=6, windows=None).cut(tiny_checkpoint)
    documents = EvaluationText(path.rename(tmp_path / "wiki.txt"), False, 6, None).cut(tiny_checkpoint)
    assert windows.shape == (4, 6)
    assert np.array_equal(windows, documents)  # white space is nothing to a tokenizer of words


# ---- the matrix ---------------------------------------------------------------------------------------------------


def _explode(task: CellTask) -> None:
    if task.cell.method == "sparsegpt":
        raise CheckpointError("this model is broken; save it again")
    if task.cell.method == "alps":
        os.kill(os.getpid(), signal.SIGKILL)
    run_cell(task)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_cell_that_fails_or_dies_costs_no_other(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    # Forked from here, where the patch is; the forkserver would import the module anew.
    monkeypatch.setattr(methods.multiprocessing, "get_all_start_methods", list)
    context = methods.multiprocessing.get_context("fork")
    monkeypatch.setattr(methods.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(methods, "run_cell", _explode)
    cells = [Cell(method, "50%", 0) for method in ("sparsegpt", "alps", "wanda")]
    failed = run_study(study, cells)
    assert failed == {
        "sparsegpt, 50%, seed 0": "this model is broken; save it again",
        "alps, 50%, seed 0": "its process ended with -9",
    }
    record = document(study, failed, "command")
    assert [cell["method"] for cell in record["cells"]] == ["wanda"]
    assert {row["cell"] for row in record["failed"]} == set(failed)
    assert "**Without a result:** sparsegpt, 50%, seed 0: this model is broken" in page([record])


def test_a_cell_that_another_process_has_finished_is_not_done_again(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [Cell("wanda", "50%", 0), Cell("wanda", "2:4", 0)]
    started: list[Cell] = []

    def both(_: Any, task: CellTask) -> None:
        started.append(task.cell)
        for cell in cells:
            run_cell(study.task(cell))

    monkeypatch.setattr(methods, "_in_own_process", both)
    assert run_study(study, cells) == {}
    assert started == cells[:1]


@pytest.mark.slow
def test_the_command_survives_ctrl_c_and_ends_in_a_page(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    work, pages = tmp_path / "work", tmp_path / "pages"
    sizes = {"steps": 400, "batch-size": 2, "window": 16, "calibration-windows": 8, "calibration-window": 16, "rank": 4}
    words = [str(tiny_checkpoint), "--name", "tiny", "--tune", str(tiny_text), "--text", str(tiny_text)]
    words += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    words += ["--text-window", "32", "--text-windows", "2", "--methods", "wanda", "ramp", "--sparsities", "50%"]
    words += ["--seeds", "0", "--quiet", "-o", str(work), "--page", str(pages)]
    command = [sys.executable, "-P", "-m", "losa_export.eval.studies.methods", *words]
    state = work / "runs" / "ramp-50-0" / "run" / "rounds.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not (state.is_file() and state.read_text()) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert "the same command goes on from here" in said
    assert not pages.exists()
    before = len(state.read_text().splitlines())
    assert before >= 1
    assert main(words) == 0
    assert (work / "cells" / "ramp-50-0.json").is_file()
    text = (pages / "methods.md").read_text()
    assert "## tiny" in text
    assert "| `ramp` |" in text
    shutil.rmtree(work)
    (pages / "methods.md").unlink()
    assert main(["--page", str(pages)]) == 0
    assert (pages / "methods.md").read_text() == text


def test_the_command_takes_minutes_in_place_of_steps(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    words = [str(tiny_checkpoint), "--name", "timed", "--tune", str(tiny_text), "--text", str(tiny_text)]
    words += ["--minutes", "0.05", "--batch-size", "2", "--window", "16", "--calibration-windows", "8"]
    words += ["--calibration-window", "16", "--rank", "4", "--text-window", "32", "--text-windows", "2", "--quiet"]
    words += ["--methods", "masked-lora", "--sparsities", "50%", "--seeds", "0", "-o", str(tmp_path / "work")]
    assert main([*words, "--page", str(tmp_path)]) == 0
    assert "3 s for pruning and tuning together, in steps of 2 windows of 16 tokens" in (
        tmp_path / "methods.md"
    ).read_text(encoding="utf-8")
    (record,) = json.loads((tmp_path / "methods-timed.json").read_text(encoding="utf-8"))["cells"]
    assert record["tokens"] == record["steps"] * 32 > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is nothing to do"),
        (["MODEL", "--text", "TEXT"], "--tune is not given"),
        (["MODEL", "--tune", "TEXT", "-o", "OUT"], "no text to judge by"),
        (["MODEL", "--tune", "TEXT", "--text", "TEXT", "-o", "OUT", "--text-windows", "99999"], "are needed"),
        (
            ["MODEL", "--tune", "TEXT", "--text", "TEXT", "-o", "OUT", "--text-windows", "1", "--methods", "dora"],
            "method is 'dora'",
        ),
        (["--page", "OUT"], "there are no results in"),
    ],
)
def test_a_command_that_cannot_work_says_so_at_once(
    words: list[str],
    message: str,
    tiny_checkpoint: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"MODEL": str(tiny_checkpoint), "TEXT": str(tiny_text), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in words]) == 1
    assert message in capsys.readouterr().err


def test_a_strange_file_beside_the_page_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "methods-x.json").write_text("[]")
    assert main(["--page", str(tmp_path)]) == 1
    assert "holds no results of this study" in capsys.readouterr().err
    (tmp_path / "methods-x.json").write_text("{")
    assert main(["--page", str(tmp_path)]) == 1
    assert "cannot be read as JSON" in capsys.readouterr().err


# ---- the page -----------------------------------------------------------------------------------------------------


def result(method: str, sparsity: str, seed: int, nll: float) -> dict[str, Any]:
    return {
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "zeros": parse_sparsity(sparsity)[0],
        "mean_rank": 4.0,
        "tokens": 100,
        "prune_seconds": 1.0,
        "tune_seconds": 2.0,
        "peak_memory_bytes": 2**20,
        "evaluation": {
            TEXT: {
                "windows": 3,
                "window": 32,
                "dense_nll": 1.0,
                "nll": nll,
                "kl_divergence": nll - 1,
                "agreement": 0.5,
            }
        },
    }


def test_verdicts_follow_the_interval_of_paired_differences() -> None:
    component = Component("x", "ramp", "masked-lora")

    def of(changes: list[float]) -> Any:
        # Seeds differ far more among each other than methods do: only pairs can tell.
        cells = [result("masked-lora", "50%", seed, 2.0 + seed) for seed in range(len(changes))]
        cells += [result("ramp", "50%", seed, 2.0 + seed + change) for seed, change in enumerate(changes)]
        return differences(component, cells, TEXT)["50%"]

    assert of([-0.10, -0.11, -0.12]).verdict is ComponentVerdict.HELPED
    assert of([0.10, 0.11, 0.12]).verdict is ComponentVerdict.HURT
    assert of([-0.10, 0.11, -0.12]).verdict is ComponentVerdict.NO_DIFFERENCE_SHOWN
    assert of([-0.10]).verdict is ComponentVerdict.ONE_SEED
    assert of([-0.10, -0.12, -0.11]).mean == pytest.approx(-0.11)


def test_the_whole_counts_seeds_that_have_every_sparsity() -> None:
    component = Component("x", "ramp", "masked-lora")
    cells = [result("masked-lora", s, seed, 2.0) for s in ("50%", "2:4") for seed in (0, 1)]
    cells += [result("ramp", "50%", 0, 1.9), result("ramp", "2:4", 0, 1.7), result("ramp", "50%", 1, 1.0)]
    found = differences(component, cells, TEXT)
    assert list(found) == ["50%", "2:4", ALL]
    assert found[ALL].seeds == 1
    assert found[ALL].mean == pytest.approx(-0.2)
    assert found["50%"].seeds == 2
    assert differences(Component("x", "rmi", "ramp"), cells, TEXT) == {}


def test_the_gap_is_that_of_the_same_sparsity_and_seed() -> None:
    cells = [result("wanda", "50%", 0, 3.0), result("wanda", "50%", 1, 5.0), result("ramp", "50%", 1, 2.0)]
    assert gap_closed(cells[2], cells, TEXT) == pytest.approx(3 / 4)
    assert gap_closed(cells[2], cells[:1], TEXT) is None


def test_percentages_come_before_patterns() -> None:
    cells = [result("wanda", sparsity, 0, 2.0) for sparsity in ("2:4", "70%", "5%", "50%")]
    assert ordered_sparsities(cells) == ["5%", "50%", "70%", "2:4"]


def test_the_page_says_plainly_what_did_not_help(tmp_path: Path) -> None:
    levels = {"wanda": 3.0, "masked-lora": 2.0, "ramp": 2.2, "rmi": 2.2}
    wobble = {"rmi": (0.1, -0.1, 0.01)}
    cells = [
        result(name, sparsity, seed, nll + seed + wobble.get(name, (0.0, 0.001, 0.0))[seed])
        for name, nll in levels.items()
        for sparsity in ("50%", "70%")
        for seed in range(3)
    ]
    record = {
        "schema": methods.SCHEMA,
        "schema_version": methods.SCHEMA_VERSION,
        "model": "tiny",
        "command": "python -m study",
        "budget": {
            "steps": 10,
            "batch_size": 2,
            "window": 16,
            "calibration_windows": 8,
            "calibration_window": 16,
            "rank": 4,
        },
        "tuning_text": ["a"],
        "calibration_text": ["b"],
        "texts": [TEXT],
        "threads": 1,
        "failed": [],
        "cells": cells,
    }
    (tmp_path / "methods-tiny.json").write_text(json.dumps(record))
    text = write_page(tmp_path).read_text()
    assert "Tuning under the masks (`masked-lora` against `wanda`): **HELPED**, perplexity -63.2%." in text
    assert "The ramp: five rounds in place of one (`ramp` against `masked-lora`): **HURT**, perplexity +22.1%." in text
    assert "(`rmi` against `ramp`): **NO DIFFERENCE SHOWN**, perplexity +0.3%." in text
    assert (
        "**What did not help here:** The ramp: five rounds in place of one (hurt); "
        "Block sparsities by mutual information (no difference shown)." in text
    )
    assert "320 tokens" in text
    perplexities = np.exp([2.0, 3.001, 4.0])  # gap closed: 1.0 of 2.0, 0.999 of 3.0, 1.0 of 4.0 nats
    assert f"| `masked-lora` | {perplexities.mean():.2f} ± {perplexities.std(ddof=1):.2f} (36%) |" in text
    assert "None" not in text
