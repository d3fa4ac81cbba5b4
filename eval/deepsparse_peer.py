"""A DeepSparse export in 8 bits: that engine's fastest form, which needs the range of every activation beforehand.

``python -m losa_export.eval.deepsparse_peer ds/ -o ds-int8/ --text FILE`` runs the exported graph on some text, notes
the smallest and largest value that each product reads, and rewrites every product with a constant matrix, the head
included: QuantizeLinear, MatMulInteger, Cast, Mul. Weights are symmetric with a scale for each output, activations
8-bit unsigned with one scale for all tokens and channels. That is coarser than our own int8, whose activations have a
scale for each token: compare quality beside speed. Zeros stay zeros.

Then ``losa bench onnx/ --against dense-onnx/ --runtime ort,deepsparse:ds-int8/ --answers own`` compares.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import ConfigError, FormatError, LosaError, RuntimeFailureError
from losa_export.eval.perplexity import cut_windows
from losa_export.eval.rewritten import Replacement, products_with_constants, write_rewritten
from losa_export.files import check_output, input_folder
from losa_export.graph.external import MODEL_FILE, ModelFolder, check_external_data
from losa_export.progress import Progress
from losa_export.runtimes.base import causal_mask
from losa_export.runtimes.deepsparse import PROFILE

_TOKENS = 128
# Of an input that was 0 throughout; any scale does.
_SMALLEST_RANGE = 1e-6

# Value name → smallest and largest number seen.
Ranges = dict[str, tuple[float, float]]


def quantise_for_deepsparse(
    source: Path, output: Path, *, text: Path | None = None, windows: int = 16, seed: int = 0, overwrite: bool = False
) -> int:
    """Write `output`: the model of `source` with products of 8 bits and fixed activation scales.

    Args:
        source: folder exported with profile 'deepsparse'.
        output: folder to write.
        text: what activations are measured on; None: random tokens, for models whose weights are random too.
        windows: how many, of 128 tokens each.
        seed: of random tokens.
        overwrite: replace a non-empty output folder.
    Returns: how many products were rewritten.
    Raises:
        ConfigError: `windows` is not positive.
        FormatError: the source is of another profile, or has nothing to rewrite.
        TextError: the text is too short.
        RuntimeFailureError: the graph gives NaN or infinity on it.
        InputError, OutputError: the source cannot be read, or the output not written.
    """
    if windows < 1:
        raise ConfigError(f"windows is {windows}; give at least 1", field="windows")
    check_output(output, overwrite=overwrite, inputs=[source])  # before activations are measured for nothing
    folder = check_external_data(input_folder(source, what="source"))
    if {entry.key: entry.value for entry in folder.proto.metadata_props}.get("losa.profile") != PROFILE:
        raise FormatError(f"'{source}' is not of profile '{PROFILE}'; export it with --profile {PROFILE}", path=source)
    if not products_with_constants(folder):
        raise FormatError(f"'{source}' has no product with a constant matrix; it may be rounded already", path=source)
    ranges = _measure(source, folder, _tokens(source, folder, text, windows, seed))
    kind = "int8, a scale for each output"
    seen = "random tokens" if text is None else f"tokens of {text.name}"
    record = {
        "format": "losa-deepsparse-peer-1",
        "values": kind,
        "head": kind,
        "activations": "int8",
        "calibration": f"{windows} windows of {_TOKENS} {seen}",
    }
    return write_rewritten(source, output, lambda model: _integer_products(model, ranges), record, overwrite=overwrite)


def _tokens(source: Path, model: ModelFolder, text: Path | None, windows: int, seed: int) -> NDArray[np.int64]:
    """(windows, 128) int64."""
    if text is None:
        logits = next(value for value in model.proto.graph.output if value.name == "logits")
        vocabulary = logits.type.tensor_type.shape.dim[2].dim_value
        return np.random.default_rng(seed).integers(0, vocabulary, (windows, _TOKENS))
    from losa_export.text import encode_documents, load_tokenizer, read_documents

    return cut_windows(encode_documents(read_documents([text]), load_tokenizer(source), None), _TOKENS, windows)


def _measure(source: Path, model: ModelFolder, tokens: NDArray[np.int64]) -> Ranges:
    """What every product with a constant matrix reads, at its extremes."""
    import onnx
    import onnxruntime

    names = list(dict.fromkeys(node.input[0] for node in products_with_constants(model)))
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    outputs = []
    for name in names:
        for kind in ("ReduceMin", "ReduceMax"):
            output = f"{name}.{kind}"
            proto.graph.node.append(onnx.helper.make_node(kind, [name], [output], keepdims=0))
            outputs.append(output)
            proto.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, []))
    options = onnxruntime.SessionOptions()
    # The graph comes from memory; its data is found here.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(source.resolve()))
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base
        raise RuntimeFailureError(f"ONNX Runtime refused '{source / MODEL_FILE}': {error}", path=source) from error
    lows, highs = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    with Progress("measuring activations", len(tokens), "windows") as progress:
        for window in tokens:
            found = np.array(session.run(outputs, _feed(session, window)))
            lows, highs = np.minimum(lows, found[0::2]), np.maximum(highs, found[1::2])
            progress.advance()
    if not (np.isfinite(lows).all() and np.isfinite(highs).all()):
        raise RuntimeFailureError(f"the graph in '{source}' gives NaN or infinity; export it again", path=source)
    return {name: (float(low), float(high)) for name, low, high in zip(names, lows, highs, strict=True)}


def _feed(session: Any, window: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    mask = np.ones((1, window.size), np.int64)
    given: dict[str, NDArray[Any]] = {
        "input_ids": window[None],
        "positions": np.arange(window.size)[None],
        "attention_mask": mask,
        "causal_mask": causal_mask(mask, window.size),
    }
    for value in session.get_inputs():
        if value.name not in given:
            _, heads, _, width = value.shape
            given[value.name] = np.zeros((1, heads, 0, width), np.float32)
    return given


def _integer_products(model: ModelFolder, ranges: Ranges) -> Callable[[Any], Replacement]:
    import onnx

    scales: dict[str, float] = {}

    def rounded(name: str) -> Replacement:
        """What rounds an activation; nothing if another product has it done already."""
        if name in scales:
            return [], []
        scale, zero = _affine(*ranges[name])
        scales[name] = scale
        node = onnx.helper.make_node(
            "QuantizeLinear", [name, f"{name}.scale", f"{name}.zero"], [f"{name}.uint8"], f"{name}.round"
        )
        return [node], [
            onnx.numpy_helper.from_array(np.array(scale, np.float32), f"{name}.scale"),
            onnx.numpy_helper.from_array(np.array(zero, np.uint8), f"{name}.zero"),
        ]

    def replace(node: Any) -> Replacement:
        (x, name), (output,) = node.input, node.output
        nodes, tensors = rounded(x)
        values, weight_scales = _per_column(model.read(name).astype(np.float32, copy=False))
        tensors += [
            onnx.numpy_helper.from_array(values, f"{name}.int8"),
            onnx.numpy_helper.from_array(np.float32(scales[x]) * weight_scales, f"{name}.scale"),
            onnx.numpy_helper.from_array(np.array(0, np.int8), f"{name}.zero"),  # the engine insists on it
        ]
        sums, floats = f"{output}.int32", f"{output}.float"
        nodes += [
            onnx.helper.make_node(
                "MatMulInteger", [f"{x}.uint8", f"{name}.int8", f"{x}.zero", f"{name}.zero"], [sums], f"{output}.mm"
            ),
            onnx.helper.make_node("Cast", [sums], [floats], f"{output}.cast", to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Mul", [floats, f"{name}.scale"], [output], f"{output}.scale"),
        ]
        return nodes, tensors

    return replace


def _affine(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of 8 unsigned bits that reach from `low` to `high`, 0 being one of the 256 numbers."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32(max(high - low, _SMALLEST_RANGE) / 255))
    return scale, round(-low / scale)


def _per_column(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(K, N) int8 in [−127, 127] and (N,) float32 scales; a zero stays a zero."""
    scales = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny) / 127
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns: the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m losa_export.eval.deepsparse_peer",
        description="Rewrite a DeepSparse export with 8-bit products.",
    )
    parser.add_argument("source", type=Path, metavar="ONNX", help="folder exported with --profile deepsparse")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--text", type=Path, metavar="FILE", help="measure activations on it (default: random tokens)")
    parser.add_argument("--windows", type=int, default=16, metavar="N", help="of 128 tokens (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it is not empty")
    arguments = parser.parse_args(argv)
    try:
        count = quantise_for_deepsparse(
            arguments.source,
            arguments.output,
            text=arguments.text,
            windows=arguments.windows,
            overwrite=arguments.overwrite,
        )
    except LosaError as error:
        sys.stderr.write(f"losa: error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{arguments.output}: {count} products in 8 bits\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
