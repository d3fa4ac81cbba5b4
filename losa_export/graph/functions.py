"""The definitions that a model carries along with operators of our domain."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from losa_export.graph.attention import ATTENTION_OP, attention_function
from losa_export.graph.composed import composed_function
from losa_export.graph.formats import DOMAIN, format_of


def own_functions(nodes: Iterable[ir.Node], opset: int) -> list[ir.Function]:
    """One function for each operator of our domain among `nodes`, in operators of version `opset`.

    They are standard operators, but for attention's, and for those made of others of ours, whose functions come along.
    """
    functions: dict[str, ir.Function] = {}
    _define(nodes, opset, functions)
    return [functions[op_type] for op_type in sorted(functions)]


def _define(nodes: Iterable[ir.Node], opset: int, functions: dict[str, ir.Function]) -> None:
    for op_type in {node.op_type for node in nodes if node.domain == DOMAIN} - functions.keys():
        function = _function(op_type, opset)
        if function is not None:
            functions[op_type] = function
            _define(function, opset, functions)


def _function(op_type: str, opset: int) -> ir.Function | None:
    if op_type == ATTENTION_OP:
        return attention_function(opset)
    value_format = format_of(op_type)
    return value_format.function(op_type, opset) if value_format is not None else composed_function(op_type, opset)
