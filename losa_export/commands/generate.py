"""`losa generate`: continue a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from losa_export.commands.arguments import add_threads


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa generate`."""
    parser.add_argument(
        "model", type=Path, metavar="ONNX", help="exported folder (or a checkpoint with --runtime torch)"
    )
    parser.add_argument("prompt", metavar="TEXT", help="what to continue, or a question to a chat model")
    parser.add_argument("--runtime", choices=("ort", "ort-stock", "torch"), default="ort", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all tokens (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    parser.add_argument("--raw", action="store_true", help="continue the text itself, without the chat template")
    add_threads(parser)
    parser.set_defaults(command=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    from losa_export.runtimes.generate import GenerationConfig, generate_text

    config = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        chat="never" if arguments.raw else "auto",
    )
    pieces = generate_text(
        arguments.model, arguments.prompt, config, runtime=arguments.runtime, threads=arguments.threads
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
