"""One pruning pass: block after block, each on inputs that come from already pruned blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from losa_export.training.adapter import MaskedLoRALinear, all_dense, all_folded
from losa_export.training.allocation import FloatVector
from losa_export.training.calibration import BlockBatch, capture_block_inputs, run_block
from losa_export.training.criteria import CRITERIA, InputStatistics, Problem
from losa_export.training.model import AdaptedModel
from losa_export.training.reconstruct import Reconstructor
from losa_export.training.reconstruction_error import ChannelErrors, ErrorKind
from losa_export.training.rule import PruneRule
from losa_export.training.scores import Amount


def prune_blocks(
    adapted: AdaptedModel,
    windows: Tensor,
    targets: FloatVector,
    *,
    batch_size: int,
    rule: PruneRule | None = None,
    errors: ErrorKind | None = None,
    on_block: Callable[[int], None] = lambda _: None,
    reconstructor: Reconstructor | None = None,
) -> FloatVector | None:
    """Set the masks of all layers to the sparsity of their block.

    Scores are taken on the folded weight (W + s·BA)⊙M, so that what the adapters learnt counts. Statistics of
    all linears of a block come from one pass at its old masks; its output with the new masks feeds the next.

    Args:
        adapted: the model; its masks change, and the frozen weights if `rule` compensates or by `reconstructor`.
        windows: (n, tokens) int64 calibration windows.
        targets: (L,) sparsity of each block.
        batch_size: windows run together.
        rule: criterion and pattern; Wanda without a pattern if not given.
        errors: measure each block's reconstruction error, against a dense block that reads what the dense model
            gives it, or what the sparse one does. The dense pass goes along block by block, so that one block's
            outputs are held at a time. None measures nothing.
        on_block: told the number of each block when it is done; may raise to stop between blocks.
        reconstructor: fits each block to a dense one's answers; errors are then those that are left.
    Returns: (L,) float64 errors, or None if none were asked for.
    """
    rule = rule or PruneRule()
    amounts = rule.amounts(adapted, targets)
    batches = capture_block_inputs(adapted.model, adapted.blocks, windows, batch_size)
    aims = (errors, reconstructor.settings.target if reconstructor is not None else None)
    kinds = {kind for kind in aims if kind is not None}
    # What the dense model hands on, if anybody asks for it.
    dense = [batch.hidden for batch in batches] if "accumulated" in kinds else []
    measured: list[float] = []
    for index, block in enumerate(adapted.blocks):
        layers = adapted.layers_of(index)
        with adapted.at_work(layers):
            with all_folded(layers, adapted.compute_dtype):
                inputs = rule.measure(block, index, layers, batches)
            for name, layer in layers.items():
                # Taken out, since second moments and their factors are large: one block's are held at a time.
                prune_layer(layer, rule, amounts[index], inputs.pop(name))
            wanted = _dense_answers(adapted, index, batches, dense, local="local" in kinds) if kinds else {}
            if reconstructor is not None:
                reconstructor.fit(block, index, layers, batches, wanted[reconstructor.settings.target])
            if errors is not None or index + 1 < len(adapted.blocks):
                with all_folded(layers, adapted.compute_dtype):
                    advance(block, index, batches)
        if errors is not None:
            measured.append(_error(wanted[errors], batches))
        on_block(index)
    return None if errors is None else np.array(measured, dtype=np.float64)


def advance(block: nn.Module, index: int, batches: Sequence[BlockBatch]) -> None:
    """Run block `index` as it is, and let its outputs take the place of its inputs."""
    for batch in batches:
        batch.hidden = run_block(block, index, batch)


def _dense_answers(
    adapted: AdaptedModel, index: int, batches: Sequence[BlockBatch], dense: list[Tensor], *, local: bool
) -> dict[ErrorKind, list[Tensor]]:
    """What block `index` of the dense checkpoint answers: to `dense`, if there is any, and to the batches if `local`.

    The former take the place of `dense`, so that one block's activations are held and not two's.
    """
    block, answers = adapted.blocks[index], dict[ErrorKind, list[Tensor]]()
    with all_dense(adapted.layers_of(index), adapted.compute_dtype):
        if local:
            answers["local"] = [run_block(block, index, batch) for batch in batches]
        if dense:
            for place, batch in enumerate(batches):
                dense[place] = run_block(block, index, replace(batch, hidden=dense[place]))
            answers["accumulated"] = dense
    return answers


def _error(dense: Sequence[Tensor], batches: Sequence[BlockBatch]) -> float:
    errors = ChannelErrors()
    for wanted, batch in zip(dense, batches, strict=True):
        errors.add(wanted, batch.hidden)
    return errors.error()


@torch.no_grad()
def prune_layer(layer: MaskedLoRALinear, rule: PruneRule, amount: Amount, inputs: InputStatistics) -> None:
    """Prune a layer to `amount`: its mask shrinks, and its frozen weight changes if the criterion compensates."""
    problem = Problem(layer.merged(), inputs, amount, layer.kept, rule.damping)
    solution = CRITERIA[rule.criterion].solve(problem)
    layer.set_mask(solution.kept)
    if solution.weight is not None:
        layer.set_effective_weight(solution.weight)
