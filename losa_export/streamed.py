"""Models of transformers that hold the linears of one decoder block at a time.

The linears are nearly all of a large model. Everything else is loaded once: embedding, norms, biases and head. A
block's weights come when it runs and go when it is done; those of a file in the model's own dtype are mapped from it,
not copied, so that the system may drop them from memory whenever it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa_export.checkpoint import open_checkpoint
from losa_export.errors import CheckpointError
from losa_export.layout import LAYOUTS, layout_of
from losa_export.reference import load_model

# Name of a linear's weight to that weight, (out, in), in the model's dtype.
ReadWeight = Callable[[str], Tensor]


def load_outline(folder: Path, dtype: torch.dtype, attention: str) -> nn.Module:
    """Load a checkpoint but for the linears of its blocks, whose weights stay on the meta device: shapes alone.

    A model of a family whose blocks are not known here is loaded whole.

    Args:
        folder: a checkpoint folder; nothing is fetched.
        dtype: of weights and activations.
        attention: implementation, as transformers names it.
    Raises: CheckpointError if a tensor is missing or cannot be read; what transformers raises for a bad config.json.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = open_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # Buffers are computed, not loaded.
    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if type(model).__name__ not in LAYOUTS:
        whole: nn.Module = load_model(folder, str(dtype).removeprefix("torch."), attention)
        return whole
    model.eval().requires_grad_(False)
    later = {name for linears in _linears(model) for name in linears}
    for name, _ in list(model.named_parameters()):
        # A tied head has no tensor of its own.
        if name not in later and checkpoint.exists(name):
            parent, _, attribute = name.rpartition(".")
            tensor = checkpoint.mapped(name).to(dtype, copy=True)
            setattr(model.get_submodule(parent), attribute, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if parameter.is_meta and name not in later:
            raise CheckpointError(f"checkpoint '{folder}' has no tensor '{name}'; it is incomplete", tensor=name)
    return model


def stream_blocks(model: nn.Module, read: ReadWeight) -> None:
    """Have each block's linears read right before it runs, and let go of right after.

    Args:
        model: made by `load_outline`; one that was loaded whole stays as it is.
        read: where the weights come from.
    """
    if type(model).__name__ not in LAYOUTS:
        return
    blocks = model.get_submodule(layout_of(model).blocks).children()
    for block, linears in zip(blocks, _linears(model), strict=True):
        block.register_forward_pre_hook(_fetching(linears, read))
        # Also after an error, or the block would stay.
        block.register_forward_hook(_releasing(linears), always_call=True)


def load_streamed(folder: Path, dtype: str = "float32", attention: str = "eager") -> nn.Module:
    """A checkpoint, ready for inference on the CPU, that answers as `reference.load_model` would have it.

    Every pass reads all blocks again, so it is meant for a few passes over models that may be larger than memory.

    Args:
        folder: a checkpoint folder; nothing is fetched.
        dtype: of weights and activations, as torch names it.
        attention: implementation, as transformers names it.
    """
    kind: torch.dtype = getattr(torch, dtype)
    checkpoint, model = open_checkpoint(folder), load_outline(folder, kind, attention)
    stream_blocks(model, lambda name: checkpoint.mapped(name).to(kind))
    return model


def _linears(model: nn.Module) -> list[dict[str, nn.Module]]:
    """For each block, weight name to linear."""
    layout = layout_of(model)
    return [
        {layout.weight(index, path): block.get_submodule(path) for path in layout.linears}
        for index, block in enumerate(model.get_submodule(layout.blocks).children())
    ]


def _fetching(linears: Mapping[str, nn.Module], read: ReadWeight) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        for name, linear in linears.items():
            linear.weight = nn.Parameter(read(name), requires_grad=False)

    return hook


def _releasing(linears: Mapping[str, nn.Module]) -> Callable[..., None]:
    outlines = {name: linear.weight for name, linear in linears.items()}

    def hook(*_: Any) -> None:
        for name, linear in linears.items():
            linear.weight = outlines[name]

    return hook
