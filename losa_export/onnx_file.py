"""What a model file refers to, read without the package onnx, which an edge box does not have.

An engine maps whatever file a tensor's external data names. So before a model from elsewhere is loaded, each
reference in it is found and checked: graphs, subgraphs, functions and sparse tensors can all hold one.

Only the few fields needed are followed, by their numbers in onnx.proto3 (onnx 1.23); a value is skipped by its length,
so weights inside the file are never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from losa_export.errors import FormatError
from losa_export.files import safe_child
from losa_export.protobuf_wire import Field, as_bytes, fields, text

MODEL_FILE = "model.onnx"
# Beside it: what was exported, from what, with the hashes of all files.
MANIFEST_FILE = "export.json"
MANIFEST_FORMAT = "losa-export-1"
_MAX_DEPTH = 100  # as protobuf's own readers: deeper nesting is an attack, not a model
_EXTERNAL = 1

Kind = Literal["model", "graph", "function", "node", "attribute", "sparse", "tensor"]
# message → field number → message inside
_INSIDE: dict[Kind, dict[int, Kind]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_NODE_OP_TYPE, _NODE_DOMAIN = 4, 7
_TENSOR_NAME, _TENSOR_EXTERNAL_DATA, _TENSOR_LOCATION = 8, 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


@dataclass(frozen=True)
class ModelReferences:
    """What was found.

    Attributes:
        data_files: files that external tensors lie in, each inside the folder and no link.
        operators: (domain, op type) of each node, function bodies included.
    """

    data_files: frozenset[Path]
    operators: frozenset[tuple[str, str]]


def check_references(folder: Path) -> ModelReferences:
    """Check `folder`/model.onnx and each file that it refers to.

    Raises:
        UnsafePathError: the model or a data file is a link, is absolute, or lies outside the folder.
        InputError: a file is missing.
        FormatError: the file is no ONNX model, or a tensor lies beyond the end of its data file.
    """
    path = safe_child(folder, MODEL_FILE)
    files: set[Path] = set()
    operators: set[tuple[str, str]] = set()
    pending: list[tuple[Kind, memoryview, int]] = [("model", memoryview(path.read_bytes()), 0)]
    try:
        while pending:
            kind, message, depth = pending.pop()
            if depth > _MAX_DEPTH:
                raise ValueError(f"messages are nested more than {_MAX_DEPTH} deep")
            found = list(fields(message))
            for number, value in found:
                inner = _INSIDE[kind].get(number)
                if inner is not None:
                    pending.append((inner, as_bytes(value), depth + 1))
            if kind == "node":
                operators.add((text(found, _NODE_DOMAIN), text(found, _NODE_OP_TYPE)))
            elif kind == "tensor" and (_TENSOR_LOCATION, _EXTERNAL) in found:
                files.add(_check_tensor(folder, found))
        if not operators:
            raise ValueError("it has no nodes")
    except ValueError as error:
        raise FormatError(f"'{path}' is not an ONNX model ({error}); export it again", path=path) from error
    return ModelReferences(frozenset(files), frozenset(operators))


def _check_tensor(folder: Path, tensor: list[Field]) -> Path:
    name = text(tensor, _TENSOR_NAME)
    facts: dict[str, str] = {}
    for number, value in tensor:
        if number == _TENSOR_EXTERNAL_DATA:
            entry = list(fields(as_bytes(value)))
            facts[text(entry, _ENTRY_KEY)] = text(entry, _ENTRY_VALUE)
    path = safe_child(folder, facts.get("location", ""))
    available = path.stat().st_size
    try:
        offset, length = int(facts.get("offset", "0")), int(facts.get("length", "0"))
    except ValueError:
        offset, length = -1, -1
    if offset < 0 or length < 0 or offset + length > available:
        raise FormatError(
            f"tensor '{name}' is said to lie at byte {facts.get('offset')} for {facts.get('length')} of '{path}', "
            f"which has {available}: the file is truncated or belongs to another model; copy or export it again",
            tensor=name,
            path=path,
        )
    return path
