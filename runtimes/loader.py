"""Load a model folder on the engine asked for by name; an engine that is missing is an error, never replaced."""

from __future__ import annotations

from pathlib import Path

from losa_export.errors import ConfigError
from losa_export.runtimes.base import RUNTIME_NAMES, Runtime, RuntimeName


def load_runtime(name: RuntimeName, folder: Path, *, threads: int | None = None) -> Runtime:
    """Load `folder` on one engine.

    Args:
        name: 'ort' (ONNX Runtime with our kernels), 'ort-stock' (the same file without them), 'genai'
            (onnxruntime-genai), 'torch' (a Hugging Face checkpoint through transformers), 'deepsparse',
            'openvino', 'optimum' or 'llamacpp' (each in that engine's own environment alone).
        folder: an exported `onnx/`, a checkpoint for 'torch', a folder with a GGUF file for 'llamacpp'.
        threads: compute threads within one operation; None takes what the machine offers.

    Raises:
        ConfigError: for an unknown name or an impossible number of threads.
        CheckpointError: when the folder lacks what the engine loads.
        UnsafePathError: when external data leaves the folder.
        FormatError: when a compressed weight contradicts itself.
        KernelError: when 'ort' was asked for and the native library or the kernel row is missing.
        MissingDependencyError: when 'genai' or 'torch' was asked for and is not installed.
        EngineUnavailableError: when an engine with an environment of its own was asked for outside of it.
        RuntimeFailureError: when the engine refuses the model for another reason.
    """
    if name in ("ort", "ort-stock"):
        from losa_export.runtimes.ort import OrtRuntime

        return OrtRuntime.load(folder, threads=threads, custom_op=name == "ort")
    if name == "genai":
        from losa_export.runtimes.genai import GenaiRuntime

        return GenaiRuntime.load(folder, threads=threads)
    if name == "torch":
        from losa_export.runtimes.torch_cpu import TorchRuntime

        return TorchRuntime.load(folder, threads=threads)
    if name == "deepsparse":
        from losa_export.runtimes.deepsparse import DeepSparseRuntime

        return DeepSparseRuntime.load(folder, threads=threads)
    if name == "llamacpp":
        from losa_export.runtimes.llamacpp import LlamaCppRuntime

        return LlamaCppRuntime.load(folder, threads=threads)
    if name == "optimum":
        from losa_export.runtimes.optimum import OptimumRuntime

        return OptimumRuntime.load(folder, threads=threads)
    if name == "openvino":
        from losa_export.runtimes.openvino import OpenVinoRuntime

        return OpenVinoRuntime.load(folder, threads=threads)
    raise ConfigError(f"runtime {name!r} is not known; choose one of {', '.join(RUNTIME_NAMES)}", field="runtime")
