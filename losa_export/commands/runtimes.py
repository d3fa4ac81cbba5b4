"""`losa runtimes`: engines with an environment of their own."""

from __future__ import annotations

import argparse
import sys


def add_runtimes(parser: argparse.ArgumentParser) -> None:
    """Arguments of `losa runtimes`."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="what there is, and what is installed")
    listing.set_defaults(command=_list_runtimes)
    for name, command, text in (
        ("install", _install_runtime, "make an engine's environment in the cache folder"),
        ("remove", _remove_runtime, "take it away"),
    ):
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.add_argument("name", metavar="NAME", help="of the engine, as 'losa runtimes list' has it")
        action.set_defaults(command=command)


def _list_runtimes(_: argparse.Namespace) -> int:
    from losa_export.runtimes.environments import engine_states

    for name, text in (
        ("ort", "ONNX Runtime with our kernels: in this environment"),
        ("ort-stock", "ONNX Runtime without them: in this environment"),
        ("genai", "onnxruntime-genai: in this environment (extra 'genai')"),
        ("torch", "PyTorch, for checkpoints: in this environment (extra 'train')"),
    ):
        print(f"{name:<12}{text}")
    for state in engine_states():
        if state.installed:
            text = f"installed, {state.bytes / 1e6:.0f} MB in {state.folder}"
        else:
            text = state.obstacle or f"not installed; losa runtimes install {state.name}"
        print(f"{state.name:<12}{state.version}: {text}")
    return 0


def _install_runtime(arguments: argparse.Namespace) -> int:
    from losa_export.runtimes.environments import install_engine
    from losa_export.runtimes.isolated import isolated_engine

    folder = install_engine(isolated_engine(arguments.name), say=lambda line: print(line, file=sys.stderr))
    print(folder)
    return 0


def _remove_runtime(arguments: argparse.Namespace) -> int:
    from losa_export.runtimes.environments import remove_engine
    from losa_export.runtimes.isolated import isolated_engine

    freed = remove_engine(isolated_engine(arguments.name))
    print(f"{arguments.name}: {freed / 1e6:.0f} MB freed" if freed else f"{arguments.name}: nothing was installed")
    return 0
