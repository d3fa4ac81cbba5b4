"""A decoder of one attention block, written by hand for both kinds of cache: the runtimes can be tried alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_export.errors import KernelError

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 40, 32, 2, 1, 16, 48


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The compiled library, or a skip where it has not been built."""
    from losa_export.runtimes import native

    try:
        return native.library_path()
    except KernelError as error:
        pytest.skip(f"needs the compiled kernels: {error}")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder whose cache is one buffer, written in place by GroupQueryAttention."""
    folder = tmp_path_factory.mktemp("shared")
    write_block(folder, shared=True)
    return folder


@pytest.fixture(scope="session")
def growing_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same decoder in standard operators (opset 23), whose cache comes back longer after each call."""
    folder = tmp_path_factory.mktemp("growing")
    write_block(folder, shared=False)
    return folder


def write_block(folder: Path, *, shared: bool) -> None:
    """Write model.onnx, model.onnx.data and genai_config.json of the decoder; the same weights at each call."""
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    weights = block_weights()
    if not shared:
        weights |= {"axes": np.array([1, 2], np.int64), "zero": np.array(0, np.int64), "one": np.array(1, np.int64)}
        weights |= {"column": np.array([-1], np.int64)}
    total = "total" if not shared else "capacity"
    cache_in = ["batch", KV_HEADS, "past" if not shared else "capacity", HEAD_DIM]
    cache_out = ["batch", KV_HEADS, total, HEAD_DIM]
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        value("attention_mask", TensorProto.INT64, ["batch", "total"]),
        value("position_ids", TensorProto.INT64, ["batch", "sequence"]),
        value("past_key_values.0.key", TensorProto.FLOAT, cache_in),
        value("past_key_values.0.value", TensorProto.FLOAT, cache_in),
    ]
    outputs = [
        value("logits", TensorProto.FLOAT, ["batch", "sequence", VOCAB]),
        value("present.0.key", TensorProto.FLOAT, cache_out),
        value("present.0.value", TensorProto.FLOAT, cache_out),
    ]
    graph = helper.make_graph(
        _nodes(shared), "block", inputs, outputs, [onnx.numpy_helper.from_array(w, name) for name, w in weights.items()]
    )
    opsets = [helper.make_opsetid("", 21 if shared else 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10 if shared else 11)
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=64
    )
    settings: dict[str, Any] = {
        "model": {"context_length": POSITIONS, "vocab_size": VOCAB},
        "search": {"past_present_share_buffer": shared},
    }
    (folder / "genai_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session", name="block_weights")
def _block_weights() -> dict[str, NDArray[np.generic]]:
    """The weights of both folders by name."""
    return block_weights()


def block_weights() -> dict[str, NDArray[np.generic]]:
    """The weights by name; matrices are (in, out)."""
    generator = np.random.default_rng(7)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return (generator.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)

    angles = np.arange(POSITIONS)[:, None] / 10000 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    return {
        "embedding": 5 * matrix(VOCAB, HIDDEN),
        "query": matrix(HIDDEN, HEADS * HEAD_DIM),
        "key": matrix(HIDDEN, KV_HEADS * HEAD_DIM),
        "value": matrix(HIDDEN, KV_HEADS * HEAD_DIM),
        "output": matrix(HEADS * HEAD_DIM, HIDDEN),
        "head": matrix(HIDDEN, VOCAB),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }


def _nodes(shared: bool) -> list[Any]:
    from onnx import TensorProto, helper

    node = helper.make_node
    cache = ["past_key_values.0.key", "past_key_values.0.value"]
    present = ["present.0.key", "present.0.value"]
    nodes = [node("Gather", ["embedding", "input_ids"], ["x"])]
    nodes += [node("MatMul", ["x", name], [name[0]]) for name in ("query", "key", "value")]
    if shared:
        nodes += [
            node("Constant", [], ["one"], value=helper.make_tensor("", TensorProto.INT64, [1], [1])),
            node("ReduceSum", ["attention_mask", "one"], ["counts"], keepdims=0),
            node("Sub", ["counts", "one"], ["last"]),
            node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32),
            node("Shape", ["attention_mask"], ["mask_shape"], start=1, end=2),
            node("Squeeze", ["mask_shape"], ["width"]),
            node("Cast", ["width"], ["total_length"], to=TensorProto.INT32),
            node(
                "GroupQueryAttention",
                ["q", "k", "v", *cache, "seqlens_k", "total_length", "cos", "sin"],
                ["attended", *present],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                do_rotary=1,
            ),
        ]
    else:
        rotary = ["cos", "sin", "position_ids"]
        nodes += [
            node("RotaryEmbedding", ["q", *rotary], ["qr"], num_heads=HEADS),
            node("RotaryEmbedding", ["k", *rotary], ["kr"], num_heads=KV_HEADS),
            # a token sees those that are not padding, and none after itself; the new ones are the last of the total
            node("Cast", ["attention_mask"], ["given"], to=TensorProto.BOOL),
            node("Unsqueeze", ["given", "axes"], ["keep"]),
            node("Shape", ["input_ids"], ["s"], start=1, end=2),
            node("Shape", ["attention_mask"], ["t"], start=1, end=2),
            node("Squeeze", ["s"], ["sequence"]),
            node("Squeeze", ["t"], ["total"]),
            node("Sub", ["total", "sequence"], ["past"]),
            node("Range", ["past", "total", "one"], ["own"]),
            node("Unsqueeze", ["own", "column"], ["rows"]),
            node("Range", ["zero", "total", "one"], ["columns"]),
            node("LessOrEqual", ["columns", "rows"], ["causal"]),
            node("And", ["keep", "causal"], ["mask"]),
            node(
                "Attention",
                ["qr", "kr", "v", "mask", *cache],
                ["attended", *present],
                q_num_heads=HEADS,
                kv_num_heads=KV_HEADS,
            ),
        ]
    return [
        *nodes,
        node("MatMul", ["attended", "output"], ["o"]),
        node("Add", ["x", "o"], ["y"]),
        node("MatMul", ["y", "head"], ["logits"]),
    ]
