from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losa_export.training.adapter import all_dense, all_folded
from losa_export.training.calibration import capture_block_inputs, run_block
from losa_export.training.config import TrainConfig
from losa_export.training.model import AdaptedModel, load_adapted_model
from losa_export.training.prune import prune_blocks
from losa_export.training.reconstruction_error import ChannelErrors

ConfigMaker = Callable[..., TrainConfig]
WINDOWS = torch.randint(4, 60, (5, 16), generator=torch.Generator().manual_seed(0))
TARGETS = np.array([0.4, 0.6])


def error(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    errors = ChannelErrors()
    errors.add(dense, sparse)
    return errors.error()


@pytest.mark.parametrize(
    ("dense", "sparse", "expected"),
    [
        ([[1, 2], [3, 4]], [[1, 1], [3, 5]], 0.05),
        ([[2, 0], [0, 1], [2, 2]], [[1, 0], [0, 1], [2, 1]], 0.1625),
    ],
)
def test_the_error_is_the_mean_over_channels_of_relative_squares(
    dense: list[list[float]], sparse: list[list[float]], expected: float
) -> None:
    assert error(torch.tensor(dense, dtype=torch.float32), torch.tensor(sparse, dtype=torch.float32)) == pytest.approx(
        expected, abs=1e-12
    )


@given(seed=st.integers(0, 1000), cut=st.integers(1, 11))
def test_batches_add_up_and_the_scale_of_a_channel_does_not_matter(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense, sparse = (torch.randn(12, 5, generator=generator) for _ in range(2))
    whole = error(dense, sparse)
    parts = ChannelErrors()
    parts.add(dense[:cut], sparse[:cut])
    parts.add(dense[cut:], sparse[cut:])
    scales = 10.0 ** (6 * torch.rand(5, generator=generator) - 3)
    # 1e-12: the same float64 terms in another order; 1e-6: a float32 rounding of each scaled value
    assert parts.error() == pytest.approx(whole, rel=1e-12)
    assert error(dense * scales, sparse * scales) == pytest.approx(whole, rel=1e-6)
    assert whole > 0.0
    assert error(dense, dense) == 0.0


def test_a_dead_channel_is_left_out_and_nothing_else_is_an_error_of_zero() -> None:
    dense, sparse = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[7.0, 1.0], [0.0, 0.0]])
    assert error(dense, sparse) == 0.5
    assert error(torch.zeros(2, 2), sparse) == 0.0
    assert ChannelErrors().error() == 0.0


def test_bfloat16_outputs_are_measured_in_float32() -> None:
    dense, sparse = torch.full((4096, 1), 1.0), torch.full((4096, 1), 1.0 + 2**-7)
    assert error(dense.bfloat16(), sparse.bfloat16()) == pytest.approx(2**-14, rel=1e-12)


def stir(adapted: AdaptedModel) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.lora_B.copy_(0.02 * torch.randn(layer.lora_B.shape, generator=generator))


@pytest.mark.parametrize("kind", ["accumulated", "local"])
def test_errors_compare_each_pruned_block_with_the_dense_one(tiny_config: ConfigMaker, kind: str) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    stir(adapted)
    # A weight that compensation has replaced must not pass for the dense one.
    changed = adapted.layers["model.layers.0.mlp.up_proj.weight"]
    changed.set_weight(1.1 * changed.weight)
    errors = prune_blocks(adapted, WINDOWS, TARGETS, batch_size=2, errors=kind)  # type: ignore[arg-type]
    assert errors is not None
    # All at once, from a model that was never adapted.
    dense = load_adapted_model(tiny_config(), "fp32")
    sparse_batch = capture_block_inputs(adapted.model, adapted.blocks, WINDOWS, 5)[0]
    dense_batch = replace(sparse_batch)
    for index, block in enumerate(adapted.blocks):
        if kind == "local":
            dense_batch = replace(sparse_batch)
        wanted = run_block(dense.blocks[index], index, dense_batch)
        with all_folded(adapted.layers_of(index), torch.float32):
            given = run_block(block, index, sparse_batch)
        # 1e-4: float32 products of other batches and of a merged weight
        assert errors[index] == pytest.approx(error(wanted, given), rel=1e-4)
        sparse_batch, dense_batch = replace(sparse_batch, hidden=given), replace(dense_batch, hidden=wanted)


def test_measuring_changes_no_mask_and_the_first_block_has_only_its_own_error(tiny_config: ConfigMaker) -> None:
    results = {}
    for kind in (None, "accumulated", "local"):
        adapted = load_adapted_model(tiny_config(), "fp32")
        errors = prune_blocks(adapted, WINDOWS, TARGETS, batch_size=2, errors=kind)  # type: ignore[arg-type]
        results[kind] = (errors, adapted.masks())
    assert results[None][0] is None
    accumulated, local = results["accumulated"][0], results["local"][0]
    assert accumulated is not None
    assert local is not None
    assert accumulated[0] == local[0]
    assert accumulated[1] > local[1] > 0.0
    for _, masks in results.values():
        assert all(np.array_equal(masks[name], keep) for name, keep in results[None][1].items())


def test_nothing_pruned_and_nothing_learnt_is_no_error(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    errors = prune_blocks(adapted, WINDOWS, np.zeros(2), batch_size=2, errors="accumulated")
    assert errors is not None
    assert errors.tolist() == [0.0, 0.0]
    with all_dense(adapted.layers, torch.float32):
        assert all(layer._folded is not None for layer in adapted.layers.values())
    assert all(layer._folded is None for layer in adapted.layers.values())
