"""Exports whose products with constant matrices are rewritten for a peer's kernels; the rest stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from losa_export.checkpoint import CONFIG_FILE, copy_companions
from losa_export.errors import FormatError
from losa_export.files import check_output, input_folder, output_folder, write_text_atomic
from losa_export.graph.external import DATA_FILE, MODEL_FILE, ModelFolder, check_external_data
from losa_export.graph.genai import GENAI_FILE
from losa_export.onnx_file import MANIFEST_FILE
from losa_export.progress import Progress

# Nodes in place of one product, and their new initializers.
Replacement = tuple[list[Any], list[Any]]


def products_with_constants(model: ModelFolder) -> list[Any]:
    """The products whose second factor is an initializer, in the graph's order."""
    return [node for node in model.proto.graph.node if _is_product(node, model)]


def write_rewritten(
    source: Path,
    output: Path,
    plan: Callable[[ModelFolder], Callable[[Any], Replacement]],
    record: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> int:
    """Write `output`: the model of `source` with other nodes in place of its products with constant matrices.

    Args:
        source: folder exported with dense weights.
        output: folder to write.
        plan: looks at the whole model, and gives what replaces one product node.
        record: written as export.json, for `losa bench`.
        overwrite: replace a non-empty output folder.
    Returns: how many products were rewritten.
    Raises:
        FormatError: there is no product to rewrite.
        InputError, OutputError: the source cannot be read, or the output not written.
    """
    import onnx

    check_output(output, overwrite=overwrite, inputs=[source])
    model = check_external_data(input_folder(source, what="source"))
    products = products_with_constants(model)
    if not products:
        raise FormatError(f"'{source}' has no product with a constant matrix; export it with --weights dense")
    replace = plan(model)
    graph = model.proto.graph
    with (
        output_folder(output, overwrite=overwrite, inputs=[source]) as folder,
        Progress("rounding", len(products), "products") as progress,
    ):
        nodes, added = [], []
        for node in graph.node:
            if not _is_product(node, model):
                nodes.append(node)
                continue
            fresh, tensors = replace(node)
            nodes += fresh
            added += tensors
            progress.advance()
        used = {name for node in nodes for name in node.input}
        kept = [
            onnx.numpy_helper.from_array(model.read(one.name), one.name)
            for one in graph.initializer
            if one.name in used
        ]
        del graph.initializer[:], graph.node[:]
        graph.initializer.extend([*kept, *added])
        graph.node.extend(nodes)
        onnx.save_model(
            model.proto, str(folder / MODEL_FILE), save_as_external_data=True, location=DATA_FILE, size_threshold=1024
        )
        copy_companions(source, folder)
        write_text_atomic(folder / MANIFEST_FILE, json.dumps(record, indent=2) + "\n")
        for name in (GENAI_FILE, CONFIG_FILE):
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
    return len(products)


def _is_product(node: Any, model: ModelFolder) -> bool:
    return node.op_type in ("MatMul", "FusedMatMul") and node.input[1] in model.tensors
