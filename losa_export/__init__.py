"""Compress a language model to zeros and serve it from an ordinary CPU.

The names below are the public interface: one function an arrow of the data path, its configuration, and the base of
all errors. Each is loaded when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

# From its import on, ONNX Runtime 1.32 keeps a device id in the user's cache and looks for its maker's servers. Nothing
# that a user of ours asks for needs that; whoever wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from losa_export.errors import LosaError as LosaError
    from losa_export.eval.bench import BenchConfig as BenchConfig
    from losa_export.eval.bench import bench as bench
    from losa_export.eval.perplexity import perplexity as perplexity
    from losa_export.export import ExportConfig as ExportConfig
    from losa_export.export import export_onnx as export_onnx
    from losa_export.merge import merge_adapter as merge_adapter
    from losa_export.merge import merge_run as merge_run
    from losa_export.runtimes.generate import GenerationConfig as GenerationConfig
    from losa_export.runtimes.generate import generate_text as generate_text
    from losa_export.runtimes.loader import load_runtime as load_runtime
    from losa_export.training.config import TrainConfig as TrainConfig
    from losa_export.training.train import train as train

_HOMES = {
    "BenchConfig": "losa_export.eval.bench",
    "ExportConfig": "losa_export.export",
    "GenerationConfig": "losa_export.runtimes.generate",
    "LosaError": "losa_export.errors",
    "TrainConfig": "losa_export.training.config",
    "bench": "losa_export.eval.bench",
    "export_onnx": "losa_export.export",
    "generate_text": "losa_export.runtimes.generate",
    "load_runtime": "losa_export.runtimes.loader",
    "merge_adapter": "losa_export.merge",
    "merge_run": "losa_export.merge",
    "perplexity": "losa_export.eval.perplexity",
    "train": "losa_export.training.train",
}

__all__ = [
    "BenchConfig",
    "ExportConfig",
    "GenerationConfig",
    "LosaError",
    "TrainConfig",
    "bench",
    "export_onnx",
    "generate_text",
    "load_runtime",
    "merge_adapter",
    "merge_run",
    "perplexity",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'losa_export' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
