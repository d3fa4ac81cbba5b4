"""External data: alignment, streaming, and references that may not leave the folder."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from losa_export.errors import FormatError, InputError, UnsafePathError
from losa_export.graph.external import ALIGNMENT, DATA_FILE, MODEL_FILE, ExternalDataWriter, check_external_data


def write_model(folder: Path, tensors: list[ir.TensorProtocol]) -> None:
    values = [ir.val(t.name, t.dtype, t.shape, const_value=t) for t in tensors]
    node = ir.Node("", "Identity", [values[0]])
    graph = ir.Graph([], list(node.outputs), nodes=[node], initializers=values, opset_imports={"": 23}, name="weights")
    ir.save(ir.Model(graph, ir_version=10), folder / MODEL_FILE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with one external and one inline tensor."""
    with ExternalDataWriter(tmp_path) as writer:
        tensors = [
            writer.add("big", np.arange(1000, dtype=np.float32)),
            writer.add("small", np.arange(4, dtype=np.int64)),
        ]
    write_model(tmp_path, tensors)
    return tmp_path


def change_reference(folder: Path, **facts: str) -> None:
    """Rewrite what the first tensor says about its external data."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    tensor = model.graph.initializer[0]
    kept = {entry.key: entry.value for entry in tensor.external_data} | facts
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())


def test_every_tensor_starts_on_a_page_and_reads_back_bit_for_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "odd": generator.standard_normal(777).astype(np.float32),
        "bytes": generator.integers(0, 256, (33, 45, 2)).astype(np.uint8),
        "long": generator.integers(0, 9, 500),
        "tiny": np.float32([1, 2]),
        "narrow": generator.standard_normal(1000).astype(ml_dtypes.bfloat16),
        "narrow and tiny": generator.standard_normal(9).astype(ml_dtypes.bfloat16),
    }
    with ExternalDataWriter(tmp_path) as writer:
        tensors = [writer.add(name, array) for name, array in arrays.items()]
    write_model(tmp_path, tensors)
    opened = check_external_data(tmp_path)
    for name, array in arrays.items():
        assert np.array_equal(opened.read(name), array)
        assert opened.read(name).dtype == array.dtype
    places = [stored for stored in opened.tensors.values() if stored.path is not None]
    assert [stored.offset % ALIGNMENT for stored in places] == [0, 0, 0, 0]
    assert opened.tensors["tiny"].path is None


@pytest.mark.parametrize("shape", [(3, 5), (64, 48), (300, 7), (17, 1001)])
def test_a_transposed_matrix_reads_back_as_its_transpose(shape: tuple[int, int], tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with ExternalDataWriter(tmp_path) as writer:
        tensor = writer.add_transposed("matrix", matrix)
    write_model(tmp_path, [tensor])
    assert np.array_equal(check_external_data(tmp_path).read("matrix"), matrix.T)


def test_stock_tools_read_the_same_data(folder: Path) -> None:
    tensor = onnx.load(folder / MODEL_FILE).graph.initializer[0]
    assert np.array_equal(onnx.numpy_helper.to_array(tensor), np.arange(1000, dtype=np.float32))


@pytest.mark.parametrize("name", ["../data", "/data", "a/b", "..", ""])
def test_the_writer_takes_plain_names_only(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafePathError, match="external data must be a plain file name"):
        ExternalDataWriter(tmp_path, name)


def test_the_writer_follows_no_link_laid_in_its_way(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / DATA_FILE).symlink_to(victim)
    with pytest.raises(FileExistsError):
        ExternalDataWriter(tmp_path)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "", "sub/../../secret"])
def test_a_reference_that_leaves_the_folder_is_refused(location: str, folder: Path) -> None:
    change_reference(folder, location=location)
    with pytest.raises(UnsafePathError, match="outside it"):
        check_external_data(folder)


def test_a_symbolic_link_as_data_is_refused(folder: Path) -> None:
    (folder / DATA_FILE).rename(folder / "elsewhere")
    (folder / DATA_FILE).symlink_to(folder / "elsewhere")
    with pytest.raises(UnsafePathError, match="is a symbolic link"):
        check_external_data(folder)


def test_a_hard_link_as_data_is_refused(folder: Path) -> None:
    os.link(folder / DATA_FILE, folder / "second-name")
    with pytest.raises(UnsafePathError, match="hard link with 2 names"):
        check_external_data(folder)


def test_missing_data_is_named(folder: Path) -> None:
    (folder / DATA_FILE).unlink()
    with pytest.raises(InputError, match=f"'{DATA_FILE}', which is missing"):
        check_external_data(folder)


@pytest.mark.parametrize("facts", [{"offset": "4096"}, {"length": "10"}, {"offset": "-1"}])
def test_data_that_does_not_fit_its_tensor_is_refused(facts: dict[str, str], folder: Path) -> None:
    change_reference(folder, **facts)
    with pytest.raises(FormatError, match=r"tensor 'big' (needs 4000 bytes|is said to lie at byte)"):
        check_external_data(folder)


def test_an_offset_that_is_no_number_is_refused(folder: Path) -> None:
    change_reference(folder, offset="many")
    with pytest.raises(FormatError, match="tensor 'big' is said to lie at byte many"):
        check_external_data(folder)


def test_a_file_that_is_no_model_is_refused(folder: Path) -> None:
    (folder / MODEL_FILE).write_bytes(b"\xff" * 64)
    with pytest.raises(FormatError, match="is not an ONNX model"):
        check_external_data(folder)


def test_a_tensor_hidden_in_an_attribute_is_checked_too(folder: Path) -> None:
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    hidden = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1])
    hidden.data_location = TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value="../secret")
    inner = helper.make_graph([helper.make_node("Constant", [], ["y"], value=hidden)], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    with pytest.raises(UnsafePathError, match="outside it"):
        check_external_data(folder)


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    with pytest.raises(FormatError, match="has no initializer 'other'"):
        check_external_data(folder).read("other")
