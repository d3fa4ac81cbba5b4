from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from losa_export.errors import CheckpointError
from losa_export.layout import LLAMA
from losa_export.quantise import quantise_int4
from losa_export.training.rounding import CalibratedRounding

ModelMaker = Callable[..., nn.Module]

STORED_TOGETHER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def windows(seed: int, count: int = 20) -> Tensor:
    return torch.randint(0, 50, (count, 24), generator=torch.Generator().manual_seed(seed))


def prune(model: nn.Module) -> dict[str, np.ndarray]:
    """Make half of every block linear zero; returns the patterns."""
    generator = np.random.default_rng(3)
    keeps = {}
    for index in range(len(list(model.get_submodule("model.layers").children()))):
        for linear in LLAMA.linears:
            name = f"model.layers.{index}.{linear}"
            weight = model.get_parameter(f"{name}.weight")
            keeps[name] = generator.random(tuple(weight.shape)) < 0.5
            with torch.no_grad():
                weight *= torch.from_numpy(keeps[name])
    return keeps


def stacked(model: nn.Module, names: list[str]) -> np.ndarray:
    return np.concatenate([model.get_parameter(f"{name}.weight").detach().numpy() for name in names])


def round_all(model: nn.Module, keeps: dict[str, np.ndarray], rounding: Any) -> None:
    for index in range(len(list(model.get_submodule("model.layers").children()))):
        for linears in STORED_TOGETHER:
            names = [f"model.layers.{index}.{linear}" for linear in linears]
            rounding(names, stacked(model, names), np.concatenate([keeps[name] for name in names]))


@pytest.mark.parametrize(("family", "changes"), [("Llama", {}), ("Qwen3", {"head_dim": 16}), ("Mistral", {})])
def test_the_model_answers_nearer_to_its_exact_self_than_after_plain_rounding(
    make_model: ModelMaker, family: str, changes: dict[str, Any]
) -> None:
    exact = make_model(family, **changes)
    keeps = prune(exact)
    ours, plain = copy.deepcopy(exact), copy.deepcopy(exact)
    done: list[int] = []
    round_all(ours, keeps, CalibratedRounding(ours, windows(1), "int4", 32, done.append))

    def plainly(names: list[str], weight: np.ndarray, keep: np.ndarray) -> None:
        restored = quantise_int4(weight, keep, 32).dequantise(keep)
        for name, rows in zip(names, np.split(restored, np.cumsum([len(keeps[n]) for n in names])[:-1]), strict=True):
            plain.get_parameter(f"{name}.weight").data = torch.from_numpy(rows)

    round_all(plain, keeps, plainly)
    assert sum(done) == sum(keep.size for keep in keeps.values())
    for name, keep in keeps.items():
        assert not ours.get_parameter(f"{name}.weight").detach().numpy()[~keep].any()
    with torch.no_grad():
        truth, found, other = (model(input_ids=windows(2)).logits for model in (exact, ours, plain))
    assert (found - truth).square().mean() < 0.8 * (other - truth).square().mean()


def test_the_head_makes_up_for_its_own_errors_and_for_those_of_rounded_linears(make_model: ModelMaker) -> None:
    exact = make_model("Llama")
    keeps = prune(exact)
    ours = copy.deepcopy(exact)
    done: list[int] = []
    rounding = CalibratedRounding(ours, windows(1), "int4", 32, done.append)
    round_all(ours, keeps, rounding)
    head = exact.get_parameter("lm_head.weight").detach().numpy()
    everything = np.ones(head.shape, dtype=np.bool_)
    del done[:]
    rounded = rounding.head(head).dequantise(everything)
    assert done == [head.size]
    with torch.no_grad():
        truth = exact(input_ids=windows(2)).logits.numpy()
        hidden = ours.get_submodule("model")(input_ids=windows(2)).last_hidden_state.numpy()
    plain = quantise_int4(head, everything, 32).dequantise(everything)
    found, other = (np.square(hidden @ table.T - truth).mean() for table in (rounded, plain))
    assert found < 0.9 * other


def test_what_is_returned_is_what_the_model_goes_on_with(make_model: ModelMaker) -> None:
    model = make_model("Llama")
    keeps = prune(model)
    rounding = CalibratedRounding(model, windows(1), "int8", 32)
    names = [f"model.layers.0.{linear}" for linear in STORED_TOGETHER[0]]
    rounded = rounding(names, stacked(model, names), np.concatenate([keeps[name] for name in names]))
    np.testing.assert_array_equal(rounded.dequantise(), stacked(model, names))  # type: ignore[call-arg]


def test_linears_asked_for_one_by_one_see_the_inputs_that_they_share(make_model: ModelMaker) -> None:
    """Query, key and value apart, as graphs without a packed attention store them."""
    model = make_model("Llama")
    keeps = prune(model)
    together, apart = copy.deepcopy(model), copy.deepcopy(model)
    names = [f"model.layers.0.{linear}" for linear in STORED_TOGETHER[0]]
    keep = np.concatenate([keeps[name] for name in names])
    CalibratedRounding(together, windows(1), "int8", 32)(names, stacked(model, names), keep)
    rounding = CalibratedRounding(apart, windows(1), "int8", 32)
    for name in names:
        rounding([name], stacked(model, [name]), keeps[name])
    # BLAS adds up in another order for another shape, which may tip a weight to the next level.
    torch.testing.assert_close(
        torch.from_numpy(stacked(apart, names)), torch.from_numpy(stacked(together, names)), rtol=0, atol=2e-3
    )


def test_activations_that_are_not_finite_are_an_error(make_model: ModelMaker) -> None:
    model = make_model("Llama")
    keeps = prune(model)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[windows(1)[0, 0]] = float("nan")
    names = ["model.layers.0.self_attn.o_proj"]
    rounding = CalibratedRounding(model, windows(1), "int8", 32)
    with pytest.raises(CheckpointError, match=r"block 0 gives 'self_attn.o_proj' inputs that are not finite") as caught:
        rounding(names, stacked(model, names), keeps[names[0]])
    assert caught.value.block == 0
