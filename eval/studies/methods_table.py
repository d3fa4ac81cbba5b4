"""What the study of methods compares: each method as a few settings, at one budget for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from losa_export.errors import ConfigError

if TYPE_CHECKING:
    from losa_export.training.config import Compute, TrainConfig

# prune: once, without tuning. tune: rounds of pruning, and tuning under the masks. tune, then prune: plain LoRA,
# merged, and pruned once at the end.
Procedure = Literal["prune", "tune", "tune, then prune"]


@dataclass(frozen=True)
class Method:
    """A way to a sparse model.

    Attributes:
        says: what it does, for the page.
        procedure: how it goes about it.
        settings: fields of `TrainConfig` that differ from their defaults.
        preset: settings that come before these.
    """

    says: str
    procedure: Procedure = "tune"
    settings: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None


_RAMP: dict[str, Any] = {"rounds": 5}
_RMI: dict[str, Any] = {**_RAMP, "sparsity_allocator": "lp"}
_RANKS: dict[str, Any] = {**_RMI, "rank_allocator": "water_filling"}
_TEACHER: dict[str, Any] = {**_RANKS, "kl_weight": 1.0, "squarehead_weight": 1.0}
_RECONSTRUCTION: dict[str, Any] = {**_TEACHER, "reconstruct_epochs": 5}

METHODS: Mapping[str, Method] = {
    "wanda": Method("one-shot Wanda", "prune"),
    "sparsegpt": Method("one-shot SparseGPT", "prune", {"criterion": "sparsegpt"}),
    "alps": Method("one-shot ALPS", "prune", {"criterion": "alps"}),
    "lora-remasked": Method("LoRA without masks, merged, then pruned by Wanda", "tune, then prune", {"rounds": 1}),
    "masked-lora": Method("Wanda at once, then LoRA under the masks, all blocks alike", settings={"rounds": 1}),
    "ramp": Method("the same in five rounds of rising sparsity", settings=_RAMP),
    "rmi": Method("ramp, and block sparsities by mutual information (`lp`)", settings=_RMI),
    "ranks": Method("rmi, and block ranks by reconstruction error (water-filling)", settings=_RANKS),
    "teacher": Method("ranks, and the dense model as a teacher (KL and SquareHead, weight 1)", settings=_TEACHER),
    "reconstruction": Method(
        "teacher, and each block fitted to the dense one's outputs after the last pruning", settings=_RECONSTRUCTION
    ),
    "faithful": Method("the preset: LoSA as released, its mistakes mended", preset="faithful"),
    "lors": Method(
        "`recommended` with gradients that leave the mask out", settings={"operator": "lors"}, preset="recommended"
    ),
    "recommended": Method("the preset", preset="recommended"),
}


@dataclass(frozen=True)
class Component:
    """What two methods differ in."""

    says: str
    method: str
    against: str


COMPONENTS: tuple[Component, ...] = (
    Component("SparseGPT in place of Wanda, one-shot", "sparsegpt", "wanda"),
    Component("ALPS in place of Wanda, one-shot", "alps", "wanda"),
    Component("Tuning under the masks", "masked-lora", "wanda"),
    Component("The masks during tuning, in place of pruning after it", "masked-lora", "lora-remasked"),
    Component("The ramp: five rounds in place of one", "ramp", "masked-lora"),
    Component("Block sparsities by mutual information", "rmi", "ramp"),
    Component("Block ranks by reconstruction error", "ranks", "rmi"),
    Component("The dense teacher", "teacher", "ranks"),
    Component("Block-wise reconstruction after the last pruning", "reconstruction", "teacher"),
    Component("What else `recommended` has", "recommended", "reconstruction"),
    Component("Gradients without the mask (`lors`)", "lors", "recommended"),
    Component("`recommended` in place of masked uniform LoRA", "recommended", "masked-lora"),
    Component("`recommended` in place of LoRA pruned afterwards", "recommended", "lora-remasked"),
    Component("`recommended` in place of `faithful`", "recommended", "faithful"),
)


@dataclass(frozen=True)
class Budget:
    """What all methods get alike.

    Attributes:
        model: dense checkpoint.
        tuning_text: as of `TrainConfig`.
        calibration_text: likewise.
        steps: optimizer steps of every method that tunes; None with a time budget alone.
        time_budget_seconds: wall time of a run, pruning and tuning together; None is no limit. Methods then have equal
            time rather than equal tokens.
        batch_size: windows in a step.
        window: tokens in one.
        calibration_windows: of every method.
        calibration_window: tokens in one of these.
        rank: mean rank of the adapters in the last round, which is what is merged.
        compute: dtype of activations; None leaves it to the method.
        spaced_fraction: as of `TrainConfig`; a matter of the text, so one for all.
        device: where to train.
    """

    model: Path
    tuning_text: tuple[Path, ...]
    calibration_text: tuple[Path, ...] = ()
    steps: int | None = 400
    time_budget_seconds: float | None = None
    batch_size: int = 4
    window: int = 256
    calibration_windows: int = 64
    calibration_window: int = 256
    rank: int = 10
    compute: Compute | None = None
    spaced_fraction: float = 0.0
    device: Literal["auto", "cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class Cell:
    """One square of the matrix; `sparsity` is a percentage such as '70%', or a pattern such as '2:4'."""

    method: str
    sparsity: str
    seed: int

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}", field="method")
        parse_sparsity(self.sparsity)

    @property
    def name(self) -> str:
        """A file name of its own."""
        return f"{self.method}-{self.sparsity.replace(':', 'of').removesuffix('%')}-{self.seed}"

    def __str__(self) -> str:
        """For people."""
        return f"{self.method}, {self.sparsity}, seed {self.seed}"


def parse_sparsity(text: str) -> tuple[float, str | None]:
    """The fraction of zeros and the pattern of '70%' or '2:4'. Raises: ConfigError."""
    from losa_export.training.pattern import Pattern

    if ":" in text:
        pattern = Pattern.parse(text)
        if pattern.kept is None:
            raise ConfigError(f"sparsity is {text!r}; give a fixed pattern such as 2:4", field="sparsity")
        return 1.0 - pattern.kept / pattern.width, text
    try:
        fraction = float(text.removesuffix("%")) / 100
    except ValueError:
        fraction = -1.0
    if not text.endswith("%") or not 0.0 < fraction < 1.0:
        raise ConfigError(f"sparsity is {text!r}; give a percentage such as 70%, or a pattern", field="sparsity")
    return fraction, None


def train_config(cell: Cell, budget: Budget, output: Path) -> TrainConfig:
    """The configuration of a cell's run, for a method that prunes once or tunes under masks.

    For LoRA that is pruned afterwards it is that of the pruning; `model` there is to be the merged one.
    """
    from losa_export.training.preflight import one_shot_config

    method = METHODS[cell.method]
    fraction, pattern = parse_sparsity(cell.sparsity)
    config = replace(_tuning_config(method, budget, output), sparsity_fraction=fraction, pattern=pattern)
    config = replace(config, seed=cell.seed)
    return config if method.procedure == "tune" else one_shot_config(config)


def plain_lora_config(cell: Cell, budget: Budget, output: Path) -> TrainConfig:
    """The tuning of LoRA that is pruned afterwards, which knows nothing of the sparsity to come."""
    return replace(_tuning_config(METHODS[cell.method], budget, output), sparsity_fraction=0.0, seed=cell.seed)


def _tuning_config(method: Method, budget: Budget, output: Path) -> TrainConfig:
    from losa_export.training.config import TrainConfig
    from losa_export.training.settings import preset_file, read_settings

    settings = read_settings(preset_file(method.preset)) if method.preset is not None else {}
    settings |= method.settings
    settings |= _scaled_ranks(settings, budget.rank)
    if "rmi_windows" in settings:
        share = settings["rmi_windows"] / settings["calibration_windows"]
        settings["rmi_windows"] = max(2, round(share * budget.calibration_windows))
    if budget.compute is not None:
        settings["compute"] = budget.compute
    settings |= {
        "model": budget.model,
        "output": output,
        "tuning_text": budget.tuning_text,
        "calibration_text": budget.calibration_text,
        "steps": budget.steps,
        "time_budget_seconds": budget.time_budget_seconds,
        "batch_size": budget.batch_size,
        "window": budget.window,
        "calibration_windows": budget.calibration_windows,
        "calibration_window": budget.calibration_window,
        "spaced_fraction": budget.spaced_fraction,
        # One order of the same whole windows for all: a text file of many stories is one document.
        "packing": True,
        "add_bos": False,
        "device": budget.device,
    }
    return TrainConfig(**settings)


def _scaled_ranks(settings: Mapping[str, Any], last: int) -> dict[str, Any]:
    """Ranks that end at a mean of `last` and grow by what the method asks for, as near as whole numbers allow."""
    from losa_export.training.config import TrainConfig

    steps = settings.get("rounds", TrainConfig.rounds) - 1
    growth = settings.get("rank_growth", 0.0)
    first = min(last, max(1, math.floor(last - growth * steps)))
    largest = max(last, settings.get("max_rank", TrainConfig.max_rank))
    return {"rank": first, "rank_growth": (last - first) / steps if steps and growth else 0.0, "max_rank": largest}


def comparable(config: TrainConfig) -> dict[str, Any]:
    """The settings of a run that its result depends on, but for the places of files."""
    from losa_export.training.config import to_table

    folders = ("model", "output", "tuning_text", "calibration_text", "save_every_seconds", "overwrite")
    return {name: value for name, value in to_table(config).items() if name not in folders}
