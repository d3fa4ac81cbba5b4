"""kill -9 at ten random moments: the resumed run has the masks, ranks and losses of one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from losa_export.masks import digest, load_masks
from losa_export.training.config import TrainConfig, to_table
from losa_export.training.settings import preset_file, read_settings

KILLS = 10

# One process imports everything, computes nothing, and forks a child for each attempt: a child is killed for
# good, and starts as fresh as a process does, but without the seconds that importing takes.
DRIVER = '''
import dataclasses, json, os, random, signal, sys, time
from pathlib import Path
import torch, transformers, accelerate, safetensors.torch
from transformers.models.llama import modeling_llama
from losa_export.training.config import from_table
from losa_export.training.state import is_resumable
from losa_export.training.train import train

table, folder, kills = json.loads(sys.argv[1])
whole = from_table(table, Path("argument"))
generator = random.Random(0)


def attempt(config, log, resume, moment):
    """Train in a child, and kill it so many seconds after so many steps. Returns: whether it lived, and how long."""
    started = time.monotonic()
    steps, delay = moment or (0, 0.0)
    done_before = count_lines(log)
    due = None if steps else started + delay
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        with log.open("a", buffering=1) as out:
            def note(record):
                print(json.dumps([record.round_number, record.step, record.loss, dict(record.terms)]), file=out)
            train(config, resume=resume, show_progress=False, on_step=note)
        os._exit(0)
    status = None
    while moment is not None and (due is None or time.monotonic() < due):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if due is None and count_lines(log) - done_before >= steps:
            due = time.monotonic() + delay
        time.sleep(0.0005)
    else:
        if moment is not None:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0, time.monotonic() - started


def count_lines(log):
    return log.read_text().count("\\n") if log.exists() else 0


_, seconds = attempt(whole, Path(folder, "whole.log"), False, None)
runs, points = 0, []
while len(points) < kills:
    output = Path(folder, f"killed-{runs}")
    # A state after every step, after some, or only between pruning and tuning.
    saving = (0.0, 0.05, 1e9)[runs % 3]
    config = dataclasses.replace(whole, output=output, save_every_seconds=saving, overwrite=True)
    finished = False
    while not finished:
        # Half of them anywhere, mostly while the model is read or pruned; half of them soon after a step.
        anywhere = (0, generator.uniform(0.0, 0.7 * seconds))
        moment = generator.choice([anywhere, (generator.randint(1, 4), generator.uniform(0.0, 0.02))])
        moment = moment if len(points) < kills else None
        finished, lived = attempt(config, Path(folder, f"killed-{runs}.log"), is_resumable(output), moment)
        if not finished:
            points.append([runs, round(lived, 3)])
    runs += 1
print(json.dumps({"runs": runs, "points": points, "seconds": seconds}))
'''


@pytest.fixture
def recommended(tiny_config: Callable[..., TrainConfig]) -> TrainConfig:
    """The preset, with everything that takes long cut down, and with allocators that have something to remember."""
    small: dict[str, Any] = {
        "sparsity_allocator": "linear",
        "rank_allocator": "water_filling",
        "rank": 2,
        "rank_growth": 0.25,
        "max_rank": 4,
        "calibration_windows": 6,
        "reconstruct_epochs": 2,
    }
    return tiny_config(**(read_settings(preset_file("recommended")) | small))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(
    recommended: TrainConfig, tmp_path: Path
) -> None:
    arguments = json.dumps([to_table(recommended), str(tmp_path), KILLS])
    command = [sys.executable, "-P", "-c", DRIVER, arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["points"]) == KILLS
    expected = dict(_events(tmp_path / "whole.log"))
    assert len(expected) == 10
    wanted = _outcome(recommended.output)
    # Killing would prove little if what a state must hold were not there: unlike ranks, fitted blocks, a teacher.
    last = wanted["rounds"][-1]
    assert min(last["block_fits"]) > [0, 0]
    assert sorted(last["loss_terms"]) == ["cross_entropy", "kl", "squarehead"]
    assert wanted["ranks"]["rank_pattern"]
    for number in range(report["runs"]):
        events = _events(tmp_path / f"killed-{number}.log")
        # Steps that were done but not yet saved are done again, and must give the same loss again.
        assert all(expected[place] == losses for place, losses in events)
        assert dict(events) == expected
        assert _outcome(tmp_path / f"killed-{number}") == wanted


def _outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves but for times: the masks, ranks and losses among it, and every byte of the weights."""
    masks = load_masks(run / "masks.safetensors")
    clocked = ("prune_seconds", "tune_seconds", "measure_seconds", "peak_memory_bytes")
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return {
        "masks": {name: digest(masks.read(name)) for name in masks.names},
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "ranks": json.loads((run / "adapter" / "adapter_config.json").read_text()),
        "weights": (run / "weights.safetensors").read_bytes(),
        "rounds": [{key: value for key, value in row.items() if key not in clocked} for row in rounds],
        "files": sorted(path.name for path in run.iterdir()),
    }


def _events(log: Path) -> list[tuple[tuple[int, int], Any]]:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [((number, step), (loss, terms)) for number, step, loss, terms in rows]


@pytest.fixture(autouse=True)
def _needs_fork() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork, which this system lacks")
