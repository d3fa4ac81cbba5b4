"""Operators made of those that follow each other in a block: a node of its own costs a small model more than its work.

    SkipNormSparseMLP…         SkipNormSparseSwiGLU…, and the SparseMatMul… that reads it
    SkipNormSparseAttention…   SkipNormSparseMatMul… of query, key and value, GroupQueryAttention, and the SparseMatMul…
                               that reads it

Each is defined by a function of the operators it is made of, so whoever does not know it finds them inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from losa_export.graph import attention
from losa_export.graph.formats import DOMAIN, DOMAIN_VERSION, FORMATS, ValueFormat, format_of
from losa_export.graph.nodes import NodeList
from losa_export.graph.stacking import METADATA_KEY

# What attention reads when query, key and value are one product: all its inputs behind these three.
_CACHE_INPUTS = attention.INPUTS[3:]


@dataclass(frozen=True)
class Product:
    """A product inside an operator.

    Attributes:
        op_type: what it would be alone, of the same format.
        prefix: what names of its weight's inputs and attributes begin with.
        value_format: of its weight.
    """

    op_type: str
    prefix: str
    value_format: ValueFormat

    @property
    def tensors(self) -> Mapping[str, str]:
        """Names of the weight's tensors → those of the operator's inputs, in order."""
        return {name: self.prefix + name for name in self.value_format.tensor_names(self.op_type)}

    @property
    def attributes(self) -> Mapping[str, str]:
        """Names of the weight's integer attributes → those of the operator's."""
        return {name: self.prefix + name for name in self.value_format.attribute_names(self.op_type)}

    @property
    def metadata_key(self) -> str:
        """Of the node's metadata that names the weight's parts."""
        return ".".join(filter(None, (METADATA_KEY, self.prefix.rstrip("_"))))


def products_of(op_type: str) -> tuple[Product, ...]:
    """The products inside an operator of our domain, in order; none if it has no weight, or is not known."""
    value_format = format_of(op_type)
    if value_format is not None:
        return (Product(op_type, "", value_format),)
    composed = _COMPOSED.get(op_type)
    return (composed.first, composed.last) if composed is not None else ()


def input_names(op_type: str) -> tuple[str, ...]:
    """Names of all inputs of an operator that has products, in order."""
    first, *others = products_of(op_type)
    composed = _COMPOSED.get(op_type)
    return (
        *first.value_format.input_names(first.op_type),
        *first.tensors.values(),
        *(composed.between if composed is not None else ()),
        *(name for other in others for name in other.tensors.values()),
    )


def composed_function(op_type: str, opset_version: int) -> ir.Function | None:
    """The definition of an operator of this module, by others of our domain; None if it is none of them."""
    composed = _COMPOSED.get(op_type)
    return composed.function(opset_version) if composed is not None else None


def compose(graph: ir.Graph) -> int:
    """Make one node of those that an operator of this module is made of, where nothing else reads what is between.

    Returns: how many were made.
    """
    made = sum(composed.take(graph, node) for node in list(graph) for composed in _COMPOSED.values())
    if made:
        graph.sort()  # a reader of the sum may have stood before the last of them
    return made


@dataclass(frozen=True)
class _Composed:
    """An operator of two products, the second of which reads what comes of the first.

    Attributes:
        op_type: its name.
        first: adds and norms before it multiplies.
        last: the product at the end.
        between: attention's further inputs, where it stands between the two; else none.
    """

    op_type: str
    first: Product
    last: Product
    between: tuple[str, ...] = ()

    def take(self, graph: ir.Graph, last: ir.Node) -> bool:
        """Replace `last` and the nodes before it by one, if they are what this operator is made of."""
        if not _is(last, self.last.op_type):
            return False
        before = _only_source(last.inputs[0])
        middle = before if self.between and before is not None and _is(before, attention.ATTENTION_OP) else None
        if self.between:
            first = _only_source(middle.inputs[0]) if middle is not None and not any(middle.inputs[1:3]) else None
        else:
            first = before
        if first is None or not _is(first, self.first.op_type):
            return False
        inputs, results = list(first.inputs), [last.outputs[0], first.outputs[1]]
        attributes = list(first.attributes.values())
        if middle is not None:
            given = middle.inputs[3:]
            inputs += [*given, *[None] * (len(self.between) - len(given))]
            results += middle.outputs[1:]
            attributes += middle.attributes.values()
        inputs += last.inputs[1:]
        attributes += [ir.Attr(self.last.prefix + one.name, one.type, one.value) for one in last.attributes.values()]
        outputs = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in results]
        name = str(first.name).replace(self.first.value_format.product_of(self.first.op_type), self.op_type)
        node = ir.Node(DOMAIN, self.op_type, inputs, attributes, outputs=outputs, name=name)
        node.metadata_props[self.first.metadata_key] = first.metadata_props[METADATA_KEY]
        node.metadata_props[self.last.metadata_key] = last.metadata_props[METADATA_KEY]
        graph.insert_before(last, node)
        for old, new in zip(results, outputs, strict=True):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove([last, *([middle] if middle is not None else []), first], safe=True)
        return True

    def function(self, opset_version: int) -> ir.Function:
        """The operator's definition."""
        nodes, inputs = NodeList(), {name: ir.val(name) for name in input_names(self.op_type)}
        before = [inputs[name] for name in self.first.value_format.input_names(self.first.op_type)]
        inner, total = self._product(nodes, self.first, before, inputs, ["inner", "sum"])
        attributes = dict.fromkeys(self.first.attributes.values(), ir.AttributeType.INT)
        attributes["epsilon"] = ir.AttributeType.FLOAT
        nodes.refer("epsilon", ir.AttributeType.FLOAT)
        presents: Sequence[ir.Value] = ()
        if self.between:
            read = [inner, None, None, *(inputs[name] for name in self.between)]
            inner, *presents = nodes.add_many(
                attention.ATTENTION_OP, read, ["attended", *attention.OUTPUTS[1:]], domain=DOMAIN
            )
            for name, kind in attention.ATTRIBUTES.items():
                nodes.refer(name, kind)
            attributes |= attention.ATTRIBUTES
        [y] = self._product(nodes, self.last, [inner], inputs, ["Y"])
        attributes |= dict.fromkeys(self.last.attributes.values(), ir.AttributeType.INT)
        imports = {"": opset_version, DOMAIN: DOMAIN_VERSION}
        graph = ir.Graph(list(inputs.values()), [y, total, *presents], nodes=nodes.nodes, opset_imports=imports)
        declared = [ir.Attr(name, kind, None) for name, kind in attributes.items()]
        return ir.Function(DOMAIN, self.op_type, graph=graph, attributes=declared)

    @staticmethod
    def _product(
        nodes: NodeList,
        product: Product,
        before: Sequence[ir.Value],
        inputs: Mapping[str, ir.Value],
        outputs: Sequence[str | None],
    ) -> list[ir.Value]:
        """Append a product inside the function, its weight and attributes among those of the whole."""
        tensors = [inputs[name] for name in product.tensors.values()]
        made = nodes.add_many(product.op_type, [*before, *tensors], outputs, domain=DOMAIN)
        for name, outer in product.attributes.items():
            nodes.refer(name, ir.AttributeType.INT, outer)
        return made


def _composed_of(value_format: ValueFormat) -> list[_Composed]:
    def normed(op_type: str) -> Product:
        return Product(str(value_format.normed_op(op_type)), "", value_format)

    def last(prefix: str) -> Product:
        return Product(value_format.sparse_op, prefix, value_format)

    ending = value_format.name.capitalize()
    return [
        _Composed(f"SkipNormSparseMLP{ending}", normed(value_format.swiglu_op), last("down_")),
        _Composed(f"SkipNormSparseAttention{ending}", normed(value_format.sparse_op), last("out_"), _CACHE_INPUTS),
    ]


_COMPOSED = {one.op_type: one for value_format in FORMATS.values() for one in _composed_of(value_format)}


def _is(node: ir.Node, op_type: str) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, op_type)


def _only_source(x: ir.Value | None) -> ir.Node | None:
    """The node that makes `x`, if one node alone reads it."""
    return None if x is None or len(x.uses()) != 1 or x.is_graph_output() else x.producer()
