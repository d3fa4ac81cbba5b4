"""A dense export with ONNX Runtime's own 4- or 8-bit products: what a user would run instead of a sparse model.

``python -m losa_export.eval.dense_peer dense-onnx/ -o int4-onnx/ --bits 4 --block 32`` rewrites every product with a
constant matrix, the head included, as MatMulNBits with accuracy level 4, ONNX Runtime's fastest. Then
``losa bench onnx/ --against int4-onnx/ --answers own`` compares. The embedding stays fp32: only rows in use are read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from losa_export.errors import ConfigError, LosaError
from losa_export.eval.rewritten import Replacement, write_rewritten
from losa_export.graph.external import ModelFolder

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
    if bits not in BITS or block not in BLOCKS:
        raise ConfigError(f"bits is {bits} and block {block}; choose from {BITS} and {BLOCKS}")
    # What 'losa bench' wants to know: other weights than the source's, and how exact the answers can be.
    kind = f"int{bits}, blocks of {block}"
    record = {"format": "losa-dense-peer-1", "values": kind, "head": kind, "activations": "int8"}
    return write_rewritten(
        source,
        output,
        lambda model: lambda node: _nbits(node, model, bits, block),
        record,
        overwrite=overwrite,
    )


def _nbits(node: Any, model: ModelFolder, bits: int, block: int) -> Replacement:
    """The product as a MatMulNBits, and its new initializers."""
    import onnx

    from losa_export.eval.kernel_bench_weights import nbits_weight

    name = node.input[1]
    stored = model.read(name).astype(np.float32, copy=False)
    weight = stored if node.op_type == "FusedMatMul" else stored.T  # (N, K); the head's is not transposed
    while weight.shape[1] % block and block > BLOCKS[0]:
        block //= 2
    rounded = nbits_weight(np.ascontiguousarray(weight), bits, block)
    names = {short: f"{name}.int{bits}.{short}" for short in rounded.tensors}
    product = onnx.helper.make_node(
        "MatMulNBits",
        [node.input[0], *names.values()],
        list(node.output),
        node.name,
        domain="com.microsoft",
    )
    product.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in rounded.attributes.items())
    return [product], [onnx.numpy_helper.from_array(array, names[short]) for short, array in rounded.tensors.items()]


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
