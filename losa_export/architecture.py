"""What a decoder is made of: read from `config.json`, checked, and frozen.

Most families here share one block: RMS norm, rotary grouped-query attention, RMS norm, SiLU-gated MLP. They differ
in biases, in norms of queries and keys, in the tied head, and in how rotary frequencies are scaled; those are the
fields of `DecoderSpec`. OPT has a block of its own (`OptSpec`). A model with anything else is refused by name rather
than exported wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from losa_export.checkpoint import CONFIG_FILE, Checkpoint
from losa_export.config_fields import ConfigFields
from losa_export.errors import CheckpointError, UnsupportedArchitectureError
from losa_export.layout import LAYOUTS, Layout

SUPPORTED = tuple(LAYOUTS)

OPT_POSITIONS = "model.decoder.embed_positions.weight"
OPT_PROJECT_IN = "model.decoder.project_in.weight"
OPT_PROJECT_OUT = "model.decoder.project_out.weight"
# OPT's tables of positions begin with rows for two positions that no token has.
OPT_POSITION_OFFSET = 2
# OPT's LayerNorms take PyTorch's default, and no field of config.json tells it.
_OPT_NORM_EPS = 1e-5

RopeKind = Literal["default", "linear", "llama3"]
_ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3")
_DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: base `theta`, and how its frequencies are stretched for long contexts.

    `factor` is used by 'linear' and 'llama3'; the other three fields by 'llama3' alone.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0


@dataclass(frozen=True)
class OptSpec:
    """What only OPT has. Its norms are LayerNorms with biases, its MLP is fc2(ReLU(fc1 x)).

    Attributes:
        embedding_size: of a token's embedding; where it is not the hidden size, two projections lie between them.
        norm_first: norms stand before attention and MLP; else behind their residual additions (350m).
        final_norm: one more norm stands before the head.
    """

    embedding_size: int
    norm_first: bool
    final_norm: bool


@dataclass(frozen=True)
class DecoderSpec:
    """The shape and options of one decoder. Sizes count elements; `attention_bias` is that of q, k and v.

    Without `rope`, positions are learned, and added to the embeddings.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec | None
    max_positions: int
    tied_embeddings: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    opt: OptSpec | None = None

    @property
    def layout(self) -> Layout:
        """Names of its modules and tensors."""
        return LAYOUTS[self.architecture]

    @property
    def embedding_size(self) -> int:
        """Columns of the embedding, and of the head."""
        return self.opt.embedding_size if self.opt is not None else self.hidden_size

    @classmethod
    def from_config(cls, config: Mapping[str, object], where: Path) -> DecoderSpec:
        """Read the spec of a Hugging Face `config.json`, in the spelling of transformers 4 or 5.

        Args:
            config: the parsed file.
            where: the file, for messages.

        Raises:
            UnsupportedArchitectureError: another model family, activation, rotary scaling or window layout.
            CheckpointError: a field is missing, of the wrong type, or contradicts another.
        """
        fields = ConfigFields(config, where)
        architecture = _architecture(config, where)
        family = architecture.removesuffix("ForCausalLM").lower()
        if family == "opt":
            return _opt(fields, architecture)
        activation = fields.text("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UnsupportedArchitectureError(
                f"{where}: hidden_act is '{activation}'; only 'silu' is supported", activation=activation
            )
        hidden_size = fields.positive("hidden_size")
        num_heads = fields.positive("num_attention_heads")
        # Qwen3's class default is 128 whatever the hidden size; the others divide.
        head_dim = fields.positive("head_dim", 128 if family == "qwen3" else max(1, hidden_size // num_heads))
        num_kv_heads = fields.positive("num_key_value_heads", num_heads)
        max_positions = fields.positive("max_position_embeddings")
        bias = fields.flag("attention_bias", False) if family in ("llama", "qwen3") else family == "qwen2"
        spec = cls(
            architecture=architecture,
            model_type=family,
            vocab_size=fields.positive("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size"),
            num_layers=fields.positive("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope(config, where, max_positions),
            max_positions=max_positions,
            tied_embeddings=fields.flag("tie_word_embeddings", False),
            attention_bias=bias,
            output_bias=bias and family != "qwen2",
            mlp_bias=fields.flag("mlp_bias", False) if family == "llama" else False,
            qk_norm=family == "qwen3",
            sliding_window=_sliding_window(fields, family, max_positions),
            bos_token_id=fields.token("bos_token_id"),
            eos_token_ids=fields.tokens("eos_token_id"),
            pad_token_id=fields.token("pad_token_id"),
        )
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"{where}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        if head_dim % 2:
            raise CheckpointError(f"{where}: head_dim {head_dim} is odd; rotary embeddings turn pairs")
        return spec


def _opt(fields: ConfigFields, architecture: str) -> DecoderSpec:
    """Read an OPT. Raises: as `DecoderSpec.from_config`."""
    where = fields.where
    activation = fields.text("activation_function", "relu")
    if activation != "relu":
        raise UnsupportedArchitectureError(
            f"{where}: activation_function is '{activation}'; only 'relu' is supported in OPT", activation=activation
        )
    if not fields.flag("layer_norm_elementwise_affine", True):
        raise UnsupportedArchitectureError(
            f"{where}: layer_norm_elementwise_affine is false; only norms with weights and biases are supported in OPT"
        )
    hidden_size, heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    if hidden_size % heads:
        raise CheckpointError(f"{where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
    bias, norm_first = fields.flag("enable_bias", True), fields.flag("do_layer_norm_before", True)
    return DecoderSpec(
        architecture=architecture,
        model_type="opt",
        vocab_size=fields.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.positive("ffn_dim"),
        num_layers=fields.positive("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden_size // heads,
        norm_eps=_OPT_NORM_EPS,
        rope=None,
        max_positions=fields.positive("max_position_embeddings"),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        qk_norm=False,
        sliding_window=None,
        bos_token_id=fields.token("bos_token_id"),
        eos_token_ids=fields.tokens("eos_token_id"),
        pad_token_id=fields.token("pad_token_id"),
        opt=OptSpec(
            embedding_size=fields.positive("word_embed_proj_dim", hidden_size),
            norm_first=norm_first,
            final_norm=norm_first and not fields.flag("_remove_final_layer_norm", False),
        ),
    )


@dataclass(frozen=True)
class DecoderFacts:
    """What is known of a decoder of no family here; names as in `DecoderSpec`."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


def prunable_names(spec: DecoderSpec) -> tuple[str, ...]:
    """Names of the weights that may be pruned: every linear of every block, in forward order."""
    layout = spec.layout
    return tuple(layout.weight(layer, linear) for layer in range(spec.num_layers) for linear in layout.linears)


def linear_shape(spec: DecoderSpec, linear: str) -> tuple[int, int]:
    """(out, in) of a block's linear, named as in its layout."""
    query, key_value = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden, wide = spec.hidden_size, spec.intermediate_size
    return {
        "q_proj": (query, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, query),
        "out_proj": (hidden, query),
        "gate_proj": (wide, hidden),
        "up_proj": (wide, hidden),
        "down_proj": (hidden, wide),
        "fc1": (wide, hidden),
        "fc2": (hidden, wide),
    }[linear.rpartition(".")[2]]


def linear_has_bias(spec: DecoderSpec, linear: str) -> bool:
    """Whether a block's linear, named as in its layout, adds a bias."""
    if not linear.startswith("self_attn."):
        return spec.mlp_bias
    return spec.output_bias if linear in ("self_attn.o_proj", "self_attn.out_proj") else spec.attention_bias


def tensor_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this spec must hold, and its shape. Others may be present."""
    layout = spec.layout
    shapes: dict[str, tuple[int, ...]] = {layout.embedding: (spec.vocab_size, spec.embedding_size)}
    for layer in range(spec.num_layers):
        prefix = layout.prefix(layer)
        for linear in layout.linears:
            shape = linear_shape(spec, linear)
            shapes[f"{prefix}{linear}.weight"] = shape
            if linear_has_bias(spec, linear):
                shapes[f"{prefix}{linear}.bias"] = (shape[0],)
        if spec.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (spec.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (spec.head_dim,)
        for norm in layout.norms:
            shapes |= _norm_shapes(spec, f"{prefix}{norm}")
    if spec.opt is None:
        shapes |= _norm_shapes(spec, layout.final_norm)
    else:
        shapes |= _opt_shapes(spec, spec.opt)
    if not spec.tied_embeddings:
        shapes[layout.head] = (spec.vocab_size, spec.embedding_size)
    return shapes


def _norm_shapes(spec: DecoderSpec, norm: str) -> dict[str, tuple[int, ...]]:
    parts = ("weight",) if spec.opt is None else ("weight", "bias")
    return {f"{norm}.{part}": (spec.hidden_size,) for part in parts}


def _opt_shapes(spec: DecoderSpec, opt: OptSpec) -> dict[str, tuple[int, ...]]:
    """Tensors of OPT outside its blocks, but for embedding and head."""
    hidden, narrow = spec.hidden_size, opt.embedding_size
    shapes: dict[str, tuple[int, ...]] = {OPT_POSITIONS: (spec.max_positions + OPT_POSITION_OFFSET, hidden)}
    if opt.final_norm:
        shapes |= _norm_shapes(spec, spec.layout.final_norm)
    if narrow != hidden:
        shapes |= {OPT_PROJECT_IN: (hidden, narrow), OPT_PROJECT_OUT: (narrow, hidden)}
    return shapes


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> NDArray[np.float32]:
    """Rotary frequencies in radians per position: (head_dim / 2,) float32.

    Each step is rounded to float32 where PyTorch's reference rounds: an angle is position times frequency, so
    one lost bit here is a visible phase at position 8,000.

    Source: Su et al. 2021, "RoFormer", arXiv:2104.09864; 'llama3' scaling as released with Llama 3.1.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(rope.theta, exponent.astype(np.float64)).astype(np.float32)
    frequency: NDArray[np.float32] = (np.float32(1.0) / powers).astype(np.float32)
    if rope.kind == "default":
        return frequency
    scaled: NDArray[np.float32] = (frequency / np.float32(rope.factor)).astype(np.float32)
    if rope.kind == "linear":
        return scaled
    # PyTorch divides a number by a tensor as reciprocal times number; so here, for the same roundings.
    wavelength = np.reciprocal(frequency) * np.float32(2 * math.pi)
    longest = rope.original_max_position / rope.low_freq_factor
    shortest = rope.original_max_position / rope.high_freq_factor
    turns = np.reciprocal(wavelength) * np.float32(rope.original_max_position)
    span = np.float32(rope.high_freq_factor - rope.low_freq_factor)
    smooth = (turns - np.float32(rope.low_freq_factor)) / span
    blended = (np.float32(1.0) - smooth) * frequency / np.float32(rope.factor) + smooth * frequency
    result = np.where(wavelength > longest, scaled, np.where(wavelength < shortest, frequency, blended))
    return result.astype(np.float32)


def rotary_caches(rope: RopeSpec, head_dim: int, max_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines for every position: two arrays (max_positions, head_dim / 2) float32."""
    positions = np.arange(max_positions, dtype=np.float32)
    # The angle is rounded to float32, as the reference does, before its exact cosine is taken.
    angles = (positions[:, None] * inverse_frequencies(rope, head_dim)[None, :]).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _architecture(config: Mapping[str, object], where: Path) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise CheckpointError(
            f"{where}: 'architectures' must be a list of one name, such as '{SUPPORTED[0]}', not {named!r}"
        )
    if named[0] not in SUPPORTED:
        raise UnsupportedArchitectureError(
            f"{where}: architecture '{named[0]}' is not supported; supported are {', '.join(SUPPORTED)}",
            architecture=named[0],
            supported=SUPPORTED,
        )
    return named[0]


def _rope(config: Mapping[str, object], where: Path, max_positions: int) -> RopeSpec:
    """Both spellings: `rope_parameters` (transformers 5) first, else `rope_theta` + `rope_scaling` (4)."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    chosen, field = (new, "rope_parameters") if new is not None else (old, "rope_scaling")
    if chosen is None:
        chosen = {}
    if not isinstance(chosen, Mapping):
        raise CheckpointError(f"{where}: {field} must be an object, not {chosen!r}")
    fields = ConfigFields(chosen, where, prefix=f"{field}.")
    top = ConfigFields(config, where)
    kind = fields.text("rope_type", fields.text("type", "default"))
    if kind not in _ROPE_KINDS:
        raise UnsupportedArchitectureError(
            f"{where}: rotary scaling '{kind}' is not supported; supported are {', '.join(_ROPE_KINDS)}",
            rope_type=kind,
        )
    partial = fields.number("partial_rotary_factor", top.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedArchitectureError(
            f"{where}: partial_rotary_factor is {partial:g}; rotary embeddings must cover whole heads (1.0)"
        )
    theta = fields.number("rope_theta", top.number("rope_theta", _DEFAULT_THETA))
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, "linear", fields.number("factor"))
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        raise CheckpointError(f"{where}: {field}.high_freq_factor {high:g} must exceed low_freq_factor {low:g}")
    original = fields.positive("original_max_position_embeddings", max_positions)
    return RopeSpec(theta, "llama3", fields.number("factor"), low, high, original)


def _sliding_window(fields: ConfigFields, family: str, max_positions: int) -> int | None:
    """Return the one window that all layers share, or None where attention is over everything.

    A window no shorter than the longest sequence hides nothing, so it counts as none.
    """
    if family == "llama" or fields.absent("sliding_window"):
        return None
    window = fields.positive("sliding_window")
    if family == "mistral":
        return window if window < max_positions else None
    if not fields.flag("use_sliding_window", False):
        return None
    layers = fields.positive("num_hidden_layers")
    kinds = fields.texts("layer_types") or tuple(
        "sliding_attention" if layer >= fields.natural("max_window_layers", 28) else "full_attention"
        for layer in range(layers)
    )
    if all(kind == "full_attention" for kind in kinds) or window >= max_positions:
        return None
    if not all(kind == "sliding_attention" for kind in kinds):
        raise UnsupportedArchitectureError(
            f"{fields.where}: some layers use a sliding window and some do not; "
            "only one window for all layers is supported (or use_sliding_window false)"
        )
    return window


def check_tensors(checkpoint: Checkpoint, spec: DecoderSpec) -> None:
    """Refuse a checkpoint whose tensors are missing or mis-shaped, from its headers alone.

    Raises: CheckpointError naming the first such tensor.
    """
    for name, shape in tensor_shapes(spec).items():
        if checkpoint.shape(name) != shape:
            raise CheckpointError(
                f"tensor '{name}' in '{checkpoint.folder}' is {checkpoint.shape(name)}, but {CONFIG_FILE} asks for "
                f"{shape}; the two belong to different models",
                tensor=name,
            )
