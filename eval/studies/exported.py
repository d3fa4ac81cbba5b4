"""What the rounding of exported files costs: perplexity and KL of each beside one with exact values, window by window.

Run as `python -m losa_export.eval.studies.exported onnx/ onnx-int4/ --text FILE`; a table for a page
comes out on standard output.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_export.checkpoint import read_json
from losa_export.errors import LosaError
from losa_export.eval.fidelity import TIPPED_KL, fidelity
from losa_export.eval.studies.codebooks import rise
from losa_export.onnx_file import MANIFEST_FILE
from losa_export.runtimes.base import Runtime
from losa_export.runtimes.detokenize import load_stop_ids
from losa_export.runtimes.loader import load_runtime
from losa_export.text import load_tokenizer, read_documents, token_windows

WINDOW = 512


@dataclass(frozen=True)
class Row:
    """One file beside the exact one.

    Attributes:
        perplexity: exp of the mean loss.
        rise_fraction: of the perplexity over the exact file's.
        rise_error: standard error of that, from paired differences of window losses.
        kl_divergence: mean over tokens of KL(exact ‖ this), nats.
        tipped: share of tokens where it is above `fidelity.TIPPED_KL`.
    """

    perplexity: float
    rise_fraction: float
    rise_error: float
    kl_divergence: float
    tipped: float


def compare(runtimes: Sequence[Runtime], windows: NDArray[np.int64], *, show_progress: bool = True) -> list[Row]:
    """Hold runtimes against the first of them.

    Args:
        runtimes: of one vocabulary.
        windows: (n, tokens) int64 token ids.
        show_progress: False for silence on stderr.
    """
    exact, *_ = found = fidelity(runtimes, windows, show_progress=show_progress)
    return [
        Row(
            math.exp(float(one.nll.mean())),
            *rise(exact.nll.tolist(), one.nll.tolist()),
            float(one.kl_divergence.mean()),
            float(one.tipped.mean()),
        )
        for one in found
    ]


def describe(folder: Path) -> str:
    """How an exported folder stores its values, in a few words."""
    record = read_json(folder / MANIFEST_FILE, what="exported folder", mend="export it again")
    if record.get("values") in (None, "fp32"):
        return "fp32"
    group = f", group {record['group']}" if record.get("group") else ""
    activations = f", {record['activations']} activations" if record.get("activations") else ""
    text = record.get("calibration")
    calibrated = f", calibrated on {text['tokens']} tokens" if text else ""
    return f"{record['values']}{group}{activations}, head {record['head']}{calibrated}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare exported folders; 0 when done."""
    parser = argparse.ArgumentParser(prog="python -m losa_export.eval.studies.exported", description=main.__doc__)
    parser.add_argument("exact", type=Path, metavar="ONNX", help="exported with fp32 values")
    parser.add_argument("rounded", type=Path, nargs="+", metavar="ONNX", help="exported from the same checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, metavar="FILE", help="that nothing was calibrated on")
    source.add_argument("--random", action="store_true", help="tokens drawn at random, as 'losa bench' draws them")
    parser.add_argument("--windows", type=int, default=24, metavar="N", help=f"of {WINDOW} tokens (default: 24)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="default: the physical cores")
    options = parser.parse_args(arguments)
    folders = [options.exact, *options.rounded]
    try:
        labels = [describe(folder) for folder in folders]
        with ExitStack() as loaded:
            runtimes = [
                loaded.enter_context(closing(load_runtime("ort", folder, threads=options.threads)))
                for folder in folders
            ]
            length = min(WINDOW, *(runtime.max_positions for runtime in runtimes))
            rows = compare(runtimes, _windows(options, length, runtimes[0].vocab_size))
    except LosaError as error:
        sys.stderr.write(f"losa: error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"| values | MB | perplexity | rise | KL | > {TIPPED_KL} |\n|---|---|---|---|---|---|\n")
    for folder, label, row in zip(folders, labels, rows, strict=True):
        size = read_json(folder / MANIFEST_FILE, what="exported folder", mend="export it again")["model_bytes"]
        cost = f"| {_percent(row)} | {row.kl_divergence:.5f} | {row.tipped:.2%} |"
        cost = "| | | |" if folder is options.exact else cost
        sys.stdout.write(f"| {label} | {size / 1e6:.0f} | {row.perplexity:.2f} {cost}\n")
    return 0


def _windows(options: argparse.Namespace, length: int, vocab_size: int) -> NDArray[np.int64]:
    if options.random:
        return np.random.default_rng(0).integers(0, vocab_size, (options.windows, length))
    return token_windows(
        read_documents([options.text]),
        load_tokenizer(options.exact),
        length,
        options.windows,
        seed=0,
        separator=next(iter(load_stop_ids(options.exact)), None),
    )


def _percent(row: Row) -> str:
    return f"{row.rise_fraction:+.2%} ± {row.rise_error:.2%}"


if __name__ == "__main__":
    sys.exit(main())
