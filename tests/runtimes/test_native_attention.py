"""Attention over a cache: the kernels against their definition, and the operator against ONNX Runtime's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_export.errors import ConfigError, FormatError
from losa_export.runtimes import native

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

Floats = NDArray[np.float32]
INPUTS = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total", "cos", "sin", "position_ids"]


@dataclass
class Case:
    """Arguments of one call, drawn at random; `pasts` has the tokens that each row has before its new ones."""

    pasts: tuple[int, ...]
    tokens: int
    heads: int = 6
    kv_heads: int = 2
    width: int = 32
    rotary: int = 16
    window: int | None = None
    spare: int = 0
    seed: int = 0
    query: Floats = field(init=False)
    key: Floats = field(init=False)
    value: Floats = field(init=False)
    past: tuple[Floats, Floats] = field(init=False)
    angles: Floats = field(init=False)

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed).standard_normal
        batch, capacity = len(self.pasts), max(self.pasts) + self.spare
        self.query = draw((batch, self.tokens, self.heads, self.width)).astype(np.float32)
        self.key = draw((batch, self.tokens, self.kv_heads, self.width)).astype(np.float32)
        self.value = draw((batch, self.tokens, self.kv_heads, self.width)).astype(np.float32)
        keys, values = draw((2, batch, self.kv_heads, capacity, self.width)).astype(np.float32)
        self.past = keys, values
        self.angles = np.outer(np.arange(1500), 0.9 ** np.arange(self.rotary)).astype(np.float32)

    @property
    def total(self) -> int:
        return max(self.pasts) + self.tokens

    @property
    def last(self) -> NDArray[np.int32]:
        return np.array([past + self.tokens - 1 for past in self.pasts], np.int32)

    @property
    def caches(self) -> tuple[Floats, Floats]:
        return np.cos(self.angles), np.sin(self.angles)

    def run(self, *, row: str | None = None, threads: int = 1, **changes: Any) -> tuple[Floats, Floats, Floats]:
        given: dict[str, Any] = {
            "total": self.total,
            "rotary": self.caches if self.rotary else None,
            "window": self.window,
            **changes,
        }
        return native.attention(
            self.query, self.key, self.value, self.past, self.last, row=row, threads=threads, **given
        )


def rotated(x: Floats, places: NDArray[np.int64], angles: Floats) -> NDArray[np.float64]:
    """x (S, heads, D) in float64; the first 2R dimensions turned by the angles of their places."""
    half = angles.shape[1]
    cos, sin = (f(angles[places].astype(np.float64))[:, None] for f in (np.cos, np.sin))
    first, second = x[..., :half].astype(np.float64), x[..., half : 2 * half].astype(np.float64)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], axis=-1)


def by_definition(case: Case) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Outputs (B, S, heads, D), and keys (B, kv_heads, capacity, D) with NaN where none has come."""
    outputs = np.empty(case.query.shape)
    keys = np.full((len(case.pasts), case.kv_heads, max(case.past[0].shape[2], case.total), case.width), np.nan)
    for b, past in enumerate(case.pasts):
        places = np.arange(past, past + case.tokens)
        new = rotated(case.key[b], places, case.angles).transpose(1, 0, 2)
        row_keys = np.concatenate([case.past[0][b, :, :past], new], axis=1)
        row_values = np.concatenate([case.past[1][b, :, :past], case.value[b].transpose(1, 0, 2)], axis=1)
        keys[b, :, : past + case.tokens] = row_keys
        queries = rotated(case.query[b], places, case.angles)
        for t, place in enumerate(places):
            start = 0 if case.window is None else max(0, place + 1 - case.window)
            for head in range(case.heads):
                shared = head // (case.heads // case.kv_heads)
                scores = row_keys[shared, start : place + 1] @ queries[t, head] * case.width**-0.5
                weights = np.exp(scores - scores.max())
                outputs[b, t, head] = weights @ row_values[shared, start : place + 1] / weights.sum()
    return outputs, keys


