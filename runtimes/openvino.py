"""OpenVINO on an exported folder with dense weights: its cache kept inside, as its own exports have it.

It runs in an environment of its own (`losa_export.runtimes.isolated`), so this module needs nothing beside it but
numpy and what that environment holds. Profile `standard` is what it reads. Weights, activations and cache are float32:
left to itself the engine rounds to bfloat16 and 8 bits where the processor is faster with them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from losa_export.errors import CheckpointError, RuntimeFailureError
from losa_export.onnx_file import MODEL_FILE
from losa_export.runtimes.base import RuntimeDescription, file_sizes
from losa_export.runtimes.by_row import Float32, Int64, Row, RowRuntime
from losa_export.runtimes.folder_settings import model_sizes
from losa_export.runtimes.isolated import not_importable
from losa_export.runtimes.threads import resolve_threads

_PAST, _PRESENT = "past_key_values.", "present."


class OpenVinoRuntime(RowRuntime):
    """A decoder graph on OpenVINO, an inference request for each row; see `losa_export.runtimes.base.Runtime`."""

    name = "openvino"

    def __init__(self, compiled: Any, version: str, folder: Path, threads: int) -> None:
        super().__init__(*model_sizes(folder))
        self._compiled: Any = compiled
        self._version, self._folder, self._threads = version, folder, threads

    @classmethod
    def load(cls, folder: Path, *, threads: int | None = None) -> OpenVinoRuntime:
        """Open `folder`.

        Raises:
            EngineUnavailableError: this interpreter has no OpenVINO.
            CheckpointError: the folder holds no graph, or genai_config.json is missing.
            RuntimeFailureError: the engine refuses the graph; it does not know our operators for sparse weights.
        """
        try:
            openvino = import_module("openvino")
        except ImportError as error:
            raise not_importable("OpenVINO", "openvino", error) from error
        if not (folder / MODEL_FILE).is_file():
            raise CheckpointError(f"'{folder}' has no {MODEL_FILE}; export it with: losa export", path=folder)
        count = resolve_threads(threads)
        settings = {
            "INFERENCE_NUM_THREADS": count,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
        }
        try:
            core = openvino.Core()
            model = core.read_model(str(folder / MODEL_FILE))
            _keep_cache_inside(openvino, model)
            compiled = core.compile_model(model, "CPU", settings)
        except Exception as error:  # the engine raises plain exceptions
            raise RuntimeFailureError(
                f"OpenVINO refused '{folder}': {str(error).strip().splitlines()[-1]}; export it with dense weights and "
                "--profile standard",
                path=folder,
            ) from error
        return cls(compiled, str(openvino.__version__), folder, count)

    def begin(self, row: Row) -> None:
        """See `RowRuntime.begin`: a request whose cache is empty."""
        row.handle = self._compiled.create_infer_request()

    def append(self, row: Row, ids: Int64) -> Float32:
        """See `RowRuntime.append`."""
        total = row.length + ids.size
        inputs = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(row.length, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        try:
            found = row.handle.infer(inputs)["logits"]
        except Exception as error:  # likewise
            raise RuntimeFailureError(f"OpenVINO failed while running the model: {error}") from error
        # The engine uses the memory of its answer again.
        return np.array(found[0], dtype=np.float32)

    def describe(self) -> RuntimeDescription:
        """The engine, its threads and the files."""
        return RuntimeDescription(
            name=self.name,
            engine="openvino",
            version=self._version,
            threads=self._threads,
            kernel_row=None,
            model_files=file_sizes(self._folder, "model.onnx*"),
            details={"cache": "inside the engine", "precision": "f32"},
        )

    def close(self) -> None:
        """Drop the model; its memory is free once no state of it is left."""
        super().close()
        self._compiled = None


def _keep_cache_inside(openvino: Any, model: Any) -> None:
    """Turn past and present into state of the requests, and let an input say which row each row goes on from.

    That input is what the engine's fusion of attention with its cache looks for.
    """
    opset = import_module("openvino.opset13")
    transformations = import_module("openvino._offline_transformations")
    beam = opset.parameter([-1], openvino.Type.i32, name="beam_idx")
    beam.output(0).get_tensor().add_names({"beam_idx"})
    pairs = {}
    for value in model.inputs:
        name = value.any_name
        if not name.startswith(_PAST):
            continue
        pairs[name] = name.replace(_PAST, _PRESENT, 1)
        readers = value.get_target_inputs()
        chosen = opset.gather(value, beam, opset.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.add_parameters([beam])
    model.validate_nodes_and_infer_types()
    transformations.apply_make_stateful_transformation(model, pairs)
