"""A model that computes the logits of its last tokens alone: how many, a new input says.

Of a prompt that is read to go on from, only the last token's logits are wanted, and the head is up to a quarter of the
work. So what the head reads is cut first. Done on the bytes of the file, as in `onnx_outputs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from losa_export.protobuf_wire import as_bytes, fields, message_field, number_field, raw_fields, text, texts

FIRST_LOGIT = "first_logit"
"""The new input, int64 (1,): the first of the tokens given whose logits are computed."""

# Field numbers of onnx.proto3.
_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_ENTRY_KEY = 1
_NODE, _INITIALIZER, _INPUT = 1, 5, 11
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP_TYPE = 1, 2, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_INT64 = 7

_LOGITS = "logits"
_PROFILE = "losa.profile"
_PRODUCTS = ("MatMul", "FusedMatMul", "MatMulNBits")
_OWN_PRODUCT, _OWN_NORMED_PRODUCT = "DenseMatMul", "SkipNormDenseMatMul"
_END, _AXIS = "first_logit.end", "first_logit.axis"


@dataclass(frozen=True)
class _Head:
    """The node that gives the logits: its place among the graph's fields, and what it reads a row of for each token."""

    place: int
    rows: tuple[str, ...]


def with_first_logit(model: bytes) -> bytes | None:
    """The model with that input. None for one that was not exported by us, or whose head is not known.

    Raises: ValueError if it is no ONNX model.
    """
    parts = list(raw_fields(memoryview(model)))
    entries = (as_bytes(value) for number, value, _ in parts if number == _MODEL_METADATA)
    if not any(text(list(fields(entry)), _ENTRY_KEY) == _PROFILE for entry in entries):
        return None
    kept = []
    for number, value, raw in parts:
        if number == _MODEL_GRAPH:
            graph = _cut_before_head(as_bytes(value))
            if graph is None:
                return None
            kept.append(message_field(number, graph))
        else:
            kept.append(bytes(raw))
    return b"".join(kept)


def _cut_before_head(graph: memoryview) -> bytes | None:
    parts = list(raw_fields(graph))
    head = _find_head(parts)
    if head is None:
        return None
    made = []
    for place, (number, value, raw) in enumerate(parts):
        if place == head.place:
            made += [message_field(_NODE, _slice(name)) for name in head.rows]
            made.append(message_field(number, _reading_cut_rows(as_bytes(value), head.rows)))
        else:
            made.append(bytes(raw))
    made += [message_field(_INITIALIZER, _int64(_END, (1 << 63) - 1)), message_field(_INITIALIZER, _int64(_AXIS, 1))]
    made.append(message_field(_INPUT, _int64_input(FIRST_LOGIT)))
    return b"".join(made)


def _find_head(parts: list[tuple[int, int | memoryview | None, memoryview]]) -> _Head | None:
    for place, (number, value, _) in enumerate(parts):
        if number != _NODE:
            continue
        found = list(fields(as_bytes(value)))
        if _LOGITS not in texts(found, _NODE_OUTPUT):
            continue
        op_type, inputs = text(found, _NODE_OP_TYPE), texts(found, _NODE_INPUT)
        if op_type.startswith(_OWN_NORMED_PRODUCT):
            return _Head(place, inputs[:2])  # what is normed, and what is added to it
        if op_type in _PRODUCTS or op_type.startswith(_OWN_PRODUCT):
            return _Head(place, inputs[:1])
    return None


def _cut(name: str) -> str:
    return f"{name}.from_first_logit"


def _reading_cut_rows(node: memoryview, rows: tuple[str, ...]) -> bytes:
    made = []
    for number, value, raw in raw_fields(node):
        name = bytes(as_bytes(value)).decode() if number == _NODE_INPUT else ""
        made.append(message_field(number, _cut(name).encode()) if name in rows else bytes(raw))
    return b"".join(made)


def _slice(name: str) -> bytes:
    inputs = (name, FIRST_LOGIT, _END, _AXIS)
    return (
        b"".join(message_field(_NODE_INPUT, one.encode()) for one in inputs)
        + message_field(_NODE_OUTPUT, _cut(name).encode())
        + message_field(_NODE_OP_TYPE, b"Slice")
    )


def _int64(name: str, value: int) -> bytes:
    """A tensor of one number."""
    return (
        number_field(_TENSOR_DIMS, 1)
        + number_field(_TENSOR_TYPE, _INT64)
        + message_field(_TENSOR_NAME, name.encode())
        + message_field(_TENSOR_RAW, value.to_bytes(8, "little", signed=True))
    )


def _int64_input(name: str) -> bytes:
    """A graph input of one number: name, and type { tensor { int64, shape { dimension { 1 } } } }."""
    shape = message_field(1, number_field(1, 1))
    tensor = number_field(1, _INT64) + message_field(2, shape)
    return message_field(1, name.encode()) + message_field(2, message_field(1, tensor))
