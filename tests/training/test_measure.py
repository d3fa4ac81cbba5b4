from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from losa_export.training.calibration import capture_block_inputs, run_block
from losa_export.training.config import TrainConfig
from losa_export.training.measure import measure_blocks, outlier_share
from losa_export.training.model import load_adapted_model
from losa_export.training.prune import prune_blocks
from losa_export.training.rmi import gram_matrix, mutual_information

ConfigMaker = Callable[..., TrainConfig]
WINDOWS = torch.randint(4, 60, (5, 16), generator=torch.Generator().manual_seed(0))


def test_mutual_information_is_that_of_the_model_as_it_is(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    dense = measure_blocks(adapted, WINDOWS, batch_size=2, rmi=True)
    prune_blocks(adapted, WINDOWS, np.array([0.7, 0.7]), batch_size=2)
    before = adapted.masks()
    sparse = measure_blocks(adapted, WINDOWS, batch_size=2, rmi=True)
    batch = capture_block_inputs(adapted.model, adapted.blocks, WINDOWS, 5)[0]
    second = replace(batch, hidden=run_block(adapted.blocks[0], 0, batch))
    expected = mutual_information([gram_matrix([batch.hidden]), gram_matrix([second.hidden])])
    assert sparse.rmi is not None
    assert dense.rmi is not None
    # 1e-5: float32 products of other batches and of a merged weight
    np.testing.assert_allclose(sparse.rmi, expected, atol=1e-5)
    assert abs(sparse.rmi[0, 1] - dense.rmi[0, 1]) > 1e-4
    assert sparse.outliers is None
    assert all(np.array_equal(before[name], keep) for name, keep in adapted.masks().items())


def test_options_reach_the_estimator(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    values = [
        measure_blocks(adapted, WINDOWS, batch_size=2, rmi=True, debiased=debiased, normalise=normalise).rmi
        for debiased in (False, True)
        for normalise in (False, True)
    ]
    assert len({float(value[0, 1]) for value in values if value is not None}) == 4


def test_outliers_are_counted_over_a_whole_block(tiny_config: ConfigMaker) -> None:
    assert outlier_share([torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [13.0]])], 3.0) == 0.25
    assert outlier_share([torch.ones(2, 2)], 1.0) == 0.0
    adapted = load_adapted_model(tiny_config(), "fp32")
    with torch.no_grad():
        adapted.layers["model.layers.1.mlp.up_proj.weight"].weight[:3] *= 100.0
    measured = measure_blocks(adapted, WINDOWS, batch_size=2, rmi=False, outlier_factor=5.0)
    assert measured.rmi is None
    assert measured.outliers is not None
    assert measured.outliers[1] > 0.001
    few, many = (
        measure_blocks(adapted, WINDOWS, batch_size=2, rmi=False, outlier_factor=factor).outliers
        for factor in (8.0, 2.0)
    )
    assert few is not None
    assert many is not None
    assert (many > few).all()


def test_progress_is_told_of_each_block_and_may_stop_between_them(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")

    def stop(block: int) -> None:
        raise KeyboardInterrupt(block)

    with pytest.raises(KeyboardInterrupt, match="0"):
        measure_blocks(adapted, WINDOWS, batch_size=2, rmi=True, on_block=stop)
    assert all(layer._folded is None for layer in adapted.layers.values())
