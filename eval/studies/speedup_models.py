"""Random models in the forms that the speed-up study holds against each other, made when they are asked for."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from losa_export.eval.deepsparse_peer import quantise_for_deepsparse
from losa_export.eval.dense_peer import quantise_dense
from losa_export.eval.gguf_peer import write_gguf_peer
from losa_export.export import ActivationsChoice, ExportConfig, TableChoice, ValuesChoice, export_onnx
from losa_export.runtimes.base import RuntimeName
from losa_export.synth import SynthConfig, synthesise


@dataclass(frozen=True)
class Form:
    """How a model is stored, and what runs it.

    Attributes:
        title: for people.
        runtime: the engine.
        pays_for_zeros: it is faster on zeros; others are measured on dense weights alone.
        values, activations, head: of exports of ours.
        block: columns that share a scale, of ONNX Runtime's own 4 bits.
    """

    title: str
    runtime: RuntimeName
    pays_for_zeros: bool = True
    values: ValuesChoice = "fp32"
    activations: ActivationsChoice = "int16"
    head: TableChoice = "auto"
    block: int = 0


# The dense float32 model in ONNX Runtime as everyone has it: the baseline.
DENSE = "dense"
FORMS: dict[str, Form] = {
    DENSE: Form("dense float32, ONNX Runtime", "ort-stock", pays_for_zeros=False),
    "fp32": Form("ours, fp32", "ort"),
    # In models of few blocks the head is a large part: it has 4 bits here, as in the dense peers that have 4 bits.
    "int8": Form("ours, int8", "ort", values="int8", head="int4"),
    "int8-a8": Form("ours, int8, activations too", "ort", values="int8", activations="int8", head="int4"),
    "int4": Form("ours, int4", "ort", values="int4", head="int4"),
    "int4-a8": Form("ours, int4, activations too", "ort", values="int4", activations="int8", head="int4"),
    "deepsparse": Form("DeepSparse, fp32", "deepsparse"),
    "deepsparse-int8": Form("DeepSparse, int8", "deepsparse"),
    "ort-int4-32": Form("dense int4, ONNX Runtime, blocks of 32", "ort-stock", pays_for_zeros=False, block=32),
    "ort-int4-128": Form("dense int4, ONNX Runtime, blocks of 128", "ort-stock", pays_for_zeros=False, block=128),
    "llamacpp-q4": Form("dense Q4_0, llama.cpp", "llamacpp", pays_for_zeros=False),
}


@dataclass(frozen=True)
class Model:
    """A random model of so many blocks, with so many zeros in their linears, in one form."""

    form: str
    sparsity: float
    blocks: int

    @property
    def name(self) -> str:
        """A file name of its own."""
        return f"{self.form}-{round(100 * self.sparsity)}-{self.blocks}"

    @property
    def checkpoint(self) -> str:
        """File name of the checkpoint it is made from, which other forms share."""
        return f"checkpoint-{round(100 * self.sparsity)}-{self.blocks}"

    def __str__(self) -> str:
        """For people."""
        return f"{FORMS[self.form].title}, {self.sparsity:.0%} zeros, {blocks_text(self.blocks)}"


def blocks_text(count: int) -> str:
    """A number of blocks, for people."""
    return "1 block" if count == 1 else f"{count} blocks"


class Models:
    """A folder of checkpoints and exports.

    Args:
        folder: emptied first; models are large, and an interrupted run may have left halves.
        like: a name of `losa_export.synth.SHAPES`.
    """

    def __init__(self, folder: Path, like: str) -> None:
        self._folder = folder
        self._like = like
        self.clear()

    def clear(self) -> None:
        """Remove all."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def keep(self, wanted: Collection[Model]) -> None:
        """Remove every export but these, and checkpoints whose exports are all made."""
        names = {model.name for model in wanted}
        names |= {model.checkpoint for model in wanted if not (self._folder / model.name).exists()}
        for path in self._folder.glob("*"):
            if path.name not in names:
                shutil.rmtree(path)

    def export(self, model: Model) -> Path:
        """Its folder, written if it is not there. Raises: any LosaError of synthesis and export."""
        output = self._folder / model.name
        if not output.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(model, output)
        return output

    def _checkpoint(self, model: Model) -> Path:
        path = self._folder / model.checkpoint
        if not path.exists():
            synthesise(SynthConfig(self._like, path, model.blocks, model.sparsity))
        return path

    def _write(self, model: Model, output: Path) -> None:
        form = FORMS[model.form]
        if form.block:
            quantise_dense(self.export(Model(DENSE, model.sparsity, model.blocks)), output, block=form.block)
        elif form.runtime == "llamacpp":
            # All weights in 4 bits, the head included: llama.cpp's fastest.
            write_gguf_peer(self._checkpoint(model), output, values="Q4_0", pure=True)
        elif model.form == "deepsparse-int8":
            quantise_for_deepsparse(self.export(Model("deepsparse", model.sparsity, model.blocks)), output)
        else:
            deepsparse = form.runtime == "deepsparse"
            export_onnx(
                ExportConfig(
                    source=self._checkpoint(model),
                    output=output,
                    profile="deepsparse" if deepsparse else "ort",
                    weights="dense" if deepsparse or model.form == DENSE else "sparse",
                    values=form.values,
                    activations=form.activations,
                    head=form.head,
                    smoothing=0,  # random weights have no outliers
                    # Random weights have no checkpoint to answer to; the benchmark checks the answers of each file.
                    gate=False,
                )
            )
