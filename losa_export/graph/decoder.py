"""The decoder graph, written node by node from the specification: no tracing, no torch, no transformers.

Inputs and outputs carry the Hugging Face names, but where a profile's engine wants others: input_ids, attention_mask,
position_ids and past_key_values.N.key/value in; logits and present.N.key/value out.
"""

from __future__ import annotations

import onnx_ir as ir

from losa_export.architecture import DecoderSpec, linear_has_bias, rotary_caches
from losa_export.graph.attention import take_attention
from losa_export.graph.composed import compose
from losa_export.graph.formats import DOMAIN, DOMAIN_VERSION
from losa_export.graph.functions import own_functions
from losa_export.graph.nodes import NodeList
from losa_export.graph.norms import fuse_skip_norms
from losa_export.graph.profiles import OPSET, Inputs, LayerCache, Profile, ProfileName
from losa_export.graph.weights import WeightStore

_TOTAL = "total_sequence"


class DecoderBuilder:
    """Builds one model; its weights are written on the way. This is the family of Llama.

    Args:
        spec: the architecture.
        store: reads the checkpoint and writes external data.
        profile: the dialect.
    """

    def __init__(self, spec: DecoderSpec, store: WeightStore, profile: Profile) -> None:
        self._spec, self._store, self._profile = spec, store, profile
        self._layout = spec.layout
        self._nodes = NodeList()

    def build(self, profile_name: ProfileName, producer: str) -> ir.Model:
        """Build the whole graph.

        Args:
            profile_name: of the dialect, recorded in the model.
            producer: version of this program, recorded in the model.

        Returns: a model whose large initializers refer to the data file that the store writes.
        """
        spec, layout, nodes = self._spec, self._layout, self._nodes
        inputs = self._profile.inputs()
        graph_inputs = inputs.values()
        x, skip = self._begin(inputs)
        presents: list[ir.Value] = []
        for layer in range(spec.num_layers):
            cache = self._cache(layer)
            graph_inputs += [cache.past_key, cache.past_value]
            x, skip, new = self._block(layer, x, skip, cache)
            presents += new
        nodes.prefix = ""
        x = self._end(x, skip)
        table = layout.embedding if spec.tied_embeddings else layout.head
        if self._profile.copies_head:
            logits = self._store.exact_linear(nodes, x, table, output="logits")
        else:
            logits = self._store.head(nodes, x, table, self._profile.head)
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(["batch", "sequence", spec.vocab_size])
        return self._model(graph_inputs, [logits, *presents], profile_name, producer)

    def _model(
        self, inputs: list[ir.Value], outputs: list[ir.Value], profile_name: ProfileName, producer: str
    ) -> ir.Model:
        imports = dict(self._profile.opset_imports)
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self._nodes.nodes,
            initializers=self._store.initializers,
            opset_imports=imports,
            name=self._spec.model_type,
        )
        fuse_skip_norms(graph)
        take_attention(graph)
        compose(graph)
        functions = own_functions(graph, OPSET)
        if functions:
            graph.opset_imports[DOMAIN] = DOMAIN_VERSION
        return ir.Model(
            graph,
            ir_version=self._profile.ir_version,
            producer_name="losa-export",
            producer_version=producer,
            functions=functions,
            metadata_props={"losa.profile": profile_name},
        )

    def _cache(self, layer: int) -> LayerCache:
        shape: list[int | str | None] = ["batch", self._profile.cache_heads, "past_sequence", self._spec.head_dim]
        past_key, past_value = (
            ir.val(f"past_key_values.{layer}.{part}", ir.DataType.FLOAT, shape) for part in ("key", "value")
        )
        return LayerCache(past_key, past_value, f"present.{layer}.key", f"present.{layer}.value")

    def _begin(self, inputs: Inputs) -> tuple[ir.Value, ir.Value | None]:
        """What enters the first block, as x and what is still to be added to it; prepares the profile too."""
        spec, store = self._spec, self._store
        x = store.embedding(self._nodes, inputs.input_ids, self._layout.embedding)
        assert spec.rope is not None
        cos, sin = rotary_caches(spec.rope, spec.head_dim, spec.max_positions)
        caches = store.array("cos_cache", cos), store.array("sin_cache", sin)
        self._profile.prepare(self._nodes, inputs, caches)
        return x, None

    def _end(self, x: ir.Value, skip: ir.Value | None) -> ir.Value:
        """What the head reads, of what the last block left."""
        return self._profile.add_norm(self._nodes, x, skip, self._store.plain(f"{self._layout.final_norm}.weight"))[0]

    def _block(
        self, layer: int, x: ir.Value, skip: ir.Value | None, cache: LayerCache
    ) -> tuple[ir.Value, ir.Value | None, list[ir.Value]]:
        """One transformer block. The last addition is left to the next norm, which fuses it."""
        nodes, store, prefix = self._nodes, self._store, f"{self._layout.blocks}.{layer}"
        nodes.prefix = f"layers.{layer}/"
        normed, residual = self._profile.add_norm(nodes, x, skip, store.plain(f"{prefix}.input_layernorm.weight"))
        if self._profile.takes_packed:
            packed = self._linear(normed, layer, *(f"self_attn.{part}_proj" for part in "qkv"))
            attended, *presents = self._profile.attention(nodes, (packed, None, None), cache)
        else:
            q, k, v = (self._linear(normed, layer, f"self_attn.{part}_proj") for part in "qkv")
            if self._spec.qk_norm:
                q = self._head_norm(q, f"{prefix}.self_attn.q_norm.weight", self._spec.num_heads)
                k = self._head_norm(k, f"{prefix}.self_attn.k_norm.weight", self._spec.num_kv_heads)
            attended, *presents = self._profile.attention(nodes, (q, k, v), cache)
        self._type(presents)
        attended = self._linear(attended, layer, "self_attn.o_proj")
        norm_weight = store.plain(f"{prefix}.post_attention_layernorm.weight")
        normed, residual = self._profile.add_norm(nodes, attended, residual, norm_weight)
        return self._linear(self._swiglu(normed, layer), layer, "mlp.down_proj"), residual, presents

    def _type(self, presents: list[ir.Value]) -> None:
        """Give a layer's new keys and values their type, as outputs of the graph must have one."""
        for present in presents:
            present.type = ir.TensorType(ir.DataType.FLOAT)
            present.shape = ir.Shape(["batch", self._profile.cache_heads, _TOTAL, self._spec.head_dim])

    def _swiglu(self, x: ir.Value, layer: int) -> ir.Value:
        """silu(gate) · up. Source: Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202."""
        nodes, prefix = self._nodes, f"{self._layout.blocks}.{layer}.mlp"
        if not linear_has_bias(self._spec, "mlp.gate_proj"):
            fused = self._store.sparse_swiglu(nodes, x, f"{prefix}.gate_proj", f"{prefix}.up_proj")
            if fused is not None:
                return fused
        gate = self._profile.silu(nodes, self._linear(x, layer, "mlp.gate_proj"))
        return nodes.add("Mul", [gate, self._linear(x, layer, "mlp.up_proj")])

    def _linear(self, x: ir.Value, layer: int, *linears: str) -> ir.Value:
        """X Wᵀ (+ b) of linears of one block that read the same x, side by side."""
        bias = linear_has_bias(self._spec, linears[0])
        return self._store.linear(
            self._nodes, x, [f"{self._layout.blocks}.{layer}.{name}" for name in linears], bias=bias
        )

    def _head_norm(self, x: ir.Value, weight: str, heads: int) -> ir.Value:
        """RMS norm of each head by itself (Qwen3)."""
        nodes = self._nodes
        split = nodes.add("Reshape", [x, nodes.integers(0, 0, heads, self._spec.head_dim)])
        normed, _ = self._profile.add_norm(nodes, split, None, self._store.plain(weight))
        return nodes.add("Reshape", [normed, nodes.integers(0, 0, -1)])
