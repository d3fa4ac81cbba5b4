"""Several processes: the masks, ranks and losses of one, one of them writes, and a stop reaches all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from losa_export.errors import ConfigError
from losa_export.masks import digest, load_masks
from losa_export.training.config import TrainConfig, to_table
from losa_export.training.model import load_adapted_model
from losa_export.training.processes import Processes
from losa_export.training.train import train

ConfigMaker = Callable[..., TrainConfig]

# Imports everything once and forks the processes of a run, which saves each of them the seconds that importing takes.
DRIVER = """
import json, os, signal, sys
from pathlib import Path
import torch, transformers, accelerate, safetensors.torch
from transformers.models.llama import modeling_llama
from losa_export.training.config import from_table
from losa_export.training.train import train

table, count, port, resume, stop_at, folder = json.loads(sys.argv[1])
config = from_table(table, Path("argument"))
children = []
for rank in range(count):
    child = os.fork()
    if child:
        children.append(child)
        continue
    torch.set_num_threads(1)
    if count > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    losses = []

    def note(record):
        losses.append([record.round_number, record.step, record.loss, dict(record.terms)])
        if rank == count - 1 and [record.round_number, record.step] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(config, resume=resume, show_progress=False, on_step=note)
    Path(folder, f"{rank}.json").write_text(json.dumps({"status": result.status, "losses": losses}))
    sys.stdout.flush()
    os._exit(0)
