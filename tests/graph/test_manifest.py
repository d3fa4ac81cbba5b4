"""The manifest is read back from the written file, and differences are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from losa_export.errors import FormatError
from losa_export.graph.external import MODEL_FILE, ExternalDataWriter, check_external_data
from losa_export.graph.formats import DOMAIN, DOMAIN_VERSION, FORMATS
from losa_export.graph.manifest import check_digests, file_records, package_version, read_sparse_linears, versions
from losa_export.graph.nodes import NodeList
from losa_export.graph.stacking import METADATA_KEY, Part, describe
from losa_export.masks import digest

KEEP = np.random.default_rng(0).random((40, 24)) < 0.3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of one sparse linear named 'w'."""
    fmt = FORMATS["fp32"]
    encoded = fmt.encode(KEEP.astype(np.float32), KEEP)
    with ExternalDataWriter(tmp_path) as writer:
        tensors = [writer.add(f"w.{name}", array) for name, array in encoded.tensors.items()]
    parts = [ir.val(tensor.name, tensor.dtype, tensor.shape, const_value=tensor) for tensor in tensors]
    x = ir.val("X", ir.DataType.FLOAT, ["rows", 24])
    nodes = NodeList()
    y = nodes.add(fmt.op_type, [x, *parts], dict(encoded.attributes), domain=DOMAIN, output="Y")
    nodes.nodes[-1].metadata_props[METADATA_KEY] = describe([Part("w", 40)])
    graph = ir.Graph([x], [y], nodes=nodes.nodes, initializers=parts, opset_imports={"": 23, DOMAIN: DOMAIN_VERSION})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / MODEL_FILE)
    return tmp_path


def change(folder: Path, **attributes: object) -> None:
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    [node] = model.graph.node
    for name, value in attributes.items():
        if name == "op_type":
            node.op_type = str(value)
        else:
            next(item for item in node.attribute if item.name == name).i = int(str(value))
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())


def test_a_sparse_linear_is_described_from_the_file(folder: Path) -> None:
    linears = read_sparse_linears(check_external_data(folder))
    assert list(linears) == ["w"]
    entry = linears["w"].as_dict()
    assert entry["mask_sha256"] == digest(KEEP)
    assert (entry["shape"], entry["zeros"], entry["values"]) == ([40, 24], int((~KEEP).sum()), "fp32")
    assert entry["stored_bytes"] == 3 * 24 * 2 + 4 * (int(KEEP.sum()) + 16) + 4 * 8
    check_digests(linears, {"w": digest(KEEP)})


def test_a_pattern_that_is_not_the_one_meant_is_an_error(folder: Path) -> None:
    linears = read_sparse_linears(check_external_data(folder))
    with pytest.raises(FormatError, match="zero pattern of 'w' in the written file is not that of the checkpoint"):
        check_digests(linears, {"w": digest(~KEEP)})
    with pytest.raises(FormatError, match="zero pattern of 'other'"):
        check_digests(linears, {"other": digest(KEEP)})


def test_an_unknown_operator_in_our_domain_is_an_error(folder: Path) -> None:
    change(folder, op_type="SparseMatMulFuture")
    with pytest.raises(FormatError, match="has the unknown operator 'SparseMatMulFuture'"):
        read_sparse_linears(check_external_data(folder))


def test_a_mask_of_another_width_than_the_node_is_an_error(folder: Path) -> None:
    change(folder, K=25)
    with pytest.raises(FormatError, match="has 24 columns, not 25"):
        read_sparse_linears(check_external_data(folder))


def test_a_node_that_does_not_name_its_weights_is_an_error(folder: Path) -> None:
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    model.graph.node[0].metadata_props[0].value = "[[]]"
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match="does not say which weights it holds: export the model again"):
        read_sparse_linears(check_external_data(folder))


def test_all_files_but_the_manifest_are_recorded(folder: Path) -> None:
    (folder / "export.json").write_text("{}")
    assert set(file_records(folder)) == {MODEL_FILE, "model.onnx.data"}


def test_absent_packages_have_no_version() -> None:
    assert package_version("no-such-package-anywhere") is None
    assert versions()["numpy"] == np.__version__
