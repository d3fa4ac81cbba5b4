"""Low-rank adapters in PEFT's folder layout, read without torch and without PEFT.

Only plain LoRA on linear layers can be folded into a weight under a mask. What else PEFT can do is refused
by name: quietly ignoring it would merge another model than the one that was trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losa_export.checkpoint import Checkpoint, read_json
from losa_export.errors import AdapterError, CheckpointError

FloatArray = NDArray[np.float32]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# Settings that change what the adapter computes, and that a fold into one weight cannot follow.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)
# Others start from a changed base weight (PiSSA, OLoRA, CorDA, LoftQ): such an adapter does not fit its own base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRank:
    """The update s·BA of one weight.

    Attributes:
        a: (rank, in) float32.
        b: (out, rank) float32.
        scaling: s.
    """

    a: FloatArray
    b: FloatArray
    scaling: float


class Adapter:
    """An open adapter folder; factors are read one layer at a time. Use `open_adapter` to make one.

    Attributes:
        folder: where it lies.
        config: the parsed ``adapter_config.json``.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], entries: Mapping[str, tuple[str, str]]) -> None:
        self.folder = folder
        self.config = dict(config)
        self._entries = dict(entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights it updates, as a checkpoint spells them, sorted."""
        return tuple(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Rank and s of weight `name`, by PEFT's rules for patterns."""
        module = name.removesuffix(".weight")
        rank = int(_by_pattern(self.config.get("rank_pattern"), module, self.config["r"]))
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def read(self, name: str, shape: tuple[int, ...]) -> LowRank:
        """Factors of the weight `name`.

        Args:
            name: one of `names`.
            shape: (out, in) of that weight.
        Raises: AdapterError if the factors do not fit the weight or the configured rank, or are not finite.
        """
        from safetensors import SafetensorError, safe_open

        path = self.folder / WEIGHTS_FILE
        try:
            with safe_open(path, framework="numpy") as file:
                a, b = (np.asarray(file.get_tensor(key), dtype=np.float32) for key in self._entries[name])
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        rank, scaling = self.rank_and_scaling(name)
        if len(shape) != 2 or a.shape != (rank, shape[1]) or b.shape != (shape[0], rank):
            raise AdapterError(
                f"adapter '{self.folder}' has factors A {a.shape} and B {b.shape} of rank {rank} for '{name}', "
                f"which is {shape} in the checkpoint; give the checkpoint that the adapter was trained on",
                tensor=name,
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise AdapterError(
                f"adapter '{self.folder}' holds values for '{name}' that are not finite; train it again", tensor=name
            )
        return LowRank(a, b, scaling)


def open_adapter(folder: Path, checkpoint: Checkpoint) -> Adapter:
    """Open a PEFT folder and check that its layers are there in the checkpoint, with shapes that fit.

    Raises: AdapterError if a file is missing or damaged, a feature is not supported, a layer is not in the
        checkpoint, or factors are incomplete or of another shape. The factors are read (and checked) once.
    """
    try:
        config = read_json(folder / CONFIG_FILE, what="adapter", mend="give a folder that PEFT saved a LoRA into")
    except CheckpointError as error:
        raise AdapterError(str(error), path=folder) from error
    _check_config(folder, config)
    adapter = Adapter(folder, config, _pair_factors(folder, checkpoint))
    for name in adapter.names:
        adapter.read(name, checkpoint.shape(name))
    return adapter


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    where = f"adapter '{folder}'"
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise AdapterError(
            f"{where} is of type {config.get('peft_type')!r}; only LORA can be merged", feature="peft_type"
        )
    for feature in _UNSUPPORTED:
        if config.get(feature):
            raise AdapterError(
                f"{where} uses {feature}, which cannot be folded under a mask; train a plain LoRA without it",
                feature=feature,
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{where} has bias={config['bias']!r}; only bias='none' can be merged, train it without", feature="bias"
        )
    if config.get("fan_in_fan_out"):
        raise AdapterError(
            f"{where} has fan_in_fan_out: its weights lie transposed (Conv1D), which is not supported",
            feature="fan_in_fan_out",
        )
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise AdapterError(
            f"{where} was started by init_lora_weights={start!r}, which changes the base weights too; convert it to a "
            "plain LoRA first (PEFT: path_initial_model_for_weight_conversion)",
            feature="init_lora_weights",
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise AdapterError(
                f"{where} has {key}={value!r} in {CONFIG_FILE}; it must be a positive number", feature=key
            )
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(
            isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
            for value in pattern.values()
        ):
            raise AdapterError(
                f"{where} has {key}={pattern!r} in {CONFIG_FILE}; it must map names to positive numbers", feature=key
            )


def _pair_factors(folder: Path, checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """Weight name → keys of its A and B."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(
            f"adapter '{folder}' has no {WEIGHTS_FILE}; save it with PEFT's save_pretrained(safe_serialization=True)",
            path=path,
        )
    try:
        with safe_open(path, framework="numpy") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    sides: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"adapter '{folder}' holds the tensor '{key}', which is no LoRA factor of a linear layer; "
                "only plain LoRA is merged",
                tensor=key,
            )
        name = match["module"].removeprefix(_PREFIX) + ".weight"
        if not checkpoint.exists(name):
            raise AdapterError(
                f"adapter '{folder}' updates '{name}', which checkpoint '{checkpoint.folder}' does not have; "
                "give the checkpoint that the adapter was trained on",
                tensor=name,
            )
        sides.setdefault(name, {})[match["side"]] = key
    for name, pair in sides.items():
        if len(pair) != 2:
            lacking = "B" if "A" in pair else "A"
            raise AdapterError(
                f"adapter '{folder}' lacks lora_{lacking} of '{name}'; save the adapter again", tensor=name
            )
    if not sides:
        raise AdapterError(f"adapter '{folder}' holds no factors; save the adapter again", path=path)
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}


def _by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the name or its end after a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _damaged(path: Path, error: Exception) -> AdapterError:
    return AdapterError(f"'{path}' is truncated or damaged ({error}); save the adapter again", path=path)
