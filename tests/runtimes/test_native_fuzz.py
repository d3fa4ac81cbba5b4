"""Broken ONNX files with our operators: ONNX Runtime must refuse them, or give the right result.

Each case makes a sound model from its number, changes one or two things about it, and asks for what the C door
says of the same weight. All of that runs in a process of its own, where a crash ends no test run and names its case:
`python -P tests/runtimes/test_native_fuzz.py nodes CASE 1` repeats one. (tests/native does the same below ONNX.)
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_export.errors import FormatError
from losa_export.runtimes import native

NODE_CASES, MODEL_CASES = 300, 20
NUMBERS = (0, 1, 2, 3, 4, 8, 16, 31, 32, 33, 64, 100, 128, 256, -1, -16, 2**30, 2**31, 2**32 + 16, 2**62, -(2**63))
OPERATORS = {"sparse": "SparseMatMul", "gated": "SparseSwiGLU", "dense": "DenseMatMul", "embedding": "Embedding"}
TYPES = ("fp32", "bf16", "int8", "int4")


def run_child(*arguments: object) -> str:
    child = subprocess.run(
        [sys.executable, "-P", __file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "LOSA_KERNEL"},
    )
    assert child.returncode == 0, f"exit code {child.returncode}, after:\n{child.stdout[-600:]}{child.stderr[-3000:]}"
    return child.stdout.splitlines()[-1]


def test_a_broken_operator_is_refused_or_gives_the_bits_of_the_c_door(kernels: Path) -> None:
    pytest.importorskip("onnx")
    accepted, refused = map(int, run_child("nodes", 0, NODE_CASES).split()[1::2])
    assert accepted + refused == NODE_CASES
    assert min(accepted, refused) > NODE_CASES / 10, "the changes no longer try both sides"


@pytest.mark.parametrize("value_type", TYPES)
def test_a_broken_export_is_refused_or_answers_as_the_scalar_row(
    kernels: Path, pruned: Path, tmp_path: Path, value_type: str
) -> None:
    pytest.importorskip("onnx_ir", reason="needs the extra 'export'")
    from losa_export.export import ExportConfig, export_onnx

    folder = tmp_path / "onnx"
    export_onnx(
        ExportConfig(pruned, folder, weights="sparse", values=value_type, smoothing=0, gate=False, progress=False)
    )
    accepted, refused = map(int, run_child("export", 0, MODEL_CASES, folder / "model.onnx").split()[1::2])
    assert accepted + refused == MODEL_CASES
    assert min(accepted, refused) > 0


# ---- what follows runs in the child ----


def containers() -> Any:
    """The conftest's class, without pytest."""
    spec = importlib.util.spec_from_file_location("runtimes_conftest", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.Containers


def change_number(value: int, generator: np.random.Generator) -> int:
    if generator.random() < 0.5:
        return int(NUMBERS[generator.integers(len(NUMBERS))])
    return value + int(generator.integers(-16, 17))


def change_array(array: NDArray[Any], generator: np.random.Generator) -> tuple[NDArray[Any], str]:
    """Another shape, another length or other contents."""
    flat = array.reshape(-1)
    if flat.size == 0:
        return array, "left empty"
    match int(generator.integers(6)):
        case 0:
            return flat[: generator.integers(flat.size + 1)], "truncated"
        case 1:
            return flat[: max(flat.size - int(generator.integers(1, 40)), 0)], "shortened"
        case 2:
            return np.concatenate([flat, flat[: generator.integers(1, flat.size + 1)]]), "extended"
        case 3:
            shapes = [(1, -1), (-1, 1), (-1,), (1, 1, 1, -1)]
            return array.reshape(shapes[generator.integers(4)]), "reshaped"
        case 4:
            raw = bytearray(array.tobytes())
            raw[generator.integers(len(raw))] ^= 1 << int(generator.integers(8))
            return np.frombuffer(bytes(raw), array.dtype).reshape(array.shape), "with a bit changed"
        case _:
            raw = generator.bytes(array.nbytes)
            return np.frombuffer(raw, array.dtype).reshape(array.shape), "overwritten"


def change_weight(weight: native.Weight, kind: str, generator: np.random.Generator) -> tuple[native.Weight, str]:
    """A change that the C door can be told of as well."""
    numbers = ["rows", "columns", "layout"]
    if weight.scales is not None:
        numbers += ["group"] if kind == "embedding" else ["group", "activation_bits"]
    names = [
        name
        for name in ("mask", "values", "values", "block_offsets", "scales", "codebook")
        if getattr(weight, name) is not None
    ]
    if generator.random() < 0.35:
        name = numbers[generator.integers(len(numbers))]
        value = change_number(getattr(weight, name), generator)
        return dataclasses.replace(weight, **{name: value}), f"{name}={value}"
    name = names[generator.integers(len(names))]
    array, how = change_array(getattr(weight, name), generator)
    return dataclasses.replace(weight, **{name: array}), f"{name} {how}"


def change_model(model: Any, generator: np.random.Generator) -> str:
    """A change that only a file can have; the result must be an error."""
    import onnx

    node, kinds = model.graph.node[0], onnx.TensorProto
    integers = [attribute for attribute in node.attribute if attribute.name in ("N", "K", "layout", "group")]
    constants = 2 if "skip" in node.input else 1  # the input at which they begin
    tensor = model.graph.initializer[generator.integers(len(model.graph.initializer))]
    match int(generator.integers(8)):
        case 0:
            attribute = integers[generator.integers(len(integers))]
            values = [1.5, "x", [attribute.i], [1.5]]
            attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, values[generator.integers(4)]))
            return f"attribute {attribute.name} of another type"
        case 1:
            name = "NK"[generator.integers(2)]
            left = [attribute for attribute in node.attribute if attribute.name != name]
            del node.attribute[:]
            node.attribute.extend(left)
            return f"no attribute {name}"
        case 2:
            kinds_of_another_size = [kinds.INT16, kinds.DOUBLE, kinds.BOOL, kinds.STRING, kinds.UINT4]
            tensor.data_type = kinds_of_another_size[generator.integers(5)]
            return f"{tensor.name} of another type"
        case 3:
            grown = [dim + int(generator.integers(1, 9)) for dim in tensor.dims]
            del tensor.dims[:]
            tensor.dims.extend(grown)
            return f"{tensor.name} declared larger than it is"
        case 4:
            tensor.dims[0] = [-1, -(2**40), 2**62][generator.integers(3)]
            return f"{tensor.name} declared with {tensor.dims[0]} rows"
        case 5:
            index = int(generator.integers(1, len(node.input)))
            del node.input[index]
            return f"no input {index}"
        case 6:
            node.input.append(node.input[-1])
            return "an input more"
        case _:
            index = int(generator.integers(constants, len(node.input)))
            node.input[index] = ["", "nothing", node.input[0]][generator.integers(3)]
            return f"input {index} is '{node.input[index]}'"


