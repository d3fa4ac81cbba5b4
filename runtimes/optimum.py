"""An exported folder in Hugging Face optimum: ONNX Runtime behind the interface of transformers.

It runs in an environment of its own (`losa_export.runtimes.isolated`), since optimum's ONNX half stands on an older
transformers than ours. It opens exports with profile `standard`; sparse ones too, with our kernels registered, where
they are there.
"""

from __future__ import annotations

from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from losa_export.errors import CheckpointError, KernelError, RuntimeFailureError
from losa_export.onnx_file import MODEL_FILE
from losa_export.runtimes import native
from losa_export.runtimes.base import RuntimeDescription, file_sizes
from losa_export.runtimes.by_row import Float32, Int64, Row, RowRuntime
from losa_export.runtimes.folder_settings import model_sizes
from losa_export.runtimes.isolated import not_importable
from losa_export.runtimes.threads import resolve_threads


class OptimumRuntime(RowRuntime):
    """A decoder graph as an `ORTModelForCausalLM`; see `losa_export.runtimes.base.Runtime`."""

    name = "optimum"

    def __init__(self, model: Any, torch: Any, folder: Path, threads: int, kernel_row: str | None) -> None:
        super().__init__(*model_sizes(folder))
        self._model, self._torch = model, torch
        self._folder, self._threads, self._kernel_row = folder, threads, kernel_row

    @classmethod
    def load(cls, folder: Path, *, threads: int | None = None) -> OptimumRuntime:
        """Open `folder`.

        Raises:
            EngineUnavailableError: this interpreter has no optimum.
            CheckpointError: the folder holds no graph, or genai_config.json is missing.
            RuntimeFailureError: optimum refuses the folder.
        """
        try:
            torch, onnxruntime = import_module("torch"), import_module("onnxruntime")
            optimum = import_module("optimum.onnxruntime")
        except ImportError as error:
            raise not_importable("optimum", "optimum", error) from error
        if not (folder / MODEL_FILE).is_file():
            raise CheckpointError(f"'{folder}' has no {MODEL_FILE}; export it with: losa export", path=folder)
        count = resolve_threads(threads)
        torch.set_num_threads(count)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = count
        kernel_row = None
        try:
            options.register_custom_ops_library(str(native.library_path()))
            kernel_row = native.describe().row
        except KernelError:
            pass  # dense weights need none
        try:
            model = optimum.ORTModelForCausalLM.from_pretrained(folder, session_options=options, local_files_only=True)
        except Exception as error:  # it raises whatever transformers and ONNX Runtime do
            raise RuntimeFailureError(
                f"optimum refused '{folder}': {str(error).strip().splitlines()[-1]}; export it with --profile standard",
                path=folder,
            ) from error
        return cls(model, torch, folder, count, kernel_row)

    def begin(self, row: Row) -> None:
        """See `RowRuntime.begin`: no past."""
        row.handle = None

    def append(self, row: Row, ids: Int64) -> Float32:
        """See `RowRuntime.append`."""
        total = row.length + ids.size
        try:
            answer = self._model(
                input_ids=self._torch.from_numpy(ids[None]),
                attention_mask=self._torch.ones(1, total, dtype=self._torch.int64),
                position_ids=self._torch.arange(row.length, total)[None],
                past_key_values=row.handle,
                use_cache=True,
            )
        except Exception as error:  # likewise
            raise RuntimeFailureError(f"optimum failed while running the model: {error}") from error
        row.handle = answer.past_key_values
        return np.asarray(answer.logits[0].numpy(), dtype=np.float32)

    def describe(self) -> RuntimeDescription:
        """The version of optimum-onnx, threads and files."""
        return RuntimeDescription(
            name=self.name,
            engine="optimum-onnx on onnxruntime",
            version=metadata.version("optimum-onnx"),
            threads=self._threads,
            kernel_row=self._kernel_row,
            model_files=file_sizes(self._folder, "model.onnx*"),
            details={"cache": "grows by concatenation", "custom_op": self._kernel_row is not None},
        )

    def close(self) -> None:
        """Drop the model; its memory is free once no state of it is left."""
        super().close()
        self._model = None