CASES = {
    "one token": Case((0,), 1),
    "decoding": Case((5, 70, 16, 0, 33), 1),
    "decoding, all heads alone": Case((5, 70), 1, heads=3, kv_heads=3),
    "seven share a head": Case((40, 7), 1, heads=14, kv_heads=2),
    "a prompt": Case((0,), 75),
    "a prompt of rows": Case((0, 0), 17),
    "behind a past": Case((37,), 50),
    "a few behind a past": Case((37,), 3),
    "room to spare": Case((20, 3), 1, spare=90),
    "window": Case((40, 5, 17), 1, window=16),
    "a prompt under a window": Case((0,), 70, window=13),
    "a window of itself": Case((3,), 40, window=1),
    "narrow heads": Case((9, 2), 4, width=8, rotary=4),
    "odd heads": Case((9, 30), 5, width=13, rotary=3),
    "wide heads": Case((90, 2), 2, width=80, rotary=40),
    "no rotation": Case((9, 30), 2, rotary=0),
    # more than 512 keys are attended to in parts
    "parts": Case((1100, 511, 512, 3), 1, spare=7),
    "parts of so many heads that none is shared out": Case((700, 20), 1, heads=64, kv_heads=16),
    "a prompt of parts": Case((0,), 560),
    "a window over parts": Case((1100, 90), 1, window=600),
    "a window behind parts": Case((1100,), 3, window=40),
}


@pytest.mark.parametrize("name", CASES)
def test_every_row_computes_the_definition(kernels: Any, name: str) -> None:
    case = CASES[name]
    outputs, keys = by_definition(case)
    came = ~np.isnan(keys)
    for row in native.describe().available_rows:
        found = case.run(row=row)
        # 1e-5: float32 sums of up to 100 products of size 1
        np.testing.assert_allclose(found[0], outputs, rtol=0, atol=1e-5, err_msg=row)
        np.testing.assert_allclose(found[1][came], keys[came], rtol=0, atol=2e-6, err_msg=row)
        for b, past in enumerate(case.pasts):
            np.testing.assert_array_equal(found[2][b, :, :past], case.past[1][b, :, :past])
            np.testing.assert_array_equal(found[2][b, :, past : past + case.tokens], case.value[b].transpose(1, 0, 2))


def test_a_token_has_the_same_bits_in_any_company(kernels: Any) -> None:
    """Alone or in a batch, in one piece or several, on one thread or three."""
    generator = np.random.default_rng(3)
    for row in native.describe().available_rows:
        for length, window in ((90, None), (90, 21), (1100, None), (1100, 530)):
            whole = Case((0,), length, window=window)
            outputs, keys, values = whole.run(row=row)
            for threads in (2, 3):
                np.testing.assert_array_equal(whole.run(row=row, threads=threads)[0], outputs)
            place = 0
            while place < length:
                count = min(length - place, int(generator.choice([1, 2, 7, 16, 40, 200])))
                piece = Case((place, 55), count, window=window, spare=9)
                for name in ("query", "key", "value"):
                    getattr(piece, name)[0] = getattr(whole, name)[0, place : place + count]
                piece.past[0][0, :, :place], piece.past[1][0, :, :place] = keys[0, :, :place], values[0, :, :place]
                found, new_keys, _ = piece.run(row=row, total=1400, threads=2)
                np.testing.assert_array_equal(found[0], outputs[0, place : place + count], err_msg=row)
                np.testing.assert_array_equal(new_keys[0, :, : place + count], keys[0, :, : place + count])
                place += count


def test_what_a_token_does_not_see_never_reaches_it(kernels: Any) -> None:
    """NaN in later tokens, in other rows and in memory behind a row's last token."""
    for row in native.describe().available_rows:
        case = Case((30, 4), 9, spare=40)
        expected = case.run(row=row)[0]
        for part in case.past:
            part[0, :, 30:] = np.nan
            part[1, :, 4:] = np.nan
        np.testing.assert_array_equal(case.run(row=row)[0], expected)
        for name in ("query", "key", "value"):
            getattr(case, name)[0, 5:] = np.nan
        found = case.run(row=row)[0]
        np.testing.assert_array_equal(found[0, :5], expected[0, :5])
        np.testing.assert_array_equal(found[1], expected[1])
        assert np.isnan(found[0, 5:]).all()


