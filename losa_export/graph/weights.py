"""From checkpoint tensors to initializers, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from losa_export.errors import FormatError, MaskError
from losa_export.graph.external import ExternalDataWriter
from losa_export.graph.formats import DOMAIN, EncodedWeight, ValueFormat
from losa_export.graph.nodes import NodeList
from losa_export.graph.sparsity import SparsityPlan, TensorReader
from losa_export.graph.stacking import METADATA_KEY, Part, describe, interleave, interleave_rounded
from losa_export.layout import TIED_HEAD
from losa_export.quantise import Rounded

_Scalar = TypeVar("_Scalar", bound=np.generic)

# Rounds linears that read the same x: (their names, rows (N, K) below each other, pattern) → the weight as stored.
Rounding = Callable[[Sequence[str], NDArray[np.float32], NDArray[np.bool_]], Rounded]

# Rounds the head (N, K), after all linears.
HeadRounding = Callable[[NDArray[np.float32]], Rounded]


@dataclass(frozen=True)
class _Table:
    """A written table: its name, tensors, and the attributes they were encoded with, none for an ordinary matrix."""

    name: str
    tensors: Sequence[ir.Value]
    attributes: Mapping[str, int]


@dataclass
class WeightStore:
    """Reads a checkpoint's tensors, writes them as external data, and hands out initializers.

    Attributes:
        source: where tensors come from.
        writer: where they go.
        plan: which linears are stored sparsely, and under which masks.
        value_format: how the values of linears are stored, sparse or not.
        head_format: how the head is stored.
        embedding_format: how the embedding is. A tied table is stored once where both formats have one name.
        on_written: called with the number of weights after each tensor, for progress.
        rounding: rounds the values of linears to the value format; None leaves that to the format.
        head_rounding: likewise those of a head that is not the embedding's table too.
        initializers: made so far, in file order.
    """

    source: TensorReader
    writer: ExternalDataWriter
    plan: SparsityPlan
    value_format: ValueFormat
    head_format: ValueFormat
    embedding_format: ValueFormat
    on_written: Callable[[int], None] = lambda count: None  # noqa: ARG005
    rounding: Rounding | None = None
    head_rounding: HeadRounding | None = None
    initializers: list[ir.Value] = field(default_factory=list)
    _tables: dict[tuple[str, str], _Table] = field(default_factory=dict)

    def array(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """An initializer that is not from the checkpoint."""
        return self._initializer(self.writer.add(name, array))

    def plain(self, name: str) -> ir.Value:
        """Checkpoint tensor `name`, stored as it is."""
        tensor = self.source.read(name)
        value = self.array(name, tensor)
        self.on_written(tensor.size)
        return value

    def embedding(self, nodes: NodeList, ids: ir.Value, name: str) -> ir.Value:
        """Append the rows `ids` of table `name`: (…, K) float32."""
        table = self._table(name, self.embedding_format)
        if not table.attributes:
            return nodes.add("Gather", [table.tensors[0], ids])
        return _on_table(nodes, self.embedding_format, self.embedding_format.embedding_op, ids, table)

    def head(
        self, nodes: NodeList, x: ir.Value, name: str, plain: Callable[[NodeList, ir.Value, ir.Value], ir.Value]
    ) -> ir.Value:
        """Append the scores x Eᵀ of table `name`, as the output "logits".

        Args:
            nodes: where to append.
            x: (…, K).
            name: of a checkpoint tensor (N, K); the embedding's if they are tied.
            plain: appends the product with an ordinary matrix (N, K).
        """
        table = self._table(name, self.head_format, self.head_rounding)
        if not table.attributes:
            return plain(nodes, x, table.tensors[0])
        return _on_table(nodes, self.head_format, self.head_format.dense_op, x, table, output="logits")

    def exact_linear(self, nodes: NodeList, x: ir.Value, name: str, *, output: str | None = None) -> ir.Value:
        """Append x Wᵀ for a weight (N, K) outside the blocks, which is never pruned or rounded."""
        return nodes.add("MatMul", [x, self._transposed(name, self.source.read(name))], output=output)

    def linear(self, nodes: NodeList, x: ir.Value, names: Sequence[str], *, bias: bool) -> ir.Value:
        """Append x Wᵀ (+ b) for linear modules that read the same x, their outputs side by side.

        Args:
            nodes: where to append.
            x: (…, K).
            names: modules, for example ("model.layers.0.self_attn.o_proj",). Sparse if the plan says so of one of them.
            bias: whether they have biases.
        """
        weights = [self.source.read(f"{name}.weight") for name in names]
        keeps = self._keeps(names, weights)
        if keeps is not None:
            y = self._sparse(nodes, x, self.value_format.sparse_op, names, weights, keeps)
        elif self.value_format.stores_dense:
            y = self._dense(nodes, x, names, weights)
        else:
            y = nodes.add("MatMul", [x, self._transposed(f"{_stem(names)}.weight", _rows(weights))])
        if bias:
            y = nodes.add("Add", [y, self._biases(names)])
        return y

    def sparse_swiglu(self, nodes: NodeList, x: ir.Value, gate: str, up: str) -> ir.Value | None:
        """Append silu(x Gᵀ) ⊙ x Uᵀ as one node, if the plan stores these modules sparsely; else None."""
        weights = [self.source.read(f"{name}.weight") for name in (gate, up)]
        keeps = self._keeps((gate, up), weights)
        if keeps is None:
            return None
        return self._sparse(nodes, x, self.value_format.swiglu_op, (gate, up), weights, keeps)

    def _keeps(self, names: Sequence[str], weights: Sequence[NDArray[np.float32]]) -> list[NDArray[np.bool_]] | None:
        """The patterns to store some linears under; None if they are stored densely.

        Raises: MaskError if a weight is not zero where its pattern prunes it.
        """
        keeps: list[NDArray[np.bool_]] = []
        found = False
        for name, weight in zip(names, weights, strict=True):
            keep = self.plan.keep(f"{name}.weight", weight)
            found |= keep is not None
            keeps.append(np.ones(weight.shape, dtype=np.bool_) if keep is None else keep)
            if keep is not None and not self.plan.store_sparse and np.any((weight != 0) & ~keep):
                raise _not_zero(f"{name}.weight")
        return keeps if found and self.plan.store_sparse else None

    def _biases(self, names: Sequence[str]) -> ir.Value:
        biases = [self.source.read(f"{name}.bias") for name in names]
        self.on_written(sum(bias.size for bias in biases))
        return self.array(f"{_stem(names)}.bias", np.concatenate(biases))

    def _transposed(self, name: str, weight: NDArray[np.float32]) -> ir.Value:
        value = self._initializer(self.writer.add_transposed(f"{name}.transposed", weight))
        self.on_written(weight.size)
        return value

    def _table(self, name: str, kind: ValueFormat, rounding: HeadRounding | None = None) -> _Table:
        """Embedding or head `name` in a format, written when it is first asked for in it."""
        if (name, kind.name) not in self._tables:
            stored = TIED_HEAD if any(written == name for written, _ in self._tables) else name
            tensor = self.source.read(name)
            if kind.stores_dense:
                encoded = _encoded(stored, lambda: kind.encode_dense(tensor, rounding(tensor) if rounding else None))
                table = _Table(stored, self._tensors(stored, encoded), encoded.attributes)
            else:
                table = _Table(stored, [self.array(stored, tensor)], {})
            self._tables[name, kind.name] = table
            self.on_written(tensor.size)
        return self._tables[name, kind.name]

    def _tensors(self, stem: str, encoded: EncodedWeight) -> list[ir.Value]:
        return [self.array(f"{stem}.{name}", tensor) for name, tensor in encoded.tensors.items()]

    def _sparse(
        self,
        nodes: NodeList,
        x: ir.Value,
        op_type: str,
        names: Sequence[str],
        weights: Sequence[NDArray[np.float32]],
        keeps: Sequence[NDArray[np.bool_]],
    ) -> ir.Value:
        """Append one sparse node that holds all of `weights`, in the order of rows that the operator wants."""
        swiglu = op_type == self.value_format.swiglu_op
        parts = [Part(f"{name}.weight", weight.shape[0]) for name, weight in zip(names, weights, strict=True)]
        stem = f"{_stem(names)}.weight"
        weight, keep = (interleave(*weights), interleave(*keeps)) if swiglu else (_rows(weights), _rows(keeps))

        def encode() -> EncodedWeight:
            rounded = self.rounding(names, _rows(weights), _rows(keeps)) if self.rounding else None
            if swiglu and rounded is not None:
                rounded = interleave_rounded(rounded)
            return self.value_format.encode(weight, keep, rounded)

        try:
            encoded = _encoded(stem, encode)
        except MaskError as error:
            for part, one, kept in zip(parts, weights, keeps, strict=True):
                if np.any((one != 0) & ~kept):
                    raise _not_zero(part.name) from error
            raise
        tensors = self._tensors(stem, encoded)
        attributes = dict(encoded.attributes) | ({"N": parts[0].rows} if swiglu else {})
        self.on_written(sum(weight.size for weight in weights))
        y = nodes.add(op_type, [x, *tensors], attributes, domain=DOMAIN)
        nodes.nodes[-1].metadata_props[METADATA_KEY] = describe(parts)
        return y

    def _dense(
        self, nodes: NodeList, x: ir.Value, names: Sequence[str], weights: Sequence[NDArray[np.float32]]
    ) -> ir.Value:
        """Append one dense node of the value format that holds all of `weights`."""
        stem, weight = f"{_stem(names)}.weight", _rows(weights)

        def encode() -> EncodedWeight:
            everything = np.ones(weight.shape, dtype=np.bool_)
            rounded = self.rounding(names, weight, everything) if self.rounding else None
            return self.value_format.encode_dense(weight, rounded)

        encoded = _encoded(stem, encode)
        y = nodes.add(self.value_format.dense_op, [x, *self._tensors(stem, encoded)], encoded.attributes, domain=DOMAIN)
        parts = [Part(f"{name}.weight", one.shape[0]) for name, one in zip(names, weights, strict=True)]
        nodes.nodes[-1].metadata_props[METADATA_KEY] = describe(parts)
        self.on_written(weight.size)
        return y

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tuple(tensor.shape.numpy())),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.initializers.append(value)
        return value


def _on_table(
    nodes: NodeList, kind: ValueFormat, op_type: str, x: ir.Value, table: _Table, output: str | None = None
) -> ir.Value:
    """Append an operator of a format on a table that is stored in it."""
    attributes = {key: table.attributes[key] for key in kind.attribute_names(op_type)}
    y = nodes.add(op_type, [x, *table.tensors], attributes, domain=DOMAIN, output=output)
    nodes.nodes[-1].metadata_props[METADATA_KEY] = describe([Part(table.name, attributes["N"])])
    return y


def _rows(matrices: Sequence[NDArray[_Scalar]]) -> NDArray[_Scalar]:
    """The rows of all matrices below each other; a single one as it is."""
    return matrices[0] if len(matrices) == 1 else np.concatenate(matrices)


def _stem(names: Sequence[str]) -> str:
    """A name for modules stored together: "…self_attn.q_proj+k_proj+v_proj"."""
    return "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])


def _encoded(name: str, encode: Callable[[], EncodedWeight]) -> EncodedWeight:
    """Call `encode`, and name the tensor if the format cannot hold it. Raises: FormatError."""
    try:
        return encode()
    except FormatError as error:
        raise FormatError(f"tensor '{name}' cannot be stored: {error}", tensor=name) from error


def _not_zero(name: str) -> MaskError:
    return MaskError(
        f"tensor '{name}' is not zero at every position that its mask prunes; the masks belong to another "
        "checkpoint, or the weights were changed after the merge: run 'losa merge' again",
        tensor=name,
    )
