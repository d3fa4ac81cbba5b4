"""Where a family of decoders keeps its parts: names of modules and tensors, as transformers has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from losa_export.errors import UnsupportedArchitectureError

# What a tied head is called where it is stored apart from the embedding.
TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Layout:
    """Names inside one causal language model.

    Attributes:
        blocks: the module whose children are the decoder blocks, in order.
        inputs: linears of one block, by what they read, in the order in which a token meets them; those of one group
            read the same inputs. These are what gets pruned.
        norms: modules of one block, that of attention first.
        embedding: the table of token embeddings; with tied embeddings it is the head too.
        final_norm: the module before the head.
        head: the table of scores.
    """

    blocks: str
    inputs: tuple[tuple[str, ...], ...]
    norms: tuple[str, str]
    embedding: str
    final_norm: str
    head: str = TIED_HEAD

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Linears of one block, in the order in which a token meets them."""
        return tuple(linear for group in self.inputs for linear in group)

    def first_reader(self, linear: str) -> str:
        """The first linear of a block that reads the same inputs as `linear`; it stands for all of them."""
        return next(group[0] for group in self.inputs if linear in group)

    def prefix(self, block: int) -> str:
        """What the names of block `block` begin with, the last dot included."""
        return f"{self.blocks}.{block}."

    def weight(self, block: int, linear: str) -> str:
        """Name of the weight of a block's linear."""
        return f"{self.blocks}.{block}.{linear}.weight"

    def place(self, name: str) -> tuple[int, str]:
        """Block and linear of a module or weight: the inverse of `weight`."""
        block, _, linear = name.removeprefix(f"{self.blocks}.").removesuffix(".weight").partition(".")
        return int(block), linear


LLAMA = Layout(
    blocks="model.layers",
    inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
    embedding="model.embed_tokens.weight",
    final_norm="model.norm",
)

OPT = Layout(
    blocks="model.decoder.layers",
    inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    embedding="model.decoder.embed_tokens.weight",
    final_norm="model.decoder.final_layer_norm",
)

LAYOUTS: dict[str, Layout] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "OPTForCausalLM": OPT,
}


# Every family here has so many groups of linears that read the same inputs.
INPUT_GROUPS = 4


def layout_of(model: object) -> Layout:
    """The layout of a causal language model of transformers, by its class.

    Raises: UnsupportedArchitectureError for a class that is none of ours.
    """
    name = type(model).__name__
    if name not in LAYOUTS:
        raise UnsupportedArchitectureError(
            f"'{name}' is no model whose parts are known; known are {', '.join(LAYOUTS)}", architecture=name
        )
    return LAYOUTS[name]


def by_inputs(names: Iterable[str]) -> list[list[str]]:
    """Weights of one block, apart by what they read, in the order in which a token meets them.

    Raises: UnsupportedArchitectureError for names that are of no layout here.
    """
    given = set(names)
    for layout in LAYOUTS.values():
        blocks = {layout.place(name)[0] for name in given if name.startswith(f"{layout.blocks}.")}
        if len(blocks) == 1:
            [block] = blocks
            groups = [[layout.weight(block, linear) for linear in group] for group in layout.inputs]
            found = [[name for name in group if name in given] for group in groups]
            if sum(map(len, found)) == len(given):
                return [group for group in found if group]
    raise UnsupportedArchitectureError(f"{sorted(given)} are not linears of one block; known are {', '.join(LAYOUTS)}")
