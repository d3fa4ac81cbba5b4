"""One tiny random model of each family, pruned to 70 % in its linears, with what transformers answers; and models
of a single node, to try an operator alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from losa_export.graph.formats import DOMAIN, DOMAIN_VERSION, EncodedWeight, ValueFormat
from losa_export.graph.nodes import NodeList

LENGTH = 9
BATCH = 3

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}),
    "llama-small-heads": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "opt": ("OPT", {"ffn_dim": 88}),
    "opt-350m": ("OPT", {"ffn_dim": 88, "do_layer_norm_before": False, "word_embed_proj_dim": 40}),
    "opt-plain": (
        "OPT",
        {"ffn_dim": 88, "enable_bias": False, "tie_word_embeddings": False, "_remove_final_layer_norm": True},
    ),
}


@dataclass(frozen=True)
class Family:
    """A checkpoint, token ids (3, 9), and `logits(ids, positions)` (B, S, V) of transformers in float32."""

    name: str
    folder: Path
    ids: NDArray[np.int64]
    logits: Callable[..., NDArray[np.float32]]


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Each family in turn."""
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    prefix, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors this small only wait for each other
    config = getattr(transformers, f"{prefix}Config")(**SIZES | changes, attn_implementation="eager")
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:  # norms near one, biases that matter
                tensor.uniform_(0.5, 1.5)
            else:  # wide enough that attention is not uniform
                tensor.normal_(0, 0.2)
            if "layers" in name and tensor.ndim == 2:
                tensor.mul_(torch.rand_like(tensor) < 0.3)
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    model.save_pretrained(folder)
    ids = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (BATCH, LENGTH))

    def logits(tokens: NDArray[np.int64], positions: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        # with a mask given, gaps in the positions are not taken for the seams of packed sequences
        given = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.ones(tokens.shape, dtype=torch.int64)}
        if positions is not None:
            given["position_ids"] = torch.from_numpy(positions)
        with torch.no_grad():
            answer: NDArray[np.float32] = model(**given).logits.numpy()
        return answer

    return Family(request.param, folder, ids, logits)


@pytest.fixture(scope="session")
def one_node() -> Callable[[ValueFormat, str, EncodedWeight], onnx.ModelProto]:
    """Makes a model of one node of our domain, with its function; its input is called X, its output Y.

    One with a norm also takes 'skip' and gives 'sum'; its gamma rises from 0.5 to 1.5, its epsilon is 0.25.
    """

    def build(fmt: ValueFormat, op_type: str, encoded: EncodedWeight) -> onnx.ModelProto:
        rows, columns = encoded.attributes["N"], encoded.attributes["K"]
        if op_type == fmt.embedding_op:
            x, width = ir.val("X", ir.DataType.INT64, ["batch", "sequence"]), columns
        else:
            x, width = ir.val("X", ir.DataType.FLOAT, ["batch", "sequence", columns]), rows
        tensors = {name: ir.tensor(array, name=name) for name, array in encoded.tensors.items()}
        parts = [ir.val(name, tensor.dtype, tensor.shape, const_value=tensor) for name, tensor in tensors.items()]
        attributes: dict[str, int | float] = {name: encoded.attributes[name] for name in fmt.attribute_names(op_type)}
        nodes, inputs, outputs, widths = NodeList(), [x], ["Y"], [width]
        if "skip" in fmt.input_names(op_type):
            tensor = ir.tensor(np.linspace(0.5, 1.5, columns, dtype=np.float32), name="gamma")
            gamma = ir.val("gamma", tensor.dtype, tensor.shape, const_value=tensor)
            inputs.append(ir.val("skip", ir.DataType.FLOAT, ["batch", "sequence", columns]))
            parts.insert(0, gamma)
            outputs.append("sum")
            widths.append(columns)
            attributes["epsilon"] = 0.25
        made = nodes.add_many(op_type, [*inputs, *parts], outputs, attributes, domain=DOMAIN)
        for y, size in zip(made, widths, strict=True):
            y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", size])
        imports = {"": 23, DOMAIN: DOMAIN_VERSION}
        graph = ir.Graph(inputs, made, nodes=nodes.nodes, initializers=parts, opset_imports=imports, name="one")
        return ir.to_proto(ir.Model(graph, ir_version=10, functions=[fmt.function(op_type, 23)]))

    return build
