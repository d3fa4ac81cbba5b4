"""merged/ → onnx/: check everything, build, read back, compare answers, and only then let the folder appear."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from losa_export.architecture import DecoderSpec
from losa_export.calibration_text import CalibrationText, read_calibration
from losa_export.checkpoint import CONFIG_FILE, Checkpoint, copy_companions, open_checkpoint, read_json
from losa_export.errors import ConfigError, MissingDependencyError
from losa_export.export_gate import StoredTypes, is_installed, reference_source, run_gate
from losa_export.exporters import Exporter, ExporterChoice, ProfileChoice, make_exporter, read_spec
from losa_export.files import check_output, output_folder, write_text_atomic
from losa_export.onnx_file import MANIFEST_FILE, MANIFEST_FORMAT
from losa_export.progress import Progress
from losa_export.quantise import Float32
from losa_export.smoothing import DEFAULT_STRENGTH, SmoothedReader, can_smooth, smoothing_scales

if TYPE_CHECKING:
    from losa_export.training.rounding import CalibratedRounding

WeightsChoice = Literal["auto", "sparse", "dense"]
ValuesChoice = Literal["fp32", "bf16", "int8", "int4"]
TableChoice = Literal["auto", "fp32", "bf16", "int8", "int4"]
ActivationsChoice = Literal["auto", "int16", "int8"]

GROUPS = (32, 64, 128)

# Errors of a head of four bits reach the answer directly, so it must be asked for. An embedding of four bits saves
# nothing but disk, since a token reads one row of it.
_TABLE_FOR: dict[ValuesChoice | TableChoice, TableChoice] = {
    "fp32": "fp32",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int8",
}

# Said in the manifest, since it surprises.
_FOLDING_NOTE = (
    "An engine without losa-export's operators decodes all sparse weights at load, once: dense speed and the right "
    "answer, for some 30 to 40 bytes of passing memory per weight of the sparse matrices."
)


# Of calibration text, which outliers are looked for in: more find no others.
_SMOOTHING_WINDOWS = 8

_CALIBRATED_METHOD = "blockwise compensation under the mask: GPTQ order, coordinate descent, least-squares scales"


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and how.

    Attributes:
        source: checkpoint folder, sparse or dense.
        output: folder to write.
        profile: 'ort' uses ONNX Runtime's contributed operators, 'standard' those of ONNX alone, 'deepsparse' those
            that DeepSparse accelerates; 'auto' is 'ort' where our builder writes the graph.
        weights: 'auto' is sparse for a sparse checkpoint, but for profile 'deepsparse', whose engine finds the zeros
            of ordinary matrices.
        values: type of the linears' values, of the non-zeros where they are sparse.
        head: type of the head; 'auto' is that of the values, but int8 for int4.
        embedding: type of the embedding; 'auto' is that of the head, but int8 for int4. Where both are tied, and of one
            type, they are stored once.
        group: columns that share a scale, for int8 and int4; None is 128, but 64 for int4 where a linear's width is no
            multiple of 128.
        activations: to what our kernels round activations before they meet int8 and int4 weights of the linears;
            the head always takes int16. 'auto' is int8 where the gate finds the answers nearly as good, else int16.
        calibration: text files; int8 and int4 values, and a head of int4, are rounded for the least error of outputs on
            them. None needs no text, and no torch.
        calibration_windows: how many windows of it are looked at.
        smoothing: how far outliers of activations are moved into int8 and int4 weights, 0 to 1; 0 leaves them, None is
            0.7 where there is torch to look at activations, on that text or else on three sentences; but int4 values
            that are rounded by calibration text stay, since compensation weighs columns by their activations already.
        gate: compare the answers with the source's before the folder appears.
        overwrite: replace a non-empty output folder.
        progress: show progress on standard error.
        exporter: 'builder' writes the graph of a family it knows, 'torch' follows any decoder by torch.onnx; 'auto'
            takes the builder where it can.
    """

    source: Path
    output: Path
    profile: ProfileChoice = "auto"
    weights: WeightsChoice = "auto"
    values: ValuesChoice = "fp32"
    head: TableChoice = "auto"
    embedding: TableChoice = "auto"
    group: int | None = None
    activations: ActivationsChoice = "auto"
    calibration: tuple[Path, ...] = ()
    calibration_windows: int = 32
    smoothing: float | None = None
    gate: bool = True
    overwrite: bool = False
    progress: bool = True
    exporter: ExporterChoice = "auto"

    def __post_init__(self) -> None:
        choices = {
            "profile": ProfileChoice,
            "weights": WeightsChoice,
            "values": ValuesChoice,
            "head": TableChoice,
            "embedding": TableChoice,
            "activations": ActivationsChoice,
            "exporter": ExporterChoice,
        }
        for name, kind in choices.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ConfigError(
                    f"ExportConfig.{name} is '{value}'; choose one of {', '.join(get_args(kind))}", field=name
                )
        types = {self.values, self.head, self.embedding}
        if self.profile == "deepsparse" and (self.weights == "sparse" or types - {"fp32", "auto"}):
            raise ConfigError(
                "ExportConfig.profile is 'deepsparse', whose engine does not know our operators: it takes dense fp32 "
                "weights, and finds their zeros itself; leave weights, values, head and embedding out",
                field="profile",
            )
        if self.group not in (None, *GROUPS):
            raise ConfigError(
                f"ExportConfig.group is {self.group}; choose one of {', '.join(map(str, GROUPS))}", field="group"
            )
        if self.calibration and self.values not in ("int8", "int4"):
            raise ConfigError(
                f"ExportConfig.calibration is text for rounding to int8 or int4, but values are '{self.values}'; "
                "choose one of these, or leave the text out",
                field="calibration",
            )
        if self.smoothing is not None and not 0 <= self.smoothing <= 1:
            raise ConfigError(f"ExportConfig.smoothing is {self.smoothing:g}; give 0 to 1", field="smoothing")
        if self.smoothing and self.values not in ("int8", "int4"):
            raise ConfigError(
                f"ExportConfig.smoothing prepares values for rounding to int8 or int4, but they are '{self.values}'; "
                "choose one of these, or leave it out",
                field="smoothing",
            )
        if self.calibration_windows < 1:
            raise ConfigError(
                f"ExportConfig.calibration_windows is {self.calibration_windows}; give 1 or more",
                field="calibration_windows",
            )

    @property
    def chosen_weights(self) -> Literal["sparse", "dense"] | None:
        """`weights`; None leaves it to the checkpoint."""
        if self.weights != "auto":
            return self.weights
        return "dense" if self.profile == "deepsparse" else None

    @property
    def tries_int8_activations(self) -> bool:
        """Whether the gate shall choose what activations are rounded to."""
        return self.activations == "auto" and self.gate and self.values in ("int8", "int4")

    @property
    def written_activations(self) -> Literal["int16", "int8"]:
        """`activations`; of 'auto' what the gate is given to look at, and without a gate int16."""
        return "int8" if self.activations == "int8" or self.tries_int8_activations else "int16"

    @property
    def chosen_head(self) -> TableChoice:
        """`head`, 'auto' resolved."""
        return _TABLE_FOR[self.values] if self.head == "auto" else self.head

    @property
    def chosen_embedding(self) -> TableChoice:
        """`embedding`, 'auto' resolved."""
        return _TABLE_FOR[self.chosen_head] if self.embedding == "auto" else self.embedding


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        output: the folder.
        exporter: what wrote the graph.
        profile: its dialect.
        weights: 'sparse' or 'dense', settled.
        types: how the weights are stored.
        model_bytes: of the model and its external data.
        dense_bytes: that the same weights take when stored densely.
        sparsity_fraction: of the block linears, as stored; 0 where weights are dense.
        smoothing: strength, and the tokens whose activations were looked at; None where outliers stayed.
        gate: the figures, or None if it was not asked for.
    """

    output: Path
    exporter: Literal["builder", "torch"]
    profile: Literal["ort", "standard", "deepsparse"]
    weights: Literal["sparse", "dense"]
    types: StoredTypes
    model_bytes: int
    dense_bytes: int
    sparsity_fraction: float
    smoothing: Mapping[str, Any] | None
    gate: Mapping[str, Any] | None

    def __str__(self) -> str:
        """A few lines for a person."""
        kind = "dense" if self.types.values is None else f"{self.weights} {self.types}"
        if self.weights == "sparse":
            kind += f", {self.sparsity_fraction:.1%} zeros"
        size = f"{self.model_bytes / 1e6:.1f} MB ({self.model_bytes / self.dense_bytes:.2f}x of dense fp32)"
        lines = [f"{self.output}: {kind}, profile {self.profile} by {self.exporter}, {size}"]
        if self.smoothing is not None:
            lines.append(
                f"smoothing: outliers of activations moved into weights, strength {self.smoothing['strength']:g}, by "
                f"{self.smoothing['tokens']:,} tokens"
            )
        return "\n".join([*lines, *_gate_lines(self.gate, self.types)])


def _gate_lines(gate: Mapping[str, Any] | None, types: StoredTypes) -> list[str]:
    if gate is None:
        return ["gate: not run"]
    lines = []
    if gate["against"] is not None:
        greedy = gate["greedy"]
        worst = max(gate[part]["max_relative_error"] for part in ("prefill", "decode", "batch3"))
        lines.append(
            f"gate: passed on '{gate['runtime']}' against {gate['against']}: relative error {worst:.1e}, "
            f"{greedy['equal']} of {greedy['tokens']} greedy tokens equal"
        )
    if "deviation" in gate:
        found = gate["deviation"]
        lines.append(
            f"rounding: KL {found['kl_mean']:.1e} nats a token from the checkpoint, the same arg-max at "
            f"{found['argmax_agreement']:.1%} of {found['positions']} positions"
        )
    if "activations_choice" in gate:
        lines.append(_choice_line(types, gate["activations_choice"]))
    return lines


def _choice_line(types: StoredTypes, choice: Mapping[str, Any]) -> str:
    narrow = f"KL {choice['int8_kl_mean']:.1e}" if "int8_kl_mean" in choice else choice["int8_error"]
    return (
        f"activations: {types.activations}; KL {choice['int16_kl_mean']:.1e} with int16, to which int8 may add "
        f"{choice['most_kl_to_add']:.1e}; with int8 {narrow}"
    )


def export_onnx(config: ExportConfig) -> ExportReport:
    """Write one ONNX model with everything that runs it.

    Raises:
        InputError: the source cannot be used, or its masks do not fit (CheckpointError, MaskError, …).
        OutputError: the destination is not empty, is the source, or cannot be written.
        MissingDependencyError: the gate needs a reference, and there is neither torch nor a stored one; the family is
            unknown, and torch.onnx cannot be had; or there is calibration text, and no torch.
        GateError: the model answers differently from its source.
    Nothing is left behind in any of these cases.
    """
    checkpoint = open_checkpoint(config.source)
    spec = read_spec(checkpoint, config.exporter, config.profile)
    check_output(config.output, overwrite=config.overwrite, inputs=[config.source])
    _require_packages()
    truth = reference_source(config.source) if config.gate else None
    text = _read_calibration(config, checkpoint, spec)
    strength = _smoothing_strength(config, spec)
    exporter = make_exporter(checkpoint, spec, config.profile)
    with (
        ThreadPoolExecutor(max_workers=1) as background,
        output_folder(config.output, overwrite=config.overwrite, inputs=[config.source]) as folder,
    ):
        # Hashing gigabytes costs seconds, and leaves the interpreter free meanwhile.
        weights_sha256 = background.submit(checkpoint.weights_sha256)
        scales, smoothing = _smooth(config, spec, strength, text)
        manifest = {**_write_model(config, checkpoint, exporter, text, scales, folder), **smoothing}
        if truth is None:
            manifest["gate"] = None
        else:
            types, manifest["gate"] = run_gate(
                config.source, folder, truth, _types(manifest), choose_activations=config.tries_int8_activations
            )
            manifest |= asdict(types)
        manifest["source"]["weights_sha256"] = weights_sha256.result()
        _write_manifest(folder, manifest)
    return _report(config, exporter, manifest)


def _require_packages() -> None:
    for package in ("onnx", "onnx_ir"):
        if not is_installed(package):
            raise MissingDependencyError.for_extra(package.replace("_", "-"), "export", "exporting to ONNX")


def _read_calibration(config: ExportConfig, checkpoint: Checkpoint, spec: DecoderSpec | None) -> CalibrationText | None:
    """The text, if there is some.

    Raises: MissingDependencyError without torch; ConfigError if the builder does not know the family; as
    `read_calibration`.
    """
    if not config.calibration:
        return None
    if spec is None:
        raise ConfigError(
            "ExportConfig.calibration needs a model whose linears are met in a known order, which torch.onnx does not "
            "tell; leave the text out",
            field="calibration",
        )
    for package in ("torch", "transformers"):
        if not is_installed(package):
            raise MissingDependencyError.for_extra(package, "train", "rounding by calibration text")
    return read_calibration(config.calibration, checkpoint.folder, spec, config.calibration_windows)


def _smoothing_strength(config: ExportConfig, spec: DecoderSpec | None) -> float:
    """How far to smooth; 0 where there is nothing to round, or by default where it cannot be done.

    Raises: ConfigError, MissingDependencyError where it was asked for and cannot be done.
    """
    if config.values not in ("int8", "int4") or config.smoothing == 0:
        return 0.0
    missing = [package for package in ("torch", "transformers") if not is_installed(package)]
    if config.smoothing is None:
        compensated = bool(config.calibration) and config.values == "int4"
        return 0.0 if missing or compensated or spec is None or not can_smooth(spec) else DEFAULT_STRENGTH
    if spec is None or not can_smooth(spec):
        raise ConfigError(
            "ExportConfig.smoothing needs a family whose linears alone read its norms, and our builder; leave it out",
            field="smoothing",
        )
    if missing:
        raise MissingDependencyError.for_extra(missing[0], "train", "smoothing activations")
    return config.smoothing


def _smooth(
    config: ExportConfig, spec: DecoderSpec | None, strength: float, text: CalibrationText | None
) -> tuple[dict[str, Float32], dict[str, Any]]:
    """By what tensors are multiplied before they are rounded, and what the manifest says of it."""
    if strength == 0 or spec is None:
        return {}, {}
    from losa_export.channel_maxima import channel_maxima_apart
    from losa_export.reference import default_prompts

    if text is None:
        given = np.stack(default_prompts(config.source, spec.vocab_size))
    else:
        given = text.windows[:_SMOOTHING_WINDOWS]
    with Progress("looking for outliers", 1, "text", enabled=config.progress) as progress:
        maxima = channel_maxima_apart(config.source, given)
        progress.advance()
    scales = smoothing_scales(spec, maxima, strength)
    return scales, {"smoothing": {"strength": strength, "tokens": int(given.size)}}


def _group(config: ExportConfig, exporter: Exporter) -> int:
    """The columns that share a scale, as asked for or by the linears' widths."""
    if config.group is not None:
        return config.group
    narrow, wide = GROUPS[-2:]
    uneven = any(columns % wide for _, columns in exporter.linears.values())
    return narrow if uneven and config.values == "int4" else wide


