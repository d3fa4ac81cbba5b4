from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from losa_export.layout import LAYOUTS, LLAMA
from losa_export.training.calibration import capture_block_inputs, head_inputs, input_square_sums, run_block

ModelMaker = Callable[..., nn.Module]
MODELS = [
    ("Llama", {}),
    ("Mistral", {"sliding_window": 4, "head_dim": 8}),
    ("Qwen2", {}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("Qwen3", {"head_dim": 16}),
]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("model.layers").children())


def windows() -> Tensor:
    # five windows in batches of two: the last batch is short
    return torch.randint(0, 50, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_blocks_run_one_by_one_give_the_hidden_states_of_the_model(
    make_model: ModelMaker, family: str, changes: dict[str, Any]
) -> None:
    model = make_model(family, **changes)
    blocks = blocks_of(model)
    batches = capture_block_inputs(model, blocks, windows(), 2)
    assert [len(batch.hidden) for batch in batches] == [2, 2, 1]
    for index, block in enumerate(blocks):
        for batch in batches:
            batch.hidden = run_block(block, index, batch)
    final = model.get_submodule("model.norm")(torch.cat([batch.hidden for batch in batches]))
    expected = model.get_submodule("model")(input_ids=windows()).last_hidden_state
    # 1e-5: float32, other batch shapes may sum in another order
    torch.testing.assert_close(final, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [*MODELS, ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16, "num_key_value_heads": 4})],
)
def test_what_the_head_reads_comes_through_all_that_follows_the_blocks(
    make_model: ModelMaker, family: str, changes: dict[str, Any]
) -> None:
    model = make_model(family, **changes)
    blocks = list(model.get_submodule(LAYOUTS[f"{family}ForCausalLM"].blocks).children())
    [batch] = capture_block_inputs(model, blocks, windows(), 8)
    for index, block in enumerate(blocks):
        batch.hidden = run_block(block, index, batch)
    expected: list[Tensor] = []
    head: nn.Module = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0])):
        logits = model(input_ids=windows()).logits
    found = head_inputs(model, blocks, batch)
    torch.testing.assert_close(found, expected[0].flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(input_ids=windows()).logits, logits)


def test_capturing_leaves_the_model_as_it_was(make_model: ModelMaker) -> None:
    model = make_model("Llama")
    before = model(input_ids=windows()).logits
    capture_block_inputs(model, blocks_of(model), windows(), 2)
    assert torch.equal(model(input_ids=windows()).logits, before)


def test_square_sums_are_those_of_the_inputs_of_each_linear(make_model: ModelMaker) -> None:
    model = make_model("Llama")
    block = blocks_of(model)[0]
    batches = capture_block_inputs(model, blocks_of(model), windows(), 2)
    linears = {path: block.get_submodule(path) for path in LLAMA.linears}
    sums = input_square_sums(block, 0, linears, batches)
    entering = block.get_submodule("input_layernorm")(torch.cat([batch.hidden for batch in batches]))
    expected = entering.double().square().sum(dim=(0, 1))
    for path in LLAMA.linears[:3]:
        # 1e-6 relative: float32 squares, summed over 24 tokens before float64 takes over
        torch.testing.assert_close(sums[path].double(), expected, rtol=1e-6, atol=0)
    assert {path: total.shape for path, total in sums.items()} == {
        path: (linears[path].in_features,) for path in LLAMA.linears
    }
    assert all(total.dtype == torch.float32 for total in sums.values())
    assert not block.get_submodule("mlp.up_proj")._forward_pre_hooks


def test_a_block_that_returns_a_tuple_is_understood(make_model: ModelMaker) -> None:
    class Old(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor, **keywords: Any) -> tuple[Tensor, None]:
            return self.inner(hidden, **keywords), None

    model = make_model("Llama")
    blocks = blocks_of(model)
    (batch,) = capture_block_inputs(model, blocks, windows(), 5)
    expected = run_block(blocks[0], 0, batch)
    assert torch.equal(run_block(Old(copy.deepcopy(blocks[0])), 0, batch), expected)
