from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from losa_export.errors import OutputError, StateError
from losa_export.training import state as state_module
from losa_export.training.journal import RoundRecord, read_journal, write_journal
from losa_export.training.schedule import RoundPlan
from losa_export.training.state import (
    RunState,
    check_fingerprint,
    drop_spare,
    is_resumable,
    load_state,
    save_state,
)

RECORD = RoundRecord(
    round_number=1,
    target_sparsity=0.3,
    sparsity_fraction=0.29,
    block_targets=(0.3, 0.3),
    block_ranks=(8, 8),
    sparsity={"w": 0.29},
    steps=2,
    tokens=64,
    losses=(0.1 + 0.2, 1 / 3),
    learning_rate_last=1e-3,
    prune_seconds=0.5,
    tune_seconds=1.5,
    peak_memory_bytes=10,
)
STATE = RunState(
    phase="tune",
    round_number=2,
    step=3,
    total_steps=5,
    plan=RoundPlan(7, 0.4, 2, 0.1 + 0.2, 1),
    block_targets=[1 / 3],
    block_ranks=[8],
    losses=[0.1 + 0.2],
    elapsed_seconds=1 / 3,
    records=[RECORD],
)
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.uint8)}


def save(run: Path, step: int = 3) -> None:
    STATE.step = step
    save_state(run, STATE, TENSORS, {"seed": 0})


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_state_comes_back_with_every_bit(tmp_path: Path) -> None:
    save(tmp_path)
    saved = load_state(tmp_path)
    assert saved.state == STATE
    assert saved.fingerprint == {"seed": 0}
    assert {name: tensor.tolist() for name, tensor in saved.tensors.items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }


def test_a_flipped_bit_anywhere_makes_a_state_give_way_to_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, step=1)
    save(tmp_path, step=2)
    current = tmp_path / "state" / "current.safetensors"
    whole = current.read_bytes()
    for place in range(0, len(whole), 7):
        damage(current, place)
        step = load_state(tmp_path).state.step
        # Padding and the spelling of the header may flip without changing what it says.
        assert step == 1 or load_state(tmp_path).state == STATE, place
        current.write_bytes(whole)
    damage(current, -1)
    assert load_state(tmp_path).state.step == 1


@pytest.mark.parametrize("broken", ["truncated", "missing"])
def test_a_crash_while_saving_leaves_a_whole_state(tmp_path: Path, broken: str) -> None:
    save(tmp_path, step=1)
    save(tmp_path, step=2)
    current = tmp_path / "state" / "current.safetensors"
    if broken == "missing":
        current.unlink()
    else:
        current.write_bytes(current.read_bytes()[:50])
    (tmp_path / "state" / "partial.safetensors").write_bytes(b"half")
    assert load_state(tmp_path).state.step == 1


def test_a_state_beyond_repair_is_an_error_that_says_so(tmp_path: Path) -> None:
    save(tmp_path)
    save(tmp_path)
    for name in ("current", "previous"):
        damage(tmp_path / "state" / f"{name}.safetensors", -1)
    with pytest.raises(StateError, match=r"damaged \(current.*digest.*previous.*digest.*--overwrite"):
        load_state(tmp_path)


def test_a_state_of_another_format_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "_FORMAT", "losa-train-state-0")
    save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(StateError, match="format 'losa-train-state-0', expected 'losa-train-state-1'"):
        load_state(tmp_path)


def test_nothing_to_resume_is_an_error_that_says_so(tmp_path: Path) -> None:
    assert not is_resumable(tmp_path)
    with pytest.raises(StateError, match="holds no training state to resume; start it without --resume"):
        load_state(tmp_path)


def test_a_finished_run_keeps_no_spare(tmp_path: Path) -> None:
    save(tmp_path)
    save(tmp_path)
    drop_spare(tmp_path)
    assert is_resumable(tmp_path)
    assert sorted(os.listdir(tmp_path / "state")) == ["current.safetensors"]


def test_a_full_disk_is_an_output_error_and_keeps_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, step=1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        save(tmp_path, step=2)
    monkeypatch.undo()
    assert load_state(tmp_path).state.step == 1


def test_a_different_start_is_an_error_that_names_what_differs() -> None:
    saved = {"learning_rate": 1e-3, "seed": 0, "model weights": {"m": "ab"}}
    check_fingerprint(Path("run"), saved, dict(saved))
    with pytest.raises(StateError) as caught:
        check_fingerprint(Path("run"), saved, saved | {"learning_rate": 2e-3, "model weights": {"m": "cd"}})
    message = str(caught.value)
    assert "learning_rate was 0.001 and is now 0.002" in message
    assert "model weights was {'m': 'ab'} and is now {'m': 'cd'}" in message
    assert "seed" not in message


def test_the_journal_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == []
    write_journal(tmp_path, [RECORD, RECORD])
    assert read_journal(tmp_path) == [RECORD, RECORD]
    write_journal(tmp_path, [RECORD])
    assert read_journal(tmp_path) == [RECORD]


def test_a_round_without_steps_has_no_losses() -> None:
    empty = RoundRecord(**{**RECORD.__dict__, "losses": ()})
    assert empty.loss_first is None
    assert empty.loss_last is None
    assert RECORD.loss_first == 0.1 + 0.2
    assert RECORD.loss_last == 1 / 3
