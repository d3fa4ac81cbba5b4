"""The definitions that a model carries along with operators of our domain."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from losa_export.graph.attention import ATTENTION_OP, attention_function
from losa_export.graph.formats import DOMAIN, format_of


def own_functions(nodes: Iterable[ir.Node], opset: int) -> list[ir.Function]:
    """One function for each operator of our domain among `nodes`, in operators of version `opset`.

    They are standard operators, but for attention's.
    """
    used = sorted({node.op_type for node in nodes if node.domain == DOMAIN})
    functions = [one.function(op_type, opset) for op_type in used if (one := format_of(op_type)) is not None]
    return [*functions, attention_function(opset)] if ATTENTION_OP in used else functions