def test_positions_count_behind_a_past_only(kernels: Any) -> None:
    case = Case((9, 30), 3)
    places = np.array([[9, 10, 11], [30, 31, 32]])
    np.testing.assert_array_equal(case.run(positions=places)[0], case.run()[0])
    assert not np.array_equal(case.run(positions=places + 1)[0], case.run()[0])
    prompt = Case((0,), 3)
    np.testing.assert_array_equal(prompt.run(positions=np.array([[7, 7, 7]]))[0], prompt.run()[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last": np.array([3, 99], np.int32)}, "seqlens_k is 99 in row 1 with 1 new tokens, a past of at most 40"),
        ({"last": np.array([-1, 5], np.int32)}, "seqlens_k is -1 in row 0"),
        ({"positions": np.array([[3], [1500]])}, "position 1500 in row 1 has no row in a cache of 1500 rotations"),
        ({"positions": np.array([[-1], [3]])}, "position -1 in row 0"),
        ({"heads": 5}, "5 heads cannot share 2 of keys"),
        ({"rotary": 17}, "heads of 32 cannot be rotated by caches of width 17"),
        ({"key": np.zeros((2, 1, 2, 31), np.float32)}, "do not fit each other"),
        ({"query": np.zeros((2, 6, 32), np.float32)}, "have four dimensions each"),
        ({"total": 41, "last": np.array([41, 5], np.int32)}, "seqlens_k is 41 in row 0"),
    ],
)
def test_contradictions_are_refused(kernels: Any, changes: dict[str, Any], message: str) -> None:
    sizes = {name: changes[name] for name in ("heads", "rotary") if name in changes}
    case = Case((40, 7), 1, **sizes)
    arguments = {name: changes.get(name, getattr(case, name)) for name in ("query", "key", "value", "past", "last")}
    options: dict[str, Any] = {"total": 41, "rotary": case.caches} | {
        name: changes[name] for name in ("positions", "total") if name in changes
    }
    with pytest.raises(FormatError, match=message):
        native.attention(**arguments, **options)


def test_threads_must_be_some(kernels: Any) -> None:
    with pytest.raises(ConfigError, match="threads is 0"):
        Case((0,), 1).run(threads=0)


# ---- the operator ----