def _rounding(
    config: ExportConfig,
    group: int,
    text: CalibrationText | None,
    scales: Mapping[str, Float32],
    on_rounded: Callable[[int], None],
) -> CalibratedRounding | None:
    """What rounds the linears by calibration text, if there is some."""
    if text is None or config.values not in ("int8", "int4"):
        return None
    from losa_export.training.rounding import load_rounding

    return load_rounding(config.source, text.windows, config.values, group, on_rounded, scales)


def _head_by_text(config: ExportConfig, exporter: Exporter) -> int:
    """How many weights of the head are rounded by calibration text."""
    spec = exporter.facts
    if config.chosen_head != "int4" or not isinstance(spec, DecoderSpec):
        return 0
    shared = spec.tied_embeddings and config.chosen_embedding == "int4"
    return 0 if shared else spec.vocab_size * spec.embedding_size


def _write_model(
    config: ExportConfig,
    checkpoint: Checkpoint,
    exporter: Exporter,
    text: CalibrationText | None,
    scales: Mapping[str, Float32],
    folder: Path,
) -> dict[str, Any]:
    """Build the graph and its data in `folder`; returns the manifest so far."""
    import onnx_ir as ir

    from losa_export.graph.external import MODEL_FILE, ExternalDataWriter, check_external_data
    from losa_export.graph.formats import value_format
    from losa_export.graph.genai import GENAI_FILE, genai_config
    from losa_export.graph.manifest import (
        check_digests,
        package_version,
        read_sparse_linears,
        versions,
    )
    from losa_export.graph.sparsity import plan_sparsity
    from losa_export.graph.weights import WeightStore
    from losa_export.graph.zeros import zeros_record

    plan = plan_sparsity(checkpoint, exporter.source, exporter.linears, config.chosen_weights)
    head, embedding, group = config.chosen_head, config.chosen_embedding, _group(config, exporter)
    activation_bits = 8 if config.written_activations == "int8" else 16
    weights, linears = exporter.weight_count, sum(rows * columns for rows, columns in exporter.linears.values())
    task, work = ("building", weights) if text is None else ("rounding", linears + _head_by_text(config, exporter))
    with (
        Progress(task, work / 1e6, "M weights", enabled=config.progress) as progress,
        ExternalDataWriter(folder) as writer,
    ):

        def advance(count: int) -> None:
            progress.advance(count / 1e6)

        rounding = _rounding(config, group, text, scales, advance)
        store = WeightStore(
            SmoothedReader(exporter.source, scales),
            writer,
            plan,
            value_format(config.values, group=group, activation_bits=activation_bits),
            # The head keeps 16 bits: with 8, it alone loses as much as all linears together, for little speed.
            value_format(head, group=group),
            value_format(embedding, group=group),
            rounding=rounding,
            head_rounding=rounding.head if rounding is not None and head == "int4" else None,
        )
        if text is None:
            store.on_written = advance
        producer = package_version("losa-export") or "unknown"
        model = exporter.build(store, producer)
    ir.save(model, folder / MODEL_FILE)
    copy_companions(checkpoint.folder, folder)
    # Not needed by the graph; optimum asks it what kind of model this is.
    shutil.copyfile(checkpoint.folder / CONFIG_FILE, folder / CONFIG_FILE)
    write_text_atomic(
        folder / GENAI_FILE,
        json.dumps(genai_config(exporter.facts, exporter.profile, _generation_config(checkpoint)), indent=2) + "\n",
    )
    # Linked to the file, not to what memory held while it was written.
    written = check_external_data(folder)
    sparse = read_sparse_linears(written)
    if plan.store_sparse:
        check_digests(sparse, plan.digests)
    zeros = zeros_record(written, exporter.linears) if plan.digests and not plan.store_sparse else {}
    types = StoredTypes()
    if sparse or {config.values, head, embedding} != {"fp32"}:
        types = StoredTypes.settled(config.values, head, embedding, group, config.written_activations)
    return {
        "format": MANIFEST_FORMAT,
        "versions": versions(*exporter.packages),
        "source": {"name": checkpoint.folder.resolve().name, "architecture": exporter.facts.architecture},
        "exporter": exporter.name,
        "profile": exporter.profile,
        "opset": model.opset_imports[""],
        "ir_version": model.ir_version,
        "weights": "sparse" if sparse else "dense",
        **asdict(types),
        **({} if text is None else {"calibration": {"method": _CALIBRATED_METHOD, **text.record()}}),
        "mask_source": plan.source if plan.digests else "none",
        "dense_bytes": 4 * weights,
        "sparsity_fraction": sum(linear.zeros for linear in sparse.values()) / linears,
        "tensors": {name: linear.as_dict() for name, linear in sparse.items()},
        **({"zero_patterns": zeros} if zeros else {}),
        "notes": [_FOLDING_NOTE] if sparse else [],
    }


def _types(manifest: Mapping[str, Any]) -> StoredTypes:
    return StoredTypes(**{field.name: manifest[field.name] for field in fields(StoredTypes)})


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    if not (checkpoint.folder / "generation_config.json").is_file():
        return {}
    return read_json(checkpoint.folder / "generation_config.json", what="checkpoint", mend="repair or delete it")


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    from losa_export.graph.external import DATA_FILE, MODEL_FILE
    from losa_export.graph.manifest import file_records

    manifest["files"] = file_records(folder)
    manifest["model_bytes"] = sum(
        manifest["files"][name]["bytes"] for name in (MODEL_FILE, DATA_FILE) if name in manifest["files"]
    )
    write_text_atomic(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def _report(config: ExportConfig, exporter: Exporter, manifest: dict[str, Any]) -> ExportReport:
    return ExportReport(
        output=config.output,
        exporter=exporter.name,
        profile=exporter.profile,
        weights=manifest["weights"],
        types=_types(manifest),
        model_bytes=manifest["model_bytes"],
        dense_bytes=manifest["dense_bytes"],
        sparsity_fraction=manifest["sparsity_fraction"],
        smoothing=manifest.get("smoothing"),
        gate=manifest["gate"],
    )
