"""The dialects a decoder can be written in, behind one set of building blocks.

`ort` uses ONNX Runtime's contributed operators: attention with rotary embedding and a KV cache that may be updated
in place, and residual additions fused into norms. `standard` uses ONNX opset 23 alone. `deepsparse` has a module of
its own.

They differ in what padding they allow. Under `standard` any position may be masked, and `position_ids` say what they
like. Under `ort` a row's tokens stand at the front (padding to the right) and the mask's row sums are the lengths,
which is what lets rows of different length share one in-place cache; `position_ids` count for tokens after a past,
while GroupQueryAttention counts a prompt without a past from 0 whatever they say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import onnx_ir as ir

from losa_export.architecture import DecoderSpec
from losa_export.graph.nodes import NodeList

ProfileName = Literal["ort", "standard", "deepsparse"]

# Attention, RotaryEmbedding and RMSNormalization are standard from 23 on; ONNX Runtime 1.24 reads it.
OPSET = 23
# What ONNX Runtime 1.24 reads; newer readers read it too.
IR_VERSION = 10
CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Inputs:
    """What a graph is given beside its cache, int64, in the order of its inputs.

    Attributes:
        input_ids: (batch, sequence).
        attention_mask: (batch, total): 1 where a token stands.
        position_ids: (batch, sequence).
        causal_mask: (batch, 1, sequence, total): 1 where a token sees another; None where the graph works it out.
    """

    input_ids: ir.Value
    attention_mask: ir.Value
    position_ids: ir.Value
    causal_mask: ir.Value | None = None

    @classmethod
    def with_usual_names(cls) -> Inputs:
        """Those of Hugging Face's own exports."""
        return cls(
            input_ids=ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"]),
            attention_mask=ir.val("attention_mask", ir.DataType.INT64, ["batch", "total_sequence"]),
            position_ids=ir.val("position_ids", ir.DataType.INT64, ["batch", "sequence"]),
        )

    def values(self) -> list[ir.Value]:
        """All that there are."""
        return [
            value
            for value in (self.input_ids, self.attention_mask, self.position_ids, self.causal_mask)
            if value is not None
        ]


@dataclass(frozen=True)
class LayerCache:
    """One layer's KV cache: (batch, kv heads, past, head dim) each, and the names of what replaces them."""

    past_key: ir.Value
    past_value: ir.Value
    present_key: str
    present_value: str


# Key and value are None where the first tensor holds all three (`Profile.takes_packed`).
QueryKeyValue = tuple[ir.Value, ir.Value | None, ir.Value | None]


