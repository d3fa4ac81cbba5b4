"""Losses against the dense teacher, padding, and recomputation, on tiny random models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from losa_export.training import loss as module
from losa_export.training.config import TrainConfig
from losa_export.training.loss import CausalLoss, Objective, next_token_loss, relative_error
from losa_export.training.model import AdaptedModel, attach_adapters

ModelMaker = Callable[..., nn.Module]
ConfigMaker = Callable[..., TrainConfig]
BOTH = Objective(kl_weight=0.7, squarehead_weight=0.3)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def adapted_pair(
    make_model: ModelMaker, config: TrainConfig, family: str = "Llama", dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, AdaptedModel]:
    """A dense model, and the same one pruned to about 60 % with adapters that do something."""
    dense = make_model(family).to(dtype)
    adapted = attach_adapters(make_model(family).to(dtype), config, dtype)
    generator = torch.Generator().manual_seed(3)
    for layer in adapted.layers.values():
        layer.weight.data = layer.weight.data.to(dtype)
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(dtype), layer.lora_B.data.to(dtype)
        layer.set_mask(torch.rand(layer.mask.shape, generator=generator) < 0.4)
        with torch.no_grad():
            layer.lora_B.normal_(std=0.1, generator=generator)
    return dense, adapted


def adapters(adapted: AdaptedModel) -> list[Tensor]:
    return [parameter for layer in adapted.layers.values() for parameter in (layer.lora_A, layer.lora_B)]


IDS = torch.randint(4, 60, (3, 12), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_the_divergence_and_its_gradient_equal_plain_autograd(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK_ROWS", chunk)
    hidden, teacher, head = randn(2, 9, 8, seed=0).requires_grad_(), randn(2, 9, 8, seed=1), randn(30, 8, seed=2)
    ids = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(4))
    ours = next_token_loss(hidden, head, ids, teacher=teacher, kl_weight=0.7).total
    logits, wise = ((states @ head.T)[:, :-1].reshape(-1, 30) for states in (hidden, teacher))
    reference = functional.cross_entropy(logits, ids[:, 1:].reshape(-1)) + 0.7 * functional.kl_div(
        logits.log_softmax(1), wise.log_softmax(1), reduction="batchmean", log_target=True
    )
    # 1e-12: float64 sums of some hundred terms
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=0)
    mine, wanted = (torch.autograd.grad(3.0 * value, hidden)[0] for value in (ours, reference))
    torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)


def test_gradients_of_all_terms_equal_finite_differences() -> None:
    hidden, teacher, head = randn(2, 4, 3, seed=0).requires_grad_(), randn(2, 4, 3, seed=1), randn(5, 3, seed=2)
    ids, lengths = torch.tensor([[0, 1, 2, 3], [4, 3, 0, 0]]), torch.tensor([4, 2])

    def value(states: Tensor) -> Tensor:
        terms = next_token_loss(states, head, ids, lengths, teacher, 0.7)
        return terms.total + 0.3 * relative_error(states, teacher, lengths)

    # 1e-6: what gradcheck's differences over 1e-6 resolve in float64
    assert torch.autograd.gradcheck(value, (hidden,), atol=1e-6)


def test_the_relative_error_has_the_worked_value_and_ignores_padding() -> None:
    teacher = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [5.0, 5.0]]])
    hidden = torch.tensor([[[1.0, 1.0], [3.0, 5.0]], [[1.0, 1.0], [9.0, 9.0]]])
    # (1 + 1) / (1 + 4 + 9 + 16 + 1 + 1), the last token being padding; 1e-6: float32
    assert float(relative_error(hidden, teacher, torch.tensor([2, 1]))) == pytest.approx(2 / 32, rel=1e-6)
    assert float(relative_error(hidden[:1], teacher[:1])) == pytest.approx(2 / 30, rel=1e-6)
    assert float(relative_error(teacher, teacher)) == 0.0


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_the_loss_is_the_sum_of_its_definitions(make_model: ModelMaker, tiny_config: ConfigMaker, family: str) -> None:
    dense, adapted = adapted_pair(make_model, tiny_config(), family)
    ours = CausalLoss(adapted.model, BOTH)(IDS).total.detach()
    with torch.no_grad():
        student, teacher = (
            model(input_ids=IDS, labels=IDS, output_hidden_states=True) for model in (adapted.model, dense)
        )
        divergence = functional.kl_div(
            student.logits[:, :-1].reshape(-1, 64).log_softmax(1),
            teacher.logits[:, :-1].reshape(-1, 64).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        hidden: list[tuple[Tensor, Tensor]] = []
        outputs: list[list[Tensor]] = [[], []]
        for model, seen in zip((adapted.model, dense), outputs, strict=True):
            hooks = [
                block.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
                for block in model.get_submodule("model.layers").children()
            ]
            model(input_ids=IDS)
            for hook in hooks:
                hook.remove()
        hidden = list(zip(*outputs, strict=True))
        squares = sum((h - t).square().sum() / t.square().sum() for h, t in hidden)
    # 1e-6 relative: transformers takes its own loss in float32
    assert float(ours) == pytest.approx(float(student.loss + 0.7 * divergence + 0.3 * squares), rel=1e-6)
    assert len(hidden) == 3


def test_the_teacher_is_the_dense_model_even_after_pruning_changed_a_base_weight(
    make_model: ModelMaker, tiny_config: ConfigMaker
) -> None:
    dense, adapted = adapted_pair(make_model, tiny_config())
    for layer in adapted.layers.values():
        layer.set_weight(layer.weight * 0.5)
    taught = CausalLoss(adapted.model, BOTH)._teach(IDS, adapted.blocks)
    with torch.no_grad():
        assert torch.equal(taught.final, dense.get_submodule("model")(input_ids=IDS).last_hidden_state)  # type: ignore[arg-type]
    assert len(taught.blocks) == 3


def test_a_dense_student_differs_from_its_teacher_in_nothing(make_model: ModelMaker, tiny_config: ConfigMaker) -> None:
    adapted = attach_adapters(make_model("Llama"), tiny_config(), torch.float32)
    alone, both = (float(CausalLoss(adapted.model, objective)(IDS).total.detach()) for objective in (Objective(), BOTH))
    # 1e-5: float32 rounding of the merged weight and of the divergence
    assert both == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("objective", [Objective(), BOTH])
def test_padding_counts_in_no_loss_and_no_gradient(
    make_model: ModelMaker, tiny_config: ConfigMaker, objective: Objective
) -> None:
    _, adapted = adapted_pair(make_model, tiny_config())
    compute = CausalLoss(adapted.model, objective)
    lengths = torch.tensor([12, 7, 2])
    values = []
    for filler in (0, 63):
        ids = torch.where(torch.arange(12) < lengths.unsqueeze(1), IDS, filler)
        value = compute(ids, lengths).total
        values.append((value, *torch.autograd.grad(value, adapters(adapted))))
    for left, right in zip(*values, strict=True):
        assert torch.equal(left, right)
    if not objective.distils:
        parts = [float(compute(IDS[i : i + 1, :n]).total.detach()) * (n - 1) for i, n in enumerate(lengths.tolist())]
        # 1e-10: float64, other shapes of the products
        assert float(values[0][0].detach()) == pytest.approx(sum(parts) / (11 + 6 + 1), rel=1e-10)


@pytest.mark.parametrize("objective", [Objective(), BOTH])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_changes_no_bit(
    make_model: ModelMaker, tiny_config: ConfigMaker, objective: Objective, dropout: float
) -> None:
    _, adapted = adapted_pair(make_model, tiny_config(adapter_dropout=dropout))
    for layer in adapted.layers.values():
        layer.train()
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        changed = Objective(objective.kl_weight, objective.squarehead_weight, checkpointing)
        value = CausalLoss(adapted.model, changed)(IDS).total
        results.append((value, *torch.autograd.grad(value, adapters(adapted))))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_recomputation_keeps_less_for_the_backward_pass(make_model: ModelMaker, tiny_config: ConfigMaker) -> None:
    _, adapted = adapted_pair(make_model, tiny_config())
    kept = []
    for checkpointing in (False, True):
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(0 if isinstance(tensor, nn.Parameter) else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            CausalLoss(adapted.model, Objective(checkpointing=checkpointing))(IDS)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


class _Largest(TorchDispatchMode):
    """Notes the largest tensor with a dimension of `width` that any operator makes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim > 0 and result.shape[-1] == self.width:
            self.rows = max(self.rows, result.numel() // self.width)
        return result


def test_the_logits_of_a_batch_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ROWS", 4)
    hidden, teacher, head = randn(2, 33, 3, seed=0).requires_grad_(), randn(2, 33, 3, seed=1), randn(101, 3, seed=2)
    with _Largest(101) as largest:
        next_token_loss(
            hidden, head, torch.zeros(2, 33, dtype=torch.int64), teacher=teacher, kl_weight=1.0
        ).total.backward()  # type: ignore[no-untyped-call]
    assert largest.rows == 4
