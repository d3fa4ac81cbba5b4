"""What a model file refers to, read without the package onnx, which an edge box does not have.

An engine maps whatever file a tensor's external data names. So before a model from elsewhere is loaded, each
reference in it is found and checked: graphs, subgraphs, functions and sparse tensors can all hold one.

Only the few fields needed are followed, by their numbers in onnx.proto3 (onnx 1.23); a value is skipped by its length,
so weights inside the file are never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from losa_export.errors import FormatError
from losa_export.files import safe_child

MODEL_FILE = "model.onnx"
# Beside it: what was exported, from what, with the hashes of all files.
MANIFEST_FILE = "export.json"
MANIFEST_FORMAT = "losa-export-1"
_MAX_DEPTH = 100  # as protobuf's own readers: deeper nesting is an attack, not a model
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
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

Field = tuple[int, int | memoryview]  # number and value: an int, or the bytes of a string or message


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
            fields = list(_fields(message))
            for number, value in fields:
                inner = _INSIDE[kind].get(number)
                if inner is not None:
                    pending.append((inner, _as_bytes(value), depth + 1))
            if kind == "node":
                operators.add((_text(fields, _NODE_DOMAIN), _text(fields, _NODE_OP_TYPE)))
            elif kind == "tensor" and (_TENSOR_LOCATION, _EXTERNAL) in fields:
                files.add(_check_tensor(folder, fields))
        if not operators:
            raise ValueError("it has no nodes")
    except ValueError as error:
        raise FormatError(f"'{path}' is not an ONNX model ({error}); export it again", path=path) from error
    return ModelReferences(frozenset(files), frozenset(operators))


def _check_tensor(folder: Path, fields: list[Field]) -> Path:
    name = _text(fields, _TENSOR_NAME)
    facts: dict[str, str] = {}
    for number, value in fields:
        if number == _TENSOR_EXTERNAL_DATA:
            entry = list(_fields(_as_bytes(value)))
            facts[_text(entry, _ENTRY_KEY)] = _text(entry, _ENTRY_VALUE)
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


def _fields(message: memoryview) -> Iterator[Field]:
    """The fields of one message in wire format, fixed-size ones skipped. Raises: ValueError where it breaks off."""
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(message, position)
            yield number, value
        elif wire == _BYTES:
            length, position = _varint(message, position)
            if length > end - position:
                raise ValueError(f"a field of {length} bytes breaks off: the file is truncated")
            yield number, message[position : position + length]
            position += length
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
            if position > end:
                raise ValueError("a number breaks off: the file is truncated")
        else:
            raise ValueError(f"wire type {wire} is unknown")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number at `position`, seven bits per byte from the lowest, and where the next begins."""
    value = 0
    for count in range(10):
        if position >= len(message):
            raise ValueError("a number breaks off: the file is truncated")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, position
    raise ValueError("a number has more than 64 bits")


def _text(fields: list[Field], number: int) -> str:
    """The last string of that number, as protobuf reads it; '' if there is none."""
    for found, value in reversed(fields):
        if found == number:
            return bytes(_as_bytes(value)).decode("utf-8")  # UnicodeDecodeError is a ValueError
    return ""


def _as_bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message should")
    return value
