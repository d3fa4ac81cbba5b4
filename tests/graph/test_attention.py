"""Attention by our own operator: where it is taken, and what an engine without our library makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from losa_export.errors import KernelError
from losa_export.export import ExportConfig, export_onnx
from losa_export.graph.attention import ATTENTION_OP, take_attention
from losa_export.graph.external import check_external_data
from losa_export.graph.formats import DOMAIN
from losa_export.graph.profiles import CONTRIB
from losa_export.graph.stored import stored_nodes
from losa_export.runtimes import native
from losa_export.runtimes.ort import OrtRuntime
from tests.graph.conftest import Family


def domains(folder: Path) -> list[str]:
    """Of a model's attention, in order."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    return [node.domain for node in model.graph.node if node.op_type == ATTENTION_OP]


@pytest.mark.parametrize(("values", "domain"), [("fp32", CONTRIB), ("int8", DOMAIN)])
def test_only_graphs_that_need_our_library_get_our_attention(
    tiny_checkpoint: Path, tmp_path: Path, values: Any, domain: str
) -> None:
    export_onnx(
        ExportConfig(tiny_checkpoint, tmp_path / "onnx", values=values, smoothing=0, gate=False, progress=False)
    )
    assert domains(tmp_path / "onnx") == [domain, domain]
    nodes = stored_nodes(check_external_data(tmp_path / "onnx"))
    assert all(node.op_type != ATTENTION_OP for node in nodes)


def test_it_answers_as_its_definition_does(family: Family, tmp_path: Path) -> None:
    """Runtime 'ort' takes our kernel, 'ort-stock' inlines the function that the file carries."""
    try:
        native.library_path()
    except KernelError as error:
        pytest.skip(f"needs the compiled kernels: {error}")
    export_onnx(ExportConfig(family.folder, tmp_path / "onnx", values="bf16", gate=False, progress=False))
    assert set(domains(tmp_path / "onnx")) == {DOMAIN}
    generator = np.random.default_rng(0)
    prompts = [generator.integers(4, 40, count) for count in (7, 1, 30)]
    more, steps = generator.integers(4, 40, 9), generator.integers(4, 40, (3, 3))
    found = []
    for custom_op in (True, False):
        runtime = OrtRuntime.load(tmp_path / "onnx", threads=2, custom_op=custom_op)
        state = runtime.new_state(3, 50)
        logits = [runtime.prefill(state, row, prompt) for row, prompt in enumerate(prompts)]
        logits += [runtime.extend(state, 1, more), *(runtime.decode(state, tokens) for tokens in steps)]
        found.append(np.concatenate(logits))
        runtime.close()
    # float32 sums in other orders, through two blocks
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2e-5 * np.abs(found[1]).max())


def attention_graph(*, inputs: int = 10, domain: str = DOMAIN, **changes: int) -> ir.Graph:
    """One attention node beside one of `domain`."""
    attributes = {"num_heads": 2, "kv_num_heads": 1, "scale": 1.0, "do_rotary": 1, "local_window_size": -1, **changes}
    values = [ir.val(f"input_{index}") for index in range(inputs)]
    attributes_of = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
    node = ir.Node(CONTRIB, ATTENTION_OP, values, attributes_of, num_outputs=3)
    other = ir.Node(domain, "DenseMatMulInt8" if domain else "MatMul", [node.outputs[0], values[0]], num_outputs=1)
    return ir.Graph(values, other.outputs, nodes=[node, other], opset_imports={"": 23, CONTRIB: 1})


@pytest.mark.parametrize(
    ("graph", "taken"),
    [
        (attention_graph(), 1),
        (attention_graph(inputs=7), 1),
        (attention_graph(inputs=11), 0),  # with a bias
        (attention_graph(softcap=1), 0),
        (attention_graph(domain=""), 0),
    ],
)
def test_what_ours_cannot_do_stays(graph: ir.Graph, taken: int) -> None:
    assert take_attention(graph) == taken
    assert graph[0].domain == (DOMAIN if taken else CONTRIB)
