"""`losa synth`: a random checkpoint of a published shape."""

from __future__ import annotations

import argparse

from losa_export.commands.arguments import add_output, fraction


def add_synth(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa synth`."""
    parser.add_argument("--like", required=True, metavar="MODEL", help="smollm2-135m, tinyllama-1.1b, llama-2-7b, …")
    parser.add_argument("--blocks", type=int, default=None, metavar="N", help="default: as many as the model has")
    parser.add_argument(
        "--sparsity", type=fraction, default=0.0, metavar="S", help="zeros of the linears, such as 70%% (default: 0)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add_output(parser, None)
    parser.set_defaults(command=_synth)


def _synth(arguments: argparse.Namespace) -> int:
    from losa_export.synth import SynthConfig, synthesise

    config = SynthConfig(
        like=arguments.like,
        output=arguments.output,
        blocks=arguments.blocks,
        sparsity_fraction=arguments.sparsity,
        dtype=arguments.dtype,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    size = synthesise(config)
    print(f"{arguments.output}: {size / 1e6:.0f} MB, random; next: losa export {arguments.output} -o onnx")
    return 0
