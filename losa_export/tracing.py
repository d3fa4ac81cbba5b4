"""A decoder of any family as a graph: `torch.onnx` follows what transformers computes.

What comes out has the inputs and outputs of graphs from the builder, so that the same runtime runs it; its weights are
still those of the model in memory. `losa_export.graph.traced` puts ours in their place.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from losa_export.architecture import DecoderFacts
from losa_export.checkpoint import CONFIG_FILE, Checkpoint
from losa_export.config_fields import ConfigFields
from losa_export.errors import CheckpointError, UnsupportedArchitectureError

# Sizes of the example that is followed; all different, and none of them 1, which torch.export takes for a constant.
_BATCH, _TOKENS, _PAST = 2, 3, 5


@dataclass(frozen=True)
class TracedDecoder:
    """What `torch.onnx` made of a checkpoint.

    Attributes:
        model: the graph; its initializers are named as the parameters of the model.
        facts: sizes and tokens.
        linears: weight of each linear of its blocks, in forward order → (out, in).
        embedding: name of the table of embeddings.
        head: name of the table of scores; the embedding's, if they are one.
    """

    model: ir.Model
    facts: DecoderFacts
    linears: Mapping[str, tuple[int, int]]
    embedding: str
    head: str

    def read(self, name: str) -> NDArray[np.float32]:
        """Weight `name` as the model has it, which may have changed its name since the checkpoint was written."""
        value = self.model.graph.initializers[name]
        assert value.const_value is not None
        return value.const_value.numpy().astype(np.float32, copy=False)


def trace_decoder(checkpoint: Checkpoint) -> TracedDecoder:
    """Load a checkpoint by transformers, and follow one step of it with a past.

    Raises:
        CheckpointError: transformers cannot load it, or some of its weights are missing.
        UnsupportedArchitectureError: it is no decoder with keys and values of equal size, or cannot be followed.
    """
    architecture = _architecture(checkpoint)
    with _quiet():
        model = _load(checkpoint)
        facts = _facts(checkpoint, architecture, model)
        names = _parameter_names(model)
        graph = _follow(model, facts)
    _name_as_parameters(graph, names)
    linears = {
        name: shape
        for name, shape in _block_linears(model, facts.num_layers).items()
        if name in graph.graph.initializers
    }
    if not linears:
        raise UnsupportedArchitectureError(
            f"'{checkpoint.folder}' is a '{architecture}' whose {facts.num_layers} blocks hold no linears that can be "
            "found; only families whose blocks are made of nn.Linear can be exported",
            architecture=architecture,
        )
    tables = [names.get(_weight_name(model, module)) for module in (model.get_input_embeddings(), _head(model))]
    embedding, head = (name or "" for name in tables)
    return TracedDecoder(graph, facts, linears, embedding, head)


class _FlatCache(nn.Module):
    """A causal language model whose cache goes in and comes out as plain tensors, keys and values by turns."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        # Positions by a bias on attention (ALiBi) need no input, and such models take none.
        more = {} if position_ids is None else {"position_ids": position_ids}
        answer = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **more
        )
        return (answer.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values)))


