"""A model whose blocks come and go answers as one that is in memory."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the 'train' extra")

import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from losa_export import streamed
from losa_export.checkpoint import open_checkpoint
from losa_export.errors import CheckpointError
from losa_export.proof import unmerged_logits
from losa_export.reference import compute_reference, load_model
from losa_export.streamed import ReadWeight, load_outline, load_streamed, stream_blocks
from tests.conftest import write_tiny_checkpoint

IDS = torch.arange(4, 36).reshape(2, 16)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def deep(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A checkpoint of five blocks."""
    write_tiny_checkpoint(tmp_path / "deep", seed=2, num_hidden_layers=5, tie_word_embeddings=request.param)
    return tmp_path / "deep"


@pytest.fixture
def most_alive(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts block linears whose weights are in memory at the same time, in everything that the test streams."""
    alive: weakref.WeakSet[nn.Parameter] = weakref.WeakSet()
    most = [0]
    fetching = streamed._fetching

    def counting(linears: dict[str, nn.Module], read: ReadWeight) -> Callable[..., None]:
        hook = fetching(linears, read)

        def counted(*arguments: object) -> None:
            hook(*arguments)
            alive.update(linear.weight for linear in linears.values())
            most[0] = max(most[0], len(alive))

        return counted

    monkeypatch.setattr(streamed, "_fetching", counting)
    return lambda: most[0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_streamed_model_answers_as_one_in_memory(deep: Path, dtype: str, attention: str) -> None:
    with torch.inference_mode():
        ours = load_streamed(deep, dtype, attention)(input_ids=IDS)
        theirs = load_model(deep, dtype, attention)(input_ids=IDS)
        # 1e-6 of the largest logit: the same products, from other addresses
        limit = 1e-6 * float(theirs.logits.abs().max())
        torch.testing.assert_close(ours.logits, theirs.logits, atol=limit, rtol=0.0)
    assert ours.logits.dtype == getattr(torch, dtype)


def test_all_but_the_linears_of_blocks_is_loaded(deep: Path) -> None:
    outline, whole = load_outline(deep, torch.float32, "eager"), load_model(deep)
    theirs = dict(whole.named_parameters())
    ours = dict(outline.named_parameters())
    assert sorted(ours) == sorted(theirs)
    away = {name for name, parameter in ours.items() if parameter.is_meta}
    assert away == {name for name in theirs if name.endswith("_proj.weight")}
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items() if name not in away)
    assert all(ours[name].shape == theirs[name].shape for name in away)
    assert not any(parameter.requires_grad for parameter in ours.values())
    assert not outline.training


def test_a_reference_needs_one_block_at_a_time(deep: Path, most_alive: Callable[[], int]) -> None:
    compute_reference(deep)
    assert most_alive() == 7


def test_unmerged_logits_need_one_block_at_a_time(deep: Path, most_alive: Callable[[], int]) -> None:
    base, read = open_checkpoint(deep), [0]
    name = "model.layers.3.mlp.up_proj.weight"

    def mask(_: str) -> np.ndarray:
        read[0] += 1
        return np.arange(176 * 64).reshape(176, 64) % 3 > 0

    logits = unmerged_logits(base, {name: mask}, None, list(IDS.numpy()))
    assert most_alive() == 7
    assert read[0] == 1
    whole = load_model(deep)
    with torch.inference_mode():
        whole.get_parameter(name).mul_(torch.from_numpy(mask(name)))
        # 1e-6: as above, of logits that are about 1
        np.testing.assert_allclose(logits, whole(input_ids=IDS).logits.numpy(), atol=1e-6)


def test_a_block_that_fails_is_let_go_of(deep: Path) -> None:
    model = load_outline(deep, torch.float32, "eager")
    checkpoint = open_checkpoint(deep)
    stream_blocks(model, lambda name: checkpoint.mapped(name)[:, :3] if "layers.1" in name else checkpoint.mapped(name))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(input_ids=IDS)
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if name.endswith("_proj.weight"))


def test_a_tensor_that_is_missing_is_named(deep: Path, tmp_path: Path) -> None:
    shutil.copytree(deep, tmp_path / "broken")
    tensors = load_file(deep / "model.safetensors")
    del tensors["model.layers.2.input_layernorm.weight"]
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.layers\.2\.input_layernorm\.weight'; it is"):
        load_outline(tmp_path / "broken", torch.float32, "eager")


def test_a_family_that_is_not_known_is_loaded_whole(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, max_position_embeddings=64, **shape)).eval()
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        found: Tensor = load_streamed(tmp_path)(input_ids=IDS).logits
        # 1e-6: attention implementations differ
        torch.testing.assert_close(found, model(input_ids=IDS).logits, atol=1e-6, rtol=1e-6)
