"""What a value format offers, and the part of it that does not depend on how a value is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from losa_export.errors import FormatError
from losa_export.graph.formats import bodies
from losa_export.graph.formats.base import (
    DOMAIN,
    LAYOUT,
    PADDING_BYTES,
    Bool,
    EncodedWeight,
    Float32,
    block_offsets,
    check_pruned,
    lay_out,
    pack,
    pad,
    take_back,
    unpack,
)
from losa_export.graph.formats.scales import stored_levels
from losa_export.graph.nodes import NodeList
from losa_export.quantise import Rounded

Array = NDArray[Any]

# What the names of operators that norm their input begin with.
_SKIP_NORM = "SkipNorm"


class ValueFormat(ABC):
    """A way to store weights, and the operators that work on them.

    `sparse_op` is X Wᵀ for the kept values of W under a mask. `swiglu_op` is silu(X Gᵀ) ⊙ X Uᵀ, for the rows of gate
    G and up U interleaved (`losa_export.graph.stacking`); its attribute N counts the rows of one of them. `dense_op`
    is X Wᵀ for all values of W, and `embedding_op` gives rows of the same table: the head, the embedding, or both.

    `normed_op` names the operator that multiplies the RMS norm of X + skip in place of X, and gives that sum as well.

    A format turns a weight into levels, one a position, and perhaps scales; the layout is the same for all. What a
    subclass defines is named below, its methods for arrays beside those for ONNX nodes.

    Attributes:
        name: as the user writes it.
        step_columns: columns of a step, see `losa_export.graph.formats.base`.
        level_type: ONNX type of a level.
        element_type: numpy type of a stored value.
        levels_per_element: how many levels share a stored element.
        stores_dense: whether it has a dense and an embedding operator; else a plain matrix does as well.
        own_tensors: node inputs after the values and offsets.
        own_attributes: node attributes after N, K and layout.
    """

    name: ClassVar[str]
    step_columns: ClassVar[int]
    level_type: ClassVar[ir.DataType]
    element_type: ClassVar[np.dtype[Any]]
    levels_per_element: ClassVar[int] = 1
    stores_dense: ClassVar[bool] = True
    own_tensors: ClassVar[tuple[str, ...]] = ()
    own_attributes: ClassVar[tuple[str, ...]] = ()

    @property
    def sparse_op(self) -> str:
        """X Wᵀ of a sparse W."""
        return f"SparseMatMul{self.name.capitalize()}"

    @property
    def swiglu_op(self) -> str:
        """SwiGLU of a sparse gate and up."""
        return f"SparseSwiGLU{self.name.capitalize()}"

    @property
    def dense_op(self) -> str:
        """X Wᵀ of a dense W."""
        return f"DenseMatMul{self.name.capitalize()}"

    @property
    def embedding_op(self) -> str:
        """Rows of a dense W."""
        return f"Embedding{self.name.capitalize()}"

    def normed_op(self, op_type: str) -> str | None:
        """The operator that adds, norms and then does what `op_type` does; None if there is none."""
        products = (self.sparse_op, self.swiglu_op, *([self.dense_op] if self.stores_dense else []))
        return _SKIP_NORM + op_type if op_type in products else None

    def product_of(self, op_type: str) -> str:
        """What an operator does after the norm that it may begin with: the inverse of `normed_op`."""
        return op_type.removeprefix(_SKIP_NORM)

    @property
    def op_types(self) -> tuple[str, ...]:
        """All operators of the format."""
        plain = [self.sparse_op, self.swiglu_op, *([self.dense_op, self.embedding_op] if self.stores_dense else [])]
        return (*plain, *(normed for one in plain if (normed := self.normed_op(one)) is not None))

    def input_names(self, op_type: str) -> tuple[str, ...]:
        """Names of an operator's inputs before those of its weight, in order."""
        if op_type == self.embedding_op:
            return ("ids",)
        return ("X",) if op_type == self.product_of(op_type) else ("X", "skip", "gamma")

    def tensor_names(self, op_type: str) -> tuple[str, ...]:
        """Names of the inputs that hold an operator's weight, which are its last, in order."""
        sparse = self.product_of(op_type) in (self.sparse_op, self.swiglu_op)
        return (("mask", "values", "block_offsets") if sparse else ("values",)) + self.own_tensors

    def attribute_names(self, op_type: str) -> tuple[str, ...]:
        """Names of an operator's integer attributes. An embedding multiplies nothing, so it has no bits to round to."""
        names = ("N", "K", "layout", *self.own_attributes)
        return tuple(name for name in names if name != "activation_bits" or op_type != self.embedding_op)

    def encode(self, weight: Float32, keep: Bool, rounded: Rounded | None = None) -> EncodedWeight:
        """Store `weight` (out, in) float32 under `keep` (out, in) bool; both are left as they are.

        Args:
            weight: zero where pruned.
            keep: True = kept.
            rounded: the weight as somebody else has rounded it to this format; None rounds it here.

        Raises: MaskError if the shapes differ, or a pruned position is not exactly zero; FormatError for a weight
            that the format cannot hold.
        """
        check_pruned(weight, keep)
        levels, own = self.to_levels(weight, keep) if rounded is None else stored_levels(rounded)
        even = self.levels_per_element > 1
        mask, values, offsets = pack(levels, keep, step_columns=self.step_columns, even_steps=even)
        stored = {
            "mask": mask,
            "values": pad(self.to_elements(values)),
            "block_offsets": offsets // self.levels_per_element,
        }
        return EncodedWeight(stored | dict(own), self._attributes(weight))

    def encode_dense(self, weight: Float32, rounded: Rounded | None = None) -> EncodedWeight:
        """Store every value of `weight` (out, in) float32; `rounded` as `encode` takes it. Raises: FormatError."""
        if rounded is None:
            levels, own = self.to_levels(weight, np.ones(weight.shape, dtype=np.bool_))
        else:
            levels, own = stored_levels(rounded)
        values = self.to_elements(lay_out(levels, self.step_columns))
        del levels  # the largest tables come here, and another copy follows
        return EncodedWeight({"values": pad(values), **own}, self._attributes(weight))

    def decode(self, encoded: EncodedWeight) -> tuple[Float32, Bool]:
        """Invert `encode` and `encode_dense`: (the weight that is stored, exactly zero where pruned; keep).

        Raises: FormatError if the tensors contradict each other.
        """
        tensors, rows, columns = encoded.tensors, encoded.attributes["N"], encoded.attributes["K"]
        levels = self.from_elements(self._unpadded(tensors["values"]))
        if "mask" not in tensors:
            keep = np.ones((rows, columns), dtype=np.bool_)
            return self.from_levels(take_back(levels, rows, columns, self.step_columns), keep, encoded), keep
        even = self.levels_per_element > 1
        mask = tensors["mask"].astype(np.uint8, copy=False)
        by_position, keep = unpack(mask, levels, rows, columns, even_steps=even)
        if not np.array_equal(tensors["block_offsets"] * self.levels_per_element, block_offsets(mask, even_steps=even)):
            raise FormatError("block_offsets do not count the kept positions of the mask: export again")
        return self.from_levels(by_position, keep, encoded), keep

    def function(self, op_type: str, opset_version: int) -> ir.Function:
        """Define one of the operators in standard ones, so that an engine without our library runs it."""
        inputs = [ir.val(name) for name in self.input_names(op_type)]
        tensors = {name: ir.val(name) for name in self.tensor_names(op_type)}
        nodes, first, outputs = NodeList(), inputs[0], []
        attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in self.attribute_names(op_type)]
        if len(inputs) > 1:
            _, skip, gamma = inputs
            first, total = bodies.skip_norm(nodes, first, skip, gamma, output="sum")
            outputs.append(total)
            attributes.append(ir.Attr("epsilon", ir.AttributeType.FLOAT, None))
        if op_type == self.embedding_op:
            output = self._embedding(nodes, first, tensors)
        elif self.product_of(op_type) == self.swiglu_op:
            gate, up = self._weights(nodes, tensors, parts=2)
            output = bodies.swiglu(nodes, first, gate, up, output="Y")
        else:
            [weight] = self._weights(nodes, tensors, parts=1)
            output = nodes.add("MatMul", [first, weight], output="Y")
        imports = {"": opset_version}
        graph = ir.Graph([*inputs, *tensors.values()], [output, *outputs], nodes=nodes.nodes, opset_imports=imports)
        return ir.Function(DOMAIN, op_type, graph=graph, attributes=attributes)

    # ---- what a format defines: for arrays … ----

    @abstractmethod
    def to_levels(self, weight: Float32, keep: Bool) -> tuple[Array, Mapping[str, Array]]:
        """Levels (N, K) of a weight, and the format's own tensors."""

    @abstractmethod
    def from_levels(self, levels: Array, keep: Bool, encoded: EncodedWeight) -> Float32:
        """The weight (N, K) that levels stand for. Raises: FormatError if the own tensors do not fit."""

    def to_elements(self, levels: Array) -> Array:
        """What is stored for levels (n,) in layout order."""
        return levels

    def from_elements(self, values: Array) -> Array:
        """Invert `to_elements`."""
        return values

    # ---- … and for nodes ----

    def element_levels(self, nodes: NodeList, values: ir.Value, tensors: Mapping[str, ir.Value]) -> ir.Value:
        """Levels of stored values of any shape; of those that share an element, in a further axis."""
        del nodes, tensors
        return values

    def _attributes(self, weight: Float32) -> dict[str, int]:
        own = {name: int(getattr(self, name)) for name in self.own_attributes}
        return {"N": weight.shape[0], "K": weight.shape[1], "layout": LAYOUT, **own}

    def _unpadded(self, values: Array) -> Array:
        padding = PADDING_BYTES // self.element_type.itemsize
        if values.dtype != self.element_type or values.ndim != 1 or values.size < padding:
            raise FormatError(
                f"values are {values.dtype} {values.shape}; {self.element_type} (stored + {padding},) is needed: "
                "export the model again"
            )
        return values[: values.size - padding]

    def _weights(self, nodes: NodeList, tensors: Mapping[str, ir.Value], *, parts: int) -> list[ir.Value]:
        """The weight as `parts` float32 matrices (K, N)."""
        sizes = bodies.Sizes(nodes, self.step_columns)
        levels = self.element_levels(nodes, tensors["values"], tensors)
        if self.levels_per_element > 1:
            levels = nodes.add("Reshape", [levels, nodes.integers(-1)])
        if "mask" in tensors:
            by_column = bodies.kept_levels(
                nodes,
                tensors["mask"],
                levels,
                step_columns=self.step_columns,
                even_steps=self.levels_per_element > 1,
                level_type=self.level_type,
            )
        else:
            by_column = bodies.every_position(nodes, levels, sizes, self.step_columns)
        found = [self._widened(nodes, one) for one in bodies.matrices(nodes, by_column, sizes, parts)]
        if "scales" in tensors:
            scales = bodies.scales_by_column(nodes, tensors["scales"], sizes, parts)
            found = [nodes.add("Mul", [one, scale]) for one, scale in zip(found, scales, strict=True)]
        return found

    def _embedding(self, nodes: NodeList, ids: ir.Value, tensors: Mapping[str, ir.Value]) -> ir.Value:
        """Rows `ids` of the weight, gathered while they are still narrow: (…, K) float32."""
        sizes = bodies.Sizes(nodes, self.step_columns)
        width = self.step_columns // self.levels_per_element
        elements = bodies.row_elements(nodes, ids, tensors["values"], sizes, width)
        levels = self.element_levels(nodes, elements, tensors)
        shape = nodes.add("Concat", [nodes.add("Shape", [ids]), nodes.integers(-1)], {"axis": 0})
        in_rows = nodes.add("Reshape", [levels, shape])
        cut = nodes.add("Slice", [in_rows, nodes.integers(0), sizes.columns, nodes.integers(-1)])
        if "scales" not in tensors:
            return self._widened(nodes, cut, output="Y")
        scales = bodies.row_scales(nodes, ids, tensors["scales"], sizes)
        return nodes.add("Mul", [self._widened(nodes, cut), scales], output="Y")

    def _widened(self, nodes: NodeList, levels: ir.Value, output: str | None = None) -> ir.Value:
        if self.level_type == ir.DataType.FLOAT:
            return levels
        return nodes.add("Cast", [levels], {"to": ir.DataType.FLOAT}, output=output)
