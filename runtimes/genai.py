"""An exported folder on onnxruntime-genai: ONNX Runtime with a decoding loop and a cache of its own around it."""

from __future__ import annotations

import json
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from losa_export.errors import KernelError, MissingDependencyError, RuntimeFailureError
from losa_export.runtimes import native
from losa_export.runtimes.base import RuntimeDescription, file_sizes
from losa_export.runtimes.by_row import Float32, Int64, Row, RowRuntime
from losa_export.runtimes.folder_settings import model_sizes
from losa_export.runtimes.threads import resolve_threads


class GenaiRuntime(RowRuntime):
    """A decoder graph on onnxruntime-genai, a generator for each row; see `losa_export.runtimes.base.Runtime`."""

    name = "genai"

    def __init__(self, module: Any, folder: Path, threads: int, custom_op: bool) -> None:
        super().__init__(*model_sizes(folder))
        self._module, self._folder, self._threads, self._custom_op = module, folder, threads, custom_op
        options: dict[str, object] = {"intra_op_num_threads": threads}
        if custom_op:
            options["custom_ops_library"] = str(native.library_path())
        try:
            config = module.Config(str(folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model: Any = module.Model(config)
        except Exception as error:  # the library raises plain exceptions
            raise RuntimeFailureError(f"onnxruntime-genai refused '{folder}': {error}", path=folder) from error

    @classmethod
    def load(cls, folder: Path, *, threads: int | None = None) -> GenaiRuntime:
        """Open `folder`; our kernels are registered where they are, so that sparse weights open too.

        Raises:
            MissingDependencyError: onnxruntime-genai is not installed.
            CheckpointError: there is no genai_config.json, or it lacks sizes.
            RuntimeFailureError: the library refuses the model.
        """
        try:
            module = import_module("onnxruntime_genai")
        except ImportError:
            raise MissingDependencyError.for_extra("onnxruntime-genai", "genai", "the runtime 'genai'") from None
        try:
            native.library_path()
            custom_op = True
        except KernelError:
            custom_op = False
        return cls(module, folder, resolve_threads(threads), custom_op)

    def begin(self, row: Row) -> None:
        """See `RowRuntime.begin`: a generator that samples nothing."""
        settings = self._module.GeneratorParams(self._model)
        settings.set_search_options(max_length=row.capacity, do_sample=False)
        row.handle = self._module.Generator(self._model, settings)

    def append(self, row: Row, ids: Int64) -> Float32:
        """See `RowRuntime.append`."""
        try:
            row.handle.append_tokens(ids.astype(np.int32))
            logits = np.asarray(row.handle.get_output("logits"), dtype=np.float32)
        except Exception as error:  # likewise
            raise RuntimeFailureError(f"onnxruntime-genai failed while running the model: {error}") from error
        return logits.reshape(-1, self.vocab_size)

    def describe(self) -> RuntimeDescription:
        """The library, its threads and the files."""
        return RuntimeDescription(
            name=self.name,
            engine="onnxruntime-genai",
            version=metadata.version("onnxruntime-genai"),
            threads=self._threads,
            kernel_row=native.describe().row if self._custom_op else None,
            model_files=file_sizes(self._folder, "model.onnx*"),
            details={"custom_op": self._custom_op},
        )

    def close(self) -> None:
        """Drop the model; its memory is free once no state of it is left."""
        super().close()
        self._model = None
