"""The models of the study of quality and speed: a dense model and pruned ones, in every form that an engine offers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from losa_export.errors import ConfigError
from losa_export.eval import gguf_peer
from losa_export.eval.dense_peer import quantise_dense
from losa_export.export import ExportConfig, ValuesChoice, export_onnx
from losa_export.runtimes.base import RuntimeName

DENSE = "dense"
# The baseline of all: what ONNX Runtime makes of the dense model.
EXACT = f"{DENSE}-fp32"
VALUES: tuple[ValuesChoice, ...] = ("fp32", "bf16", "int8", "int4")
# llama.cpp's types, and whether the head has it too.
_GGUF: tuple[tuple[gguf_peer.Values, bool], ...] = (
    ("Q8_0", False),
    ("Q6_K", False),
    ("Q5_K_M", False),
    ("Q4_K_M", False),
    ("Q4_0", False),
    ("Q4_0", True),
    ("Q3_K_M", False),
    ("Q2_K", False),
)


@dataclass(frozen=True)
class Variant:
    """One model in one form.

    Attributes:
        name: of its folder.
        source: checkpoint that it is made from.
        kind: 'ours', 'nbits' (ONNX Runtime's own products) or 'gguf' (llama.cpp's).
        values: type of the weights.
        pure: of a GGUF file: the head has that type too.
        zeros: whether the checkpoint is pruned.
    """

    name: str
    source: Path
    kind: Literal["ours", "nbits", "gguf"]
    values: str
    pure: bool = False
    zeros: bool = False

    @property
    def runtime(self) -> RuntimeName:
        """What runs it fastest."""
        return "llamacpp" if self.kind == "gguf" else "ort-stock" if self.name == EXACT else "ort"


def variants_of(dense: Path, pruned: list[Path]) -> list[Variant]:
    """Every form of the models; the exact dense one first. Raises: ConfigError for two folders of one name."""
    names = [DENSE, *(folder.resolve().name for folder in pruned)]
    if len(set(names)) < len(names):
        raise ConfigError(f"two models have one name among {', '.join(names)}; rename a folder", field="pruned")
    found = [Variant(f"{DENSE}-{values}", dense, "ours", values) for values in VALUES if values != "bf16"]
    found += [Variant(f"{DENSE}-nbits{bits}", dense, "nbits", f"int{bits}") for bits in (8, 4)]
    for values, pure in _GGUF:
        found.append(Variant(f"{DENSE}-{values}{'-pure' if pure else ''}", dense, "gguf", values, pure))
    for name, folder in zip(names[1:], pruned, strict=True):
        found += [Variant(f"{name}-{values}", folder, "ours", values, zeros=True) for values in VALUES]
    return found


def make(variant: Variant, models: Path) -> Path:
    """The variant's folder in `models`, written if it is not there. Raises: any LosaError of its making."""
    output = models / variant.name
    if output.exists():
        return output
    models.mkdir(parents=True, exist_ok=True)
    if variant.kind == "nbits":
        exact = make(Variant(EXACT, variant.source, "ours", "fp32"), models)
        quantise_dense(exact, output, bits=int(variant.values.removeprefix("int")))
    elif variant.kind == "gguf":
        values = next(values for values in gguf_peer.VALUES if values == variant.values)
        gguf_peer.write_gguf_peer(variant.source, output, values=values, pure=variant.pure)
    else:
        values_choice = next(values for values in VALUES if values == variant.values)
        weights: Literal["sparse", "dense"] = "sparse" if variant.zeros else "dense"
        # The study measures what the gate would; and a benchmark checks each file's answers.
        export_onnx(ExportConfig(variant.source, output, weights=weights, values=values_choice, gate=False))
    return output
