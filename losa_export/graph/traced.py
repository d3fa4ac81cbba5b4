"""Our weights in a graph that `torch.onnx` made: the same products by our operators, the same files.

A product of a traced graph is MatMul(x, Transpose(W)), or Gemm with a bias. Those whose W is a linear of a block give
way to what `WeightStore` makes of that linear, sparse or not; head and embedding too, where they are rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
)

from losa_export.errors import UnsupportedArchitectureError
from losa_export.graph.formats import DOMAIN, DOMAIN_VERSION
from losa_export.graph.functions import own_functions
from losa_export.graph.nodes import NodeList
from losa_export.graph.profiles import IR_VERSION, ProfileName
from losa_export.graph.weights import WeightStore
from losa_export.tracing import TracedDecoder

# Like the graphs of this profile, a traced one lets the cache grow, and takes padding anywhere.
TRACED_PROFILE: ProfileName = "standard"


def simplify(model: ir.Model) -> None:
    """Fold what is constant and drop what does nothing; weights and their transposes stay as they are."""
    from onnxscript.optimizer import fold_constants

    ClearMetadataAndDocStringPass()(model)
    IdentityEliminationPass()(model)
    fold_constants(model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


def replaceable(model: ir.Model, names: Iterable[str]) -> list[str]:
    """Those of some initializers that stand in products and nowhere else."""
    return [name for name in names if _products(model.graph.initializers.get(name)) is not None]


def put_weights(traced: TracedDecoder, store: WeightStore, producer: str) -> ir.Model:
    """Put the store's weights in the place of the model's, and write all others.

    Args:
        traced: the graph, simplified; it changes, and is no decoder any more without the store's data file.
        store: reads the checkpoint and writes external data.
        producer: version of this program, recorded in the model.

    Raises: UnsupportedArchitectureError if head and embedding are to be rounded, but do not stand where they should.
    """
    model, graph = traced.model, traced.model.graph
    _put_tables(traced, store)
    for name in traced.linears:
        for product in _products(graph.initializers.get(name)) or ():
            nodes = NodeList(f"{name}/")
            x = product.inputs[0]
            assert x is not None
            y = store.linear(nodes, x, [name.removesuffix(".weight")], bias=False)
            _replace(graph, product, nodes, y)
    RemoveUnusedNodesPass()(model)
    for value in list(graph.initializers.values()):
        if value.uses():
            assert value.const_value is not None
            store.on_written(value.const_value.size)
            value.const_value = store.writer.add(str(value.name), value.const_value.numpy())
        else:
            del graph.initializers[str(value.name)]
    for value in store.initializers:
        graph.register_initializer(value)
    for node in graph:
        for output in node.outputs:
            if not output.is_graph_output():
                # Inferred again by whoever reads the graph; torch's names for sizes would not agree with ours.
                output.shape, output.type = None, None
    _name_sizes(graph.inputs, graph.outputs)
    functions = own_functions(graph, graph.opset_imports[""])
    if functions:
        graph.opset_imports[DOMAIN] = DOMAIN_VERSION
    for function in functions:
        model.functions[function.identifier()] = function
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "losa-export", producer
    model.metadata_props["losa.profile"] = TRACED_PROFILE
    return model


def _products(weight: ir.Value | None) -> list[ir.Node] | None:
    """Nodes that compute x Wᵀ (+ b) with an initializer W; None if something else is done with it, or nothing."""
    found: list[ir.Node] = []
    for node, place in weight.uses() if weight is not None else ():
        if _is_product(node, place, transposes=True):
            found.append(node)
        elif node.op_type == "Transpose" and _integers(node, "perm") == (1, 0):
            for product, inner in node.outputs[0].uses():
                if not _is_product(product, inner, transposes=False):
                    return None
                found.append(product)
        else:
            return None
    return found or None


def _is_product(node: ir.Node, place: int, *, transposes: bool) -> bool:
    """Whether a node multiplies by its input `place`, turned by itself if `transposes`."""
    if node.domain != "" or place != 1:
        return False
    if node.op_type == "MatMul":
        return not transposes
    if node.op_type != "Gemm":
        return False
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    turned = bool(node.attributes.get_int("transB", 0))
    return plain and not node.attributes.get_int("transA", 0) and turned == transposes


def _put_tables(traced: TracedDecoder, store: WeightStore) -> None:
    """Head and embedding in the store's format for them."""
    graph = traced.model.graph
    table = graph.initializers.get(traced.embedding)
    gathers = [node for node, place in table.uses() if node.op_type == "Gather" and place == 0] if table else []
    heads = _head_products(graph.initializers.get(traced.head), gathers)
    if not gathers or not heads:
        if not (store.head_format.stores_dense or store.embedding_format.stores_dense):
            return
        raise UnsupportedArchitectureError(
            f"head and embedding of a '{traced.facts.architecture}' are not where they can be rounded; export it with "
            "--head fp32 --embedding fp32",
            architecture=traced.facts.architecture,
        )
    for gather in gathers:
        nodes, ids = NodeList("embedding/"), gather.inputs[1]
        assert ids is not None
        _replace(graph, gather, nodes, store.embedding(nodes, ids, traced.embedding))
    for product in heads:
        nodes, x = NodeList("head/"), product.inputs[0]
        assert x is not None
        y = store.head(nodes, x, traced.head, _plain_head)
        # What follows may still cap the scores, so the name is the output's only if this node is.
        y.name = None
        _replace(graph, product, nodes, y)


def _head_products(table: ir.Value | None, gathers: Sequence[ir.Node]) -> list[ir.Node]:
    """Products with a table that may also be the embedding."""
    found: list[ir.Node] = []
    for node, place in table.uses() if table is not None else ():
        if node in gathers:
            continue
        if _is_product(node, place, transposes=True):
            found.append(node)
        elif node.op_type == "Transpose" and _integers(node, "perm") == (1, 0):
            found += [one for one, inner in node.outputs[0].uses() if _is_product(one, inner, transposes=False)]
    return found


def _plain_head(nodes: NodeList, x: ir.Value, table: ir.Value) -> ir.Value:
    return nodes.add("MatMul", [x, nodes.add("Transpose", [table], {"perm": [1, 0]})])


def _replace(graph: ir.Graph, old: ir.Node, nodes: NodeList, y: ir.Value) -> None:
    """Put `nodes`, which end in `y`, in the place of a node of one output, its bias included."""
    if old.op_type == "Gemm" and len(old.inputs) > 2 and old.inputs[2] is not None:
        y = nodes.add("Add", [y, old.inputs[2]])
    before = old.outputs[0]
    y.type, y.shape = before.type, before.shape
    graph.insert_before(old, nodes.nodes)
    ir.convenience.replace_all_uses_with(before, y, replace_graph_outputs=True)
    name = before.name
    graph.remove(old, safe=True)
    if y.is_graph_output():
        before.name, y.name = None, name


def _integers(node: ir.Node, attribute: str) -> tuple[int, ...]:
    found = node.attributes.get(attribute)
    return () if found is None else tuple(found.as_ints())


def _name_sizes(inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> None:
    """Give the dimensions of inputs and outputs the names that graphs of the builder use."""
    for value in (*inputs, *outputs):
        name, shape = str(value.name), value.shape
        assert shape is not None
        sizes: list[int | str] = [size if isinstance(size, int) else "" for size in shape.dims]
        if name.startswith(("past_key_values.", "present.")):
            sizes[0], sizes[2] = "batch", "past_sequence" if name.startswith("past") else "total_sequence"
        else:
            sizes[:2] = "batch", "total_sequence" if name == "attention_mask" else "sequence"
        value.shape = ir.Shape(sizes)