class Profile(Protocol):
    """Building blocks of a decoder. Each appends to the node list it is given."""

    opset_imports: ClassVar[dict[str, int]]
    ir_version: int
    # Whether the head has a transposed matrix of its own, even where the embedding's is the same.
    copies_head: bool

    @property
    def cache_heads(self) -> int:
        """Heads of keys and values in the cache."""
        ...

    def inputs(self) -> Inputs:
        """What the graph is given beside its cache."""
        ...

    @property
    def takes_packed(self) -> bool:
        """Whether `attention` takes query, key and value side by side in one tensor."""
        ...

    def prepare(self, nodes: NodeList, inputs: Inputs, rotary: tuple[ir.Value, ir.Value] | None) -> None:
        """Append what all layers share; called once, before the layers.

        `rotary` is cosines and sines, (positions, head dim / 2) each; without them attention does not rotate.
        """
        ...

    def add_norm(
        self, nodes: NodeList, x: ir.Value, skip: ir.Value | None, weight: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """RMS norm of x + skip; returns it, and the sum for the next residual."""
        ...

    def add_layer_norm(
        self, nodes: NodeList, x: ir.Value, skip: ir.Value | None, affine: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        """LayerNorm of x + skip with weight and bias; returns it, and the sum for the next residual."""
        ...

    def attention(self, nodes: NodeList, qkv: QueryKeyValue, cache: LayerCache) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Grouped-query attention, rotary if `prepare` was given caches.

        Returns: output (batch, sequence, heads · head dim), present key and value.
        """
        ...

    def silu(self, nodes: NodeList, x: ir.Value) -> ir.Value:
        """SiLU: x · sigmoid(x)."""
        ...

    def head(self, nodes: NodeList, x: ir.Value, table: ir.Value) -> ir.Value:
        """Scores of each token, x Eᵀ, for E (vocabulary, hidden); so a tied table is stored once."""
        ...


def make_profile(name: ProfileName, spec: DecoderSpec) -> Profile:
    """The building blocks of profile `name` for one model. Raises: UnsupportedArchitectureError if it has none."""
    if name == "deepsparse":
        from losa_export.graph.deepsparse import DeepSparseProfile

        return DeepSparseProfile(spec)
    return OrtProfile(spec) if name == "ort" else StandardProfile(spec)


def rms_norm(nodes: NodeList, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
    """RMS norm over the last axis. Source: Zhang and Sennrich 2019, arXiv:1910.07467."""
    return nodes.add("RMSNormalization", [x, weight], {"axis": -1, "epsilon": epsilon, "stash_type": 1})


def layer_norm(nodes: NodeList, x: ir.Value, affine: tuple[ir.Value, ir.Value], epsilon: float) -> ir.Value:
    """LayerNorm over the last axis, with weight and bias. Source: Ba et al. 2016, arXiv:1607.06450."""
    return nodes.add("LayerNormalization", [x, *affine], {"axis": -1, "epsilon": epsilon, "stash_type": 1})


def rotate(nodes: NodeList, x: ir.Value, rotary: tuple[ir.Value, ir.Value, ir.Value], heads: int) -> ir.Value:
    """Rotary embedding of x (batch, sequence, heads · head dim); `rotary` is cosines, sines and position ids."""
    return nodes.add("RotaryEmbedding", [x, *rotary], {"num_heads": heads})


class OrtProfile:
    """ONNX Runtime's contributed operators, as of version 1.24."""

    opset_imports: ClassVar[dict[str, int]] = {"": OPSET, CONTRIB: 1}
    ir_version = IR_VERSION
    copies_head = False

    def __init__(self, spec: DecoderSpec) -> None:
        self._spec = spec
        # The operator's own rotation only takes heads of a multiple of 16; the smallest models have 8.
        self._rotates = spec.rope is not None and spec.head_dim % 16 == 0

    @property
    def cache_heads(self) -> int:
        """See `Profile.cache_heads`."""
        return self._spec.num_kv_heads

    def inputs(self) -> Inputs:
        """See `Profile.inputs`."""
        return Inputs.with_usual_names()

    @property
    def takes_packed(self) -> bool:
        """See `Profile.takes_packed`: unless something has to be done to query and key first."""
        return (self._rotates or self._spec.rope is None) and not self._spec.qk_norm

    def prepare(self, nodes: NodeList, inputs: Inputs, rotary: tuple[ir.Value, ir.Value] | None) -> None:
        """See `Profile.prepare`: per-row lengths, as GroupQueryAttention counts them."""
        self._rotary = None if rotary is None else (*rotary, inputs.position_ids)
        lengths = nodes.add("ReduceSum", [inputs.attention_mask, nodes.integers(1)], {"keepdims": 0})
        last = nodes.add("Sub", [lengths, nodes.integer(1)])
        self._last = nodes.add("Cast", [last], {"to": ir.DataType.INT32})
        total = nodes.add("Shape", [inputs.attention_mask], {"start": 1, "end": 2})
        self._total = nodes.add("Cast", [total], {"to": ir.DataType.INT32})

    def add_norm(
        self, nodes: NodeList, x: ir.Value, skip: ir.Value | None, weight: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """See `Profile.add_norm`: one fused node."""
        epsilon = self._spec.norm_eps
        if skip is None:
            return rms_norm(nodes, x, weight, epsilon), x
        normed, _, _, total = nodes.add_many(
            "SkipSimplifiedLayerNormalization",
            [x, skip, weight],
            [None, "", "", None],
            {"epsilon": epsilon},
            domain=CONTRIB,
        )
        return normed, total

    def add_layer_norm(
        self, nodes: NodeList, x: ir.Value, skip: ir.Value | None, affine: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        """See `Profile.add_layer_norm`: one fused node."""
        epsilon = self._spec.norm_eps
        if skip is None:
            return layer_norm(nodes, x, affine, epsilon), x
        normed, _, _, total = nodes.add_many(
            "SkipLayerNormalization", [x, skip, *affine], [None, "", "", None], {"epsilon": epsilon}, domain=CONTRIB
        )
        return normed, total

    def attention(self, nodes: NodeList, qkv: QueryKeyValue, cache: LayerCache) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `Profile.attention`. A batch with a past must have one new token a row: the operator's own limit."""
        spec, (q, k, v), fused = self._spec, qkv, self._rotates
        if self._rotary is not None and not fused:
            assert k is not None
            q = rotate(nodes, q, self._rotary, spec.num_heads)
            k = rotate(nodes, k, self._rotary, spec.num_kv_heads)
        attributes = {
            "num_heads": spec.num_heads,
            "kv_num_heads": spec.num_kv_heads,
            "scale": spec.head_dim**-0.5,
            "do_rotary": int(fused),
            "local_window_size": spec.sliding_window or -1,
        }
        past = [cache.past_key, cache.past_value]
        rotary = self._rotary if fused else None
        output, key, value = nodes.add_many(
            "GroupQueryAttention",
            [q, k, v, *past, self._last, self._total, *(rotary or ())],
            [None, cache.present_key, cache.present_value],
            attributes,
            domain=CONTRIB,
        )
        return output, key, value

    def silu(self, nodes: NodeList, x: ir.Value) -> ir.Value:
        """See `Profile.silu`: QuickGelu with alpha 1 is SiLU, in one pass over x."""
        return nodes.add("QuickGelu", [x], {"alpha": 1.0}, domain=CONTRIB)

    def head(self, nodes: NodeList, x: ir.Value, table: ir.Value) -> ir.Value:
        """See `Profile.head`: as fast as MatMul with a transposed copy, since both are packed at load."""
        return nodes.add("FusedMatMul", [x, table], {"transB": 1}, domain=CONTRIB, output="logits")


class StandardProfile:
    """ONNX opset 23, without contributed operators."""

    opset_imports: ClassVar[dict[str, int]] = {"": OPSET}
    ir_version = IR_VERSION
    copies_head = False
    takes_packed = False

    def __init__(self, spec: DecoderSpec) -> None:
        self._spec = spec

    @property
    def cache_heads(self) -> int:
        """See `Profile.cache_heads`."""
        return self._spec.num_kv_heads

    def inputs(self) -> Inputs:
        """See `Profile.inputs`."""
        return Inputs.with_usual_names()

    def prepare(self, nodes: NodeList, inputs: Inputs, rotary: tuple[ir.Value, ir.Value] | None) -> None:
        """See `Profile.prepare`: one attention mask for all layers, and the shape of the logits.

        Query i stands at place past + i. It sees the places up to its own that attention_mask allows, within
        the window; and always itself, since a row that sees nothing would be 0/0 and poison later layers.
        """
        self._rotary = None if rotary is None else (*rotary, inputs.position_ids)
        zero, one = nodes.integer(0), nodes.integer(1)
        total = self._size(nodes, inputs.attention_mask)
        past = nodes.add("Sub", [total, self._size(nodes, inputs.input_ids)])
        keys = nodes.add("Range", [zero, total, one])
        queries = nodes.add("Unsqueeze", [nodes.add("Range", [past, total, one]), nodes.integers(1)])
        visible = nodes.add("LessOrEqual", [keys, queries])
        if self._spec.sliding_window is not None:
            oldest = nodes.add("Sub", [queries, nodes.integer(self._spec.sliding_window)])
            visible = nodes.add("And", [visible, nodes.add("Greater", [keys, oldest])])
        allowed = nodes.add("Cast", [inputs.attention_mask], {"to": ir.DataType.BOOL})
        by_row = nodes.add("Unsqueeze", [allowed, nodes.integers(1, 2)])
        masked = nodes.add("And", [visible, by_row])
        self._mask = nodes.add("Or", [masked, nodes.add("Equal", [keys, queries])])
        leading = nodes.add("Shape", [inputs.input_ids])
        self._logits_shape = nodes.add("Concat", [leading, nodes.integers(self._spec.vocab_size)], {"axis": 0})

    @staticmethod
    def _size(nodes: NodeList, value: ir.Value) -> ir.Value:
        """Length of the second axis, as a scalar."""
        return nodes.add("Squeeze", [nodes.add("Shape", [value], {"start": 1, "end": 2})])

    def add_norm(
        self, nodes: NodeList, x: ir.Value, skip: ir.Value | None, weight: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """See `Profile.add_norm`."""
        total = x if skip is None else nodes.add("Add", [x, skip])
        return rms_norm(nodes, total, weight, self._spec.norm_eps), total

    def add_layer_norm(
        self, nodes: NodeList, x: ir.Value, skip: ir.Value | None, affine: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        """See `Profile.add_layer_norm`."""
        total = x if skip is None else nodes.add("Add", [x, skip])
        return layer_norm(nodes, total, affine, self._spec.norm_eps), total

    def attention(self, nodes: NodeList, qkv: QueryKeyValue, cache: LayerCache) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `Profile.attention`; the cache grows by concatenation inside Attention."""
        spec, (q, k, v) = self._spec, qkv
        if self._rotary is not None:
            assert k is not None
            q = rotate(nodes, q, self._rotary, spec.num_heads)
            k = rotate(nodes, k, self._rotary, spec.num_kv_heads)
        attributes = {
            "q_num_heads": spec.num_heads,
            "kv_num_heads": spec.num_kv_heads,
            "scale": spec.head_dim**-0.5,
        }
        output, key, value = nodes.add_many(
            "Attention",
            [q, k, v, self._mask, cache.past_key, cache.past_value],
            [None, cache.present_key, cache.present_value],
            attributes,
        )
        return output, key, value

    def silu(self, nodes: NodeList, x: ir.Value) -> ir.Value:
        """See `Profile.silu`."""
        return nodes.add("Mul", [x, nodes.add("Sigmoid", [x])])

    def head(self, nodes: NodeList, x: ir.Value, table: ir.Value) -> ir.Value:
        """See `Profile.head`: Gemm reads the table transposed, but only knows matrices."""
        flat = nodes.add("Reshape", [x, nodes.constant(np.array([-1, self._spec.embedding_size], dtype=np.int64))])
        scores = nodes.add("Gemm", [flat, table], {"transB": 1})
        return nodes.add("Reshape", [scores, self._logits_shape], output="logits")
