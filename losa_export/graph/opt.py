"""OPT: LayerNorms, learned positions and a ReLU MLP around the attention that all families share.

Source: Zhang et al. 2022, "OPT: Open Pre-trained Transformer Language Models", arXiv:2205.01068.
"""

from __future__ import annotations

import onnx_ir as ir

from losa_export.architecture import (
    OPT_POSITION_OFFSET,
    OPT_POSITIONS,
    OPT_PROJECT_IN,
    OPT_PROJECT_OUT,
    DecoderSpec,
    OptSpec,
)
from losa_export.graph.decoder import DecoderBuilder
from losa_export.graph.profiles import Inputs, LayerCache, Profile
from losa_export.graph.weights import WeightStore


class OptBuilder(DecoderBuilder):
    """As `DecoderBuilder`, for an OPT; `opt` is what its spec has beside the rest."""

    def __init__(self, spec: DecoderSpec, opt: OptSpec, store: WeightStore, profile: Profile) -> None:
        super().__init__(spec, store, profile)
        self._opt = opt

    def _begin(self, inputs: Inputs) -> tuple[ir.Value, ir.Value | None]:
        """Embeddings, and positions still to be added."""
        nodes, store = self._nodes, self._store
        x = store.embedding(nodes, inputs.input_ids, self._layout.embedding)
        if self._opt.embedding_size != self._spec.hidden_size:
            x = store.exact_linear(nodes, x, OPT_PROJECT_IN)
        rows = nodes.add("Add", [inputs.position_ids, nodes.integer(OPT_POSITION_OFFSET)])
        positions = nodes.add("Gather", [store.plain(OPT_POSITIONS), rows])
        self._profile.prepare(nodes, inputs, None)
        return x, positions

    def _block(
        self, layer: int, x: ir.Value, skip: ir.Value | None, cache: LayerCache
    ) -> tuple[ir.Value, ir.Value | None, list[ir.Value]]:
        """One transformer block. With norms first, the last addition is left to the next norm, which fuses it."""
        nodes = self._nodes
        nodes.prefix = f"layers.{layer}/"
        attention_norm, mlp_norm = (f"{self._layout.prefix(layer)}{norm}" for norm in self._layout.norms)
        if self._opt.norm_first:
            normed, residual = self._norm(attention_norm, x, skip)
            attended, presents = self._attention(layer, normed, cache)
            normed, residual = self._norm(mlp_norm, attended, residual)
            return self._mlp(layer, normed), residual, presents
        if skip is not None:
            x = nodes.add("Add", [x, skip])
        attended, presents = self._attention(layer, x, cache)
        x, _ = self._norm(attention_norm, attended, x)
        x, _ = self._norm(mlp_norm, self._mlp(layer, x), x)
        return x, None, presents

    def _end(self, x: ir.Value, skip: ir.Value | None) -> ir.Value:
        """The last norm, if there is one, and the projection back to the size of embeddings."""
        if self._opt.final_norm:
            x, _ = self._norm(self._layout.final_norm, x, skip)
        elif skip is not None:
            x = self._nodes.add("Add", [x, skip])
        if self._opt.embedding_size != self._spec.hidden_size:
            x = self._store.exact_linear(self._nodes, x, OPT_PROJECT_OUT)
        return x

    def _norm(self, name: str, x: ir.Value, skip: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        affine = self._store.plain(f"{name}.weight"), self._store.plain(f"{name}.bias")
        return self._profile.add_layer_norm(self._nodes, x, skip, affine)

    def _attention(self, layer: int, x: ir.Value, cache: LayerCache) -> tuple[ir.Value, list[ir.Value]]:
        """Attention and its output projection; and the layer's new keys and values."""
        names = [f"self_attn.{part}_proj" for part in "qkv"]
        if self._profile.takes_packed:
            packed = self._linear(x, layer, *names)
            attended, *presents = self._profile.attention(self._nodes, (packed, None, None), cache)
        else:
            q, k, v = (self._linear(x, layer, name) for name in names)
            attended, *presents = self._profile.attention(self._nodes, (q, k, v), cache)
        self._type(presents)
        return self._linear(attended, layer, "self_attn.out_proj"), presents

    def _mlp(self, layer: int, x: ir.Value) -> ir.Value:
        return self._linear(self._nodes.add("Relu", [self._linear(x, layer, "fc1")]), layer, "fc2")
