"""The operators of every value type inside ONNX Runtime: what the C door gives, to the bit, or a refusal."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from losa_export.errors import FormatError
from losa_export.runtimes import native

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROWS, COLUMNS = 40, 70
OPERATORS = {"sparse": "SparseMatMul", "gated": "SparseSwiGLU", "dense": "DenseMatMul"}
CASES = [(t, k) for t in ("fp32", "bf16", "int8", "int4") for k in OPERATORS if (t, k) != ("fp32", "dense")]
TABLES = ("bf16", "int8", "int4")
SCALED = [(t, k) for t, k in CASES if t in ("int8", "int4")]


def example(containers: Any, value_type: str, kind: str, **options: Any) -> Any:
    return containers.example(value_type, ROWS, COLUMNS, kind=kind, **({"group": 32} | options))


def through_the_door(one: Any, x: Any) -> Any:
    return (native.swiglu if one.gated else native.matmul)(x, one.weight)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize(("value_type", "kind"), CASES)
def test_an_operator_gives_the_bits_of_the_c_door(
    containers: Any, value_type: str, kind: str, activation_bits: int
) -> None:
    one = example(containers, value_type, kind, activation_bits=activation_bits)
    model = containers.model(one.weight, OPERATORS[kind])
    alone, together = containers.session(model), containers.session(model, threads=2)
    assert alone.get_outputs()[0].shape == ["batch", "sequence", ROWS]
    for shape in ((1, 1), (1, 3), (3, 1), (1, 16), (2, 64), (1, 130), (0, 5)):
        x = containers.activations(shape[0] * shape[1], COLUMNS).reshape(*shape, COLUMNS)
        y = alone.run(None, {"X": x})[0]
        assert y.shape == (*shape, ROWS)
        np.testing.assert_array_equal(y, through_the_door(one, x))
        np.testing.assert_array_equal(y, together.run(None, {"X": x})[0])


@pytest.mark.parametrize(("value_type", "kind"), CASES)
def test_a_forced_row_gives_its_own_bits(
    row: str, containers: Any, value_type: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = example(containers, value_type, kind)
    multiply = native.swiglu if one.gated else native.matmul
    x = containers.activations(9, COLUMNS)
    monkeypatch.setenv("LOSA_KERNEL", row)
    y = containers.session(containers.model(one.weight, OPERATORS[kind])).run(None, {"X": x[None]})[0][0]
    np.testing.assert_array_equal(y, multiply(x, one.weight, row=row))


@pytest.mark.parametrize("value_type", TABLES)
def test_an_embedding_gives_the_bits_of_the_c_door(containers: Any, value_type: str) -> None:
    one = example(containers, value_type, "dense")
    session = containers.session(containers.model(one.weight, "Embedding"))
    assert session.get_outputs()[0].shape == ["batch", "sequence", COLUMNS]
    for shape in ((1, 1), (2, 7), (1, 130), (0, 5)):
        ids = np.random.default_rng(4).integers(0, ROWS, shape)
        y = session.run(None, {"ids": ids})[0]
        assert y.shape == (*shape, COLUMNS)
        np.testing.assert_array_equal(y, native.embedding(ids, one.weight))


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3)])
def test_ids_may_have_any_rank(containers: Any, shape: tuple[int, ...]) -> None:
    one = example(containers, "int8", "dense")
    session = containers.session(containers.model(one.weight, "Embedding", shape=shape))
    ids = np.full(shape, ROWS - 1)
    np.testing.assert_array_equal(session.run(None, {"ids": ids})[0], native.embedding(ids, one.weight))


@pytest.mark.parametrize("value_type", TABLES)
@pytest.mark.parametrize("wrong", [-1, ROWS, 47, 48, 2**40, -(2**63)])
def test_an_id_that_is_no_row_is_refused_when_it_arrives(containers: Any, value_type: str, wrong: int) -> None:
    session = containers.session(containers.model(example(containers, value_type, "dense").weight, "Embedding"))
    with pytest.raises(Exception, match=f"Embedding{value_type.capitalize()} node 'layers.0': id {wrong} is not"):
        session.run(None, {"ids": np.array([[0, wrong, 1]])})
    session.run(None, {"ids": np.array([[0, ROWS - 1]])})  # the session lives on


@pytest.mark.parametrize("value_type", TABLES)
def test_head_and_embedding_may_share_a_table(containers: Any, value_type: str) -> None:
    one = example(containers, value_type, "dense")
    model = containers.model(one.weight, "Embedding")
    head = containers.model(one.weight, "DenseMatMul").graph.node[0]
    head.input[0], head.output[0], head.name = "Y", "logits", "head"
    model.graph.node.append(head)
    model.graph.output[0].name = "logits"
    ids = np.arange(ROWS)[None]
    y = containers.session(model).run(None, {"ids": ids})[0]
    np.testing.assert_array_equal(y, native.matmul(native.embedding(ids, one.weight), one.weight))


@pytest.mark.parametrize(("value_type", "kind"), CASES)
def test_a_weight_that_is_not_constant_is_refused(containers: Any, value_type: str, kind: str) -> None:
    weight = example(containers, value_type, kind).weight
    for name in containers.tensors(weight):
        model = containers.model(weight, OPERATORS[kind], inputs=(name,))
        with pytest.raises(Exception, match=rf"losa.FormatError: .*'layers.0': input '{name}' is not an initializer"):
            containers.session(model)


@pytest.mark.parametrize(("value_type", "kind"), CASES)
def test_a_tensor_of_another_type_is_refused(containers: Any, value_type: str, kind: str) -> None:
    """By ONNX Runtime, which knows the types of our operators."""
    weight = example(containers, value_type, kind).weight
    for index, name in enumerate(containers.tensors(weight)):
        model = containers.model(weight, OPERATORS[kind])
        tensor = model.graph.initializer[index]
        assert tensor.name == name
        tensor.data_type = onnx.TensorProto.INT16 if tensor.data_type != onnx.TensorProto.INT16 else 1
        with pytest.raises(Exception, match=rf"Type 'tensor\(int16\)' of input parameter \({name}\)"):
            containers.session(model)


WRONG_ATTRIBUTES = [
    ({"N": 0}, "N = 0 and K = 70 are not the sides of a weight"),
    ({"N": 2**62}, "N = 4611686018427387904 and K = 70 are not the sides of a weight"),
    ({"K": -(2**63)}, "N = 40 and K = -9223372036854775808 are not the sides of a weight"),
    ({"layout": 2}, "layout is 2, this library reads layout 1"),
]
WRONG_SCALED = [
    ({"group": 256}, "group is 256, this library knows 32, 64 and 128"),
    ({"group": -32}, "group is -32, this library knows"),
    ({"group": 64}, "scales has [0-9]+ bytes, N = 40 and K = 70 need"),
    ({"activation_bits": 4}, "activation_bits is 4, this library knows 8 and 16"),
]


@pytest.mark.parametrize(
    ("value_type", "kind", "attributes", "message"),
    [(*case, *wrong) for case in CASES for wrong in WRONG_ATTRIBUTES]
    + [(*case, *wrong) for case in SCALED for wrong in WRONG_SCALED],
)
def test_attributes_that_contradict_the_weight_are_refused(
    containers: Any, value_type: str, kind: str, attributes: dict[str, int], message: str
) -> None:
    name = f"{OPERATORS[kind]}{value_type.capitalize()}"
    model = containers.model(example(containers, value_type, kind).weight, OPERATORS[kind], attributes=attributes)
    with pytest.raises(Exception, match=f"losa.FormatError: {name} node 'layers.0': {message}") as info:
        containers.session(model)
    assert isinstance(native.typed_error(str(info.value)), FormatError)


@pytest.mark.parametrize("value_type", TABLES)
def test_an_embedding_is_validated_too(containers: Any, value_type: str) -> None:
    weight = example(containers, value_type, "dense").weight
    with pytest.raises(Exception, match=r"losa.FormatError: Embedding.* node 'layers.0': (values|scales) has"):
        containers.session(containers.model(weight, "Embedding", attributes={"N": ROWS + 16}))


@pytest.mark.parametrize("name", ["layout", "group", "activation_bits"])
def test_an_attribute_with_a_default_may_be_left_out(containers: Any, name: str) -> None:
    one = example(containers, "int8", "sparse", group=128, activation_bits=16)
    model = containers.model(one.weight, "SparseMatMul")
    kept = [attribute for attribute in model.graph.node[0].attribute if attribute.name != name]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    x = containers.activations(2, COLUMNS)
    np.testing.assert_array_equal(
        containers.session(model).run(None, {"X": x[None]})[0][0], native.matmul(x, one.weight)
    )


@pytest.mark.parametrize("name", ["N", "K", "layout", "group", "activation_bits"])
def test_an_attribute_of_another_type_is_refused_not_replaced_by_its_default(containers: Any, name: str) -> None:
    model = containers.model(example(containers, "int8", "sparse", group=128).weight, "SparseMatMul")
    [attribute] = [one for one in model.graph.node[0].attribute if one.name == name]
    for other in (float(attribute.i), str(attribute.i), [attribute.i]):
        attribute.CopyFrom(onnx.helper.make_attribute(name, other))
        with pytest.raises(Exception, match=f"losa.FormatError: .* attribute '{name}' is .*not one integer"):
            containers.session(model)


def test_a_broken_part_is_refused_by_its_name(containers: Any) -> None:
    weight = example(containers, "int4", "sparse").weight
    for name, shorter in {
        "mask": weight.mask[:2],
        "values": weight.values[:-1],
        "block_offsets": weight.block_offsets[:3],
        "scales": weight.scales[:2],
        "codebook": weight.codebook[:15],
    }.items():
        model = containers.model(dataclasses.replace(weight, **{name: shorter}), "SparseMatMul")
        with pytest.raises(Exception, match=f"losa.FormatError: SparseMatMulInt4 node 'layers.0': {name} has"):
            containers.session(model)
