"""Masked LoRA for PEFT: `PeftModel.from_pretrained(base, run / "adapter")` computes what `losa merge` writes.

After `register()`, PEFT looks for masks beside a LoRA that it loads: in its own folder, or in the run folder above it.
Where there are some, each of its layers computes with (W + s·BA)⊙M, W being the run's own weight if the run changed
it; merging leaves exactly the zeros of the mask, and saving takes the masks along. A LoRA without masks stays the
plain one. Adapter files are the same in both cases, so PEFT without this module can read them, and applies them
unmasked.

Importing this module needs the package 'peft'.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from losa_export.base_weights import DIGEST_KEY, WEIGHTS_FILE
from losa_export.errors import AdapterError, ConfigError, MissingDependencyError
from losa_export.files import sha256_of
from losa_export.masks import MaskFile, load_masks
from losa_export.peft_adapter import WEIGHTS_FILE as FACTORS_FILE

try:
    from peft import LoraConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ImportError as error:
    raise MissingDependencyError.for_extra("peft", "peft", "the PEFT tuner") from error

MASKS_FILE = "masks.safetensors"


def register() -> None:
    """Have PEFT load LoRA folders with their masks. Calling it again changes nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = MaskedLoraConfig


@dataclass
class MaskedLoraConfig(LoraConfig):  # type: ignore[misc]
    """PEFT's LoRA configuration, which also knows where the masks of its folder lie.

    Attributes:
        masks: the open masks; None for a plain LoRA. Not a field: the JSON file is PEFT's own.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.masks: MaskFile | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **options: Any
    ) -> MaskedLoraConfig:
        """Read a folder's configuration and open its masks.

        Raises: MaskError if the masks are damaged; AdapterError if the adapter does not cover them, or is more than
            plain LoRA, or changed weights that belong to the masks are gone or others.
        """
        config: MaskedLoraConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **options)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        places = [place for place in (folder, folder.parent) if (place / MASKS_FILE).is_file()]
        if isinstance(config, MaskedLoraConfig) and folder.is_dir() and places:
            config.use_masks(load_masks(places[0] / MASKS_FILE))
            _check_cover(folder, config)
        return config

    def use_masks(self, masks: MaskFile) -> None:
        """Mask the layers of this adapter, and take the changed weights that lie beside the masks.

        Raises: AdapterError as `from_pretrained`.
        """
        if self.use_dora or self.lora_bias or self.bias != "none" or self.layer_replication:
            raise AdapterError(
                f"masks '{masks.path}' lie beside a LoRA with use_dora, bias or layer_replication, which cannot be "
                "folded under a mask; train a plain LoRA"
            )
        expected, weights = masks.metadata.get(DIGEST_KEY), _weights_beside(masks)
        if expected is not None and (not weights.is_file() or sha256_of(weights) != expected):
            raise AdapterError(
                f"masks '{masks.path}' belong to changed weights, but '{weights}' is gone or another file; "
                "copy both from the run folder",
                path=weights,
            )
        self.masks = masks
        self._register_custom_module({nn.Linear: MaskedLinear})

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        """Write the configuration, and copies of masks and changed weights beside it."""
        super().save_pretrained(save_directory, **options)
        if self.masks is not None:
            sources = [self.masks.path]
            if DIGEST_KEY in self.masks.metadata:
                sources.append(_weights_beside(self.masks))
            for source in sources:
                target = Path(save_directory, source.name)
                if not (target.exists() and target.samefile(source)):
                    shutil.copyfile(source, target)


class MaskedLinear(Linear):  # type: ignore[misc]
    """A LoRA layer that computes with (W + s·BA)⊙M. Adapters without a mask for it are PEFT's own.

    One masked adapter is active at a time: two masks have no common zero pattern to merge into. With adapters
    disabled the dense weight computes.
    """

    other_param_names = (*Linear.other_param_names, "losa_masks", "losa_weights")

    def update_layer(self, adapter_name: str, *arguments: Any, **options: Any) -> None:
        """Add an adapter, and this layer's mask and changed weight where its folder has them.

        Raises: AdapterError if a mask is of another shape than the weight.
        """
        if "losa_masks" not in self._modules:  # the constructor comes here too, before it is done
            self.losa_masks, self.losa_weights = BufferDict(), BufferDict()
            self.losa_dense: Tensor | None = None
        super().update_layer(adapter_name, *arguments, **options)
        masks: MaskFile | None = getattr(options["config"], "masks", None)
        name = f"{options['target_name']}.weight"
        if masks is None or name not in masks:
            return
        weight = self.get_base_layer().weight
        if masks.shape(name) != tuple(weight.shape):
            raise AdapterError(
                f"mask for '{name}' in '{masks.path}' is {masks.shape(name)}, its weight is {tuple(weight.shape)}; "
                "load the checkpoint that the adapter was trained on",
                tensor=name,
            )
        # Not bool: PyTorch multiplies floats by bool some thirty times slower.
        self.losa_masks[adapter_name] = torch.from_numpy(masks.read(name)).to(weight.device, torch.uint8)
        changed = _read_changed(masks, name)
        if changed is not None:
            self.losa_weights[adapter_name] = changed.to(weight)

    def effective_weight(self, adapter_name: str) -> Tensor:
        """(W + s·BA)⊙M of a masked adapter, (out, in) in the dtype of its factors; gradients reach A and B."""
        delta = self.get_delta_weight(adapter_name)
        effective: Tensor = (self._frozen(adapter_name).to(delta.dtype) + delta) * self.losa_masks[adapter_name]
        return effective

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """(…, in) to (…, out), in the dtype of `x`."""
        adapter = None if self.disable_adapters or self.merged else self._masked(self.active_adapters)
        if adapter is None:
            output: Tensor = super().forward(x, *arguments, **options)
            return output
        if options.get("adapter_names") is not None:
            raise ConfigError("adapter_names mixes adapters in a batch, which masked ones cannot; run them in turn")
        base, dropout = self.get_base_layer(), self.lora_dropout[adapter]
        if self.training and not isinstance(dropout, nn.Identity):
            mask = self.losa_masks[adapter]
            frozen = functional.linear(x, (self._frozen(adapter) * mask).to(x.dtype), base.bias)
            return frozen + functional.linear(dropout(x), (self.get_delta_weight(adapter) * mask).to(x.dtype))
        return functional.linear(x, self.effective_weight(adapter).to(x.dtype), base.bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the effective weight in place of the base layer's, pruned positions exactly zero.

        The update is accumulated in float64 and rounded to the base's dtype once, as `losa merge` does.
        Raises: AdapterError if the result is not finite and `safe_merge` asks.
        """
        names = check_adapters_to_merge(self, adapter_names)
        adapter = self._masked(names)
        if adapter is None:
            super().merge(safe_merge, adapter_names)
            return
        base = self.get_base_layer()
        a, b = (factors[adapter].weight.detach().double() for factors in (self.lora_A, self.lora_B))
        merged = (self._frozen(adapter) + (b * self.scaling[adapter]) @ a).to(base.weight.dtype)
        merged.masked_fill_(self.losa_masks[adapter] == 0, 0.0)
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise AdapterError(f"adapter '{adapter}' merges into weights that are not finite; train it again")
        self.losa_dense, base.weight.data = base.weight.data, merged
        self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Put the base layer's weight back, bit for bit."""
        if self.losa_dense is None:
            super().unmerge()
            return
        self.get_base_layer().weight.data, self.losa_dense = self.losa_dense, None
        self.merged_adapters.clear()

    def _frozen(self, adapter_name: str) -> Tensor:
        """W under a masked adapter: the run's own, or the base layer's."""
        if adapter_name in self.losa_weights:
            weight: Tensor = self.losa_weights[adapter_name]
            return weight
        dense: Tensor = self.get_base_layer().weight.detach()
        return dense

    def _masked(self, adapter_names: list[str]) -> str | None:
        """The one masked adapter among those named, or None. Raises: ConfigError if it is not alone."""
        masked = [name for name in adapter_names if name in self.losa_masks]
        if masked and len(adapter_names) + len(self.merged_adapters) > 1:
            raise ConfigError(
                f"adapter '{masked[0]}' is masked and cannot be combined with others ({', '.join(adapter_names)}); "
                "activate it alone"
            )
        return masked[0] if masked else None


def _weights_beside(masks: MaskFile) -> Path:
    return masks.path.parent / WEIGHTS_FILE


def _read_changed(masks: MaskFile, name: str) -> Tensor | None:
    """The run's own weight `name`, if it changed it."""
    if DIGEST_KEY not in masks.metadata:
        return None
    from safetensors import safe_open

    with safe_open(_weights_beside(masks), framework="pt") as file:
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118


def _check_cover(folder: Path, config: MaskedLoraConfig) -> None:
    """Every mask needs an adapter on its layer, or that layer would stay dense."""
    from safetensors import safe_open

    assert config.masks is not None  # set by the caller
    with safe_open(folder / FACTORS_FILE, framework="pt") as file:
        keys = set(file.keys())
    for name in config.masks.names:
        if f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight" not in keys:
            raise AdapterError(
                f"masks '{config.masks.path}' prune '{name}', which adapter '{folder}' does not touch; give the "
                "adapter of the same run",
                tensor=name,
            )
