"""The dialect that DeepSparse 1.8 accelerates: opset 13, and a cache that the engine can keep to itself.

Its conventions are those of SparseML's exports: inputs `positions` and `causal_mask`, and keys and values of every
head in the cache. The engine aborts where grouped heads are repeated behind the cache, so they are repeated before it.
Pruned weights stay zeros in ordinary matrices; the engine finds them when it compiles the graph.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from losa_export.architecture import DecoderSpec
from losa_export.errors import UnsupportedArchitectureError
from losa_export.graph.nodes import NodeList
from losa_export.graph.profiles import Inputs, LayerCache, QueryKeyValue


class DeepSparseProfile:
    """Operators of opset 13 alone; see `losa_export.graph.profiles.Profile`.

    Raises: UnsupportedArchitectureError for a decoder with learned positions or a sliding window.
    """

    opset_imports: ClassVar[dict[str, int]] = {"": 13}
    ir_version = 7
    # With the transposition left to the engine a prefill took a sixth longer.
    copies_head = True
    takes_packed = False

    def __init__(self, spec: DecoderSpec) -> None:
        if spec.rope is None or spec.sliding_window is not None:
            raise UnsupportedArchitectureError(
                f"{spec.architecture} has {'learned positions' if spec.rope is None else 'a sliding window'}, which "
                "profile 'deepsparse' does not write; choose another profile",
                architecture=spec.architecture,
            )
        self._spec = spec

    @property
    def cache_heads(self) -> int:
        """See `Profile.cache_heads`: those of queries."""
        return self._spec.num_heads

    def inputs(self) -> Inputs:
        """See `Profile.inputs`: `attention_mask` is for the engine's own bookkeeping, `causal_mask` for attention."""
        integer, batch, sequence, total = ir.DataType.INT64, "batch", "sequence", "total_sequence"
        return Inputs(
            input_ids=ir.val("input_ids", integer, [batch, sequence]),
            attention_mask=ir.val("attention_mask", integer, [batch, total]),
            position_ids=ir.val("positions", integer, [batch, sequence]),
            causal_mask=ir.val("causal_mask", integer, [batch, 1, sequence, total]),
        )

    def prepare(self, nodes: NodeList, inputs: Inputs, rotary: tuple[ir.Value, ir.Value] | None) -> None:
        """See `Profile.prepare`: cosines and sines of the given positions, and what is added to the scores."""
        assert rotary is not None  # no rope is refused above
        assert inputs.causal_mask is not None  # as made by `inputs`
        self._cos, self._sin = (self._rows(nodes, table, inputs.position_ids) for table in rotary)
        visible = nodes.add("Cast", [inputs.causal_mask], {"to": ir.DataType.FLOAT})
        hidden = nodes.add("Sub", [visible, _scalar(nodes, 1.0)])
        self._bias = nodes.add("Mul", [hidden, _scalar(nodes, float(np.finfo(np.float32).max))])

    @staticmethod
    def _rows(nodes: NodeList, table: ir.Value, positions: ir.Value) -> ir.Value:
        """(batch, 1, sequence, head dim) of a table (positions, head dim / 2): both halves alike."""
        both = nodes.add("Concat", [table, table], {"axis": -1})
        return nodes.add("Unsqueeze", [nodes.add("Gather", [both, positions]), nodes.integers(1)])

    def add_norm(
        self, nodes: NodeList, x: ir.Value, skip: ir.Value | None, weight: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """See `Profile.add_norm`."""
        total = x if skip is None else nodes.add("Add", [x, skip])
        square = nodes.add("Pow", [total, _scalar(nodes, 2.0)])
        mean = nodes.add("ReduceMean", [square], {"axes": [-1], "keepdims": 1})
        root = nodes.add("Sqrt", [nodes.add("Add", [mean, _scalar(nodes, self._spec.norm_eps)])])
        normed = nodes.add("Mul", [total, nodes.add("Div", [_scalar(nodes, 1.0), root])])
        return nodes.add("Mul", [weight, normed]), total

    def add_layer_norm(
        self, nodes: NodeList, x: ir.Value, skip: ir.Value | None, affine: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        """Never asked for: the families with LayerNorms have learned positions, which are refused."""
        raise NotImplementedError

    def attention(self, nodes: NodeList, qkv: QueryKeyValue, cache: LayerCache) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `Profile.attention`; the cache grows by concatenation, and the engine may take that over."""
        spec, (q, k, v) = self._spec, qkv
        assert k is not None  # `takes_packed` is False
        assert v is not None
        query = self._rotated(nodes, self._heads(nodes, q, spec.num_heads))
        new_key = self._repeated(nodes, self._rotated(nodes, self._heads(nodes, k, spec.num_kv_heads)))
        new_value = self._repeated(nodes, self._heads(nodes, v, spec.num_kv_heads))
        key = nodes.add("Concat", [cache.past_key, new_key], {"axis": 2}, output=cache.present_key)
        value = nodes.add("Concat", [cache.past_value, new_value], {"axis": 2}, output=cache.present_value)
        products = nodes.add("MatMul", [query, nodes.add("Transpose", [key], {"perm": [0, 1, 3, 2]})])
        scores = nodes.add("Div", [products, _scalar(nodes, spec.head_dim**0.5)])
        weights = nodes.add("Softmax", [nodes.add("Add", [scores, self._bias])], {"axis": -1})
        heads = nodes.add("Transpose", [nodes.add("MatMul", [weights, value])], {"perm": [0, 2, 1, 3]})
        return nodes.add("Reshape", [heads, nodes.integers(0, -1, spec.num_heads * spec.head_dim)]), key, value

    def _heads(self, nodes: NodeList, x: ir.Value, heads: int) -> ir.Value:
        """(batch, sequence, heads · head dim) to (batch, heads, sequence, head dim)."""
        split = nodes.add("Reshape", [x, nodes.integers(0, -1, heads, self._spec.head_dim)])
        return nodes.add("Transpose", [split], {"perm": [0, 2, 1, 3]})

    def _rotated(self, nodes: NodeList, x: ir.Value) -> ir.Value:
        """x·cos + (−x₂, x₁)·sin. Source: Su et al. 2021, "RoFormer", arXiv:2104.09864, halves instead of pairs."""
        half, width = self._spec.head_dim // 2, self._spec.head_dim
        last = nodes.integers(3)
        first = nodes.add("Slice", [x, nodes.integers(0), nodes.integers(half), last])
        second = nodes.add("Slice", [x, nodes.integers(half), nodes.integers(width), last])
        turned = nodes.add("Concat", [nodes.add("Neg", [second]), first], {"axis": 3})
        return nodes.add("Add", [nodes.add("Mul", [x, self._cos]), nodes.add("Mul", [turned, self._sin])])

    def _repeated(self, nodes: NodeList, x: ir.Value) -> ir.Value:
        """Each head of keys or values once for every head of queries that reads it."""
        spec = self._spec
        times = spec.num_heads // spec.num_kv_heads
        if times == 1:
            return x
        apart = nodes.add("Unsqueeze", [x, nodes.integers(2)])
        spread = nodes.add("Expand", [apart, nodes.integers(1, spec.num_kv_heads, times, 1, spec.head_dim)])
        return nodes.add("Reshape", [spread, nodes.integers(0, spec.num_heads, -1, spec.head_dim)])

    def silu(self, nodes: NodeList, x: ir.Value) -> ir.Value:
        """See `Profile.silu`."""
        return nodes.add("Mul", [x, nodes.add("Sigmoid", [x])])

    def head(self, nodes: NodeList, x: ir.Value, table: ir.Value) -> ir.Value:
        """Never asked for, since `copies_head` is True."""
        raise NotImplementedError


def _scalar(nodes: NodeList, number: float) -> ir.Value:
    return nodes.constant(np.array(number, dtype=np.float32))
