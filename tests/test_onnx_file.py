from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from losa_export.errors import FormatError, InputError, LosaError, UnsafePathError
from losa_export.export import ExportConfig, export_onnx
from losa_export.onnx_file import check_references


def external(name: str, location: str, **facts: object) -> TensorProto:
    """A tensor of two float32 that lies in another file."""
    tensor = TensorProto(name=name, dims=[2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **facts}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def save(folder: Path, place: str, tensor: TensorProto) -> None:
    """A model that holds `tensor` in a certain place."""
    node = helper.make_node("Neg", ["x"], ["y"])
    model = helper.make_model(helper.make_graph([node], "g", [], []), ir_version=10)
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place == "constant":
        model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    elif place == "list":
        attribute = onnx.AttributeProto(name="values", type=onnx.AttributeProto.TENSORS, tensors=[tensor])
        model.graph.node.add(op_type="Odd", domain="far").attribute.append(attribute)
    elif place == "branch":
        branch = helper.make_graph([node], "branch", [], [], initializer=[tensor])
        model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch))
    elif place == "function":
        constant = helper.make_node("Constant", [], ["c"], value=tensor)
        model.functions.append(helper.make_function("own", "F", [], ["c"], [constant], []))
    elif place == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


PLACES = ["initializer", "constant", "list", "branch", "function", "sparse"]


@pytest.mark.parametrize("place", PLACES)
def test_a_reference_is_found_wherever_it_stands(tmp_path: Path, place: str) -> None:
    (tmp_path / "weights").write_bytes(bytes(8))
    save(tmp_path, place, external("w", "weights"))
    assert check_references(tmp_path).data_files == {tmp_path / "weights"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "sub/../../secret", "", "sub\\..\\secret"])
def test_a_reference_that_leaves_the_folder_is_refused(tmp_path: Path, place: str, location: str) -> None:
    save(tmp_path, place, external("w", location))
    with pytest.raises(UnsafePathError, match="only plain names inside the folder are read"):
        check_references(tmp_path)


@pytest.fixture(scope="module")
def decoder_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole decoder, as the exporter writes it."""
    folder = tmp_path_factory.mktemp("decoder") / "onnx"
    export_onnx(ExportConfig(tiny_checkpoint, folder, gate=False, progress=False))
    return folder


def test_a_model_that_is_a_link_is_refused(tmp_path: Path, decoder_folder: Path) -> None:
    (tmp_path / "model.onnx").symlink_to(decoder_folder / "model.onnx")
    with pytest.raises(UnsafePathError, match="is a symbolic link"):
        check_references(tmp_path)


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    save(tmp_path, "initializer", external("w", "weights"))
    with pytest.raises(InputError, match="refers to 'weights', which is missing"):
        check_references(tmp_path)


@pytest.mark.parametrize("facts", [{"offset": 1, "length": 8}, {"offset": -1}, {"length": -8}, {"offset": "x"}])
def test_a_tensor_beyond_its_file_is_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    (tmp_path / "weights").write_bytes(bytes(8))
    save(tmp_path, "initializer", external("w", "weights", **facts))
    with pytest.raises(FormatError, match=r"tensor 'w' is said to lie at byte .* has 8: the file is truncated"):
        check_references(tmp_path)


def test_operators_are_listed_with_those_of_functions(tmp_path: Path) -> None:
    save(tmp_path, "function", helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0]))
    assert check_references(tmp_path).operators == {("", "Neg"), ("", "Constant")}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has no nodes"),
        (b"\x08\x0a", "it has no nodes"),
        (b"\x3a\x05ab", "a field of 5 bytes breaks off: the file is truncated"),
        (b"\x3a", "a number breaks off"),
        (b"\x0d\x00", "a number breaks off"),
        (b"\x3b", "wire type 3 is unknown"),
        (b"\x08" + b"\xff" * 11, "a number has more than 64 bits"),
        (b"\x38\x01", "a number stands where a message should"),
        (b"\x3a\x08\x0a\x06\x22\x01\xff\x3a\x01\xff", "utf-8"),
    ],
)
def test_what_is_no_model_is_refused_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(FormatError, match=rf"model.onnx' is not an ONNX model \(.*{reason}.*export it again"):
        check_references(tmp_path)


def test_endless_nesting_is_refused(tmp_path: Path) -> None:
    content = b""
    for _ in range(40):  # a graph in an attribute of a node of a graph
        content = onnx_field(1, onnx_field(5, onnx_field(6, content)))
    (tmp_path / "model.onnx").write_bytes(onnx_field(7, content))
    with pytest.raises(FormatError, match="messages are nested more than 100 deep"):
        check_references(tmp_path)


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, decoder_folder: Path, data: st.DataObject
) -> None:
    content = bytearray((decoder_folder / "model.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "model.onnx").write_bytes(content)
    (folder / "model.onnx.data").write_bytes(np.zeros(1 << 14, np.uint8).tobytes())
    with contextlib.suppress(LosaError):
        check_references(folder)


def onnx_field(number: int, content: bytes) -> bytes:
    """A field of bytes in wire format."""
    length, size = len(content), b""
    while length >= 0x80:
        size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content
