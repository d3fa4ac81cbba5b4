"""The dense model with a masked low-rank layer in place of every block linear."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from losa_export.checkpoint import open_checkpoint
from losa_export.errors import CheckpointError, ConfigError
from losa_export.layout import Layout, layout_of
from losa_export.masks import BoolArray
from losa_export.streamed import load_outline
from losa_export.training import attention
from losa_export.training.adapter import MaskedLoRALinear, Operator
from losa_export.training.allocation import FloatVector
from losa_export.training.config import Compute, Device, Dtype, OperatorChoice, TrainConfig
from losa_export.training.weight_store import WeightStore

_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Store(Protocol):
    """Where linears' weights lie while their block is not at work."""

    def fetch(self, name: str, layer: MaskedLoRALinear, /) -> None:
        """Make a layer whole."""

    def put_away(self, name: str, layer: MaskedLoRALinear, /) -> None:
        """Take the weights of a layer that may have been changed."""

    def changed(self, name: str, layer: MaskedLoRALinear, /) -> Tensor:
        """The changed weight of a layer that is put away: do not write to it."""
        ...

    def clear(self) -> None:
        """Remove what lies on the disk."""


@dataclass(frozen=True)
class AdaptedModel:
    """A causal language model whose block linears are `MaskedLoRALinear`.

    All of it is in memory, or with a `store` all but the linears of blocks that are not `at_work`.

    Attributes:
        model: the whole model, everything frozen but the adapters.
        blocks: its decoder blocks, in order.
        layers: weight name, for example 'model.layers.0.mlp.up_proj.weight', to layer, in forward order.
        compute_dtype: dtype of activations and of all weights outside the blocks.
        store: where weights lie meanwhile.
    """

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    layers: Mapping[str, MaskedLoRALinear]
    compute_dtype: torch.dtype
    store: Store | None = None

    @contextlib.contextmanager
    def at_work(self, layers: Mapping[str, MaskedLoRALinear]) -> Iterator[None]:
        """Within the block, `layers`, usually those of one block, are in memory.

        Raises: CheckpointError if they cannot be read or are not finite; OutputError if a changed weight cannot be
            put away.
        """
        with contextlib.ExitStack() as stack:
            if self.store is not None:
                for name, layer in layers.items():
                    self.store.fetch(name, layer)
                    stack.callback(self.store.put_away, name, layer)
            yield

    def layers_of(self, block: int) -> dict[str, MaskedLoRALinear]:
        """Weight name to layer of one block."""
        prefix = self.layout.prefix(block)
        return {name: layer for name, layer in self.layers.items() if name.startswith(prefix)}

    @property
    def layout(self) -> Layout:
        """Where the model keeps its parts."""
        return layout_of(self.model)

    def parameter_counts(self) -> FloatVector:
        """(L,) prunable weights of each block."""
        counts = [sum(layer.size for layer in self.layers_of(i).values()) for i in range(len(self.blocks))]
        return np.array(counts, dtype=np.float64)

    def mask(self, name: str) -> BoolArray:
        """Mask of the weight `name`, (out, in) bool, True = keep."""
        keep: BoolArray = self.layers[name].kept.cpu().numpy()
        return keep

    def masks(self) -> dict[str, BoolArray]:
        """Weight name to mask, (out, in) bool, True = keep: one byte a position, for all layers."""
        return {name: self.mask(name) for name in self.layers}

    def changed_weights(self) -> dict[str, Tensor]:
        """Weight name → (out, in) of every layer whose frozen weight is not the checkpoint's: do not write to it."""
        return {
            name: self.store.changed(name, layer) if self.store is not None and layer.parked else layer.weight.detach()
            for name, layer in self.layers.items()
            if layer.weight_changed
        }

    def lend_changed_weights(self) -> None:
        """What every other process must do while one asks for `changed_weights` of a model that is shared out."""
        for name, layer in self.layers.items():
            if self.store is not None and layer.parked and layer.weight_changed:
                self.store.changed(name, layer)

    def sparsity_fraction(self) -> float:
        """Pruned positions of all block linears, as a fraction."""
        total = sum(layer.size for layer in self.layers.values())
        return 1.0 - sum(int(layer.kept.sum(dtype=torch.int64)) for layer in self.layers.values()) / total


