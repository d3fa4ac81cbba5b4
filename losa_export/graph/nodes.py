"""A list of nodes under construction: the few lines of onnx-ir that every graph part repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Attribute = int | float | str | Sequence[int] | ir.DataType | ir.TensorProtocol


class NodeList:
    """Collects nodes in order; `prefix` makes the names of nodes and values unique and readable."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[ir.Node] = []
        self.prefix = prefix
        self._count = 0

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
        output: str | None = None,
    ) -> ir.Value:
        """Append a node with one output, and return that output."""
        return self.add_many(op_type, inputs, [output], attributes, domain=domain)[0]

    def add_many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[str | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
    ) -> list[ir.Value]:
        """Append a node; `outputs` holds names, None for a made-up one, and "" for an output left out."""
        self._count += 1
        stem = f"{self.prefix}{op_type}_{self._count}"
        values = [ir.Value(name=f"{stem}_{number}" if name is None else name) for number, name in enumerate(outputs)]
        converted = [_attribute(name, value) for name, value in (attributes or {}).items()]
        self.nodes.append(ir.Node(domain, op_type, inputs, converted, outputs=values, name=stem))
        return values

    def constant(self, array: NDArray[np.generic] | np.generic) -> ir.Value:
        """A Constant node holding `array`."""
        [value] = self.add_many("Constant", [], [None])
        self.nodes[-1].attributes.add(ir.Attr("value", ir.AttributeType.TENSOR, ir.tensor(np.asarray(array))))
        return value

    def integer(self, number: int, dtype: type[np.integer] = np.int64) -> ir.Value:
        """A scalar constant."""
        return self.constant(np.array(number, dtype=dtype))

    def integers(self, *numbers: int) -> ir.Value:
        """A constant int64 vector."""
        return self.constant(np.array(numbers, dtype=np.int64))

    def refer(self, name: str, kind: ir.AttributeType, outer: str | None = None) -> None:
        """Inside a function: give the last node attribute `name` of the calling node, where it is called `outer`."""
        self.nodes[-1].attributes.add(ir.RefAttr(name, outer or name, kind))

    def reference(self, attribute: str) -> ir.Value:
        """Inside a function: the calling node's integer attribute, as an int64 vector of one element."""
        [scalar] = self.add_many("Constant", [], [None])
        self.refer("value_int", ir.AttributeType.INT, attribute)
        return self.add("Unsqueeze", [scalar, self.integers(0)])


def _attribute(name: str, value: Attribute) -> ir.Attr:
    if isinstance(value, ir.DataType):
        return ir.AttrInt64(name, int(value))
    return ir.convenience.convert_attribute(name, value)