def _architecture(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else "?"


def _load(checkpoint: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, safetensors' own and others
        raise CheckpointError(
            f"transformers cannot load the checkpoint '{checkpoint.folder}': {error}; save it again",
            path=checkpoint.folder,
        ) from error
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise CheckpointError(
            f"checkpoint '{checkpoint.folder}' lacks tensor '{absent[0]}', or has it in another shape; save it again",
            tensor=absent[0],
        )
    return model.eval().requires_grad_(False)


def _facts(checkpoint: Checkpoint, architecture: str, model: Any) -> DecoderFacts:
    """Sizes, those of the cache from a first run.

    Raises: UnsupportedArchitectureError for a model without an ordinary cache; CheckpointError for a missing size.
    """
    with torch.inference_mode():
        answer = model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.int64), use_cache=True)
    cache = getattr(answer, "past_key_values", None)
    shapes = {
        tuple(part.shape) if isinstance(part, Tensor) else None
        for layer in getattr(cache, "layers", ())
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
    }
    shape = shapes.pop() if len(shapes) == 1 else None
    if shape is None or len(shape) != 4:
        raise UnsupportedArchitectureError(
            f"'{checkpoint.folder}' is a '{architecture}', whose blocks do not all keep keys and values of one size; "
            "such decoders cannot be exported",
            architecture=architecture,
        )
    settings = model.config
    sizes = {"max_position_embeddings": getattr(settings, "max_position_embeddings", None)}
    known = ConfigFields(sizes, checkpoint.folder / CONFIG_FILE)
    tokens = ConfigFields(checkpoint.config, checkpoint.folder / CONFIG_FILE)
    return DecoderFacts(
        architecture=architecture,
        model_type=str(settings.model_type),
        vocab_size=int(answer.logits.shape[-1]),
        hidden_size=int(settings.hidden_size),
        num_layers=len(cache.layers),  # type: ignore[union-attr]  # without layers there are no shapes
        num_heads=int(getattr(settings, "num_attention_heads", shape[1])),
        num_kv_heads=shape[1],
        head_dim=shape[3],
        max_positions=known.positive("max_position_embeddings"),
        bos_token_id=tokens.token("bos_token_id"),
        eos_token_ids=tokens.tokens("eos_token_id"),
        pad_token_id=tokens.token("pad_token_id"),
    )


def _follow(model: Any, facts: DecoderFacts) -> ir.Model:
    """The graph with flat inputs and outputs. Raises: UnsupportedArchitectureError if torch cannot make it."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    places = torch.arange(_PAST, _PAST + _TOKENS).repeat(_BATCH, 1) if takes_positions else None
    inputs = {
        "input_ids": torch.zeros(_BATCH, _TOKENS, dtype=torch.int64),
        "attention_mask": torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64),
        "position_ids": places,
    }
    shape = (_BATCH, facts.num_kv_heads, _PAST, facts.head_dim)
    past = [torch.zeros(shape) for _ in range(2 * facts.num_layers)]
    dynamic = torch.export.Dim.DYNAMIC
    parts = [f"{layer}.{part}" for layer in range(facts.num_layers) for part in ("key", "value")]
    try:
        program = torch.onnx.export(
            _FlatCache(model).eval(),
            kwargs={**inputs, "past": past},
            dynamic_shapes={
                **{name: None if given is None else {0: dynamic, 1: dynamic} for name, given in inputs.items()},
                "past": [{0: dynamic, 2: dynamic} for _ in past],
            },
            input_names=[
                *(name for name, given in inputs.items() if given is not None),
                *(f"past_key_values.{part}" for part in parts),
            ],
            output_names=["logits", *(f"present.{part}" for part in parts)],
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    except Exception as error:  # whatever torch, transformers and onnxscript meet in a model they do not know
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = f"{type(cause).__name__} {str(cause).strip().partition(chr(10))[0]}"
        raise UnsupportedArchitectureError(
            f"torch.onnx cannot follow a '{facts.architecture}': {said}; another release of torch or transformers may",
            architecture=facts.architecture,
        ) from error
    assert program is not None
    graph: ir.Model = program.model
    return graph


def _parameter_names(model: Any) -> dict[str, str]:
    """Name of each parameter → the first name of the same tensor."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _name_as_parameters(model: ir.Model, names: Mapping[str, str]) -> None:
    """Take the wrapper's prefix from the names of parameters and buffers."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        name = str(value.name).removeprefix("model.")
        value.name = names.get(name, name)


def _block_linears(model: Any, layers: int) -> dict[str, tuple[int, int]]:
    """Weight of every linear inside the blocks, which are the one list of modules that is as long as the cache."""
    found: dict[str, tuple[int, int]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            for name, inner in module.named_modules():
                if isinstance(inner, nn.Linear):
                    found[f"{prefix}.{name}.weight"] = (inner.out_features, inner.in_features)
    return found


def _head(model: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


def _weight_name(model: Any, module: nn.Module | None) -> str:
    """Name of a module's weight; empty if there is no such module."""
    return next((f"{name}.weight" for name, one in model.named_modules() if one is module), "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, torch and transformers keep their remarks on the way of exporting to themselves."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    showed_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if showed_bars:
            transformers_logging.enable_progress_bar()
