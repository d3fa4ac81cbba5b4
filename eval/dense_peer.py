"""A dense export with ONNX Runtime's own 4- or 8-bit products: what a user would run instead of a sparse model.

``python -m losa_export.eval.dense_peer dense-onnx/ -o int4-onnx/ --bits 4 --block 32`` rewrites every product with a
constant matrix, the head included, as MatMulNBits with accuracy level 4, ONNX Runtime's fastest. Then
``losa bench onnx/ --against int4-onnx/ --answers own`` compares. The embedding stays fp32: only rows in use are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from losa_export.checkpoint import copy_companions
from losa_export.errors import ConfigError, FormatError, LosaError
from losa_export.files import check_output, input_folder, output_folder, write_text_atomic
from losa_export.graph.external import DATA_FILE, MODEL_FILE, ModelFolder, check_external_data
from losa_export.graph.genai import GENAI_FILE
from losa_export.graph.manifest import MANIFEST_FILE
from losa_export.progress import Progress

BITS = (4, 8)
BLOCKS = (16, 32, 64, 128, 256)


def quantise_dense(source: Path, output: Path, *, bits: int = 4, block: int = 32, overwrite: bool = False) -> int:
    """Write `output`: the model of `source` with MatMulNBits in place of its products with constant matrices.

    Args:
        source: folder exported with dense weights and profile 'ort'.
        output: folder to write.
        bits: 4 or 8.
        block: columns that share a scale; a width it does not divide takes the largest half of it that does.
        overwrite: replace a non-empty output folder.
    Returns: how many products were rewritten.
    Raises:
        ConfigError: bits or block is not offered.
        FormatError: there is no product to rewrite.
        InputError, OutputError: the source cannot be read, or the output not written.
    """
    import onnx

    if bits not in BITS or block not in BLOCKS:
        raise ConfigError(f"bits is {bits} and block {block}; choose from {BITS} and {BLOCKS}")
    check_output(output, overwrite=overwrite, inputs=[source])
    model = check_external_data(input_folder(source, what="source"))
    products = [node for node in model.proto.graph.node if _is_product(node, model)]
    if not products:
        raise FormatError(f"'{source}' has no product with a constant matrix; export it with --weights dense")
    with (
        output_folder(output, overwrite=overwrite, inputs=[source]) as folder,
        Progress("rounding", len(products), "products") as progress,
    ):
        added = []
        for node in products:
            added += _rewrite(node, model, bits, block)
            progress.advance()
        used = {name for node in model.proto.graph.node for name in node.input}
        kept = [_loaded(one, model) for one in model.proto.graph.initializer if one.name in used]
        del model.proto.graph.initializer[:]
        model.proto.graph.initializer.extend([*kept, *added])
        onnx.save_model(
            model.proto, str(folder / MODEL_FILE), save_as_external_data=True, location=DATA_FILE, size_threshold=1024
        )
        copy_companions(source, folder)
        # What 'losa bench' wants to know: other weights than the source's, and how exact the answers can be.
        kind = f"int{bits}, blocks of {block}"
        record = {"format": "losa-dense-peer-1", "values": kind, "head": kind, "activations": "int8"}
        write_text_atomic(folder / MANIFEST_FILE, json.dumps(record, indent=2) + "\n")
        if (source / GENAI_FILE).is_file():
            (folder / GENAI_FILE).write_bytes((source / GENAI_FILE).read_bytes())
    return len(products)


def _is_product(node: Any, model: ModelFolder) -> bool:
    return node.op_type in ("MatMul", "FusedMatMul") and node.input[1] in model.tensors


def _rewrite(node: Any, model: ModelFolder, bits: int, block: int) -> list[Any]:
    """Make `node` a MatMulNBits. Returns: its new initializers."""
    import onnx

    from losa_export.eval.kernel_bench_weights import nbits_weight

    name = node.input[1]
    stored = model.read(name).astype(np.float32, copy=False)
    weight = stored if node.op_type == "FusedMatMul" else stored.T  # (N, K); the head's is not transposed
    while weight.shape[1] % block and block > BLOCKS[0]:
        block //= 2
    rounded = nbits_weight(np.ascontiguousarray(weight), bits, block)
    names = {short: f"{name}.int{bits}.{short}" for short in rounded.tensors}
    x = node.input[0]
    del node.input[:], node.attribute[:]
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    node.input.extend([x, *names.values()])
    node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in rounded.attributes.items())
    return [onnx.numpy_helper.from_array(array, names[short]) for short, array in rounded.tensors.items()]


def _loaded(tensor: Any, model: ModelFolder) -> Any:
    """An initializer with its data inside."""
    import onnx

    return onnx.numpy_helper.from_array(model.read(tensor.name), tensor.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns: the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m losa_export.eval.dense_peer",
        description="Rewrite a dense export with ONNX Runtime's 4- or 8-bit products.",
    )
    parser.add_argument("source", type=Path, metavar="ONNX", help="folder exported with --weights dense")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="default: %(default)s")
    parser.add_argument("--block", type=int, choices=BLOCKS, default=32, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it is not empty")
    arguments = parser.parse_args(argv)
    try:
        count = quantise_dense(
            arguments.source,
            arguments.output,
            bits=arguments.bits,
            block=arguments.block,
            overwrite=arguments.overwrite,
        )
    except LosaError as error:
        sys.stderr.write(f"losa: error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{arguments.output}: {count} products in {arguments.bits} bits\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
