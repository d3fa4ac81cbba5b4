"""Attention by the operator of our own domain, in graphs that need our library anyway.

`losa.sparse.GroupQueryAttention` takes what `com.microsoft.GroupQueryAttention` takes, and its definition is a call of
that one. ONNX Runtime's own waits for its threads after each row of a batch whose rows have different lengths; ours
does not, and gives a token the same bits whatever shares its call.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from losa_export.graph.formats import DOMAIN
from losa_export.graph.nodes import NodeList
from losa_export.graph.profiles import CONTRIB

ATTENTION_OP: Final = "GroupQueryAttention"

INPUTS: Final = (
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "seqlens_k",
    "total_sequence_length",
    "cos_cache",
    "sin_cache",
    "position_ids",
)
OUTPUTS: Final = ("output", "present_key", "present_value")
ATTRIBUTES: Final = {
    "num_heads": ir.AttributeType.INT,
    "kv_num_heads": ir.AttributeType.INT,
    "scale": ir.AttributeType.FLOAT,
    "do_rotary": ir.AttributeType.INT,
    "local_window_size": ir.AttributeType.INT,
}


def take_attention(graph: ir.Graph) -> int:
    """Give attention to our operator, where the graph has others of our domain.

    Returns: how many nodes were taken. One that asks for what ours has not (a bias, a soft cap, …) stays.
    """
    if all(node.domain != DOMAIN for node in graph):
        return 0
    taken = 0
    for node in graph:
        fits = len(node.inputs) <= len(INPUTS) and set(node.attributes) == set(ATTRIBUTES)
        if (node.domain, node.op_type) == (CONTRIB, ATTENTION_OP) and fits:
            node.domain = DOMAIN
            taken += 1
    return taken


def attention_function(opset_version: int) -> ir.Function:
    """The operator's definition. An input that a node leaves out is left out there, too."""
    nodes, inputs = NodeList(""), [ir.Value(name=name) for name in INPUTS]
    outputs = nodes.add_many(ATTENTION_OP, inputs, list(OUTPUTS), domain=CONTRIB)
    for name, kind in ATTRIBUTES.items():
        nodes.refer(name, kind)
    graph = ir.Graph(inputs, outputs, nodes=nodes.nodes, opset_imports={"": opset_version, CONTRIB: 1})
    attributes = [ir.Attr(name, kind, None) for name, kind in ATTRIBUTES.items()]
    return ir.Function(DOMAIN, ATTENTION_OP, graph=graph, attributes=attributes)
