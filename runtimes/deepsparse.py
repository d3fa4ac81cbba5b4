"""DeepSparse on a folder exported with profile `deepsparse`: the engine of Neural Magic, discontinued in 2025.

It runs in an environment of its own (`losa_export.runtimes.isolated`), so this module needs nothing beside it but
numpy and what that environment holds. The engine compiles one program for each number of tokens that enters at once
and each length of cache; the cache then lies inside the engine, which is a third faster than outside of it.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from losa_export.errors import CheckpointError, RuntimeFailureError
from losa_export.onnx_file import MODEL_FILE
from losa_export.runtimes.base import RuntimeDescription, causal_mask, file_sizes
from losa_export.runtimes.by_row import Float32, Int64, Row, RowRuntime
from losa_export.runtimes.isolated import not_importable
from losa_export.runtimes.threads import resolve_threads

PROFILE = "deepsparse"
_PAST = "past_key_values."


@dataclass(frozen=True)
class _Cache:
    """Keys and values of a row inside the engine, and the length of the programs that share them."""

    engine: Any
    length: int


class DeepSparseRuntime(RowRuntime):
    """A decoder graph on DeepSparse; see `losa_export.runtimes.base.Runtime`."""

    name = "deepsparse"

    def __init__(self, folder: Path, threads: int, vocab_size: int, max_positions: int) -> None:
        super().__init__(vocab_size, max_positions)
        self._folder, self._threads = folder, threads
        self._library: Any = import_module("deepsparse.engine")
        # Length of programs → tokens that enter at once, and whether the last one's logits are all → engine.
        self._programs: dict[int, dict[tuple[int, bool], Any]] = {}
        self._compile_seconds: list[float] = []
        self._supported = 1.0

    @classmethod
    def load(cls, folder: Path, *, threads: int | None = None) -> DeepSparseRuntime:
        """Open `folder`. Nothing is compiled yet: that takes the lengths of prompt and cache.

        Raises:
            EngineUnavailableError: this interpreter has no DeepSparse.
            CheckpointError: the folder holds no graph of profile `deepsparse`.
            ConfigError: an impossible number of threads.
        """
        try:
            onnx = import_module("onnx")
            import_module("deepsparse")
        except ImportError as error:
            raise not_importable("DeepSparse", "deepsparse", error) from error
        if not (folder / MODEL_FILE).is_file():
            raise CheckpointError(f"'{folder}' has no {MODEL_FILE}; export it with: losa export", path=folder)
        model = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
        if {entry.key: entry.value for entry in model.metadata_props}.get("losa.profile") != PROFILE:
            raise CheckpointError(
                f"the graph in '{folder}' is not of profile '{PROFILE}'; export it with: losa export … --profile "
                f"{PROFILE}",
                path=folder,
            )
        logits = next(value for value in model.graph.output if value.name == "logits")
        table = next(one for one in model.graph.initializer if one.name == "cos_cache")
        vocabulary = logits.type.tensor_type.shape.dim[2].dim_value
        return cls(folder, resolve_threads(threads), int(vocabulary), int(table.dims[0]))

    def begin(self, row: Row) -> None:
        """See `RowRuntime.begin`. The cache is made with the prompt, which decides its length."""
        row.handle = None

    def append(self, row: Row, ids: Int64) -> Float32:
        """See `RowRuntime.append`. What is not there for these lengths is compiled."""
        return self._run(row, ids, last_only=False)

    def append_for_last(self, row: Row, ids: Int64) -> Float32:
        """See `RowRuntime.append_for_last`: by a program of its own."""
        return self._run(row, ids, last_only=True)

    def describe(self) -> RuntimeDescription:
        """The engine, its threads, how much of the graph it accelerates, and the files."""
        return RuntimeDescription(
            name=self.name,
            engine="deepsparse",
            version=str(self._library.__version__),
            threads=self._threads,
            kernel_row=None,
            model_files=file_sizes(self._folder, "model.onnx*"),
            details={
                "cache": "inside the engine",
                "fraction_of_supported_ops": self._supported,
                "compile_seconds": [round(seconds, 3) for seconds in self._compile_seconds],
            },
        )

    def close(self) -> None:
        """Drop what was compiled."""
        super().close()
        self._programs = {}

    def _run(self, row: Row, ids: Int64, *, last_only: bool) -> Float32:
        """Run some tokens. They stand at the end of the cache's length, on which all programs of a cache must agree."""
        if row.handle is None:
            row.handle = _Cache(self._library.LIB.kv_cache(0, 0), program_length(ids.size, row.capacity))
        cache: _Cache = row.handle
        engine, total, past = self._engine(ids.size, cache.length, last_only), cache.length, row.length
        mask = (np.arange(total) >= total - past - ids.size).astype(np.int64)[None]
        given = {
            "input_ids": ids[None],
            "positions": past + np.arange(ids.size)[None],
            "attention_mask": mask,
            "causal_mask": causal_mask(mask, ids.size),
        }
        shapes = dict(zip(engine.input_names, engine.input_shapes, strict=True))
        inputs = [
            # Empty pasts of the right rank: the engine has the real ones.
            np.zeros((0, *shapes[name][1:]), np.float32) if name.startswith(_PAST) else _fresh(given[name])
            for name in engine.input_names
        ]
        try:
            found: Float32 = np.array(engine._eng_net.execute_list_out(inputs, cache.engine)[0][0])
        except Exception as error:  # the engine's own exceptions have no documented base
            raise RuntimeFailureError(f"DeepSparse failed while running the model: {error}") from error
        return found

    def _engine(self, tokens: int, length: int, last_only: bool) -> Any:
        """What was compiled for so many tokens in programs of that length; of other lengths the last one stays."""
        if length not in self._programs:
            for old in list(self._programs)[:-1]:
                del self._programs[old]
        engines = self._programs.setdefault(length, {})
        kind = tokens, last_only and tokens > 1
        if kind not in engines:
            started = time.perf_counter()
            engines[kind] = self._compile(*kind, length)
            self._compile_seconds.append(time.perf_counter() - started)
        return engines[kind]

    def _compile(self, tokens: int, last_only: bool, length: int) -> Any:
        onnx = import_module("onnx")
        model = onnx.load(str(self._folder / MODEL_FILE), load_external_data=False)
        for value in model.graph.input:
            for dimension, size in zip(
                value.type.tensor_type.shape.dim,
                _sizes(value.name, tokens, length),
                strict=True,
            ):
                if size is not None:
                    dimension.dim_value = size
        if last_only:
            _cut_before_head(onnx, model.graph)
        cached = [output.name.startswith("present.") for output in model.graph.output]
        with tempfile.TemporaryDirectory(prefix="losa-deepsparse-") as scratch:
            for path in self._folder.glob(f"{MODEL_FILE}.*"):
                os.symlink(path.resolve(), Path(scratch) / path.name)
            file = Path(scratch) / MODEL_FILE
            file.write_bytes(model.SerializeToString())
            del model
            try:
                engine = self._library.Engine(str(file), batch_size=1, num_cores=self._threads, cached_outputs=cached)
            except Exception as error:  # likewise
                raise RuntimeFailureError(f"DeepSparse refused the model: {error}") from error
        self._supported = min(self._supported, float(engine.fraction_of_supported_ops))
        return engine