sys.exit(max(os.waitpid(child, 0)[1] for child in children) != 0)
"""


def run(
    config: TrainConfig, count: int, folder: Path, *, resume: bool = False, stop_at: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """Train in `count` processes. Returns: what each of them saw."""
    folder.mkdir(exist_ok=True)
    request = json.dumps([to_table(config), count, free_port(), resume, stop_at, str(folder)])
    command = [sys.executable, "-P", "-c", DRIVER, request]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def masks_of(config: TrainConfig) -> dict[str, str]:
    masks = load_masks(config.output / "masks.safetensors")
    return {name: digest(masks.read(name)) for name in masks.names}


def rounds_of(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture
def everything(tiny_config: ConfigMaker) -> ConfigMaker:
    """A run with all that a share of the data could bend: examples of many lengths, teacher, ranks, fitted blocks."""

    def make(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "packing": False,
            "window": 20,
            "batch_size": 4,
            "kl_weight": 1.0,
            "squarehead_weight": 1.0,
            "sparsity_allocator": "linear",
            "rank_allocator": "water_filling",
            "rank": 2,
            "rank_growth": 0.5,
            "reconstruct_epochs": 1,
            "calibration_windows": 6,
        }
        return tiny_config(**(settings | changes))

    return make


@pytest.fixture
def uneven_text(tmp_path: Path) -> Path:
    path = tmp_path / "uneven.jsonl"
    words = "the old dog saw a small red ball by the river and ran to it but then sat down in the sun".split()
    # Few documents, so that even those that are put into one batch for their like lengths differ.
    path.write_text("".join(json.dumps({"text": " ".join(words[: 2 + number])}) + "\n" for number in range(18)))
    return path


@pytest.mark.slow
def test_two_processes_give_the_masks_ranks_and_losses_of_one(
    everything: ConfigMaker, uneven_text: Path, tiny_text: Path, tmp_path: Path
) -> None:
    texts = {"tuning_text": (uneven_text,), "calibration_text": (tiny_text,)}
    alone, together = (everything(output=tmp_path / name, **texts) for name in ("alone", "together"))
    (wanted,) = run(alone, 1, tmp_path / "seen-1")
    first, second = run(together, 2, tmp_path / "seen-2")
    assert first == second
    assert [row[:2] for row in first["losses"]] == [row[:2] for row in wanted["losses"]]
    for mine, other in zip(first["losses"], wanted["losses"], strict=True):
        # 1e-5 relative: float32 gradients summed in another order, through ten steps of Adam
        assert mine[2] == pytest.approx(other[2], rel=1e-5)
        assert mine[3] == pytest.approx(other[3], rel=1e-5)
        assert mine[2] == pytest.approx(sum(mine[3].values()), rel=1e-6)
        assert sorted(mine[3]) == ["cross_entropy", "kl", "squarehead"]
    assert masks_of(together) == masks_of(alone)
    assert [row["block_ranks"] for row in rounds_of(together)] == [row["block_ranks"] for row in rounds_of(alone)]
    assert [row["tokens"] for row in rounds_of(together)] == [row["tokens"] for row in rounds_of(alone)]
    assert "processes = 2" in (together.output / "config.toml").read_text()
    assert sorted(os.listdir(together.output)) == sorted(os.listdir(alone.output))


@pytest.mark.slow
def test_a_stop_of_one_process_stops_all_and_they_resume_to_the_bit(everything: ConfigMaker, tmp_path: Path) -> None:
    whole, broken = everything(output=tmp_path / "whole"), everything(output=tmp_path / "broken")
    expected, _ = run(whole, 2, tmp_path / "seen-whole")
    before = run(broken, 2, tmp_path / "seen-before", stop_at=(2, 0))
    assert [seen["status"] for seen in before] == ["interrupted", "interrupted"]
    after = run(broken, 2, tmp_path / "seen-after", resume=True)
    assert [seen["status"] for seen in after] == ["completed", "completed"]
    assert before[0]["losses"] + after[0]["losses"] == expected["losses"]
    assert before[0]["losses"][-1][:2] == [2, 0]
    assert masks_of(broken) == masks_of(whole)
    adapter = Path("adapter", "adapter_model.safetensors")
    assert (broken.output / adapter).read_bytes() == (whole.output / adapter).read_bytes()


@pytest.mark.slow
def test_torchrun_starts_the_command_line_in_several_processes(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    folder = Path(sys.executable).parent
    options = "--sparsity 60% --rounds 2 --steps 2 --window 16 --batch-size 2 --calibration-windows 4 --device cpu"
    command = [folder / "torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "--no-python"]
    command += [folder / "losa", "train", tiny_checkpoint, "--text", tiny_text, *options.split(), "-o", tmp_path / "r"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("zeros after 2 rounds") == 1
    assert "Warning" not in done.stderr
    assert "processes = 2" in (tmp_path / "r" / "config.toml").read_text()


def test_a_launcher_that_starts_one_of_several_processes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="'accelerate launch --cpu' was asked for several processes but starts one"):
        Processes(SimpleNamespace(num_processes=1))


def test_sharded_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the launcher asks for FSDP, .*; launch plain .* --shard-weights"):
        Processes(SimpleNamespace(num_processes=2, distributed_type="DistributedType.FSDP"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"criterion": "sparsegpt", "adapter_dropout": 0.2, "gradient_checkpointing": True}]
)
def test_sharing_the_frozen_weights_out_changes_no_bit(
    everything: ConfigMaker, changes: dict[str, Any], tmp_path: Path
) -> None:
    held, shared = (everything(output=tmp_path / name, **changes) for name in ("held", "shared"))
    shared = replace(shared, shard_weights=True)
    expected, _ = run(held, 2, tmp_path / "seen-held")
    before = run(shared, 2, tmp_path / "seen-before", stop_at=(2, 0))
    assert [seen["status"] for seen in before] == ["interrupted", "interrupted"]
    after = run(shared, 2, tmp_path / "seen-after", resume=True)
    assert before[0]["losses"] + after[0]["losses"] == expected["losses"]
    assert 'blocks_in_memory = "shared out"' in (shared.output / "config.toml").read_text()
    assert masks_of(shared) == masks_of(held)
    names = ("adapter/adapter_model.safetensors", "weights.safetensors")
    assert [(shared.output / name).read_bytes() for name in names] == [
        (held.output / name).read_bytes() for name in names
    ]


def test_one_process_alone_cannot_share_weights_out(everything: ConfigMaker) -> None:
    with pytest.raises(ConfigError, match="shard_weights is on, but this is the only process"):
        train(everything(shard_weights=True), show_progress=False)


# Two processes share a model out and give it back; what each of them saw is printed.
SHARING = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import PartialState
from losa_export.training.config import from_table
from losa_export.training.model import load_adapted_model
from losa_export.training.sharding import share_out

table, port, folder = json.loads(sys.argv[1])
rank = 0 if os.fork() else 1
torch.set_num_threads(1)
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
PartialState(cpu=True)
config = from_table(table, Path("argument"))
whole = load_adapted_model(config, "fp32")
shared = share_out(load_adapted_model(config, "fp32", parking=Path(folder, "parked")), 2)
seen = {"rows": {}, "equal": []}
for number, (name, layer) in enumerate(shared.layers.items()):
    twin = whole.layers[name]
    kept = torch.rand(twin.weight.shape, generator=torch.Generator().manual_seed(number)) > 0.5
    for each in (layer, twin):
        each.set_mask(kept)
        torch.nn.init.constant_(each.lora_B, 0.01)
    seen["rows"][name] = [layer.shares.weight.to_local().shape[0], layer.shares.mask.to_local().shape[0]]
    x = torch.rand(3, layer.in_features, requires_grad=True)
    seen["equal"].append(layer.parked and torch.equal(layer(x), twin(x)) and torch.equal(layer.kept, twin.kept))
    with shared.at_work({name: layer}):
        seen["equal"].append(not layer.parked and torch.equal(layer.weight, twin.weight))
        layer.set_weight(2.0 * twin.weight)
    seen["equal"].append(torch.equal(layer.dense_weight, twin.weight))
    seen["equal"].append(torch.equal(shared.store.changed(name, layer), 2.0 * twin.weight))
Path(folder, f"{rank}.json").write_text(json.dumps(seen))
if rank == 0:
    os.wait()
os._exit(0)
"""


def test_each_process_keeps_its_rows_and_computes_with_all(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    config = tiny_config()
    request = json.dumps([to_table(config), free_port(), str(tmp_path)])
    command = [sys.executable, "-P", "-c", SHARING, request]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    layers = load_adapted_model(config, "fp32").layers
    assert list(first["rows"]) == list(layers)
    for name, layer in layers.items():
        for mine, other in zip(first["rows"][name], second["rows"][name], strict=True):
            assert mine + other == layer.out_features
            assert 0 <= mine - other <= 1
    assert first["equal"] == second["equal"] == [True] * (4 * len(layers))


def test_one_process_agrees_with_itself() -> None:
    processes = Processes(SimpleNamespace(num_processes=1, distributed_type="DistributedType.NO"))
    values = torch.tensor([1.0, 2.0])
    assert processes.mean(values) is values
    assert processes.first("here") == "here"
    assert processes.any(True)
    assert not processes.any(False)
    processes.copy_first([values])
    assert values.tolist() == [1.0, 2.0]


@pytest.fixture(autouse=True)
def _needs_processes() -> None:
    if not hasattr(os, "fork") or not torch.distributed.is_gloo_available():
        pytest.skip("needs os.fork and PyTorch's gloo, which this system lacks")
