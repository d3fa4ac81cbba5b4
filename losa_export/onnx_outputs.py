"""A model with fewer outputs: without the nodes and weights that only the others needed.

ONNX Runtime computes every node of a graph, whatever is asked for. A prompt that is read in pieces needs the logits
of its last token alone, and the head is a fifth of the work; so a second session reads the rest with a graph that
has none. Done on the bytes of the file, since an edge box does not have the package onnx.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from losa_export.protobuf_wire import Field, as_bytes, fields, message_field, raw_fields, text, texts

# Field numbers of onnx.proto3.
_MODEL_GRAPH = 7
_NODE, _INITIALIZER, _OUTPUT, _VALUE_INFO = 1, 5, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_ATTRIBUTE = 1, 2, 5
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 6, 11
_TENSOR_NAME, _VALUE_NAME = 8, 1


@dataclass(frozen=True)
class _Node:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def with_outputs(model: bytes, wanted: Callable[[str], bool]) -> bytes:
    """The model with those outputs of its graph whose names are wanted.

    Raises: ValueError if it is no ONNX model, no output is wanted, or a node holds a graph of its own, whose needs are
    not followed.
    """
    kept = []
    for number, value, raw in raw_fields(memoryview(model)):
        is_graph = number == _MODEL_GRAPH
        kept.append(message_field(number, _prune(as_bytes(value), wanted)) if is_graph else bytes(raw))
    return b"".join(kept)


def _prune(graph: memoryview, wanted: Callable[[str], bool]) -> bytes:
    parts = list(raw_fields(graph))
    names = [text(list(fields(as_bytes(value))), _VALUE_NAME) for number, value, _ in parts if number == _OUTPUT]
    needed = {name for name in names if wanted(name)}
    if not needed:
        raise ValueError(f"none of its outputs ({', '.join(names[:5])}, …) is wanted")
    outputs = frozenset(needed)
    used = set()
    # Nodes stand in an order in which each comes behind those that it needs.
    for place in reversed([place for place, (number, _, _) in enumerate(parts) if number == _NODE]):
        node = _read_node(as_bytes(parts[place][1]))
        if not needed.isdisjoint(node.outputs):
            needed.update(node.inputs)
            used.add(place)

    def stays(place: int, number: int, value: int | memoryview | None) -> bool:
        if number == _NODE:
            return place in used
        if number == _INITIALIZER:
            return text(list(fields(as_bytes(value))), _TENSOR_NAME) in needed
        if number == _OUTPUT:
            return text(list(fields(as_bytes(value))), _VALUE_NAME) in outputs
        if number == _VALUE_INFO:
            return text(list(fields(as_bytes(value))), _VALUE_NAME) in needed
        return True

    return b"".join(raw for place, (number, value, raw) in enumerate(parts) if stays(place, number, value))


def _read_node(message: memoryview) -> _Node:
    found: list[Field] = list(fields(message))
    for number, value in found:
        if number == _NODE_ATTRIBUTE and any(
            inner in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS) for inner, _ in fields(as_bytes(value))
        ):
            raise ValueError("a node holds a graph of its own")
    return _Node(texts(found, _NODE_INPUT), texts(found, _NODE_OUTPUT))