def outcome(function: Callable[[], NDArray[Any]]) -> NDArray[Any] | Exception:
    try:
        return function()
    except Exception as error:  # of ONNX Runtime's many kinds
        return error


def through_the_door(weight: native.Weight, kind: str, first: NDArray[Any]) -> NDArray[Any]:
    native.validate(weight, gated=kind == "gated")
    if kind == "embedding":
        return native.embedding(first, weight)
    return (native.swiglu if kind == "gated" else native.matmul)(first, weight)


def run_node_case(tools: Any, case: int) -> tuple[str, bool]:
    """What was changed, and whether it was accepted. Raises: AssertionError for the wrong outcome."""
    generator = np.random.default_rng([2024, case])
    kind = list(OPERATORS)[generator.integers(4)]
    value_type = TYPES[generator.integers(0 if kind in ("sparse", "gated") else 1, 4)]
    rows, columns = (int(size) for size in generator.integers(1, 50, 2))
    weight = tools.example(
        value_type,
        rows,
        columns,
        kind="dense" if kind == "embedding" else kind,
        group=[32, 64, 128][generator.integers(3)],
        activation_bits=[8, 16][generator.integers(2)],
        seed=case,
    ).weight
    gamma = None
    if kind != "embedding" and generator.random() < 0.4:
        gamma = generator.uniform(0.5, 2, columns).astype(np.float32)
    what = f"{'' if gamma is None else 'SkipNorm'}{OPERATORS[kind]} {value_type} ({rows}, {columns}):"
    in_file_only = generator.random() < 0.25
    if not in_file_only:
        for _ in range(generator.integers(1, 3)):
            weight, change = change_weight(weight, kind, generator)
            what += f" {change}"
    model = tools.model(weight, OPERATORS[kind], shape=("batch", "width"), gamma=gamma)
    if in_file_only:
        what += f" {change_model(model, generator)}"
    sys.stderr.write(f"case {case}: {what}\n")

    tokens = int(generator.choice([1, 3, 17]))
    if kind == "embedding":
        first = generator.integers(0, rows, (1, tokens))
    else:
        first = generator.standard_normal((tokens, columns)).astype(np.float32)
    feeds = {"ids" if kind == "embedding" else "X": first}
    if gamma is not None:
        feeds["skip"] = generator.standard_normal(first.shape).astype(np.float32)
        first = native.skip_norm(first, feeds["skip"], gamma, 1e-5)[0]
    expected = outcome(lambda: through_the_door(weight, kind, first))
    found = outcome(lambda: tools.session(model).run(None, feeds)[0])

    if in_file_only:
        assert isinstance(found, Exception), "accepted"
    elif isinstance(expected, Exception):
        assert isinstance(expected, FormatError), f"the C door fails otherwise: {expected!r}"
        assert isinstance(found, Exception), f"accepted, though the C door says: {expected}"
        own = native.typed_error(str(found))
        # Only what is wrong about this call, not about the weight, may be worded otherwise.
        assert own is not None or "node 'layers.0': id " in str(found), f"not typed: {found}"
    else:
        assert not isinstance(found, Exception), f"refused, though the C door runs it: {found}"
        np.testing.assert_array_equal(found, expected)
    return what, not isinstance(found, Exception)


