"""How the kept weights should be rounded: methods compared by the error of the layers' outputs, and by perplexity.

The error of an output is that of the whole layer on real inputs, relative to its size:
sqrt(E‖x (Ŵ - W)ᵀ‖² / E‖x Wᵀ‖²), from the second moments E[x xᵀ] of the layer's inputs on validation text. Methods that
look at inputs see those of other text, for calibration. Wherever a perplexity is quoted, all linears of all blocks are
rounded, weights only; activations stay float32.

Run as `python -m losa_export.eval.studies.codebooks --checkpoint DIR --calibration FILE --text FILE -o docs/studies`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from losa_export.architecture import DecoderSpec
from losa_export.checkpoint import Checkpoint, open_checkpoint
from losa_export.errors import ConfigError, LosaError, MissingDependencyError
from losa_export.eval.fidelity import kl_divergence, log_softmax
from losa_export.eval.machine import git_revision, package_versions
from losa_export.eval.perplexity import cut_windows, token_nll
from losa_export.files import write_text_atomic
from losa_export.layout import LLAMA
from losa_export.masks import MaskFile, load_masks
from losa_export.progress import Progress
from losa_export.quantise import (
    LARGEST_LEVEL,
    apply_codebook,
    column_importance,
    fit_codebook,
    kept_groups,
    quantise_int8,
    round_scales,
)
from losa_export.text import encode_documents, load_tokenizer, read_documents

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

SCHEMA = "losa-study-codebooks"
SCHEMA_VERSION = 1
WINDOW = 512

# Trials of the int8 scale search, in units of the absmax scale.
_INT8_TRIALS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8)

# By what fraction rounding the linears to a value type may raise perplexity: the project's own bars.
_MOST_RISE = {"bf16": 0.002, "int8": 0.005, "int4": 0.04}

# Importances that smoothing tells apart.
_SMOOTHED_RANGE = (1e-4, 1e4)

_PARAGRAPHS = (
    "Fits minimise the squared error of the weights, times what an error in that column costs. An error does harm in "
    "proportion to the input that it meets, and Wanda keeps small weights just where inputs are large: a fit that "
    "weighs all columns alike gives those up first. Weighing each column by the mean square of its input mends that. "
    "The exporter sees no inputs; but the smallest weights that a column kept are in inverse proportion to the norm of "
    "its input, so the mask tells nearly the same (`losa_export.quantise.column_importance`).",
    "",
)


@dataclass(frozen=True)
class Method:
    """One way to round.

    Attributes:
        values: the value type.
        codebook: of int4: 16 even steps, or the best ones for the weight.
        scales: absmax, or searched for the least squared error.
        importance: what an error in a column costs: the same everywhere, what the mask tells, or E[x²] of
            calibration text.
        smoothing: columns are multiplied by this power of their input's norm, as far as the mask tells it, before
            they are rounded, and inputs divided by it. An exporter would fold the division into the norm or the
            linear before.
    """

    values: Literal["int8", "int4"]
    codebook: Literal["none", "linear", "fitted"]
    scales: Literal["absmax", "searched"]
    importance: Literal["even", "mask", "calibration"]
    smoothing: float = 0.0

    @property
    def name(self) -> str:
        """As the tables call it."""
        kind = {"none": "", "linear": " linear", "fitted": " Lloyd-Max"}[self.codebook]
        weighing = {"even": "", "mask": ", weighted by the mask", "calibration": ", weighted by calibration"}
        smoothed = f", columns smoothed by {self.smoothing:g}" if self.smoothing else ""
        return f"{self.values}{kind}{weighing[self.importance]}, {self.scales} scales{smoothed}"

    def restore(self, weight: Float32, keep: Bool, group: int, calibration: Float32) -> Float32:
        """The weight after rounding, (N, K) float32.

        Args:
            weight: (N, K) float32, 0 where pruned.
            keep: (N, K) bool.
            group: columns that share a scale.
            calibration: (K,) mean squares of the inputs.
        """
        if self.smoothing:
            # Bounds, so that no column is lost: they cut off the few that kept next to nothing.
            factors = np.clip(column_importance(weight, keep), *_SMOOTHED_RANGE) ** np.float32(self.smoothing / 2)
            plain = replace(self, smoothing=0.0)
            return plain.restore(weight * factors, keep, group, calibration / np.square(factors)) / factors
        if self.values == "int8":
            if self.scales == "absmax":
                return quantise_int8(weight, keep, group).dequantise()
            return _int8_searched(weight, keep, group)
        importance = {
            "even": np.ones_like(calibration),
            "mask": column_importance(weight, keep),
            "calibration": calibration / calibration.mean(),
        }[self.importance]
        search = self.scales == "searched"
        if self.codebook == "linear":
            codebook = linear_codebook()
        elif search:
            codebook = fit_codebook(weight, keep, group, importance)
        else:
            codebook = fit_codebook(weight, keep, group, importance, refits=0)
        return apply_codebook(weight, keep, group, codebook, importance, search=search).dequantise(keep)


Rounding = Method | Literal["fp32", "bf16"]

BUILT_INT8 = Method("int8", "none", "absmax", "even")
BUILT_INT4 = Method("int4", "fitted", "searched", "mask")
_LINEAR = Method("int4", "linear", "searched", "even")
_LLOYD_MAX = Method("int4", "fitted", "searched", "even")
_CALIBRATED = Method("int4", "fitted", "searched", "calibration")
_SMOOTHED_INT8 = replace(BUILT_INT8, smoothing=0.5)

METHODS = (
    BUILT_INT8,
    replace(BUILT_INT8, scales="searched"),
    _SMOOTHED_INT8,
    replace(_LINEAR, scales="absmax"),
    _LINEAR,
    replace(_LLOYD_MAX, scales="absmax"),
    _LLOYD_MAX,
    replace(_LINEAR, importance="mask"),
    replace(BUILT_INT4, scales="absmax"),
    BUILT_INT4,
    replace(_CALIBRATED, scales="absmax"),
    _CALIBRATED,
    replace(BUILT_INT4, smoothing=0.25),
)

# What perplexity is measured for: linears, head, group.
_CASES: tuple[tuple[Rounding, Rounding, int], ...] = (
    ("bf16", "fp32", 0),
    (BUILT_INT8, "fp32", 128),
    (BUILT_INT8, BUILT_INT8, 128),
    (_SMOOTHED_INT8, "fp32", 128),
    (_LINEAR, "fp32", 128),
    (_LLOYD_MAX, "fp32", 128),
    (_CALIBRATED, "fp32", 128),
    (BUILT_INT4, "fp32", 128),
    (BUILT_INT4, BUILT_INT8, 128),
    (BUILT_INT4, BUILT_INT4, 128),
    (BUILT_INT4, "fp32", 64),
    (BUILT_INT4, "fp32", 32),
)


@dataclass(frozen=True)
class LayerError:
    """What one method does to one linear: relative errors of its weight and of its outputs, both root mean square."""

    checkpoint: str
    tensor: str
    method: str
    group: int
    weight_error: float
    output_error: float


@dataclass(frozen=True)
class PerplexityRow:
    """A checkpoint after rounding, beside its exact weights on the same windows.

    Attributes:
        checkpoint: its name.
        linears: how the linears of all blocks are rounded.
        head: how the head is, which is the embedding too.
        group: columns that share a scale.
        perplexity: exp of the mean loss.
        rise_fraction: of the perplexity over that of the exact weights.
        rise_error: standard error of the rise, from the paired differences of window losses.
        kl_divergence: mean over tokens of KL(exact ‖ rounded), nats.
    """

    checkpoint: str
    linears: str
    head: str
    group: int
    perplexity: float
    rise_fraction: float
    rise_error: float
    kl_divergence: float


def linear_codebook() -> NDArray[np.int8]:
    """16 levels at even steps from -127 to 127; there is none at 0."""
    return np.rint(np.linspace(-LARGEST_LEVEL, LARGEST_LEVEL, 16)).astype(np.int8)


def relative_output_error(weight: Float32, restored: Float32, moments: Float64) -> float:
    """Root mean square error of a linear's outputs over their root mean square.

    Args:
        weight: (N, K) float32.
        restored: (N, K) float32.
        moments: (K, K) E[x xᵀ] of the inputs.
    """
    off = (restored - weight).astype(np.float64)
    exact = weight.astype(np.float64)
    return math.sqrt(np.vdot(off @ moments, off) / np.vdot(exact @ moments, exact))


def relative_weight_error(weight: Float32, restored: Float32) -> float:
    """Root mean square error of the weights over their root mean square."""
    return float(np.linalg.norm(restored - weight) / np.linalg.norm(weight))


def layer_errors(
    checkpoint: str,
    tensor: str,
    weight: Float32,
    keep: Bool,
    calibration: Float32,
    moments: Float64,
    groups: Sequence[int],
    methods: Sequence[Method] = METHODS,
) -> list[LayerError]:
    """Every method on one linear. `calibration` and `moments` as `Method.restore` and `relative_output_error` take."""
    found = []
    for group in groups:
        for method in methods:
            restored = method.restore(weight, keep, group, calibration)
            found.append(
                LayerError(
                    checkpoint=checkpoint,
                    tensor=tensor,
                    method=method.name,
                    group=group,
                    weight_error=relative_weight_error(weight, restored),
                    output_error=relative_output_error(weight, restored, moments),
                )
            )
    return found


def geometric_mean(values: Iterable[float]) -> float:
    """Mean of ratios and relative errors, which no single large layer rules."""
    return math.exp(float(np.mean(np.log(list(values)))))


def markdown(document: Mapping[str, Any]) -> str:
    """The study page of a document as `study` returns it."""
    checkpoints = {entry["name"]: entry for entry in document["checkpoints"]}
    groups = document["groups"]
    columns = [(name, group) for name in checkpoints for group in groups]
    lines = [
        "# Rounding the kept weights",
        "",
        f"Made by `{document['command']}`; do not edit by hand. The figures of every layer are in `codebooks.json`.",
        "",
        *_PARAGRAPHS,
        "## Error of layer outputs",
        "",
        f"Relative root mean square error, geometric mean over {document['layers']} linears of blocks "
        f"{', '.join(map(str, document['blocks']))}; in brackets that of the weights themselves.",
        "",
        "| method | " + " | ".join(f"{_title(checkpoints[name])}, group {group}" for name, group in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in document["errors"]):
        cells = []
        for name, group in columns:
            rows = [
                row
                for row in document["errors"]
                if (row["method"], row["checkpoint"], row["group"]) == (method, name, group)
            ]
            output = geometric_mean(row["output_error"] for row in rows)
            cells.append(f"{output:.4f} ({geometric_mean(row['weight_error'] for row in rows):.4f})")
        label = f"**{method}** (what is built)" if method in document["built"] else method
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    if document["perplexity"]:
        lines += ["", "## Perplexity", "", *_perplexity_table(document, checkpoints)]
    return "\n".join(lines) + "\n"


def _perplexity_table(document: Mapping[str, Any], checkpoints: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{document['windows']} windows of {WINDOW} tokens of validation text, the same for every row; ± is the "
        "standard error over windows of the paired difference. KL is that of the rounded model from the exact one, in "
        "nats a token: it moves before perplexity does, and with far less noise. The head is also the embedding (one "
        "tied table); fp32 leaves it as it is.",
        "",
        "| checkpoint | linears | head | group | perplexity | rise | bar | KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["perplexity"]:
        exact = row["linears"] == row["head"] == "fp32"
        rise = "" if exact else f"{row['rise_fraction']:+.2%} ± {row['rise_error']:.2%}"
        cells = [
            _title(checkpoints[row["checkpoint"]]),
            row["linears"],
            row["head"],
            str(row["group"] or ""),
            f"{row['perplexity']:.2f}",
            rise,
            "" if exact else _bar(row["linears"], row["rise_fraction"]),
            "" if exact else f"{row['kl_divergence']:.5f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _bar(linears: str, found: float) -> str:
    most = _MOST_RISE[linears.split()[0].rstrip(",")]
    return f"{most:.1%}, {'held' if found <= most else 'missed'}"


def _title(checkpoint: Mapping[str, Any]) -> str:
    return f"{checkpoint['name']}, {checkpoint['zeros']:.0%} zeros"


def rise(exact: Sequence[float], rounded: Sequence[float]) -> tuple[float, float]:
    """By what fraction perplexity rises, and the standard error of that.

    Args:
        exact: mean loss of each window with exact weights, nats.
        rounded: the same windows after rounding.
    """
    differences = np.asarray(rounded) - np.asarray(exact)
    ratio = math.exp(float(differences.mean()))
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return ratio - 1, ratio * error


def rounded_to(rounding: Rounding, weight: Float32, keep: Bool, group: int, calibration: Float32 | None) -> Float32:
    """`weight` after `rounding`. `calibration` is needed by methods that weigh by it alone."""
    if rounding == "fp32":
        return weight
    if rounding == "bf16":
        bits = weight.view(np.uint32)
        return ((bits + (0x7FFF + (bits >> 16 & 1))) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounding.restore(
        weight, keep, group, np.ones(weight.shape[1], np.float32) if calibration is None else calibration
    )


def _int8_searched(weight: Float32, keep: Bool, group: int) -> Float32:
    """int8 with the scale of least squared error among a few."""
    restored = np.zeros_like(weight)
    for part in kept_groups(weight, keep, group):
        largest = part.absmax_scales()
        best = np.full(largest.shape, np.inf, dtype=np.float32)
        chosen = np.zeros_like(part.values)
        for trial in _INT8_TRIALS if len(largest) else ():
            scales = round_scales(largest * np.float32(trial))
            levels = np.clip(np.rint(part.over(scales)), -LARGEST_LEVEL, LARGEST_LEVEL)
            values = levels * np.repeat(scales.astype(np.float32), part.counts)
            errors = np.add.reduceat(np.square(values - part.values), part.starts)
            chosen = np.where(np.repeat(errors < best, part.counts), values, chosen)
            best = np.minimum(errors, best)
        restored[part.rows][part.keep] = chosen
    return restored


class _Model:
    """A checkpoint in torch whose linears can be listened to and replaced."""

    def __init__(self, checkpoint: Checkpoint, windows: int, calibration: Path, text: Path) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise MissingDependencyError.for_extra(error.name or "torch", "train", "this study") from error
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            str(checkpoint.folder), dtype=torch.float32, local_files_only=True
        ).eval()
        tokenizer = load_tokenizer(checkpoint.folder)
        separator = DecoderSpec.from_config(checkpoint.config, checkpoint.folder).eos_token_ids[0]
        self._calibration, self._validation = (
            cut_windows(encode_documents(read_documents([path]), tokenizer, separator), WINDOW, windows)
            for path in (calibration, text)
        )
        self._exact: list[NDArray[np.float16]] = []

    def mean_squares(self, tensors: Sequence[str]) -> dict[str, Float32]:
        """E[x²] of the inputs of the linears, (K,) each, on the calibration text."""
        sums = self._sums(tensors, self._calibration, lambda x: x.square().sum(dim=0))
        return {tensor: (found / self._calibration.size).astype(np.float32) for tensor, found in sums.items()}

    def moments(self, tensors: Sequence[str]) -> dict[str, Float64]:
        """E[x xᵀ] of the inputs of the linears, (K, K) each, on the validation text."""
        sums = self._sums(tensors, self._validation, lambda x: x.T @ x)
        return {tensor: found / self._validation.size for tensor, found in sums.items()}

    def replace(self, tensor: str, weight: Float32) -> None:
        """Give a linear or the embedding other weights."""
        with self._torch.no_grad():
            self._model.get_parameter(tensor).copy_(self._torch.from_numpy(weight))

    def losses(self) -> tuple[list[float], float]:
        """Mean loss of each window of validation text, and KL from the first call, which must see exact weights."""
        first = not self._exact
        means, divergences = [], []
        for index, window in enumerate(self._validation):
            logits = self._forward(window)[:-1]
            means.append(float(token_nll(logits, window[1:]).mean()))
            found = log_softmax(logits)
            if first:
                self._exact.append(found.astype(np.float16))
            divergences.append(kl_divergence(self._exact[index], found))
        return means, float(np.mean(divergences))

    def _sums(
        self, tensors: Sequence[str], windows: NDArray[np.int64], of_inputs: Callable[[Any], Any]
    ) -> dict[str, Float64]:
        sums: dict[str, Any] = {}

        def watch(tensor: str) -> Callable[[Any, tuple[Any, ...]], None]:
            def add(_: Any, inputs: tuple[Any, ...]) -> None:
                sums[tensor] = sums.get(tensor, 0) + of_inputs(inputs[0].flatten(0, -2)).double()

            return add

        with ExitStack() as hooks:
            for tensor in tensors:
                linear = self._model.get_submodule(tensor.removesuffix(".weight"))
                hooks.callback(linear.register_forward_pre_hook(watch(tensor)).remove)
            for window in windows:
                self._forward(window)
        return {tensor: total.numpy() for tensor, total in sums.items()}

    def _forward(self, window: NDArray[np.int64]) -> Float32:
        with self._torch.inference_mode():
            output = self._model(self._torch.from_numpy(window)[None], use_cache=False)
        logits: Float32 = output.logits[0].numpy()
        return logits


@dataclass(frozen=True)
class StudyConfig:
    """What to measure.

    Attributes:
        checkpoints: merged folders with their masks.
        calibration: text for methods that look at inputs.
        text: validation text.
        groups: columns that share a scale, for the errors of layers.
        block_step: every how many blocks layers are compared.
        windows: of each text.
        perplexity: whether to measure it; most of the time goes there.
    """

    checkpoints: tuple[Path, ...]
    calibration: Path
    text: Path
    groups: tuple[int, ...] = (128, 64)
    block_step: int = 6
    windows: int = 8
    perplexity: bool = True

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ConfigError("no checkpoint is named; give one or more folders", field="checkpoints")
        if self.block_step < 1:
            raise ConfigError(f"block_step is {self.block_step}; give 1 or more", field="block_step")


def study(config: StudyConfig, command: str) -> dict[str, Any]:
    """Compare all methods on all checkpoints.

    Raises: any LosaError of reading checkpoints, masks and text.
    """
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "git_revision": git_revision(Path(__file__).parent),
        "packages": package_versions(),
        "windows": config.windows,
        "groups": list(config.groups),
        "built": [BUILT_INT8.name, BUILT_INT4.name],
        "checkpoints": [],
        "errors": [],
        "perplexity": [],
    }
    for folder in config.checkpoints:
        checkpoint = open_checkpoint(folder)
        masks = load_masks(folder / "masks.safetensors")
        spec = DecoderSpec.from_config(checkpoint.config, folder)
        model = _Model(checkpoint, config.windows, config.calibration, config.text)
        blocks = range(0, spec.num_layers, config.block_step)
        tensors = [LLAMA.weight(block, linear) for block in blocks for linear in LLAMA.linears]
        kept = sum(int(np.count_nonzero(masks.read(name))) for name in masks.names)
        size = sum(math.prod(masks.shape(name)) for name in masks.names)
        document["checkpoints"].append(
            {"name": folder.name, "zeros": 1 - kept / size, "weights_sha256": checkpoint.weights_sha256()}
        )
        document |= {"blocks": list(blocks), "layers": len(tensors)}
        document["errors"] += [
            asdict(row) for row in _layer_rows(folder.name, checkpoint, masks, model, tensors, config.groups)
        ]
        if config.perplexity:
            document["perplexity"] += [asdict(row) for row in _perplexity_rows(folder.name, checkpoint, masks, model)]
    return document


def _layer_rows(
    name: str, checkpoint: Checkpoint, masks: MaskFile, model: _Model, tensors: Sequence[str], groups: Sequence[int]
) -> Iterator[LayerError]:
    squares = model.mean_squares([tensor for tensor in tensors if _input_of(tensor) == tensor])
    moments = model.moments(list(squares))
    with Progress(f"{name}: errors of outputs", len(tensors), "linears") as progress:
        for tensor in tensors:
            source = _input_of(tensor)
            yield from layer_errors(
                name,
                tensor,
                checkpoint.read(tensor),
                masks.read(tensor),
                squares[source],
                moments[source],
                groups,
            )
            progress.advance(1)


def _perplexity_rows(name: str, checkpoint: Checkpoint, masks: MaskFile, model: _Model) -> Iterator[PerplexityRow]:
    exact, _ = model.losses()
    yield PerplexityRow(name, "fp32", "fp32", 0, math.exp(float(np.mean(exact))), 0.0, 0.0, 0.0)
    squares = model.mean_squares([tensor for tensor in masks.names if _input_of(tensor) == tensor])
    table = checkpoint.read(LLAMA.embedding)
    everything = np.ones(table.shape, dtype=np.bool_)
    with Progress(f"{name}: perplexity", len(_CASES), "cases") as progress:
        for linears, head, group in _CASES:
            for tensor in masks.names:
                weight, keep = checkpoint.read(tensor), masks.read(tensor)
                model.replace(tensor, rounded_to(linears, weight, keep, group, squares[_input_of(tensor)]))
            model.replace(LLAMA.embedding, rounded_to(head, table, everything, group, None))
            found, divergence = model.losses()
            yield PerplexityRow(
                name,
                _label(linears),
                _label(head),
                group,
                math.exp(float(np.mean(found))),
                *rise(exact, found),
                divergence,
            )
            progress.advance(1)


def _label(rounding: Rounding) -> str:
    return rounding if isinstance(rounding, str) else rounding.name


def _input_of(tensor: str) -> str:
    """The first linear of the block that reads the same inputs as the linear `tensor`."""
    prefix, _, linear = tensor.removesuffix(".weight").rpartition(".layers.")
    block, _, linear = linear.partition(".")
    return f"{prefix}.layers.{block}.{LLAMA.first_reader(linear)}.weight"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and write `codebooks.json` and `codebooks.md`; 0 when done."""
    parser = argparse.ArgumentParser(prog="python -m losa_export.eval.studies.codebooks", description=main.__doc__)
    parser.add_argument("--checkpoint", type=Path, nargs="+", required=True, metavar="DIR", help="merged checkpoints")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="text for calibrated methods")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="validation text")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="windows of each text (default: 8)")
    parser.add_argument("--block-step", type=int, default=6, metavar="N", help="compare every Nth block (default: 6)")
    parser.add_argument("--no-perplexity", action="store_true", help="errors of layers only")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for both files")
    options = parser.parse_args(arguments)
    try:
        config = StudyConfig(
            checkpoints=tuple(options.checkpoint),
            calibration=options.calibration,
            text=options.text,
            block_step=options.block_step,
            windows=options.windows,
            perplexity=not options.no_perplexity,
        )
        document = study(config, _command(config))
        options.output.mkdir(parents=True, exist_ok=True)
        write_text_atomic(options.output / "codebooks.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        write_text_atomic(options.output / "codebooks.md", markdown(document))
    except LosaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _command(config: StudyConfig) -> str:
    """The command without the folders that only this machine has."""
    checkpoints = " ".join(folder.name for folder in config.checkpoints)
    return (
        f"python -m losa_export.eval.studies.codebooks --checkpoint {checkpoints} "
        f"--calibration {config.calibration.name} --text {config.text.name} --windows {config.windows} "
        f"--block-step {config.block_step} -o docs/studies"
    )


if __name__ == "__main__":
    sys.exit(main())
