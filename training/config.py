"""What a training run does: one frozen configuration, written beside the result it produced."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from losa_export.errors import ConfigError, InputError
from losa_export.training.allocation import (
    MIN_WINDOWS,
    MIN_WINDOWS_DEBIASED,
    NEED_RMI,
    RANK_ALLOCATORS,
    SPARSITY_ALLOCATORS,
)
from losa_export.training.criteria import CRITERIA
from losa_export.training.pattern import Pattern

Dtype = Literal["fp32", "bf16"]
Compute = Literal["auto", "fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
# accumulated: the dense block reads what the dense model gives it, so the error holds that of all blocks before.
# local: it reads what the sparse model gives it, so the error is the block's own.
ErrorKind = Literal["accumulated", "local"]
OperatorChoice = Literal["auto", "exact", "exact_bf16", "lors"]
Schedule = Literal["cosine", "per_round"]
ReconstructTarget = Literal["accumulated", "local"]
ReconstructRounds = Literal["last", "every"]

# Their names as annotations spell them: what they hold is a string.
_CHOICES = (
    "Dtype",
    "Compute",
    "Device",
    "ErrorKind",
    "OperatorChoice",
    "Schedule",
    "ReconstructTarget",
    "ReconstructRounds",
)

CONFIG_FILE = "config.toml"

# Fields that may change between a run and its resumption: none of them touches a mask or a loss.
# Model and texts are compared by content, so that a moved folder does not stop a run.
FREE_ON_RESUME = frozenset(
    {"model", "output", "tuning_text", "calibration_text", "save_every_seconds", "overwrite", "shard_weights"}
)


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of `losa_export.training.train.train`.

    Attributes:
        model: Hugging Face checkpoint folder of the dense model.
        output: run folder to make.
        tuning_text: files to fine-tune on: plain text, or rows of text, instructions or conversations (see
            `losa_export.text.read_documents`).
        calibration_text: text files for the activation statistics; empty means the tuning text.
        sparsity_fraction: zeros among the block linears at the end, at least 0 and below 1. 0 prunes nothing: what is
            left is plain LoRA.
        rounds: T, the number of prune-then-tune rounds.
        steps: optimizer steps over all rounds. None without a time budget means one pass over the tuning
            text; None with one means as many as fit. 0 prunes only.
        time_budget_seconds: wall time for pruning and tuning together; None is no limit.
        final_round_share: fraction of the tuning spent in the last round, where the zeros are final.
        rank: active rank r of every adapter.
        max_rank: rows of A and columns of B that are allocated, so that ranks can vary between rounds.
        scaling: s in W + s·BA, the same for every block and round.
        learning_rate: peak of the schedule.
        weight_decay: decoupled decay of the active rank slices.
        gradient_clip: largest gradient norm over all adapters; 0 never clips.
        warmup_fraction: part of each round in which the rate rises again from zero.
        learning_rate_schedule: "cosine" is one cosine over all rounds that keeps the optimizer's state between
            them; "per_round" starts every round anew: rise, linear fall to zero, no moments of the round before.
        kl_weight: λ₁ of the divergence KL(dense ‖ sparse) of the predictions; 0 asks no teacher.
        squarehead_weight: λ₂ of the summed relative errors of the blocks' outputs; 0 asks no teacher.
        operator: "exact" gradients of the adapters; "exact_bf16", the same from factors rounded to bfloat16, for
            processors that multiply those fast; "auto", the latter on such a processor; or "lors", which leaves the
            mask out of them.
        adapter_dropout: probability that an adapter does not see an input feature of a token; 0 needs one matrix
            product less in the forward pass.
        gradient_checkpointing: keep only the blocks' inputs and compute each block again in the backward pass.
        batch_size: windows in an optimizer step, over all processes.
        window: tokens in a window.
        packing: tune on windows cut from the joined texts. Otherwise on one document each, cut to a window and
            padded in its batch; what is padded counts in no loss. Calibration always reads whole windows, so
            that no padding enters a statistic.
        add_bos: put the beginning-of-text token before each document.
        add_eos: put the end-of-text token between packed documents, and at the end of each unpacked one.
        spaced_fraction: share of the paragraphs, of tuning and calibration text, whose punctuation is set off by
            spaces, as in tokenised corpora (`losa_export.training.spacing`).
        calibration_windows: windows for the activation statistics of each round.
        calibration_window: tokens in one of these; None is `window`.
        dtype: how the frozen block weights are held. Adapters are always float32.
        compute: dtype of activations and matrix products. "auto" is bf16 for a bf16 base on hardware that
            multiplies it natively, and fp32 otherwise.
        device: "auto" takes a GPU if there is one.
        shard_weights: each of several processes holds its part of the frozen block weights alone; they meet layer by
            layer to compute, which costs time on the wire.
        seed: of the adapters' start, the choice of calibration windows and the order of the tuning windows.
        sparsity_allocator: how the sparsity of a round is shared out among blocks: "uniform"; "lp" or "linear" by
            how redundant a block is, exactly or smoothly; "owl" by its outliers; "atp" by its place; "fixed" by
            `block_sparsities`.
        sparsity_band: of "lp" and "linear": how far a block may lie from a round's target; None is 0.01 to 0.03,
            wider for higher targets.
        block_sparsities: of "fixed": one number for each block; only their proportions count.
        rmi_windows: of "lp" and "linear": calibration windows, the first so many, on which mutual information is
            measured; None is all of them.
        rmi_debiased: estimate it without the bias towards 1 that many features and few windows give.
        rmi_normalise: bring each token's features to one size first, so that massive channels do not decide.
        owl_outlier_factor: of "owl": a score this many times the mean of its block is an outlier.
        owl_spread: of "owl": half the difference in density between the blocks with most and fewest outliers.
        atp_difference: of "atp": by how much each block is sparser than the one before it.
        rank_allocator: how rank is shared out among blocks: "uniform"; "water_filling" or "proportional" by each
            block's reconstruction error, with an exact sum or as the method was released.
        rank_growth: by how much the mean rank rises from round to round; `rank` is that of the first.
        error_kind: reconstruction error that ranks go by: "accumulated" over the blocks before, or a block's own,
            "local".
        criterion: which weights go: "wanda", "magnitude", or "sparsegpt" and "alps", which also change those that
            stay.
        pattern: an N:M pattern such as "2:4", N kept of M, which `sparsity_fraction` must agree with; "mixed:8"
            gives each block an N by its own sparsity. None prunes without structure.
        damping: of sparsegpt and alps: part of the mean diagonal of the inputs' second moments that is added to it.
        reconstruct_epochs: passes over the calibration windows in which a block that has been pruned is fitted to
            the dense block's answers; 0 leaves kept weights as they are.
        reconstruct_least_squares: before that, or in its place, fit each linear alone, in closed form.
        reconstruct_learning_rate: peak rate of that fit, as a fraction of the size of a linear's kept weights.
        reconstruct_target: "accumulated" fits to the dense model's hidden states, "local" to what the dense block
            answers to the sparse model's.
        reconstruct_rounds: fit in the "last" round's pruning alone, or in "every" one's.
        save_every_seconds: longest training time that a crash can cost; 0 saves after each step.
        overwrite: replace the run that lies in `output`.
    Raises: ConfigError naming the field that is out of range.
    """

    model: Path
    output: Path
    tuning_text: tuple[Path, ...]
    calibration_text: tuple[Path, ...] = ()
    sparsity_fraction: float = 0.5
    rounds: int = 5
    steps: int | None = None
    time_budget_seconds: float | None = None
    final_round_share: float = 0.6
    rank: int = 8
    max_rank: int = 16
    scaling: float = 2.0
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    gradient_clip: float = 1.0
    warmup_fraction: float = 0.05
    learning_rate_schedule: Schedule = "cosine"
    kl_weight: float = 0.0
    squarehead_weight: float = 0.0
    operator: OperatorChoice = "exact"
    adapter_dropout: float = 0.0
    gradient_checkpointing: bool = False
    batch_size: int = 4
    window: int = 256
    packing: bool = True
    add_bos: bool = False
    add_eos: bool = True
    spaced_fraction: float = 0.0
    calibration_windows: int = 16
    calibration_window: int | None = None
    dtype: Dtype = "fp32"
    compute: Compute = "auto"
    device: Device = "auto"
    shard_weights: bool = False
    seed: int = 0
    sparsity_allocator: str = "uniform"
    sparsity_band: float | None = None
    block_sparsities: tuple[float, ...] = ()
    rmi_windows: int | None = None
    rmi_debiased: bool = False
    rmi_normalise: bool = False
    owl_outlier_factor: float = 5.0
    owl_spread: float = 0.08
    atp_difference: float = 0.01
    rank_allocator: str = "uniform"
    rank_growth: float = 0.0
    error_kind: ErrorKind = "accumulated"
    criterion: str = "wanda"
    pattern: str | None = None
    damping: float = 0.01
    reconstruct_epochs: int = 0
    reconstruct_least_squares: bool = False
    reconstruct_learning_rate: float = 0.01
    reconstruct_target: ReconstructTarget = "accumulated"
    reconstruct_rounds: ReconstructRounds = "last"
    save_every_seconds: float = 60.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        self._require("tuning_text", len(self.tuning_text) > 0, "name at least one text file")
        self._require(
            "sparsity_fraction",
            0.0 <= self.sparsity_fraction < 1.0,
            "it must be at least 0 and below 1, for example 0.5",
        )
        for name in ("rounds", "rank", "batch_size", "calibration_windows"):
            self._require(name, getattr(self, name) >= 1, "it must be at least 1")
        self._require("window", self.window >= 2, "it must be at least 2: a token to read and one to predict")
        self._require("steps", self.steps is None or self.steps >= 0, "it must not be negative")
        self._require(
            "calibration_window", self.calibration_window is None or self.calibration_window >= 1, "it must be positive"
        )
        self._require(
            "time_budget_seconds",
            self.time_budget_seconds is None or self.time_budget_seconds > 0.0,
            "it must be positive",
        )
        self._require("final_round_share", 0.0 < self.final_round_share <= 1.0, "it must lie in (0, 1]")
        self._require("max_rank", self.max_rank >= self.rank, f"it must be at least the rank, {self.rank}")
        for name in ("scaling", "learning_rate"):
            value = getattr(self, name)
            self._require(name, 0.0 < value < math.inf, "it must be positive and finite")
        for name in ("weight_decay", "gradient_clip", "save_every_seconds", "kl_weight", "squarehead_weight"):
            value = getattr(self, name)
            self._require(name, 0.0 <= value < math.inf, "it must be 0 or a positive finite number")
        self._require("warmup_fraction", 0.0 <= self.warmup_fraction < 1.0, "it must lie in [0, 1)")
        self._require("spaced_fraction", 0.0 <= self.spaced_fraction <= 1.0, "it must lie in [0, 1]")
        self._require("adapter_dropout", 0.0 <= self.adapter_dropout < 1.0, "it must lie in [0, 1)")
        self._require("seed", self.seed >= 0, "it must not be negative")
        self._choice("dtype", ("fp32", "bf16"))
        self._choice("compute", ("auto", "fp32", "bf16"))
        self._choice("device", ("auto", "cpu", "cuda"))
        self._choice("operator", ("auto", "exact", "exact_bf16", "lors"))
        self._choice("learning_rate_schedule", ("cosine", "per_round"))
        self._choice("sparsity_allocator", tuple(SPARSITY_ALLOCATORS))
        self._choice("rank_allocator", tuple(RANK_ALLOCATORS))
        self._choice("error_kind", ("accumulated", "local"))
        self._check_allocation()
        self._choice("criterion", tuple(CRITERIA))
        self._require("damping", 0.0 <= self.damping < math.inf, "it must be 0 or a positive finite number")
        if self.pattern is not None:
            Pattern.parse(self.pattern).check_sparsity(self.sparsity_fraction)
        self._require("reconstruct_epochs", self.reconstruct_epochs >= 0, "it must not be negative")
        rate = self.reconstruct_learning_rate
        self._require("reconstruct_learning_rate", 0.0 < rate < math.inf, "it must be positive and finite")
        self._choice("reconstruct_target", ("accumulated", "local"))
        self._choice("reconstruct_rounds", ("last", "every"))

    def _check_allocation(self) -> None:
        band = self.sparsity_band
        self._require("sparsity_band", band is None or 0.0 <= band < 1.0, "it must lie in [0, 1)")
        for name in ("owl_outlier_factor", "owl_spread"):
            value = getattr(self, name)
            self._require(name, 0.0 < value < math.inf, "it must be positive and finite")
        self._require("atp_difference", -1.0 < self.atp_difference < 1.0, "it must lie between -1 and 1")
        sparsities = self.block_sparsities
        self._require(
            "block_sparsities",
            all(0.0 <= value < 1.0 for value in sparsities) and (not sparsities or max(sparsities) > 0.0),
            "each must lie in [0, 1), and one of them above 0",
        )
        fixed = self.sparsity_allocator == "fixed"
        self._require("block_sparsities", fixed == bool(sparsities), "give them with sparsity_allocator 'fixed' only")
        windows = self.rmi_windows
        self._require(
            "rmi_windows",
            windows is None or 1 <= windows <= self.calibration_windows,
            f"it must lie between 1 and calibration_windows, {self.calibration_windows}",
        )
        needed = MIN_WINDOWS_DEBIASED if self.rmi_debiased else MIN_WINDOWS
        if self.sparsity_allocator in NEED_RMI and self.windows_for_rmi < needed:
            raise ConfigError(
                f"sparsity_allocator '{self.sparsity_allocator}' compares blocks over windows, of which "
                f"{self.windows_for_rmi} is too few; set rmi_windows or calibration_windows to at least {needed}",
                field="calibration_windows" if windows is None else "rmi_windows",
                value=self.windows_for_rmi,
            )
        last = self.rank + self.rank_growth * (self.rounds - 1)
        self._require(
            "rank_growth",
            1.0 <= last <= self.max_rank,
            f"it brings the mean rank to {last:g} in the last round; that must lie between 1 and max_rank, "
            f"{self.max_rank}",
        )

    @property
    def windows_for_rmi(self) -> int:
        """Calibration windows on which mutual information is measured."""
        return self.calibration_windows if self.rmi_windows is None else self.rmi_windows

    def mean_rank(self, round_number: int) -> float:
        """Mean rank of the blocks in a round, counted from 1."""
        return self.rank + self.rank_growth * (round_number - 1)

    def _require(self, field: str, condition: bool, mend: str) -> None:
        if not condition:
            value = getattr(self, field)
            raise ConfigError(f"{field} is {value!r}; {mend}", field=field, value=value)

    def _choice(self, field: str, allowed: tuple[str, ...]) -> None:
        self._require(field, getattr(self, field) in allowed, f"choose one of {', '.join(allowed)}")

    @property
    def calibration_files(self) -> tuple[Path, ...]:
        """The files that calibration reads: `calibration_text`, or the tuning text where that is empty."""
        return self.calibration_text or self.tuning_text

    def absolute(self) -> TrainConfig:
        """The same configuration with every path absolute, so that it means the same from anywhere."""
        return dataclasses.replace(
            self,
            model=self.model.resolve(),
            output=self.output.resolve(),
            tuning_text=tuple(path.resolve() for path in self.tuning_text),
            calibration_text=tuple(path.resolve() for path in self.calibration_text),
        )


