"""Residual additions and RMS norms, moved into the products that read them.

A token's way through a small model is short enough that a node of its own costs more than the norm it computes. Where
one product of our domain alone reads a norm, its operator does both; elsewhere the norm keeps its node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from losa_export.graph.formats import DOMAIN, format_of
from losa_export.graph.profiles import CONTRIB


@dataclass(frozen=True)
class _SkipNorm:
    """RMS norm of x + skip by some nodes, the first of which adds; `total` is the sum, None if it is not given."""

    nodes: tuple[ir.Node, ...]
    x: ir.Value
    skip: ir.Value
    gamma: ir.Value
    total: ir.Value | None
    epsilon: float


def fuse_skip_norms(graph: ir.Graph) -> int:
    """Give each product of our domain the addition and norm before it, where nothing else reads their result.

    Returns: how many were fused.
    """
    fused = 0
    for node in list(graph):
        value_format = format_of(node.op_type) if node.domain == DOMAIN else None
        normed_op = value_format.normed_op(node.op_type) if value_format is not None else None
        norm = _norm_before(node.inputs[0]) if normed_op is not None else None
        if normed_op is not None and norm is not None:
            _fuse(graph, node, normed_op, norm)
            fused += 1
    return fused


def _fuse(graph: ir.Graph, node: ir.Node, normed_op: str, norm: _SkipNorm) -> None:
    weight = node.inputs[1:]
    node.op_type = normed_op
    node.attributes.add(ir.AttrFloat32("epsilon", norm.epsilon))
    node.resize_inputs(3 + len(weight))
    for index, value in enumerate((norm.x, norm.skip, norm.gamma, *weight)):
        node.replace_input_with(index, value)
    # Where nobody reads the sum it is given a name all the same: ONNX Runtime inlines no function without it.
    node.resize_outputs(2)
    total = node.outputs[1]
    total.name = f"{node.name}_sum"
    if norm.total is not None:
        total.name, total.type, total.shape = norm.total.name, norm.total.type, norm.total.shape
        norm.total.replace_all_uses_with(total, replace_graph_outputs=True)
    # Readers of the sum stand behind the addition, not necessarily behind the product.
    graph.remove(node)
    graph.insert_before(norm.nodes[0], node)
    graph.remove(norm.nodes, safe=True)


def _norm_before(x: ir.Value | None) -> _SkipNorm | None:
    """The addition and norm whose result is `x`, if it has one reader and the operators can do the same."""
    if x is None or len(x.uses()) != 1 or x.is_graph_output():
        return None
    node = x.producer()
    if node is None:
        return None
    if (node.domain, node.op_type) == (CONTRIB, "SkipSimplifiedLayerNormalization"):
        # A fourth input would be a bias.
        total = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3].name else None
        return _skip_norm((node,), node.inputs, total, default=1e-12) if len(node.inputs) == 3 else None
    if (node.domain, node.op_type) == ("", "RMSNormalization") and node.attributes.get_int("axis", -1) == -1:
        total = node.inputs[0]
        add = total.producer() if total is not None else None
        if add is not None and (add.domain, add.op_type) == ("", "Add"):
            return _skip_norm((add, node), (*add.inputs, node.inputs[1]), total, default=1e-5)
    return None


def _skip_norm(
    nodes: tuple[ir.Node, ...], inputs: Sequence[ir.Value | None], total: ir.Value | None, *, default: float
) -> _SkipNorm | None:
    """The match, unless a term of the sum is a weight (which Add may stretch) or the scale is none."""
    x, skip, gamma = inputs
    if x is None or skip is None or gamma is None or x.is_initializer() or skip.is_initializer():
        return None
    if gamma.const_value is None:
        return None
    return _SkipNorm(nodes, x, skip, gamma, total, nodes[-1].attributes.get_float("epsilon", default))