def run_export_case(tools: Any, case: int, sound: bytes) -> tuple[str, bool]:
    """As above, for one node of a whole exported model; only it knows what is right, so rows are compared."""
    import onnx

    generator = np.random.default_rng([2025, case])
    model = onnx.ModelProto.FromString(sound)
    nodes = [node for node in model.graph.node if node.domain == "losa.sparse"]
    node = nodes[generator.integers(len(nodes))]
    numbers = [one for one in node.attribute if one.type == onnx.AttributeProto.INT]
    constants = {one.name: one for one in model.graph.initializer}
    stored = [name for name in node.input if name in constants and not name.endswith("_cache")]
    if not stored or generator.random() < 0.4:
        attribute = numbers[generator.integers(len(numbers))]
        attribute.i = change_number(attribute.i, generator)
        what = f"{node.op_type} {attribute.name}={attribute.i}"
    else:
        name = stored[generator.integers(len(stored))]
        tensor = constants[name]
        size = len(tensor.raw_data) // int(np.prod(tensor.dims))
        array = np.frombuffer(tensor.raw_data, f"V{size}").reshape(tensor.dims)
        changed, how = change_array(array, generator)
        tensor.raw_data = changed.tobytes()
        del tensor.dims[:]
        tensor.dims.extend(changed.shape)
        what = f"{node.op_type} {name} {how}"
    sys.stderr.write(f"case {case}: {what}\n")

    def logits(row: str | None) -> NDArray[Any]:
        os.environ.pop("LOSA_KERNEL", None)
        if row is not None:
            os.environ["LOSA_KERNEL"] = row
        session = tools.session(model)
        sizes = {"batch": 1, "sequence": 5, "total_sequence": 5, "past_sequence": 0}
        feeds = {}
        for one in session.get_inputs():
            shape = [sizes.get(dim, dim) for dim in one.shape]
            feeds[one.name] = np.ones(shape, np.int64) if one.type == "tensor(int64)" else np.zeros(shape, np.float32)
        feeds["input_ids"] = generator.permutation(100)[None, :5]
        return session.run(["logits"], feeds)[0]

    state = generator.bit_generator.state
    expected = outcome(lambda: logits("scalar"))
    generator.bit_generator.state = state  # the same tokens
    found = outcome(lambda: logits(None))
    assert isinstance(found, Exception) == isinstance(expected, Exception), f"{found!r} and by scalar {expected!r}"
    if not isinstance(found, Exception) and np.isfinite(expected).all():
        # Rows differ in the order of float32 sums, in attention's inputs too; random weights may be large.
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(found, expected, atol=1e-3 * scale)
    return what, not isinstance(found, Exception)


def main(part: str, first: int, count: int, *path: str) -> int:
    tools = containers()
    sound = b""
    if path:
        import onnx

        sound = onnx.load_model(path[0]).SerializeToString()
    accepted = 0
    for case in range(first, first + count):
        _, went = run_node_case(tools, case) if part == "nodes" else run_export_case(tools, case, sound)
        accepted += went
    sys.stdout.write(f"accepted {accepted} refused {count - accepted}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