def program_length(prompt: int, capacity: int) -> int:
    """Tokens of a program's cache and input together, for a prompt and all that may follow it.

    The engine answers wrongly, or crashes, for a prompt that is not shorter than the cache beside it, and for one that
    enters in pieces; and it spoils the answer of the token that fills the last place.
    """
    return max(capacity, 2 * prompt) + 1


def _cut_before_head(onnx: Any, graph: Any) -> None:
    """Let the head, a product in float32 or in 8 bits, read the last token alone."""
    made_by = {output: node for node in graph.node for output in node.output}
    node = made_by["logits"]
    while node.op_type not in ("MatMul", "MatMulInteger"):  # scales
        node = made_by[node.input[0]]
    if made_by[node.input[0]].op_type == "QuantizeLinear":
        node = made_by[node.input[0]]
    whole, last = node.input[0], "last_token"
    bounds = {"last_token.start": -1, "last_token.end": (1 << 63) - 1, "last_token.axis": 1}
    for name, value in bounds.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    node.input[0] = last
    graph.node.insert(list(graph.node).index(node), onnx.helper.make_node("Slice", [whole, *bounds], [last]))


def _sizes(name: str, tokens: int, total: int) -> tuple[int | None, ...]:
    """The fixed sizes of a graph input; None where the graph fixes it already."""
    if name in ("input_ids", "positions"):
        return 1, tokens
    if name == "attention_mask":
        return 1, total
    if name == "causal_mask":
        return 1, None, tokens, total
    return 1, None, total - tokens, None


def _fresh(values: Int64) -> Int64:
    """A copy whose type is numpy's own object: the engine refuses an equal one, as arrays from a pipe have."""
    copy: Int64 = np.empty(values.shape, np.int64)
    copy[...] = values
    return copy
