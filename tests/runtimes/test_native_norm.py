"""A residual addition and RMS norm before a product: alone, and inside the operators SkipNorm… of every value type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_export.errors import FormatError
from losa_export.runtimes import native

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROWS, COLUMNS = 40, 70
EPSILON = 1e-5
OPERATORS = {"sparse": "SparseMatMul", "gated": "SparseSwiGLU", "dense": "DenseMatMul"}
CASES = [(t, k) for t in ("fp32", "bf16", "int8", "int4") for k in OPERATORS if (t, k) != ("fp32", "dense")]
SHAPES = ((1, 1), (1, 3), (3, 1), (1, 16), (2, 64), (1, 130), (0, 5))

Floats = NDArray[np.float32]


def inputs(shape: tuple[int, ...], seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """x, skip and gamma, with tokens of very different size."""
    generator = np.random.default_rng(seed)
    x, skip = generator.standard_normal((2, *shape)).astype(np.float32)
    x *= np.exp2(generator.integers(-8, 9, (*shape[:-1], 1))).astype(np.float32)
    return x, skip, generator.uniform(0.5, 1.5, shape[-1]).astype(np.float32)


def by_definition(x: Floats, skip: Floats, gamma: Floats, epsilon: float) -> tuple[Floats, Floats]:
    """docs/format.md, "The norm before a product": each operation rounded to float32."""
    total = x + skip
    columns = x.shape[-1]
    squares = np.zeros((*x.shape[:-1], -(-columns // 16) * 16), np.float32)
    squares[..., :columns] = total * total
    partial = np.zeros((*x.shape[:-1], 16), np.float32)
    for first in range(0, squares.shape[-1], 16):
        partial += squares[..., first : first + 16]
    for width in (8, 4, 2, 1):
        partial = partial[..., :width] + partial[..., width : 2 * width]
    inverse = np.float32(1) / np.sqrt(partial / np.float32(columns) + np.float32(epsilon))
    return total * inverse * gamma, total


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 31, 33, 64, 70, 576, 4099])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.5])
def test_the_norm_is_its_definition_to_the_bit(kernels: Any, columns: int, epsilon: float) -> None:
    x, skip, gamma = inputs((3, 5, columns), seed=columns)
    found, expected = native.skip_norm(x, skip, gamma, epsilon), by_definition(x, skip, gamma, epsilon)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_norm_is_the_usual_one(kernels: Any) -> None:
    x, skip, gamma = inputs((7, 576))
    total = (x + skip).astype(np.float64)
    expected = total / np.sqrt(np.mean(total**2, axis=-1, keepdims=True) + EPSILON) * gamma
    # 36 additions in each partial sum, and a handful of other roundings of 6e-8 each
    np.testing.assert_allclose(native.skip_norm(x, skip, gamma, EPSILON)[0], expected, rtol=3e-6)


def test_a_token_of_zeros_stays_zero_and_what_is_not_finite_stays_in_its_token(kernels: Any) -> None:
    x, skip, gamma = inputs((5, 33))
    x[1], skip[1] = 0, 0
    x[2, 4], x[3, 32] = np.nan, np.inf
    normed, _ = native.skip_norm(x, skip, gamma, EPSILON)
    assert not normed[1].any()
    assert np.isnan(normed[2]).all()
    assert np.isnan(normed[3, 32])
    assert np.isfinite(normed[[0, 1, 4]]).all()


def test_arrays_that_do_not_fit_each_other_are_refused(kernels: Any) -> None:
    x, skip, gamma = inputs((2, 8))
    for broken in (
        (x, skip[:1], gamma),
        (x, skip, gamma[:7]),
        (x[0, 0], skip, gamma),
        (x[:, :0], skip[:, :0], gamma[:0]),
    ):
        with pytest.raises(
            FormatError, match=r"x is \(.*, skip \(.* and gamma \(.*; x \(..., columns\) is needed twice"
        ):
            native.skip_norm(*broken, EPSILON)
    with pytest.raises(FormatError, match="skip is float64, a norm needs float32"):
        native.skip_norm(x, skip.astype(np.float64), gamma, EPSILON)  # type: ignore[arg-type]


def example(containers: Any, value_type: str, kind: str, **options: Any) -> Any:
    return containers.example(value_type, ROWS, COLUMNS, kind=kind, **({"group": 32} | options))


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize(("value_type", "kind"), CASES)
def test_an_operator_is_its_product_of_the_norm_to_the_bit(
    containers: Any, value_type: str, kind: str, activation_bits: int
) -> None:
    """Whatever the number of tokens and threads."""
    one = example(containers, value_type, kind, activation_bits=activation_bits)
    gamma = inputs((COLUMNS,))[2]
    model = containers.model(one.weight, OPERATORS[kind], gamma=gamma)
    alone, together = containers.session(model), containers.session(model, threads=2)
    assert [output.shape for output in alone.get_outputs()] == [["batch", "sequence", n] for n in (ROWS, COLUMNS)]
    product = native.swiglu if one.gated else native.matmul
    for shape in SHAPES:
        x, skip, _ = inputs((*shape, COLUMNS), seed=sum(shape))
        normed, total = native.skip_norm(x, skip, gamma, EPSILON)
        for session in (alone, together):
            y, found = session.run(None, {"X": x, "skip": skip})
            assert y.shape == (*shape, ROWS)
            np.testing.assert_array_equal(y, product(normed, one.weight))
            np.testing.assert_array_equal(found, total)


@pytest.mark.parametrize(("value_type", "kind"), CASES)
def test_a_forced_row_norms_alike(
    row: str, containers: Any, value_type: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = example(containers, value_type, kind)
    product = native.swiglu if one.gated else native.matmul
    monkeypatch.setenv("LOSA_KERNEL", row)
    for tokens in (1, 9, 40):
        x, skip, gamma = inputs((1, tokens, COLUMNS))
        session = containers.session(containers.model(one.weight, OPERATORS[kind], gamma=gamma))
        y, total = session.run(None, {"X": x, "skip": skip})
        np.testing.assert_array_equal(total, x + skip)
        np.testing.assert_array_equal(y, product(by_definition(x, skip, gamma, EPSILON)[0], one.weight, row=row))


def test_several_operators_may_share_their_inputs(containers: Any) -> None:
    """The sum is a tensor of its own: x and skip are as they were for whoever reads them next."""
    one = example(containers, "int8", "sparse")
    x, skip, gamma = inputs((1, 4, COLUMNS))
    model = containers.model(one.weight, "SparseMatMul", gamma=gamma)
    again = onnx.NodeProto.FromString(model.graph.node[0].SerializeToString())
    again.name, again.output[0], again.output[1] = "again", "Y2", "sum2"
    model.graph.node.append(again)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, 1, None) for n in ("Y2", "sum2"))
    y, total, y2, total2 = containers.session(model).run(None, {"X": x, "skip": skip})
    np.testing.assert_array_equal(y, y2)
    np.testing.assert_array_equal(total, total2)


@pytest.mark.parametrize(("value_type", "kind"), CASES)
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"epsilon": 1}, "attribute 'epsilon' is missing, or not one number"),
        ({"epsilon": "1e-5"}, "attribute 'epsilon' is missing, or not one number"),
        ({"epsilon": -1e-5}, "epsilon is -0.000010, not a finite number from 0 on"),
        ({"epsilon": float("nan")}, "epsilon is -?nan, not a finite"),
        ({"epsilon": float("inf")}, "epsilon is inf, not a finite"),
        ({"N": 0}, "N = 0 and K = 70 are not the sides of a weight"),
    ],
)
def test_wrong_attributes_are_refused(
    containers: Any, value_type: str, kind: str, attributes: dict[str, Any], message: str
) -> None:
    weight = example(containers, value_type, kind).weight
    model = containers.model(weight, OPERATORS[kind], gamma=inputs((COLUMNS,))[2], attributes=attributes)
    name = f"SkipNorm{OPERATORS[kind]}{value_type.capitalize()}"
    with pytest.raises(Exception, match=f"losa.FormatError: {name} node 'layers.0': {message}") as info:
        containers.session(model)
    assert isinstance(native.typed_error(str(info.value)), FormatError)


def test_an_epsilon_left_out_is_refused(containers: Any) -> None:
    model = containers.model(example(containers, "int8", "sparse").weight, "SparseMatMul", gamma=inputs((COLUMNS,))[2])
    kept = [attribute for attribute in model.graph.node[0].attribute if attribute.name != "epsilon"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(Exception, match=r"losa.FormatError: .*attribute 'epsilon' is missing, or not one number"):
        containers.session(model)


def test_a_gamma_that_does_not_fit_is_refused(containers: Any) -> None:
    weight = example(containers, "int8", "sparse").weight
    gamma = inputs((COLUMNS + 1,))[2]
    for wrong in (gamma, gamma[: COLUMNS - 1], gamma[:0]):
        model = containers.model(weight, "SparseMatMul", gamma=wrong)
        with pytest.raises(Exception, match=f"'layers.0': gamma has {wrong.nbytes} bytes, K = 70 needs 280"):
            containers.session(model)
    model = containers.model(weight, "SparseMatMul", gamma=gamma[:COLUMNS], inputs=("gamma",))
    with pytest.raises(Exception, match=r"losa.FormatError: .*'gamma' is not an initializer; it must be constant"):
        containers.session(model)


@pytest.mark.parametrize(
    "shape", [(1, 3, COLUMNS - 1), (3, COLUMNS), (1, 1, COLUMNS), (1, 4, COLUMNS), (3, 1, COLUMNS), ()]
)
def test_a_skip_of_another_shape_is_refused_when_it_arrives(containers: Any, shape: tuple[int, ...]) -> None:
    weight = example(containers, "int8", "sparse").weight
    x, skip, gamma = inputs((1, 3, COLUMNS))
    session = containers.session(containers.model(weight, "SparseMatMul", gamma=gamma))
    with pytest.raises(Exception, match=r"losa.FormatError: .*'layers.0': skip has not the shape of X"):
        session.run(None, {"X": x, "skip": np.zeros(shape, np.float32)})
    session.run(None, {"X": x, "skip": skip})  # the session lives on
