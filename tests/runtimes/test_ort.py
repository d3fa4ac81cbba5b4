from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from losa_export.errors import (
    CheckpointError,
    FormatError,
    InputError,
    KernelError,
    RuntimeFailureError,
    UnsafePathError,
)
from losa_export.runtimes import native
from losa_export.runtimes.base import DecodeState, Runtime
from losa_export.runtimes.loader import load_runtime
from losa_export.runtimes.ort import GrowingState, OrtRuntime, SharedState
from losa_export.runtimes.ort_session import SessionOptions, open_session

# float32 sums of 16 to 32 products of order 1, in another order: a few units in the last place
TOLERANCE = 5e-6
PROMPTS = [4, 9, 6]


@pytest.fixture(scope="session", params=["shared", "growing"])
def stock(request: pytest.FixtureRequest) -> OrtRuntime:
    """The hand-written decoder, with each kind of cache."""
    return OrtRuntime.load(request.getfixturevalue(f"{request.param}_folder"), threads=1, custom_op=False)


@pytest.fixture
def copy(shared_folder: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder that a test may break."""
    return Path(shutil.copytree(shared_folder, tmp_path / "onnx"))


def sequences() -> list[NDArray[np.int64]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 40, size=length + 5) for length in PROMPTS]


def alone(runtime: Runtime, sequence: NDArray[np.int64]) -> NDArray[np.float32]:
    return runtime.prefill(runtime.new_state(1, len(sequence)), 0, sequence)


def plain_forward(weights: dict[str, Any], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The decoder of conftest in float64, one attention matrix for the whole sequence."""
    x = weights["embedding"][ids].astype(np.float64)
    size = weights["cos"].shape[1]

    def rotated(y: NDArray[np.float64]) -> NDArray[np.float64]:
        low, high, cos, sin = y[:, :size], y[:, size:], weights["cos"][: len(ids)], weights["sin"][: len(ids)]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=1)

    key, value = rotated(x @ weights["key"]), x @ weights["value"]
    heads = []
    for query in np.split(x @ weights["query"], 2, axis=1):
        scores = rotated(query) @ key.T / np.sqrt(2 * size)
        scores[np.triu_indices(len(ids), 1)] = -np.inf
        exps = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(exps / exps.sum(axis=1, keepdims=True) @ value)
    result: NDArray[np.float64] = (x + np.concatenate(heads, axis=1) @ weights["output"]) @ weights["head"]
    return result


def test_prefill_is_the_plain_forward_pass(stock: OrtRuntime, block_weights: dict[str, Any]) -> None:
    for sequence in sequences():
        expected = plain_forward(block_weights, sequence)
        np.testing.assert_allclose(alone(stock, sequence), expected, atol=1e-4)  # float32 against float64, |x| < 20


def test_decoding_rows_of_different_lengths_equals_each_row_alone(stock: OrtRuntime) -> None:
    whole = [alone(stock, sequence) for sequence in sequences()]
    state = stock.new_state(3, 20)
    for row in (2, 0, 1):
        got = stock.prefill(state, row, sequences()[row][: PROMPTS[row]])
        np.testing.assert_allclose(got, whole[row][: PROMPTS[row]], atol=TOLERANCE)
    for step in range(5):
        at = [length + step for length in PROMPTS]
        assert state.lengths.tolist() == at
        got = stock.decode(state, np.array([sequence[a] for sequence, a in zip(sequences(), at, strict=True)]))
        np.testing.assert_allclose(got, [w[a] for w, a in zip(whole, at, strict=True)], atol=TOLERANCE)


def test_a_row_is_reused_after_reset_while_others_go_on(stock: OrtRuntime) -> None:
    first, second, third = sequences()
    whole = [alone(stock, first), alone(stock, third)]
    state = stock.new_state(2, 20)
    stock.prefill(state, 0, first[:4])
    stock.prefill(state, 1, second[:12])
    stock.decode(state, np.array([first[4], second[12]]))
    state.reset(1)
    stock.prefill(state, 1, third[:7])
    got = stock.decode(state, np.array([first[5], third[7]]))
    np.testing.assert_allclose(got, [whole[0][5], whole[1][7]], atol=TOLERANCE)


