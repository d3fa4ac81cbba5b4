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
        module(torch.from_numpy(twin._data.batch(number))).total.backward()
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
        ours, theirs = CausalLoss(adapted.model)(ids).total, adapted.model(input_ids=ids, labels=ids).loss
    # 1e-6 relative: float32 against float64 sums
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_no_decay_touches_nothing(tiny_config: ConfigMaker) -> None:
    adapted = load_adapted_model(tiny_config(), "fp32")
    before = [layer.lora_A.clone() for layer in adapted.layers.values()]
    decay_active(adapted.layers.values(), 0.0)
    assert all(torch.equal(a, layer.lora_A) for a, layer in zip(before, adapted.layers.values(), strict=True))


RAGGED = [np.full(size, size, dtype=np.int64) for size in np.random.default_rng(1).integers(2, 17, size=23)]


def test_examples_of_their_own_lengths_are_padded_at_the_end_and_counted_without() -> None:
    data = TuningData(RAGGED, batch_size=4, seed=1)
    for number in range(12):
        batch, lengths = data.batch(number), data.lengths(number)
        assert lengths is not None
        assert batch.shape == (4, lengths.max())
        for row, length in zip(batch, lengths, strict=True):
            assert row[:length].tolist() == [length] * length
            assert not row[length:].any()
        assert data.tokens(number) == lengths.sum()
    assert TuningData(WINDOWS, batch_size=4, seed=1).lengths(0) is None
    assert TuningData(WINDOWS, batch_size=4, seed=1).tokens(0) == 64


def test_examples_of_their_own_lengths_come_once_a_pass_with_their_like() -> None:
    data = TuningData(RAGGED, batch_size=1, seed=1)
    stream = [int(data.batch(number)[0, 0]) for number in range(46)]
    expected = sorted(row.size for row in RAGGED)
    assert [sorted(stream[:23]), sorted(stream[23:])] == [expected, expected]
    assert stream[:23] != stream[23:]
    spread = [np.ptp(TuningData(RAGGED, batch_size=4, seed=1).lengths(number)) for number in range(5)]
    assert max(spread) <= 6  # of 14 between the shortest and the longest


def test_a_step_on_padded_examples_equals_torch_on_the_examples_alone(tiny_config: ConfigMaker) -> None:
    config = tiny_config(gradient_clip=0.0, weight_decay=0.0)
    examples = [np.asarray(row[:size]) for row, size in zip(WINDOWS, (16, 9, 4, 16, 2, 7, 5), strict=True)]
    tuner = make_tuner(config)
    tuner._data = TuningData(examples, 2, 0)
    batch, lengths = tuner._data.batch(0), tuner._data.lengths(0)
    assert lengths is not None
    with torch.no_grad():
        parts = [
            float(CausalLoss(tuner._adapted.model)(torch.from_numpy(row[None, :size])).total) * (size - 1)
            for row, size in zip(batch, lengths, strict=True)
        ]
    # 1e-6: float32 products of other shapes
    assert tuner.step(0, 1e-3).total == pytest.approx(sum(parts) / (lengths - 1).sum(), rel=1e-6)


def test_what_an_adapter_drops_depends_on_seed_and_step_and_touches_no_other_randomness(
    tiny_config: ConfigMaker,
) -> None:
    losses = []
    for noise in (0, 1):
        tuner = make_tuner(tiny_config(adapter_dropout=0.5))
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        losses.append([tuner.step(number, 5e-2) for number in (0, 1, 2)])
        assert torch.equal(torch.get_rng_state(), before)
        assert not any(layer.training for layer in tuner._adapted.layers.values())
    assert losses[0] == losses[1]
    plain = make_tuner(tiny_config())
    assert [plain.step(number, 5e-2) for number in (0, 1, 2)] != losses[0]


def test_surviving_slices_keep_their_moments_and_woken_ones_begin_without(tiny_config: ConfigMaker) -> None:
    tuner = make_tuner(tiny_config(rank=2, max_rank=4))
    layers = tuner._adapted.layers
    for number in range(3):
        tuner.step(number, 1e-2)
    before = {name: tuner._adamw.state[layer.lora_A]["exp_avg"].clone() for name, layer in layers.items()}
    tuner.set_ranks(dict.fromkeys(layers, 4))
    for name, layer in layers.items():
        now = tuner._adamw.state[layer.lora_A]["exp_avg"]
        assert torch.equal(now, before[name])
        assert bool((now[:2] != 0).any())
        assert bool((now[2:] == 0).all())


def test_a_changed_weight_takes_up_what_a_smaller_rank_loses(tiny_config: ConfigMaker) -> None:
    tuner = make_tuner(tiny_config(rank=4, max_rank=4))
    for number in range(3):
        tuner.step(number, 5e-2)
    name, fitted = next(iter(tuner._adapted.layers.items()))
    fitted.set_weight(fitted.weight * 1.5)
    layers = tuner._adapted.layers
    before = {name: layer.merged() for name, layer in layers.items()}
    tuner.resize(dict.fromkeys(layers, 1), absorb=True)
    for other, layer in layers.items():
        if other == name:
            # 1e-6: the difference of two float32 updates
            torch.testing.assert_close(layer.merged(), before[other], rtol=1e-5, atol=1e-6)
            assert not (layer.weight * (1 - layer.mask)).any()
        else:
            assert not layer.weight_changed
            assert float((layer.merged() - before[other]).norm()) > 1e-3 * float(before[other].norm())
    assert torch.equal(fitted.merged() == 0.0, before[name] == 0.0)


def test_an_optimizer_that_forgot_steps_like_a_new_one(tiny_config: ConfigMaker) -> None:
    tuner = make_tuner(tiny_config())
    for number in range(3):
        tuner.step(number, 1e-2)
    tuner.forget_moments()
    saved = {name: tensor.clone() for name, tensor in tuner.tensors().items()}
    assert {name.partition(":")[0] for name in saved} == {"A", "B"}
    other = make_tuner(tiny_config())
    other.restore(saved, 0)
    assert [tuner.step(number, 1e-2) for number in range(3, 6)] == [other.step(number, 1e-2) for number in range(3, 6)]


@pytest.mark.parametrize("changes", [{"kl_weight": 1.0}, {"squarehead_weight": 1.0}])
def test_distillation_settings_reach_the_loss(tiny_config: ConfigMaker, changes: dict[str, float]) -> None:
    assert make_tuner(tiny_config(**changes)).step(0, 0.0).total > make_tuner(tiny_config()).step(0, 0.0).total
