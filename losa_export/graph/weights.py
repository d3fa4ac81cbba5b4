"""From checkpoint tensors to initializers, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from losa_export.checkpoint import Checkpoint
from losa_export.errors import MaskError
from losa_export.graph.external import ExternalDataWriter
from losa_export.graph.formats import DOMAIN, ValueFormat
from losa_export.graph.nodes import NodeList
from losa_export.graph.sparsity import SparsityPlan


@dataclass
class WeightStore:
    """Reads a checkpoint's tensors, writes them as external data, and hands out initializers.

    Attributes:
        checkpoint: where tensors come from.
        writer: where they go.
        plan: which linears are stored sparsely, and under which masks.
        value_format: how a sparse linear's values are stored.
        on_written: called with the number of weights after each tensor, for progress.
        initializers: made so far, in file order.
    """

    checkpoint: Checkpoint
    writer: ExternalDataWriter
    plan: SparsityPlan
    value_format: ValueFormat
    on_written: Callable[[int], None] = lambda count: None  # noqa: ARG005
    initializers: list[ir.Value] = field(default_factory=list)

    def array(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """An initializer that is not from the checkpoint."""
        return self._initializer(self.writer.add(name, array))

    def plain(self, name: str) -> ir.Value:
        """Checkpoint tensor `name`, stored as it is."""
        tensor = self.checkpoint.read(name)
        value = self.array(name, tensor)
        self.on_written(tensor.size)
        return value

    def linear(self, nodes: NodeList, x: ir.Value, name: str, *, bias: bool) -> ir.Value:
        """Append x Wᵀ (+ b) for the linear module `name`, sparse if the plan says so."""
        weight_name = f"{name}.weight"
        weight = self.checkpoint.read(weight_name)
        keep = self.plan.keep(weight_name, weight)
        if keep is None or not self.plan.store_sparse:
            if keep is not None and np.any((weight != 0) & ~keep):
                raise _not_zero(weight_name)
            y = nodes.add("MatMul", [x, self._transposed(weight_name, weight)])
        else:
            y = self._sparse(nodes, x, weight_name, weight, keep)
        if bias:
            y = nodes.add("Add", [y, self.plain(f"{name}.bias")])
        return y

    def _transposed(self, name: str, weight: NDArray[np.float32]) -> ir.Value:
        value = self._initializer(self.writer.add_transposed(f"{name}.transposed", weight))
        self.on_written(weight.size)
        return value

    def _sparse(
        self, nodes: NodeList, x: ir.Value, name: str, weight: NDArray[np.float32], keep: NDArray[np.bool_]
    ) -> ir.Value:
        try:
            encoded = self.value_format.encode(weight, keep)
        except MaskError as error:
            raise _not_zero(name) from error
        parts = [self.array(f"{name}.{part}", tensor) for part, tensor in encoded.tensors.items()]
        self.on_written(weight.size)
        return nodes.add(self.value_format.op_type, [x, *parts], dict(encoded.attributes), domain=DOMAIN)

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tuple(tensor.shape.numpy())),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.initializers.append(value)
        return value


def _not_zero(name: str) -> MaskError:
    return MaskError(
        f"tensor '{name}' is not zero at every position that its mask prunes; the masks belong to another "
        "checkpoint, or the weights were changed after the merge: run 'losa merge' again",
        tensor=name,
    )
