"""Two ways to a decoder's graph: our builder for the families it knows, and `torch.onnx` for any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

from losa_export.architecture import DecoderFacts, DecoderSpec, check_tensors, prunable_names, tensor_shapes
from losa_export.checkpoint import CONFIG_FILE, Checkpoint
from losa_export.errors import ConfigError, MissingDependencyError, UnsupportedArchitectureError
from losa_export.export_gate import is_installed

if TYPE_CHECKING:
    import onnx_ir as ir

    from losa_export.graph.profiles import ProfileName
    from losa_export.graph.weights import WeightStore
    from losa_export.tracing import TracedDecoder

ExporterChoice = Literal["auto", "builder", "torch"]
ProfileChoice = Literal["auto", "ort", "standard", "deepsparse"]

_TORCH_PACKAGES = ("torch", "transformers", "onnxscript")


@dataclass(frozen=True)
class BuilderExporter:
    """Our builder, for a family it knows.

    Attributes:
        source: of the weights.
        facts: the specification.
        profile: the dialect that it writes.
        name: as the user knows it.
        packages: that have a part in it beside those of every export.
    """

    source: Checkpoint
    facts: DecoderSpec
    profile: ProfileName
    name: Literal["builder"] = "builder"
    packages: tuple[str, ...] = ()

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Weight of each linear of the blocks, in forward order → (out, in)."""
        shapes = tensor_shapes(self.facts)
        return {name: (shapes[name][0], shapes[name][1]) for name in prunable_names(self.facts)}

    @property
    def weight_count(self) -> int:
        """Weights of the whole checkpoint."""
        return sum(prod(shape) for shape in tensor_shapes(self.facts).values())

    def build(self, store: WeightStore, producer: str) -> ir.Model:
        """Build the whole model; its weights are written on the way."""
        from losa_export.graph.build import build_decoder

        return build_decoder(self.facts, store, self.profile, producer)


@dataclass(frozen=True)
class TorchExporter:
    """What `torch.onnx` made of a checkpoint; attributes and methods as `BuilderExporter` has them."""

    traced: TracedDecoder
    weight_count: int
    name: Literal["torch"] = "torch"
    profile: ProfileName = "standard"
    packages: tuple[str, ...] = _TORCH_PACKAGES

    @property
    def source(self) -> TracedDecoder:
        """See `BuilderExporter`."""
        return self.traced

    @property
    def facts(self) -> DecoderFacts:
        """See `BuilderExporter`."""
        return self.traced.facts

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """See `BuilderExporter`."""
        return self.traced.linears

    def build(self, store: WeightStore, producer: str) -> ir.Model:
        """See `BuilderExporter.build`; can be called once."""
        from losa_export.graph.traced import put_weights

        return put_weights(self.traced, store, producer)


Exporter = BuilderExporter | TorchExporter


def read_spec(checkpoint: Checkpoint, exporter: ExporterChoice, profile: ProfileChoice) -> DecoderSpec | None:
    """The checkpoint's specification if the builder is to export it, its tensors checked; None if `torch.onnx` is.

    Raises:
        UnsupportedArchitectureError: the builder was asked for by name, and does not know the family.
        MissingDependencyError: `torch.onnx` is needed, and something it needs is not installed.
        ConfigError: the profile is none that `torch.onnx` writes.
        CheckpointError: a tensor or a setting of a known family is missing or wrong.
    """
    unknown: UnsupportedArchitectureError | None = None
    if exporter != "torch":
        try:
            spec = DecoderSpec.from_config(checkpoint.config, checkpoint.folder / CONFIG_FILE)
        except UnsupportedArchitectureError as error:
            if exporter == "builder":
                raise
            unknown = error
        else:
            check_tensors(checkpoint, spec)
            return spec
    for package in _TORCH_PACKAGES:
        if not is_installed(package):
            missing = MissingDependencyError.for_extra(package, "export-torch", "exporting by torch.onnx")
            if unknown is None:
                raise missing
            raise MissingDependencyError(f"{unknown}. {missing}", **missing.facts) from unknown
    if profile in ("ort", "deepsparse"):
        raise ConfigError(
            f"ExportConfig.profile is '{profile}', but torch.onnx writes standard operators alone; leave it out"
            + (f" ({unknown})" if unknown is not None else ""),
            field="profile",
        )
    return None


def make_exporter(checkpoint: Checkpoint, spec: DecoderSpec | None, profile: ProfileChoice) -> Exporter:
    """What writes the graph: the builder by `spec`, or without one `torch.onnx`, which follows the model first.

    Raises: as `losa_export.tracing.trace_decoder`.
    """
    if spec is not None:
        return BuilderExporter(checkpoint, spec, "ort" if profile == "auto" else profile)
    from losa_export.graph.traced import replaceable, simplify
    from losa_export.tracing import trace_decoder

    traced = trace_decoder(checkpoint)
    simplify(traced.model)
    linears = {name: traced.linears[name] for name in replaceable(traced.model, traced.linears)}
    weights = traced.model.graph.initializers.values()
    count = sum(value.const_value.size for value in weights if value.const_value is not None)
    return TorchExporter(replace(traced, linears=linears), count)