def session(domain: str, case: Case, *, packed: bool, threads: int = 1, **changes: Any) -> Any:
    """A model of one attention node; ours for domain losa.sparse."""
    left_out = set() if not packed else {"key", "value"}
    left_out |= set() if case.rotary else {"cos", "sin", "position_ids"}
    attributes = {
        "num_heads": case.heads,
        "kv_num_heads": case.kv_heads,
        "scale": float(case.width**-0.5),
        "do_rotary": int(case.rotary > 0),
        "local_window_size": case.window or -1,
        **changes,
    }
    inputs = ["" if name in left_out else name for name in INPUTS]
    while not inputs[-1]:
        inputs.pop()
    outputs = ["output", "present_key", "present_value"]
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        inputs,
        outputs,
        domain=domain,
        **{name: value for name, value in attributes.items() if value is not None},
    )
    kinds = dict.fromkeys(INPUTS, onnx.TensorProto.FLOAT)
    kinds |= {"seqlens_k": onnx.TensorProto.INT32, "total": onnx.TensorProto.INT32}
    kinds |= {"position_ids": onnx.TensorProto.INT64}
    graph = onnx.helper.make_graph(
        [node],
        "attention",
        [onnx.helper.make_tensor_value_info(name, kinds[name], None) for name in inputs if name],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(domain, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if domain == "losa.sparse":
        options.register_custom_ops_library(str(native.library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feed(case: Case, *, packed: bool) -> dict[str, NDArray[Any]]:
    batch = len(case.pasts)
    flat = {name: getattr(case, name).reshape(batch, case.tokens, -1) for name in ("query", "key", "value")}
    if packed:
        flat = {"query": np.concatenate(list(flat.values()), axis=-1)}
    positions = np.array([[past + t for t in range(case.tokens)] for past in case.pasts], np.int64)
    cos, sin = case.caches
    rotary = {"cos": cos, "sin": sin, "position_ids": positions} if case.rotary else {}
    return {
        **flat,
        "past_key": case.past[0],
        "past_value": case.past[1],
        "seqlens_k": case.last,
        "total": np.array([case.total], np.int32),
        **rotary,
    }


# ONNX Runtime's own rotates heads of a multiple of 16 only, and takes no batch of several tokens behind a past.
SHARED_CASES = [
    name
    for name, case in CASES.items()
    if (case.rotary == 0 or (2 * case.rotary == case.width and case.width % 16 == 0))
    and (case.tokens == 1 or max(case.pasts) == 0 or len(case.pasts) == 1)
]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("name", SHARED_CASES)
def test_the_operator_answers_as_that_of_onnx_runtime(kernels: Any, name: str, packed: bool) -> None:
    case = CASES[name]
    inputs = feed(case, packed=packed)
    found = session("losa.sparse", case, packed=packed).run(None, inputs)
    expected = session("com.microsoft", case, packed=packed).run(None, inputs)
    assert [array.shape for array in found] == [array.shape for array in expected]
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-5)
    for b, past in enumerate(case.pasts):
        for mine, theirs in zip(found[1:], expected[1:], strict=True):
            end = past + case.tokens
            np.testing.assert_allclose(mine[b, :, :end], theirs[b, :, :end], rtol=0, atol=1e-5)


def test_a_shared_buffer_is_written_in_place(kernels: Any) -> None:
    case = Case((20, 3), 1, spare=90)
    expected = case.run()
    inputs = feed(case, packed=True)
    own = session("losa.sparse", case, packed=True, threads=2)
    binding, output = own.io_binding(), np.empty((2, 1, case.heads * case.width), np.float32)
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    binding.bind_output("output", "cpu", 0, np.float32, output.shape, output.ctypes.data)
    for name in ("key", "value"):
        buffer = inputs[f"past_{name}"]
        binding.bind_output(f"present_{name}", "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
    own.run_with_iobinding(binding)
    np.testing.assert_array_equal(output.reshape(expected[0].shape), expected[0])
    for b, past in enumerate(case.pasts):
        np.testing.assert_array_equal(inputs["past_key"][b, :, : past + 1], expected[1][b, :, : past + 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_window_size": 0}, "local_window_size is 0, neither -1 nor at least 1"),
        ({"num_heads": None}, "attribute 'num_heads' is missing"),
        ({"num_heads": 5}, "5 heads cannot share 2 of keys"),
        ({"num_heads": 1 << 62}, "4611686018427387904 heads cannot share 2 of keys"),
        ({"kv_num_heads": 0}, "6 heads cannot share 0 of keys"),
        ({"scale": None}, "attribute 'scale' is missing"),
    ],
)
def test_impossible_attributes_are_refused_at_load(kernels: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        session("losa.sparse", Case((3,), 1), packed=True, **changes)
    assert isinstance(native.typed_error(str(caught.value)), FormatError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.zeros((2, 1, 7), np.float32)}, r"'query' of shape \(2, 1, 7\) does not fit"),
        ({"past_value": np.zeros((2, 2, 5, 32), np.float32)}, "'past_value' of shape"),
        ({"seqlens_k": np.zeros(3, np.int32)}, "'seqlens_k' of shape"),
        ({"seqlens_k": np.array([9, 200], np.int32)}, "seqlens_k is 200 in row 1"),
        ({"position_ids": np.zeros((1, 1), np.int64)}, "'position_ids' of shape"),
        ({"sin": np.zeros((1500, 15), np.float32)}, "'sin_cache' of shape"),
        ({"total": np.zeros(2, np.int32)}, "'total_sequence_length' of shape"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(kernels: Any, change: dict[str, Any], message: str) -> None:
    case = Case((20, 3), 1)
    own = session("losa.sparse", case, packed=True)
    with pytest.raises(Exception, match=message) as caught:
        own.run(None, feed(case, packed=True) | change)
    assert isinstance(native.typed_error(str(caught.value)), FormatError)


@pytest.mark.parametrize("row", ["scalar", None])
def test_the_operator_takes_the_forced_row(kernels: Any, monkeypatch: pytest.MonkeyPatch, row: str | None) -> None:
    if row is None:
        monkeypatch.delenv("LOSA_KERNEL", raising=False)
    else:
        monkeypatch.setenv("LOSA_KERNEL", row)
    case = CASES["decoding"]
    found = session("losa.sparse", case, packed=True, threads=2).run(None, feed(case, packed=True))[0]
    np.testing.assert_array_equal(found.reshape(case.query.shape), case.run(row=row)[0])
