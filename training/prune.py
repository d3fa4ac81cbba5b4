"""One pruning pass: block after block, each on inputs that come from already pruned blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from losa_export.training.adapter import MaskedLoRALinear
from losa_export.training.allocation import FloatVector
from losa_export.training.calibration import capture_block_inputs, input_square_sums, run_block
from losa_export.training.model import AdaptedModel
from losa_export.training.scores import pruned_per_row, select_kept, wanda_scores


def prune_blocks(
    adapted: AdaptedModel,
    windows: Tensor,
    targets: FloatVector,
    *,
    batch_size: int,
    on_block: Callable[[int], None] = lambda _: None,
) -> None:
    """Set the masks of all layers to the sparsity of their block.

    Scores are taken on the folded weight (W + s·BA)⊙M, so that what the adapters learnt counts. Statistics of
    all linears of a block come from one pass at its old masks; its output with the new masks feeds the next.

    Args:
        adapted: the model; only its masks change.
        windows: (n, tokens) int64 calibration windows.
        targets: (L,) sparsity of each block.
        batch_size: windows run together.
        on_block: told the number of each block when it is done; may raise to stop between blocks.
    """
    batches = capture_block_inputs(adapted.model, adapted.blocks, windows, batch_size)
    for index, block in enumerate(adapted.blocks):
        layers = adapted.layers_of(index)
        with _all_folded(layers, adapted.compute_dtype):
            sums = input_square_sums(block, index, layers, batches)
        for name, layer in layers.items():
            prune_layer(layer, sums[name], float(targets[index]))
        if index + 1 < len(adapted.blocks):
            with _all_folded(layers, adapted.compute_dtype):
                for batch in batches:
                    batch.hidden = run_block(block, index, batch)
        on_block(index)


@torch.no_grad()
def prune_layer(layer: MaskedLoRALinear, input_sq_sum: Tensor, sparsity_fraction: float) -> None:
    """Prune each row of a layer to ⌊in · sparsity + 1e-6⌋ zeros by Wanda's score."""
    scores = wanda_scores(layer.merged(), input_sq_sum)
    layer.set_mask(select_kept(scores, pruned_per_row(layer.in_features, sparsity_fraction), layer.kept))


@contextlib.contextmanager
def _all_folded(layers: Mapping[str, MaskedLoRALinear], dtype: torch.dtype) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.folded(dtype))
        yield
