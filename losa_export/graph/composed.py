"""Operators made of those that follow each other in a block: a node of its own costs a small model more than its work.

An MLP is `SkipNormSparseSwiGLU…` and the `SparseMatMul…` that reads it. Each is defined by a function of those
operators, so that whoever does not know it finds them inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from losa_export.graph.formats import DOMAIN, FORMATS, ValueFormat, format_of
from losa_export.graph.nodes import NodeList
from losa_export.graph.stacking import METADATA_KEY


@dataclass(frozen=True)
class Product:
    """A product inside an operator: what it would be alone, and what the names of its weight begin with there.

    Attributes:
        op_type: an operator of the format.
        prefix: of the weight's inputs and attributes, and behind a dot of the key of its parts.
        value_format: that the operator belongs to.
    """

    op_type: str
    prefix: str
    value_format: ValueFormat

    @property
    def tensors(self) -> Mapping[str, str]:
        """Names of the weight's tensors → those of the whole operator's inputs, in order."""
        return {name: self.prefix + name for name in self.value_format.tensor_names(self.op_type)}

    @property
    def attributes(self) -> Mapping[str, str]:
        """Names of the weight's attributes → those of the whole operator."""
        return {name: self.prefix + name for name in self.value_format.attribute_names(self.op_type)}

    @property
    def metadata_key(self) -> str:
        """Of the node's metadata that names the weight's parts."""
        return ".".join(filter(None, (METADATA_KEY, self.prefix.rstrip("_"))))


def products_of(op_type: str) -> tuple[Product, ...]:
    """The products inside an operator of our domain, in order; none if it is not known, or has no weight."""
    value_format = format_of(op_type)
    if value_format is not None:
        return (Product(op_type, "", value_format),)
    mlp = _MLPS.get(op_type)
    return (mlp.gate_up, mlp.down) if mlp is not None else ()


def input_names(op_type: str) -> tuple[str, ...]:
    """Names of all inputs of an operator that `products_of` knows, in order."""
    first, *others = products_of(op_type)
    before = first.value_format.input_names(first.op_type)
    return (*before, *first.tensors.values(), *(name for other in others for name in other.tensors.values()))


def composed_function(op_type: str, opset_version: int) -> ir.Function | None:
    """The definition of an operator of this module, by others of our domain; None if it is none of them."""
    mlp = _MLPS.get(op_type)
    return mlp.function(opset_version) if mlp is not None else None


def compose(graph: ir.Graph) -> int:
    """Make one node of those that an operator of this module is made of, where nothing else reads what is between.

    Returns: how many were made.
    """
    made = 0
    for node in list(graph):
        for mlp in _MLPS.values():
            made += mlp.take(graph, node)
    if made:
        graph.sort()  # a reader of the sum may have stood between the two
    return made


@dataclass(frozen=True)
class _MLP:
    """Norm, gate and up, and down, all of one format."""

    value_format: ValueFormat

    @property
    def op_type(self) -> str:
        return f"SkipNormSparseMLP{self.value_format.name.capitalize()}"

    @property
    def gate_up(self) -> Product:
        normed = self.value_format.normed_op(self.value_format.swiglu_op)
        assert normed is not None
        return Product(normed, "", self.value_format)

    @property
    def down(self) -> Product:
        return Product(self.value_format.sparse_op, "down_", self.value_format)

    def take(self, graph: ir.Graph, down: ir.Node) -> bool:
        gate_up = _only_source(down.inputs[0]) if _is(down, self.down) else None
        if gate_up is None or not _is(gate_up, self.gate_up):
            return False
        node = ir.Node(
            DOMAIN,
            self.op_type,
            [*gate_up.inputs, *down.inputs[1:]],
            [*gate_up.attributes.values(), *_prefixed(down, self.down)],
            outputs=[ir.Value(name=down.outputs[0].name), ir.Value(name=gate_up.outputs[1].name)],
            name=gate_up.name,
        )
        node.metadata_props[self.gate_up.metadata_key] = gate_up.metadata_props[METADATA_KEY]
        node.metadata_props[self.down.metadata_key] = down.metadata_props[METADATA_KEY]
        _replace(graph, (gate_up, down), node, (down.outputs[0], gate_up.outputs[1]))
        return True

    def function(self, opset_version: int) -> ir.Function:
        nodes, inputs = NodeList(), {name: ir.val(name) for name in input_names(self.op_type)}
        before = [inputs[name] for name in self.value_format.input_names(self.gate_up.op_type)]
        hidden, total = _add(nodes, self.gate_up, before, inputs, ["hidden", "sum"])
        [y] = _add(nodes, self.down, [hidden], inputs, ["Y"])
        imports = {"": opset_version, DOMAIN: 1}
        graph = ir.Graph(list(inputs.values()), [y, total], nodes=nodes.nodes, opset_imports=imports)
        attributes = [ir.Attr(name, ir.AttributeType.INT, None) for one in (self.gate_up, self.down) for name in one.attributes.values()]
        attributes.append(ir.Attr("epsilon", ir.AttributeType.FLOAT, None))
        return ir.Function(DOMAIN, self.op_type, graph=graph, attributes=attributes)


_MLPS = {mlp.op_type: mlp for mlp in map(_MLP, FORMATS.values())}


def _is(node: ir.Node, product: Product) -> bool:
    return node.domain == DOMAIN and node.op_type == product.op_type


def _only_source(x: ir.Value | None) -> ir.Node | None:
    """The node that makes `x`, if one node alone reads it."""
    return None if x is None or len(x.uses()) != 1 or x.is_graph_output() else x.producer()


def _prefixed(node: ir.Node, product: Product) -> Iterator[ir.Attr]:
    for attribute in node.attributes.values():
        yield ir.Attr(product.prefix + attribute.name, attribute.type, attribute.value)


def _replace(graph: ir.Graph, old: tuple[ir.Node, ...], node: ir.Node, results: tuple[ir.Value, ...]) -> None:
    """Put `node` in the place of some others, the last of which stays; its outputs are theirs in order."""
    graph.insert_before(old[-1], node)
    for new, value in zip(node.outputs, results, strict=True):
        new.type, new.shape = value.type, value.shape
        value.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(reversed(old), safe=True)


def _add(
    nodes: NodeList, product: Product, before: list[ir.Value], inputs: Mapping[str, ir.Value], outputs: list[str | None]
) -> list[ir.Value]:
    """Append a product inside a function, on its weight and attributes among those of the whole."""
    tensors = [inputs[name] for name in product.tensors.values()]
    made = nodes.add_many(product.op_type, [*before, *tensors], outputs, domain=DOMAIN)
    attributes = nodes.nodes[-1].attributes
    for name, outer in product.attributes.items():
        attributes.add(ir.RefAttr(name, outer, ir.AttributeType.INT))
    if len(before) > 1:
        attributes.add(ir.RefAttr("epsilon", "epsilon", ir.AttributeType.FLOAT))
    return made