def to_table(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain TOML values; fields that are None are left out."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = [str(item) if isinstance(item, Path) else item for item in value]
        if value is not None:
            table[field.name] = value
    return table


def from_table(table: Mapping[str, Any], where: Path) -> TrainConfig:
    """A configuration from TOML values.

    Args:
        table: as `to_table` makes it; missing fields take their defaults.
        where: the file, for messages.
    Raises: ConfigError for an unknown or missing field, a value of the wrong type, or one out of range.
    """
    values = typed_fields(table, where)
    for name in ("model", "output", "tuning_text"):
        if name not in values:
            raise ConfigError(f"'{where}' lacks the field '{name}' in [train]; add it", field=name)
    return TrainConfig(**values)


def typed_fields(table: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Some fields of a configuration from TOML values, each of its type; ranges are not looked at.

    Raises: ConfigError for an unknown field or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise ConfigError(f"'{where}' has the unknown field '{unknown[0]}' in [train]; take it out", field=unknown[0])
    return {name: _typed(name, str(fields[name].type), value, where) for name, value in table.items()}


def _typed(name: str, annotation: str, value: Any, where: Path) -> Any:
    kind = annotation.removesuffix(" | None")
    if kind == "Path" and isinstance(value, str):
        return Path(value)
    if kind == "tuple[float, ...]" and isinstance(value, list):
        return tuple(_typed(name, "float", item, where) for item in value)
    if kind.startswith("tuple") and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(Path(item) for item in value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind in ("str", *_CHOICES) and isinstance(value, str):
        return value
    raise ConfigError(f"'{where}': {name} is {value!r}, which is not a {kind}; correct it", field=name)


def write_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """TOML text of tables of plain values (str, bool, int, float, list of str, or a table of str)."""
    lines: list[str] = []
    for title, table in tables.items():
        lines.append(f"[{title}]")
        lines += [f"{_key(name)} = {_toml_value(value)}" for name, value in table.items()]
        lines.append("")
    return "\n".join(lines)


def _key(name: str) -> str:
    bare = name.replace("_", "").replace("-", "")
    return name if bare.isascii() and bare.isalnum() else _toml_value(name)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(name)} = {_toml_value(item)}' for name, item in value.items())}}}"
    # JSON strings are TOML basic strings, but for DEL, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def read_run_config(run: Path) -> TrainConfig:
    """The configuration that a run folder was made with.

    Raises: InputError if there is no readable config.toml; ConfigError if it holds nonsense.
    """
    path = run / CONFIG_FILE
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"'{run}' is not a run folder: {CONFIG_FILE} cannot be read ({error.strerror}); run 'losa train' first",
            path=path,
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not TOML ({error}); run 'losa train' again", path=path) from error
    table = tables.get("train")
    if not isinstance(table, dict):
        raise InputError(f"'{path}' has no table [train]; run 'losa train' again", path=path)
    return from_table(table, path)
