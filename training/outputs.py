"""What a finished run leaves for others: masks, changed base weights, and adapters in PEFT's layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from losa_export.files import output_folder, write_text_atomic
from losa_export.masks import ReadOnDemand, save_masks
from losa_export.training.base_weights import write_changed_weights
from losa_export.training.model import AdaptedModel
from losa_export.training.tensors import write_tensors

MASKS_FILE = "masks.safetensors"
ADAPTER_FOLDER = "adapter"


def write_outputs(run: Path, adapted: AdaptedModel, base: Path, metadata: Mapping[str, str]) -> None:
    """Write masks.safetensors, adapter/ and, where base weights changed, weights.safetensors into `run`.

    Each appears whole or not at all.

    Args:
        run: the run folder.
        adapted: the trained model.
        base: folder of the dense checkpoint, named in the adapter's configuration.
        metadata: kept in the header of the masks.
    Raises: OutputError if the disk is full or the folder cannot be written.
    """
    identity = write_changed_weights(run, adapted)
    save_masks(run / MASKS_FILE, ReadOnDemand(dict.fromkeys(adapted.layers, adapted.mask)), {**metadata, **identity})
    with output_folder(run / ADAPTER_FOLDER, overwrite=True) as folder:
        write_adapter(folder, adapted, base)


def write_adapter(folder: Path, adapted: AdaptedModel, base: Path) -> None:
    """Write the active rank slices as PEFT's LoRA files.

    PEFT scales by alpha / r, so alpha is s·r for each layer: in general for the commonest rank, and by pattern
    for the others. PEFT knows no masks; loaded there, the update is not masked.
    """
    ranks = {name.removesuffix(".weight"): layer.rank for name, layer in adapted.layers.items()}
    scaling = next(iter(adapted.layers.values())).scaling
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    tensors = {}
    for name, layer in adapted.layers.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = layer.active()
        tensors[f"{module}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{module}.lora_B.weight"] = b.detach().cpu().contiguous()
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": common,
        "lora_alpha": _whole(scaling * common),
        "rank_pattern": others,
        "alpha_pattern": {name: _whole(scaling * rank) for name, rank in others.items()},
        "target_modules": sorted(path.rpartition(".")[2] for path in adapted.layout.linears),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_text_atomic(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value