def choose_device(device: Device) -> torch.device:
    """The device named, or for 'auto' a GPU if there is one. Raises: ConfigError for 'cuda' without one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but PyTorch sees no GPU here; use device 'auto' or 'cpu'", field="device")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def choose_compute(compute: Compute, dtype: Dtype, device: torch.device) -> Dtype:
    """The compute dtype, resolving 'auto'.

    bfloat16 products are emulated, some nine times slower than float32, on CPUs without AVX512-BF16 or AMX.
    """
    if compute != "auto":
        return compute
    if dtype == "fp32":
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if _processor_multiplies_bfloat16() else "fp32"


def choose_operator(operator: OperatorChoice, device: torch.device) -> Operator:
    """The operator, resolving 'auto': float32 factors of a gradient are rounded where that is twice as fast."""
    if operator != "auto":
        return operator
    return "exact_bf16" if device.type == "cpu" and _processor_multiplies_bfloat16() else "exact"


def _processor_multiplies_bfloat16() -> bool:
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in native)


def load_adapted_model(config: TrainConfig, compute: Dtype, *, parking: Path | None = None) -> AdaptedModel:
    """Load the dense checkpoint on the CPU and put adapters into its blocks.

    The adapters' start depends on `config.seed` and on the layer's place alone.

    Args:
        config: names the checkpoint, and describes the adapters.
        compute: dtype of activations.
        parking: a folder for weights that change. With it a block's linears are in memory only while they are at work;
            without it all are.
    Raises: CheckpointError if transformers cannot load it, or a block weight is not finite; with `parking` the
        latter only once the block is at work.
    """
    compute_dtype = _TORCH_DTYPES[compute]
    try:
        with _quiet():
            model = _load(config, compute_dtype, outline=parking is not None)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"transformers cannot load the checkpoint '{config.model}': {error}; save it again", path=config.model
        ) from error
    adapted = attach_adapters(model, config, compute_dtype)
    if parking is None:
        return adapted

    def convert(name: str, weight: Tensor) -> Tensor:
        return _frozen_weight(name, weight.to(compute_dtype), config)

    return replace(adapted, store=WeightStore(open_checkpoint(config.model), convert, parking))


def _load(config: TrainConfig, dtype: torch.dtype, *, outline: bool) -> nn.Module:
    implementation = attention.register() if attention.helps(dtype, choose_device(config.device)) else "sdpa"
    if outline:
        return load_outline(config.model, dtype, implementation)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        config.model, dtype=dtype, attn_implementation=implementation, local_files_only=True
    )
    return cast(nn.Module, model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, transformers neither warns nor draws progress bars."""
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def attach_adapters(model: nn.Module, config: TrainConfig, compute_dtype: torch.dtype) -> AdaptedModel:
    """Freeze `model` and replace every linear of its blocks, in place. Those on the meta device become parked layers.

    Raises: CheckpointError naming the first block weight that is not finite.
    """
    # Dropout would make the training loss a random variable; evaluation mode turns it off and keeps gradients.
    model.eval().requires_grad_(False)
    layout = layout_of(model)
    blocks = tuple(model.get_submodule(layout.blocks).children())
    operator = choose_operator(config.operator, choose_device(config.device))
    layers: dict[str, MaskedLoRALinear] = {}
    for index, block in enumerate(blocks):
        for place, path in enumerate(layout.linears):
            parent_path, _, attribute = path.rpartition(".")
            linear = cast(nn.Linear, block.get_submodule(path))
            name = layout.weight(index, path)
            if not linear.weight.is_meta:
                linear.weight.data = _frozen_weight(name, linear.weight.data, config)
            seed = np.random.SeedSequence([config.seed, index, place]).generate_state(1, np.uint64)[0]
            layers[name] = MaskedLoRALinear(
                linear,
                max_rank=config.max_rank,
                rank=config.rank,
                scaling=config.scaling,
                generator=torch.Generator().manual_seed(int(seed)),
                operator=operator,
                dropout=config.adapter_dropout,
            )
            setattr(block.get_submodule(parent_path), attribute, layers[name])
    return AdaptedModel(model, blocks, layers, compute_dtype)


def _frozen_weight(name: str, weight: Tensor, config: TrainConfig) -> Tensor:
    """What an adapter is put beside: `weight`, as loaded, in the dtype that the configuration stores.

    Raises: CheckpointError if it is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(
            f"tensor '{name}' of checkpoint '{config.model}' holds values that are not finite; "
            "download or save it again",
            tensor=name,
        )
    return weight.to(_TORCH_DTYPES[config.dtype])
