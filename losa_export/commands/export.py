"""`losa export`, and `losa-export`: merged/ → onnx/."""

from __future__ import annotations

import argparse
from pathlib import Path

from losa_export.commands.arguments import add_output

EXPORT_TEXT = "Write one ONNX model: merged/ → onnx/."


def add_export(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa export` and `losa-export`."""
    parser.add_argument("source", metavar="CHECKPOINT", help="folder, or hub id; sparse or dense")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="default: %(default)s")
    parser.add_argument(
        "--profile",
        choices=("auto", "ort", "standard", "deepsparse"),
        default="auto",
        help="'ort' uses ONNX Runtime's own operators and is faster; 'standard' uses those of ONNX alone;"
        " 'deepsparse' is for that engine (default: ort where our builder writes the graph)",
    )
    parser.add_argument(
        "--exporter",
        choices=("auto", "builder", "torch"),
        default="auto",
        help="'builder' knows some families; 'torch' follows any decoder by torch.onnx (default: builder where it can)",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "sparse", "dense"),
        default="auto",
        help="compressed zeros, or ordinary matrices (default: sparse for a sparse checkpoint)",
    )
    parser.add_argument(
        "--values",
        choices=("fp32", "bf16", "int8", "int4"),
        default="fp32",
        help="type of the non-zeros; fp32 is exact (default: %(default)s)",
    )
    parser.add_argument(
        "--head",
        choices=("auto", "fp32", "bf16", "int8", "int4"),
        default="auto",
        help="type of the head (default: that of the values, but int8 for int4)",
    )
    parser.add_argument(
        "--embedding",
        choices=("auto", "fp32", "bf16", "int8", "int4"),
        default="auto",
        help="type of the embedding (default: the head's, but int8 for int4)",
    )
    parser.add_argument(
        "--group",
        type=int,
        choices=(32, 64, 128),
        default=None,
        help="columns that share a scale, for int8 and int4 (default: 128; int4 64 where a width is no multiple of it)",
    )
    parser.add_argument(
        "--activations",
        choices=("auto", "int16", "int8"),
        default="auto",
        help="what activations are rounded to before int8 and int4 weights, but the head's (default: int8 where the gate"
        " finds the answers nearly as good, else int16)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="round int8 and int4 values, and an int4 head, for the least error on these .txt or .jsonl files; needs"
        " torch, and minutes",
    )
    parser.add_argument(
        "--calibration-windows", type=int, default=32, metavar="N", help="of 512 tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--smoothing",
        type=float,
        default=None,
        metavar="S",
        help="how far outliers of activations are moved into int8 and int4 weights, 0 (not) to 1; needs torch (default:"
        " 0.7 where it is installed, but 0 for int4 with --calibration)",
    )
    parser.add_argument(
        "--no-gate", dest="gate", action="store_false", help="do not compare the answers with the source's"
    )
    add_output(parser, "onnx")
    parser.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from losa_export.export import ExportConfig, export_onnx
    from losa_export.sources import resolve_model

    report = export_onnx(
        ExportConfig(
            source=resolve_model(arguments.source),
            output=arguments.output,
            profile=arguments.profile,
            exporter=arguments.exporter,
            weights=arguments.weights,
            values=arguments.values,
            head=arguments.head,
            embedding=arguments.embedding,
            group=arguments.group,
            activations=arguments.activations,
            calibration=tuple(arguments.calibration),
            calibration_windows=arguments.calibration_windows,
            smoothing=arguments.smoothing,
            gate=arguments.gate,
            overwrite=arguments.overwrite,
        )
    )
    print(report)
    return 0
