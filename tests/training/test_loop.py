from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from losa_export.training.config import TrainConfig
from losa_export.training.loop import Tuner, TuningData, decay_active
from losa_export.training.loss import CausalLoss
from losa_export.training.model import load_adapted_model

ConfigMaker = Callable[..., TrainConfig]
WINDOWS = np.random.default_rng(0).integers(4, 60, size=(7, 16))


def make_tuner(config: TrainConfig) -> Tuner:
    adapted = load_adapted_model(config, "fp32")
    generator = torch.Generator().manual_seed(5)
    for layer in adapted.layers.values():
        layer.set_mask(torch.rand(layer.mask.shape, generator=generator) < 0.5)
    return Tuner(adapted, TuningData(WINDOWS, config.batch_size, config.seed), config, Accelerator(cpu=True))


def test_every_pass_over_the_data_shows_each_window_once_in_a_new_order() -> None:
    data = TuningData(np.arange(7)[:, None], batch_size=3, seed=1)
    stream = np.concatenate([data.batch(number)[:, 0] for number in range(7)])
    passes = stream.reshape(3, 7)
    assert [sorted(order) for order in passes.tolist()] == [list(range(7))] * 3
    assert not np.array_equal(passes[0], passes[1])


def test_a_batch_depends_on_seed_and_number_alone() -> None:
    data = TuningData(WINDOWS, batch_size=3, seed=1)
    late = data.batch(9)
    data.batch(0)
    np.testing.assert_array_equal(data.batch(9), late)
    np.testing.assert_array_equal(TuningData(WINDOWS, batch_size=3, seed=1).batch(9), late)
    assert not np.array_equal(TuningData(WINDOWS, batch_size=3, seed=2).batch(9), late)


def test_training_moves_active_slices_only_and_never_the_base(tiny_config: ConfigMaker) -> None:
    config = tiny_config(weight_decay=0.5, rank=2, max_rank=4)
    tuner = make_tuner(config)
    adapted = tuner._adapted
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    masks = adapted.masks()
    for number in range(3):
        tuner.step(number, 1e-2)
    for name, tensor in adapted.model.state_dict().items():
        if name.endswith("lora_A"):
            assert torch.equal(tensor[2:], before[name][2:])
            assert not torch.equal(tensor[:2], before[name][:2])
        elif name.endswith("lora_B"):
            assert torch.equal(tensor[:, 2:], before[name][:, 2:])
            assert not torch.equal(tensor[:, :2], before[name][:, :2])
        else:
            assert torch.equal(tensor, before[name]), name
    for name, keep in adapted.masks().items():
        np.testing.assert_array_equal(keep, masks[name])


def test_a_slice_put_to_sleep_stays_where_it_is_and_forgets_its_moments(tiny_config: ConfigMaker) -> None:
    tuner = make_tuner(tiny_config(weight_decay=0.5, rank=4, max_rank=4))
    layers = tuner._adapted.layers
    for number in range(3):
        tuner.step(number, 1e-2)
    tuner.set_ranks(dict.fromkeys(layers, 2))
    asleep = {name: (layer.lora_A[2:].clone(), layer.lora_B[:, 2:].clone()) for name, layer in layers.items()}
    for number in range(3, 6):
        tuner.step(number, 1e-2)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A[2:], asleep[name][0])
        assert torch.equal(layer.lora_B[:, 2:], asleep[name][1])
        moments = tuner._adamw.state[layer.lora_A]
        assert bool((moments["exp_avg"][2:] == 0).all())
        assert bool((moments["exp_avg"][:2] != 0).any())


def test_with_all_slices_active_a_step_is_that_of_torch_adamw(tiny_config: ConfigMaker) -> None:
    config = tiny_config(rank=4, max_rank=4, weight_decay=0.1, gradient_clip=0.5)
    tuner, twin = make_tuner(config), make_tuner(config)
    parameters = [p for layer in twin._adapted.layers.values() for p in (layer.lora_A, layer.lora_B)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    module = CausalLoss(twin._adapted.model)
    for number in range(3):
        tuner.step(number, 1e-2)
        module(torch.from_numpy(twin._data.batch(number))).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for mine, wanted in zip(tuner._adapted.layers.values(), twin._adapted.layers.values(), strict=True):
        # 1e-6: the decay multiplies in the same order, but through a view
        torch.testing.assert_close(mine.lora_A, wanted.lora_A, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(mine.lora_B, wanted.lora_B, rtol=1e-6, atol=1e-8)


def test_a_restored_tuner_goes_on_bit_by_bit(tiny_config: ConfigMaker) -> None:
    tuner = make_tuner(tiny_config())
    for number in range(3):
        tuner.step(number, 1e-2)
    saved = {name: tensor.clone() for name, tensor in tuner.tensors().items()}
    expected = [tuner.step(number, 1e-2) for number in range(3, 6)]
    other = make_tuner(tiny_config())
    other.restore(saved, 3)
    assert [other.step(number, 1e-2) for number in range(3, 6)] == expected


def test_the_loss_is_the_one_transformers_reports(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    ids = torch.from_numpy(WINDOWS)
    with torch.no_grad():
        ours, theirs = CausalLoss(adapted.model)(ids), adapted.model(input_ids=ids, labels=ids).loss
    # 1e-6 relative: float32 against float64 sums
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_no_decay_touches_nothing(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    before = [layer.lora_A.clone() for layer in adapted.layers.values()]
    decay_active(adapted.layers.values(), 0.0)
    assert all(torch.equal(a, layer.lora_A) for a, layer in zip(before, adapted.layers.values(), strict=True))
