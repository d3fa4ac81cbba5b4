"""The manifest is read back from the written file, and differences are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from losa_export.errors import FormatError
from losa_export.graph.external import MODEL_FILE, ExternalDataWriter, check_external_data
from losa_export.graph.formats import DOMAIN, DOMAIN_VERSION, FORMATS, ValueFormat, value_format
from losa_export.graph.manifest import check_digests, file_records, package_version, read_sparse_linears, versions
from losa_export.graph.nodes import NodeList
from losa_export.graph.stacking import METADATA_KEY, Part, describe
from losa_export.graph.stored import read_weights
from losa_export.masks import digest

KEEP = np.random.default_rng(0).random((40, 24)) < 0.3
# a byte for each two of the weights that a step of 16 rows and 4 columns keeps
INT4_BYTES = int(((np.pad(KEEP, ((0, 8), (0, 0))).reshape(3, 16, 6, 4).sum(axis=(1, 3)) + 1) // 2).sum())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, FORMATS["fp32"])


def write(tmp_path: Path, fmt: ValueFormat) -> Path:
    """A model of one sparse linear named 'w'."""
    encoded = fmt.encode(KEEP.astype(np.float32), KEEP)
    with ExternalDataWriter(tmp_path) as writer:
        tensors = [writer.add(f"w.{name}", array) for name, array in encoded.tensors.items()]
    parts = [ir.val(tensor.name, tensor.dtype, tensor.shape, const_value=tensor) for tensor in tensors]
    x = ir.val("X", ir.DataType.FLOAT, ["rows", 24])
    nodes = NodeList()
    y = nodes.add(fmt.sparse_op, [x, *parts], dict(encoded.attributes), domain=DOMAIN, output="Y")
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


@pytest.mark.parametrize(
    ("name", "stored_bytes"),
    [
        # mask, values, offsets; then scales for 48 rows of one group, and a codebook
        ("bf16", 3 * 12 * 4 + 2 * int(KEEP.sum()) + 64 + 8 * 4),
        ("int8", 3 * 6 * 8 + int(KEEP.sum()) + 64 + 8 * 4 + 2 * 48),
        ("int4", 3 * 6 * 8 + INT4_BYTES + 64 + 8 * 4 + 2 * 48 + 16),
    ],
)
def test_masks_of_every_format_are_read_back(name: str, stored_bytes: int, tmp_path: Path) -> None:
    model = check_external_data(write(tmp_path, value_format(name)))
    linears = read_sparse_linears(model)
    entry = linears["w"].as_dict()
    assert entry["mask_sha256"] == digest(KEEP)
    assert (entry["values"], entry["stored_bytes"]) == (name, stored_bytes)
    [(tensor, weight)] = read_weights(model)
    assert tensor == "w"
    # zeros and ones are levels of every format
    np.testing.assert_allclose(weight, KEEP, rtol=1e-3)


def test_a_pattern_that_is_not_the_one_meant_is_an_error(folder: Path) -> None:
    linears = read_sparse_linears(check_external_data(folder))
    with pytest.raises(FormatError, match="zero pattern of 'w' in the written file is not that of the checkpoint"):
        check_digests(linears, {"w": digest(~KEEP)})
    with pytest.raises(FormatError, match="zero pattern of 'other'"):
        check_digests(linears, {"other": digest(KEEP)})


def test_an_unknown_operator_in_our_domain_is_an_error(folder: Path) -> None:
    change(folder, op_type="SparseMatMulFuture")
    with pytest.raises(FormatError, match="has the unknown operator 'SparseMatMulFuture' with 4 inputs"):
        read_sparse_linears(check_external_data(folder))


def test_an_operator_with_too_few_inputs_is_an_error(folder: Path) -> None:
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    del model.graph.node[0].input[3:]
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match="operator 'SparseMatMulFp32' with 3 inputs"):
        read_sparse_linears(check_external_data(folder))


def test_a_mask_of_another_width_than_the_node_is_an_error(folder: Path) -> None:
    change(folder, K=25)
    with pytest.raises(FormatError, match=r"\(3, 24, 2\), which fits no weight of 40 rows and 25 columns"):
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