def test_decoding_from_an_empty_cache_is_the_first_position(stock: OrtRuntime) -> None:
    sequence = sequences()[0]
    state = stock.new_state(2, 4)
    stock.prefill(state, 1, sequence[:3])
    got = stock.decode(state, np.array([sequence[0], sequence[3]]))
    np.testing.assert_allclose(got, alone(stock, sequence)[[0, 3]], atol=TOLERANCE)


def test_results_do_not_change_afterwards(stock: OrtRuntime) -> None:
    state = stock.new_state(1, 8)
    results = [stock.prefill(state, 0, np.array([1, 2])), stock.decode(state, np.array([3]))]
    before = [result.copy() for result in results]
    stock.decode(state, np.array([4]))
    for result, kept in zip(results, before, strict=True):
        np.testing.assert_array_equal(result, kept)


def test_the_shared_cache_is_written_in_place_and_no_further_than_needed(shared_folder: Path) -> None:
    runtime = OrtRuntime.load(shared_folder, threads=1, custom_op=False)
    state = runtime.new_state(2, 10)
    assert isinstance(state, SharedState)
    runtime.prefill(state, 1, np.array([1, 2, 3]))
    runtime.prefill(state, 0, np.array([4]))
    runtime.decode(state, np.array([5, 6]))
    for buffer in state.buffers:
        assert np.count_nonzero(buffer[0, :, :2]) == buffer[0, :, :2].size
        assert np.count_nonzero(buffer[1, :, :4]) == buffer[1, :, :4].size
        assert not buffer[0, :, 2:].any()
        assert not buffer[1, :, 4:].any()


def test_the_kind_of_cache_is_read_from_the_folder(shared_folder: Path, growing_folder: Path) -> None:
    folders = (shared_folder, growing_folder)
    states: list[DecodeState] = [
        OrtRuntime.load(folder, threads=1, custom_op=False).new_state(1, 4) for folder in folders
    ]
    assert [type(state) for state in states] == [SharedState, GrowingState]
    assert all(isinstance(state, DecodeState) for state in states)


def test_without_prepacking_the_answers_are_the_same(shared_folder: Path, stock: OrtRuntime) -> None:
    plain = OrtRuntime.load(shared_folder, threads=1, custom_op=False, prepack=False)
    np.testing.assert_allclose(alone(plain, sequences()[0]), alone(stock, sequences()[0]), atol=TOLERANCE)
    assert plain.describe().details["prepacking"] is False


