"""kill -9 at any moment, then resume: the same masks, losses and adapters as a run that was left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from losa_export.masks import digest, load_masks
from losa_export.training.config import TrainConfig, to_table

# One process imports everything, computes nothing, and forks a child for each attempt: a child is killed for
# good, and starts as fresh as a process does, but without the seconds that importing takes.
DRIVER = '''
import json, os, random, signal, sys, time, warnings
from pathlib import Path
import torch, transformers, accelerate, safetensors.torch
from transformers.models.llama import modeling_llama
from losa_export.masks import digest, load_masks
from losa_export.training.config import from_table
from losa_export.training.train import train

table, log, seed = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
config = from_table(table, Path("argument"))
generator = random.Random(seed)


def attempt(resume, kill_after_events, delay):
    """Runs a child; kills it `delay` seconds after it has logged that many events. Returns: its exit status."""
    before = len(log.read_text().splitlines()) if log.exists() else 0
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        with log.open("a", buffering=1) as out:
            def note(record):
                print(json.dumps([record.round_number, record.step, record.loss]), file=out)
            train(config, resume=resume, show_progress=False, on_step=note)
        os._exit(0)
    while kill_after_events is not None:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        events = len(log.read_text().splitlines()) - before if log.exists() else 0
        if events >= kill_after_events:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.001)
    return os.waitpid(child, 0)[1]


kills, resume = 0, False
if seed >= 0:
    for events in (generator.randint(1, 3), generator.randint(0, 4), generator.randint(1, 3)):
        status = attempt(resume, events, generator.random() * 0.05)
        kills += os.WIFSIGNALED(status)
        resume = (Path(config.output) / "state").is_dir()
assert attempt(resume, None, 0.0) == 0
print(kills)
'''


def run_driver(config: TrainConfig, log: Path, seed: int) -> int:
    arguments = [sys.executable, "-P", "-c", DRIVER, json.dumps(to_table(config)), str(log), str(seed)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_run_killed_at_random_points_ends_as_if_nothing_had_happened(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    options = {"save_every_seconds": 0.0, "steps": 12, "rounds": 3}
    whole = tiny_config(output=tmp_path / "whole", **options)
    run_driver(whole, tmp_path / "whole.log", -1)
    expected = dict(_events(tmp_path / "whole.log"))
    assert len(expected) == 12
    for seed in (0, 1):
        killed = tiny_config(output=tmp_path / f"killed-{seed}", **options)
        log = tmp_path / f"killed-{seed}.log"
        assert run_driver(killed, log, seed) >= 2
        events = _events(log)
        # Steps that were done but not yet saved are done again, and must give the same loss again.
        assert all(expected[place] == loss for place, loss in events)
        assert dict(events) == expected
        masks, wanted = (load_masks(folder / "masks.safetensors") for folder in (killed.output, whole.output))
        assert [digest(masks.read(name)) for name in masks.names] == [digest(wanted.read(name)) for name in masks.names]
        adapter = Path("adapter", "adapter_model.safetensors")
        assert (killed.output / adapter).read_bytes() == (whole.output / adapter).read_bytes()
        rounds = [json.loads(line) for line in (killed.output / "rounds.jsonl").read_text().splitlines()]
        assert [row["round_number"] for row in rounds] == [1, 2, 3]
        assert [loss for row in rounds for loss in row["losses"]] == [expected[place] for place in sorted(expected)]


def _events(log: Path) -> list[tuple[tuple[int, int], float]]:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [((number, step), loss) for number, step, loss in rows]


@pytest.fixture(autouse=True)
def _needs_fork() -> None:
    import os

    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork, which this system lacks")
