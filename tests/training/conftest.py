"""A tuned-down configuration on the tiny checkpoint, and one thread, so that results repeat bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from losa_export.training.config import TrainConfig

ConfigMaker = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> ConfigMaker:
    """Makes a config of three short rounds on the tiny checkpoint; keyword arguments change fields."""

    def make(**changes: Any) -> TrainConfig:
        fields: dict[str, Any] = {
            "model": tiny_checkpoint,
            "output": tmp_path / "run",
            "tuning_text": (tiny_text,),
            "sparsity_fraction": 0.6,
            "rounds": 3,
            "steps": 10,
            "rank": 3,
            "max_rank": 4,
            "learning_rate": 5e-3,
            "batch_size": 2,
            "window": 16,
            "calibration_windows": 5,
            "device": "cpu",
            "save_every_seconds": 1e9,
        }
        return TrainConfig(**(fields | changes))

    return make


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """Makes a random frozen model of three blocks of a family ('Llama', 'Qwen2' …); keyword arguments change fields."""

    def make(family: str, **changes: Any) -> nn.Module:
        import transformers

        shape: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 64,
            "attn_implementation": "sdpa",
        }
        config = getattr(transformers, f"{family}Config")(**(shape | changes))
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
        return model.eval().requires_grad_(False)

    return make