def test_describe_tells_engine_threads_and_files(shared_folder: Path) -> None:
    runtime = load_runtime("ort-stock", shared_folder, threads=1)
    facts = runtime.describe()
    assert isinstance(runtime, Runtime)
    assert (facts.name, facts.engine, facts.version) == ("ort-stock", "onnxruntime", onnxruntime.__version__)
    assert (facts.threads, facts.kernel_row) == (1, None)
    assert facts.model_files == {
        name: (shared_folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data")
    }
    assert json.loads(json.dumps(facts.as_dict()))["details"]["cache"] == "shared buffer, written in place"


def test_nothing_is_written_to_stderr(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runtime = load_runtime("ort-stock", copy, threads=1)
    alone(runtime, np.array([1, 2]))
    (copy / "model.onnx.data").unlink()
    with pytest.raises(InputError):
        load_runtime("ort-stock", copy, threads=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty: give at least one token"),
        ([1, 40], r"prompt token 1 is id 40, but the model's vocabulary has ids 0 to 39; use the tokenizer"),
        ([-1], "prompt token 0 is id -1"),
        ([[1, 2]], r"token ids must be one row of integers, but are int64 of shape \(1, 2\)"),
        ([1.5], "token ids must be one row of integers, but are float64"),
        ([1] * 9, "the prompt has 9 tokens, but the cache holds 8 per row; make the state with a larger capacity"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused(stock: OrtRuntime, prompt: Any, message: str) -> None:
    state = stock.new_state(1, 8)
    with pytest.raises(InputError, match=message):
        stock.prefill(state, 0, np.array(prompt))
    assert state.lengths.tolist() == [0]


def test_a_row_in_use_or_absent_is_refused(stock: OrtRuntime) -> None:
    state = stock.new_state(2, 8)
    stock.prefill(state, 1, np.array([1, 2]))
    with pytest.raises(InputError, match=r"row 1 of the cache already holds 2 tokens; call reset\(row\)"):
        stock.prefill(state, 1, np.array([1]))
    with pytest.raises(InputError, match="row 2 of the cache was asked for, but it has rows 0 to 1"):
        stock.prefill(state, 2, np.array([1]))


def test_next_tokens_that_do_not_fit_are_refused(stock: OrtRuntime) -> None:
    state = stock.new_state(2, 3)
    stock.prefill(state, 1, np.array([1, 2, 3]))
    with pytest.raises(InputError, match="1 next tokens were given for a cache of 2 rows: give one per row"):
        stock.decode(state, np.array([1]))
    with pytest.raises(InputError, match="next token of row 1 is id 99"):
        stock.decode(state, np.array([1, 99]))
    with pytest.raises(InputError, match="row 1 of the cache is full: it holds 3 tokens of 3; make the state with"):
        stock.decode(state, np.array([1, 2]))


def test_a_cache_that_the_model_cannot_fill_is_refused(stock: OrtRuntime) -> None:
    with pytest.raises(InputError, match=r"a cache of 0 row\(s\) of 4 token\(s\) was asked for; both must be"):
        stock.new_state(0, 4)
    with pytest.raises(InputError, match="a cache of 49 tokens was asked for, but the model knows only 48 positions"):
        stock.new_state(1, 49)


def test_the_state_of_another_runtime_is_refused(stock: OrtRuntime) -> None:
    class Foreign:
        lengths = np.zeros(1, np.int64)
        capacity = 4

        def reset(self, row: int) -> None: ...

    for call in (lambda: stock.prefill(Foreign(), 0, np.array([1])), lambda: stock.decode(Foreign(), np.array([1]))):
        with pytest.raises(InputError, match=r"this state was made by another runtime; make it with new_state\(\)"):
            call()


def test_a_closed_runtime_says_so(shared_folder: Path) -> None:
    runtime = load_runtime("ort-stock", shared_folder, threads=1)
    state = runtime.new_state(1, 4)
    runtime.close()
    runtime.close()
    with pytest.raises(InputError, match="the runtime 'ort-stock' is closed; load the folder again"):
        runtime.decode(state, np.array([1]))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model.onnx, so there is nothing to run; make it with"):
        load_runtime("ort-stock", tmp_path, threads=1)


def test_missing_or_truncated_data_is_refused(copy: Path) -> None:
    data = copy / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"tensor '\w+' is said to lie at byte \d+ .*the file is truncated"):
        load_runtime("ort-stock", copy, threads=1)
    data.unlink()
    with pytest.raises(InputError, match=r"refers to 'model.onnx.data', which is missing"):
        load_runtime("ort-stock", copy, threads=1)


def test_data_of_another_size_than_its_tensor_is_refused(copy: Path) -> None:
    import onnx

    model = onnx.load(copy / "model.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "length":
            entry.value = "8"
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        CheckpointError, match=r"cannot load '.*model.onnx': .*; the file or its data is missing or trunc"
    ):
        load_runtime("ort-stock", copy, threads=1)


def test_data_that_is_a_link_is_refused(copy: Path) -> None:
    data = copy / "model.onnx.data"
    data.rename(copy / "elsewhere")
    data.symlink_to(copy / "elsewhere")
    with pytest.raises(UnsafePathError, match="is a symbolic link"):
        load_runtime("ort-stock", copy, threads=1)
    data.unlink()
    data.hardlink_to(copy / "elsewhere")
    with pytest.raises(UnsafePathError, match="is a hard link"):
        load_runtime("ort-stock", copy, threads=1)


def test_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    write_graph(tmp_path, "other (float[2] x) => (float[2] y) { y = Neg(x) }")
    with pytest.raises(CheckpointError, match="lacks input_ids, logits, so it is not a decoder with a cache"):
        load_runtime("ort-stock", tmp_path, threads=1)


def test_a_graph_without_a_fixed_cache_shape_is_refused(tmp_path: Path) -> None:
    write_graph(
        tmp_path,
        'g (int64[b,s] input_ids, float[b,h,p,d] "past_key_values.0.key") => (float[b,s] logits, float[b,h,p,d] '
        '"present.0.key") { logits = Cast<to=1>(input_ids) "present.0.key" = Identity("past_key_values.0.key") }',
    )
    with pytest.raises(CheckpointError, match="does not fix the heads and head size of its cache"):
        load_runtime("ort-stock", tmp_path, threads=1)


def test_settings_that_are_missing_or_broken_are_named(copy: Path) -> None:
    (copy / "genai_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"genai_config.json' cannot be read as JSON.*export the model again"):
        load_runtime("ort-stock", copy, threads=1)
    (copy / "genai_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"genai_config.json' holds no JSON object; export the model again"):
        load_runtime("ort-stock", copy, threads=1)
    (copy / "genai_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not tell its vocabulary size and context length"):
        load_runtime("ort-stock", copy, threads=1)


def test_an_operator_that_nobody_knows_is_the_engines_refusal(tmp_path: Path) -> None:
    write_graph(tmp_path, "g (float[2] x) => (float[2] y) { y = no.such.domain.Op(x) }", domain="no.such.domain")
    with pytest.raises(RuntimeFailureError, match=r"ONNX Runtime .* cannot load '.*model.onnx': .*onnx.checker"):
        load_runtime("ort-stock", tmp_path, threads=1)


def test_a_failure_while_running_is_a_runtime_failure(copy: Path) -> None:
    runtime = load_runtime("ort-stock", copy, threads=1)
    runtime.vocab_size = 41  # the graph then answers with another shape than expected
    with pytest.raises(RuntimeFailureError, match=r"ONNX Runtime failed in prefill on runtime 'ort-stock': .*export"):
        alone(runtime, np.array([1, 2]))


def test_ort_without_the_library_is_refused_and_not_replaced(
    shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOSA_LIBRARY", "/nowhere/liblosa_kernels.so")
    with pytest.raises(KernelError, match=r"/nowhere/liblosa_kernels\.so"):
        load_runtime("ort", shared_folder, threads=1)


def test_a_library_that_holds_no_operators_is_refused(
    tmp_path: Path, shared_folder: Path, monkeypatch: pytest.MonkeyPatch, kernels: Path
) -> None:
    library = tmp_path / "liblosa_kernels.so"
    library.write_text("not a library")
    monkeypatch.setattr(native, "library_path", lambda: library)
    monkeypatch.setattr(native, "describe", lambda: native.KernelInfo("scalar", (), (), "0", library))
    with pytest.raises(KernelError, match=r"cannot use the kernels in '.*liblosa_kernels.so': .*build them again"):
        load_runtime("ort", shared_folder, threads=1)


def test_an_unknown_kernel_row_is_refused(kernels: Path, shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSA_KERNEL", "abacus")
    with pytest.raises(KernelError, match="abacus"):
        load_runtime("ort", shared_folder, threads=1)


def test_a_kernel_row_that_the_library_refuses_is_a_kernel_error(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sparse(tmp_path, [0, 2])
    known = native.describe()
    monkeypatch.setattr(native, "describe", lambda: known)
    monkeypatch.setenv("LOSA_KERNEL", "abacus")
    with pytest.raises(KernelError, match=r"cannot load '.*model.onnx': .*abacus.*; choose another row by LOSA_KERNEL"):
        open_session(tmp_path, SessionOptions(threads=1, custom_op=True))


def test_a_dense_model_runs_none_of_our_kernels(kernels: Path, shared_folder: Path, stock: OrtRuntime) -> None:
    runtime = load_runtime("ort", shared_folder, threads=1)
    assert runtime.describe().kernel_row is None
    np.testing.assert_allclose(alone(runtime, sequences()[0]), alone(stock, sequences()[0]), atol=TOLERANCE)


@pytest.mark.parametrize("offsets", [[0, 3], [1, 2], [0, -2]])
def test_a_weight_that_contradicts_itself_is_a_format_error(kernels: Path, tmp_path: Path, offsets: list[int]) -> None:
    """One row, two columns, both kept: the offsets must be [0, 2]."""
    write_sparse(tmp_path, offsets)
    with pytest.raises(FormatError, match=r"cannot load '.*model.onnx': SparseMatMulFp32 .*; export the model again"):
        open_session(tmp_path, SessionOptions(threads=1, custom_op=True))


def test_a_sparse_model_names_the_kernel_row_that_runs(kernels: Path, tmp_path: Path) -> None:
    write_sparse(tmp_path, [0, 2])
    opened = open_session(tmp_path, SessionOptions(threads=1, custom_op=True))
    assert opened.kernel_row == native.describe().row
    [y] = opened.session.run(None, {"x": np.array([[3.0, 4.0]], np.float32)})
    np.testing.assert_array_equal(y, [[3 * 5 + 4 * 6]])


def write_graph(folder: Path, text: str, domain: str = "other") -> None:
    import onnx

    header = f'<ir_version: 10, opset_import: ["": 21, "{domain}": 1]> '
    onnx.save(onnx.parser.parse_model(header + text), folder / "model.onnx")


def write_sparse(folder: Path, offsets: list[int]) -> None:
    """A model of one sparse product of two weights, 5 and 6."""
    import onnx

    weights = {
        "mask": np.array([[[1, 0], [1, 0]]], np.uint8),
        "values": np.array([5, 6, *[0] * 16], np.float32),
        "offsets": np.array(offsets, np.int64),
    }
    node = onnx.helper.make_node("SparseMatMulFp32", ["x", *weights], ["y"], domain="losa.sparse", N=1, K=2, layout=1)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["m", 2])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["m", 1])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("losa.sparse", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")


def test_absorbed_tokens_leave_what_prefilled_ones_leave(shared_folder: Path) -> None:
    runtime = OrtRuntime.load(shared_folder, threads=1, custom_op=False)
    sequence = sequences()[1]
    expected = alone(runtime, sequence)
    state = runtime.new_state(2, len(sequence))
    assert isinstance(state, SharedState)
    runtime.absorb(state, 1, sequence[:5])
    runtime.absorb(state, 1, sequence[5:9])
    assert state.lengths.tolist() == [0, 9]
    np.testing.assert_allclose(runtime.extend(state, 1, sequence[9:]), expected[9:], atol=TOLERANCE)
    with pytest.raises(InputError, match="would hold"):
        runtime.absorb(state, 1, sequence)
    with pytest.raises(InputError, match="row 2 of the cache"):
        runtime.absorb(state, 2, sequence)
    with pytest.raises(InputError, match="the prompt is empty"):
        runtime.absorb(state, 0, sequence[:0])
    runtime.close()
    with pytest.raises(InputError, match="is closed"):
        runtime.absorb(state, 0, sequence)
