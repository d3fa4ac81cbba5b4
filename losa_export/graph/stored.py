"""What nodes of our domain hold: found in a written model, decoded from its files, or set to other activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import FormatError
from losa_export.graph.attention import ATTENTION_OP
from losa_export.graph.composed import input_names, products_of
from losa_export.graph.external import ModelFolder
from losa_export.graph.formats import DOMAIN, EncodedWeight, ValueFormat
from losa_export.graph.formats.base import BLOCK_ROWS, unpack_mask
from losa_export.graph.stacking import Part, parse, parts_of

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True)
class StoredNode:
    """One weight of a node of our domain.

    Attributes:
        name: of the node.
        op_type: its operator; of one product among several, what that would be alone.
        value_format: that the operator belongs to.
        tensors: short name → initializer.
        attributes: the node's integers that describe its weight.
        parts: checkpoint tensors whose rows it holds.
    """

    name: str
    op_type: str
    value_format: ValueFormat
    tensors: Mapping[str, str]
    attributes: Mapping[str, int]
    parts: tuple[Part, ...]

    @property
    def is_sparse(self) -> bool:
        """Whether it holds a mask."""
        return "mask" in self.tensors

    def masks(self, model: ModelFolder) -> list[NDArray[np.bool_]]:
        """Of each part which weights are kept: (rows, K) bool.

        Raises: FormatError if the mask does not fit the attributes or the parts.
        """
        mask = model.read(self.tensors["mask"]).astype(np.uint8, copy=False)
        rows = self._rows(mask.shape[0])
        return self._apart(unpack_mask(mask, rows, self.attributes["K"]))

    def weights(self, model: ModelFolder) -> list[NDArray[np.float32]]:
        """Of each part the weight that is stored, rounded as it is: (rows, K) float32.

        Raises: FormatError if the tensors contradict each other, the attributes or the parts.
        """
        tensors = {short: model.read(name) for short, name in self.tensors.items()}
        rows = self._rows(tensors["mask"].shape[0]) if self.is_sparse else self.attributes["N"]
        weight, _ = self.value_format.decode(EncodedWeight(tensors, {**self.attributes, "N": rows}))
        return self._apart(weight)

    @property
    def _interleaved(self) -> bool:
        return self.value_format.product_of(self.op_type) == self.value_format.swiglu_op

    def _rows(self, blocks: int) -> int:
        return blocks * BLOCK_ROWS if self._interleaved else self.attributes["N"]

    def _apart(self, stored: NDArray[_Scalar]) -> list[NDArray[_Scalar]]:
        return parts_of(stored, [part.rows for part in self.parts], interleaved=self._interleaved)


def stored_nodes(model: ModelFolder) -> Iterator[StoredNode]:
    """Every weight that a node of our domain holds, in order; a node of several products gives one for each.

    Raises: FormatError if one is of no known format, or does not name its weights.
    """
    for node in model.proto.graph.node:
        if node.domain != DOMAIN or node.op_type == ATTENTION_OP:
            continue
        products = products_of(node.op_type)
        names = input_names(node.op_type) if products else ()
        if len(node.input) != len(names):
            raise FormatError(
                f"node '{node.name}' has the unknown operator '{node.op_type}' with {len(node.input)} inputs: "
                "export the model again"
            )
        inputs = dict(zip(names, node.input, strict=True))
        numbers = {one.name: int(one.i) for one in node.attribute if one.type == one.INT}
        metadata = {entry.key: entry.value for entry in node.metadata_props}
        for product in products:
            yield StoredNode(
                node.name,
                product.op_type,
                product.value_format,
                {short: inputs[name] for short, name in product.tensors.items()},
                {short: numbers[name] for short, name in product.attributes.items() if name in numbers},
                parse(metadata.get(product.metadata_key), node.name),
            )


def read_weights(model: ModelFolder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every checkpoint tensor that nodes of our domain hold, as it is stored: name and (out, in) float32, each once."""
    seen: set[str] = set()
    for node in stored_nodes(model):
        names = [part.name for part in node.parts]
        if not seen.issuperset(names):
            yield from zip(names, node.weights(model), strict=True)
        seen.update(names)


def with_activation_bits(model: bytes, bits: int) -> bytes:
    """A serialised model whose products all round activations to `bits` bits, 8 or 16; its weights stay as they are."""
    import onnx

    proto = onnx.load_model_from_string(model)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.domain == DOMAIN and attribute.name.endswith("activation_bits"):
                attribute.i = bits
    written: bytes = proto.SerializeToString()
    return written
