"""Whole runs whose sparsities and ranks are allocated by measurement."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_export.errors import ConfigError, MissingDependencyError
from losa_export.masks import digest, load_masks
from losa_export.training import train as train_module
from losa_export.training.config import TrainConfig, from_table, read_run_config, to_table, write_toml
from losa_export.training.journal import read_journal
from losa_export.training.loop import Tuner
from losa_export.training.scores import pruned_per_row
from losa_export.training.state import load_state
from losa_export.training.train import StepRecord, train

ConfigMaker = Callable[..., TrainConfig]
FULL: dict[str, Any] = {
    "sparsity_allocator": "linear",
    "sparsity_band": 0.05,
    "rank_allocator": "water_filling",
    "rank": 2,
    "rank_growth": 0.5,
    "max_rank": 4,
    "steps": 6,
}


@pytest.fixture(scope="module")
def three_blocks(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with its second block a third time: of two blocks each is as redundant as the other."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("three") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
    tensors |= {name.replace(".layers.1.", ".layers.2."): 0.8 * tensor for name, tensor in last.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def outcome(folder: Path) -> dict[str, Any]:
    masks = load_masks(folder / "masks.safetensors")
    clocked = ("prune_seconds", "tune_seconds", "measure_seconds", "peak_memory_bytes")
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return {
        "masks": {name: digest(masks.read(name)) for name in masks.names},
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "rounds": [{key: value for key, value in row.items() if key not in clocked} for row in rows],
    }


@pytest.mark.parametrize("allocator", ["lp", "linear", "owl", "atp", "fixed"])
def test_every_allocator_reaches_the_target_with_another_sparsity_for_each_block(
    tiny_config: ConfigMaker, three_blocks: Path, allocator: str
) -> None:
    changes: dict[str, Any] = {"fixed": {"block_sparsities": (0.5, 0.7, 0.6)}}.get(allocator, {})
    config = tiny_config(**(FULL | {"model": three_blocks, "sparsity_allocator": allocator, "steps": 0} | changes))
    result = train(config, show_progress=False)
    # P3: each row loses at most one position to the floor, and none is pruned beyond the target
    assert 0.6 - 1 / 64 < result.sparsity_fraction <= 0.6
    for record in result.rounds:
        assert np.mean(record.block_targets) == pytest.approx(record.target_sparsity, abs=1e-9)
        assert len(set(record.block_targets)) > 1
        assert len(record.rmi_row_sums) == (3 if allocator in ("lp", "linear") else 0)
        assert len(record.block_outliers) == (3 if allocator == "owl" else 0)
        assert (record.measure_seconds > 0.0) == (allocator in ("lp", "linear", "owl"))
        assert record.prune_seconds > record.measure_seconds
    masks = load_masks(result.masks_file)
    for name in masks.names:
        target = result.rounds[-1].block_targets[int(name.split(".")[2])]
        keep = masks.read(name)
        assert set((~keep).sum(axis=1)) == {pruned_per_row(keep.shape[1], target)}


@pytest.mark.parametrize("allocator", ["water_filling", "proportional"])
def test_ranks_follow_errors_and_their_mean_grows(tiny_config: ConfigMaker, allocator: str) -> None:
    result = train(tiny_config(**(FULL | {"rank_allocator": allocator})), show_progress=False)
    assert [record.mean_rank for record in result.rounds] == [2.0, 2.5, 3.0]
    for record in result.rounds:
        assert len(record.block_errors) == 2
        assert min(record.block_errors) > 0.0
        asked = np.array(record.block_errors) / sum(record.block_errors) * round(2 * record.mean_rank)
        assert record.block_ranks_asked == pytest.approx(asked)
        if allocator == "water_filling":
            assert sum(record.block_ranks) == round(2 * record.mean_rank)
        larger = int(np.argmax(record.block_errors))
        assert record.block_ranks[larger] >= record.block_ranks[1 - larger]
    # accumulated errors grow with sparsity here
    assert sum(result.rounds[-1].block_errors) > sum(result.rounds[0].block_errors)
    ranks = json.loads((result.adapter_folder / "adapter_config.json").read_text())
    assert {ranks["r"], *ranks["rank_pattern"].values()} == set(result.rounds[-1].block_ranks)


def test_mutual_information_is_measured_on_what_the_round_before_left(
    tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, int]] = []
    measure_blocks = train_module.measure_blocks

    def watch(adapted: Any, windows: Any, **options: Any) -> Any:
        seen.append((adapted.sparsity_fraction(), len(windows)))
        return measure_blocks(adapted, windows, **options)

    monkeypatch.setattr(train_module, "measure_blocks", watch)
    result = train(tiny_config(**FULL, rmi_windows=4), show_progress=False)
    reached = [0.0] + [record.sparsity_fraction for record in result.rounds[:-1]]
    assert seen == [(sparsity, 4) for sparsity in reached]


def test_a_run_is_its_own_twin_and_local_errors_make_another(
    tiny_config: ConfigMaker, three_blocks: Path, tmp_path: Path
) -> None:
    runs = {
        name: tiny_config(output=tmp_path / name, model=three_blocks, **FULL, error_kind=kind)
        for name, kind in (("a", "accumulated"), ("b", "accumulated"), ("c", "local"))
    }
    for config in runs.values():
        train(config, show_progress=False)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    first, other = (read_journal(tmp_path / name)[0].block_errors for name in ("a", "c"))
    assert first[0] == other[0]
    assert first[1] > other[1]


@pytest.mark.parametrize("stop_at", [(1, 0), (2, 0), (3, 1)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    tiny_config: ConfigMaker, three_blocks: Path, tmp_path: Path, stop_at: tuple[int, int]
) -> None:
    # Ranks fall here: shrinking, and moments that were forgotten, must come back too.
    changes = FULL | {"rank": 4, "rank_growth": -1.0, "steps": 9, "final_round_share": 0.4, "model": three_blocks}
    whole = tiny_config(output=tmp_path / "whole", **changes)
    result = train(whole, show_progress=False)
    assert [sum(record.block_ranks) for record in result.rounds] == [12, 9, 6]

    def interrupt(record: StepRecord) -> None:
        if (record.round_number, record.step) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    config = tiny_config(**changes)
    assert train(config, show_progress=False, on_step=interrupt).status == "interrupted"
    if stop_at == (2, 0):
        state = load_state(config.output).state
        assert np.array(state.rmi).shape == (3, 3)
        assert state.block_errors == list(result.rounds[1].block_errors)
    assert train(config, show_progress=False, resume=True).status == "completed"
    assert outcome(config.output) == outcome(whole.output)


def test_ranks_that_shrink_after_a_fit_leave_the_fitted_weights(
    tiny_config: ConfigMaker, three_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[float] = []
    resize = Tuner.resize

    def watch(tuner: Tuner, ranks: dict[str, int], **options: bool) -> None:
        layers = {name: layer for name, layer in tuner._adapted.layers.items() if ranks[name] < layer.rank}
        before = {name: layer.merged() for name, layer in layers.items()}
        resize(tuner, ranks, **options)
        moved.extend(float((layers[name].merged() - old).norm() / old.norm()) for name, old in before.items())

    monkeypatch.setattr(Tuner, "resize", watch)
    changes = FULL | {"rank": 4, "rank_growth": -1.0, "steps": 9, "final_round_share": 0.4, "model": three_blocks}
    fitting = {"reconstruct_epochs": 1, "reconstruct_rounds": "every", "learning_rate": 5e-2}
    train(tiny_config(**(changes | fitting)), show_progress=False)
    fitted, moved = moved, []
    train(tiny_config(output=tmp_path / "unfitted", **(changes | {"learning_rate": 5e-2})), show_progress=False)
    assert max(fitted) < 1e-6 < 1e-4 < max(moved)  # float32 rounding, and singular values that are left out


@pytest.mark.parametrize("allocator", ["lp", "linear"])
def test_a_model_of_one_block_gets_the_target_and_all_the_rank(
    tiny_config: ConfigMaker, tiny_checkpoint: Path, tmp_path: Path, allocator: str
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "one"
    shutil.copytree(tiny_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    result = train(tiny_config(**(FULL | {"model": folder, "sparsity_allocator": allocator})), show_progress=False)
    assert [record.block_targets for record in result.rounds] == [(record.target_sparsity,) for record in result.rounds]
    assert [record.block_ranks for record in result.rounds] == [(2,), (2,), (3,)]
    assert all(record.rmi_row_sums == () for record in result.rounds)


def test_ctrl_c_while_measuring_stops_between_blocks(tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    from losa_export.training import measure

    advance = measure.advance

    def interrupt(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        advance(*arguments)

    monkeypatch.setattr(measure, "advance", interrupt)
    config = tiny_config(**FULL)
    assert train(config, show_progress=False).status == "interrupted"
    assert load_state(config.output).state.phase == "prune"


def test_fixed_sparsities_for_another_number_of_blocks_are_refused_before_anything_is_written(
    tiny_config: ConfigMaker,
) -> None:
    config = tiny_config(sparsity_allocator="fixed", block_sparsities=(0.5, 0.6, 0.7))
    with pytest.raises(ConfigError, match="block_sparsities has 3 values, but the model has 2 blocks"):
        train(config, show_progress=False)
    assert not config.output.exists()


def test_allocation_settings_survive_the_run_folder(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    config = tiny_config(
        sparsity_allocator="fixed",
        sparsity_band=0.04,
        block_sparsities=(0.5, 0.7),
        rmi_windows=3,
        rmi_debiased=True,
        rmi_normalise=True,
        rank_growth=0.25,
        error_kind="local",
    )
    path = tmp_path / "config.toml"
    path.write_text(write_toml({"train": to_table(config)}))
    assert read_run_config(tmp_path) == config
    table = tomllib.loads(path.read_text())["train"]
    with pytest.raises(ConfigError, match="block_sparsities is 'half', which is not a float"):
        from_table(table | {"block_sparsities": ["half"]}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity_band": 1.0}, r"sparsity_band is 1\.0; it must lie in \[0, 1\)"),
        ({"owl_spread": 0.0}, r"owl_spread is 0\.0; it must be positive"),
        ({"owl_outlier_factor": -1.0}, "owl_outlier_factor is -1"),
        ({"atp_difference": 1.5}, r"atp_difference is 1\.5; it must lie between -1 and 1"),
        ({"sparsity_allocator": "fixed"}, "block_sparsities is .*with sparsity_allocator 'fixed' only"),
        ({"block_sparsities": (0.5, 0.5)}, "with sparsity_allocator 'fixed' only"),
        ({"sparsity_allocator": "fixed", "block_sparsities": (0.0, 0.0)}, "one of them above 0"),
        ({"sparsity_allocator": "fixed", "block_sparsities": (0.5, 1.0)}, r"each must lie in \[0, 1\)"),
        ({"rmi_windows": 6}, "rmi_windows is 6; it must lie between 1 and calibration_windows, 5"),
        ({"sparsity_allocator": "lp", "rmi_windows": 1}, "of which 1 is too few; .* at least 2"),
        ({"sparsity_allocator": "lp", "calibration_windows": 3, "rmi_debiased": True}, "of which 3 is too few"),
        ({"rank_growth": 1.0}, "rank_growth is 1.0; it brings the mean rank to 5 in the last round"),
        ({"rank_growth": -2.0}, "brings the mean rank to -1"),
        ({"error_kind": "total"}, "error_kind is 'total'; choose one of accumulated, local"),
        ({"sparsity_allocator": "best"}, "choose one of uniform, lp, linear, owl, atp, fixed"),
        ({"rank_allocator": "best"}, "choose one of uniform, proportional, water_filling"),
    ],
)
def test_allocation_settings_out_of_range_are_refused(
    tiny_config: ConfigMaker, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_the_command_line_reaches_every_allocator_and_draws(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from losa_export.cli import main

    options = "--sparsity 0.6 --rounds 2 --steps 2 --batch-size 2 --window 16 --calibration-windows 5 --device cpu"
    options += " --sparsity-allocator linear --sparsity-band 0.05 --rmi-windows 4 --rmi-debiased"
    options += " --rank 2 --rank-allocator water_filling --rank-growth 1 --error-kind local"
    command = ["train", str(tiny_checkpoint), "-o", str(tmp_path / "run"), "--text", str(tiny_text), *options.split()]
    assert main(command) == 0
    config = read_run_config(tmp_path / "run")
    assert (config.sparsity_band, config.rmi_windows, config.rmi_debiased) == (0.05, 4, True)
    assert (config.rank_growth, config.error_kind) == (1.0, "local")
    capsys.readouterr()
    plotted = [*command[:3], str(tmp_path / "other"), *command[4:], "--sparsity-band", "auto", "--plot"]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert main(plotted) == MissingDependencyError.exit_code
        assert "'losa-export[plot]'" in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
    else:
        assert main(plotted) == 0
        assert (tmp_path / "other" / "rounds.png").is_file()
    finally:
        capsys.readouterr()
