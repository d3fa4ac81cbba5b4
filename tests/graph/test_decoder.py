"""Decoder graphs of every family answer as transformers does, in both dialects, dense and sparse, on stock engines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from losa_export.errors import KernelError
from losa_export.export import ExportConfig, export_onnx

Arrays = dict[str, NDArray[Any]]

# float32 through two blocks: sums of 88 terms in another order leave about 1e-6 of logits around 10
TOLERANCE = {"rtol": 0, "atol": 5e-5}


class StockSession:
    """The exported folder in ONNX Runtime without our library; the caller carries the cache."""

    def __init__(self, folder: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        self._session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        (folder / "optimised.onnx").rename(folder.parent / "optimised.onnx")
        self._outputs = [item.name for item in self._session.get_outputs()]
        self._past = [item for item in self._session.get_inputs() if item.name.startswith("past")]

    def run(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64], past: Arrays | None = None
    ) -> tuple[NDArray[np.float32], Arrays]:
        if past is None:
            past = {item.name: np.zeros((len(ids), item.shape[1], 0, item.shape[3]), np.float32) for item in self._past}
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        answers = dict(zip(self._outputs, self._session.run(None, feed), strict=True))
        logits = answers.pop("logits")
        return logits, {name.replace("present", "past_key_values"): value for name, value in answers.items()}


def positions_of(first: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.broadcast_to(np.arange(first, first + ids.shape[1]), ids.shape).astype(np.int64)


def ones(rows: int, columns: int) -> NDArray[np.int64]:
    return np.ones((rows, columns), np.int64)


@pytest.fixture(scope="module", params=["ort", "standard"])
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["dense", "sparse"])
def weights(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: Any, profile: Any, weights: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "onnx"
    report = export_onnx(ExportConfig(family.folder, output, profile, weights, gate=False, progress=False))
    assert report.weights == weights
    return output


@pytest.fixture(scope="module")
def session(folder: Path) -> StockSession:
    return StockSession(folder)


def test_the_checker_accepts_the_folder(folder: Path) -> None:
    onnx.checker.check_model(str(folder / "model.onnx"))


def test_stock_onnxruntime_folds_every_sparse_weight(family: Any, session: StockSession, folder: Path) -> None:
    optimised = onnx.load(folder.parent / "optimised.onnx", load_external_data=False)
    operators = Counter(node.op_type for node in optimised.graph.node)
    assert operators["CumSum"] == operators["SparseMatMulFp32"] == operators["SparseSwiGLUFp32"] == 0
    # of each layer: query, key and value together, output, gate, up, down (fc1 and fc2 of OPT); and the head
    products = 4 if family.name.startswith("opt") else 5
    assert operators["MatMul"] + operators["Gemm"] + operators["FusedMatMul"] >= 2 * products + 1


def test_the_standard_dialect_uses_no_contributed_operators(folder: Path, profile: str, weights: str) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    domains = {item.domain for item in model.opset_import}
    expected = {""} | ({"com.microsoft"} if profile == "ort" else set())
    assert domains == expected | ({"losa.sparse"} if weights == "sparse" else set())


def test_prefill_and_decoding_of_a_batch_answer_as_transformers(family: Any, session: StockSession) -> None:
    ids, expected = family.ids, family.logits(family.ids)
    logits, cache = session.run(ids[:, :6], ones(3, 6), positions_of(0, ids[:, :6]))
    np.testing.assert_allclose(logits, expected[:, :6], **TOLERANCE)
    for step in range(6, 9):
        token = ids[:, step : step + 1]
        logits, cache = session.run(token, ones(3, step + 1), positions_of(step, token), cache)
        np.testing.assert_allclose(logits, expected[:, step : step + 1], **TOLERANCE)


def test_several_tokens_after_a_past_answer_as_transformers(family: Any, session: StockSession) -> None:
    ids = family.ids[:1]
    _, cache = session.run(ids[:, :4], ones(1, 4), positions_of(0, ids[:, :4]))
    logits, _ = session.run(ids[:, 4:], ones(1, 9), positions_of(4, ids[:, 4:]), cache)
    np.testing.assert_allclose(logits, family.logits(ids)[:, 4:], **TOLERANCE)


def test_rows_of_different_length_do_not_see_their_padding(family: Any, session: StockSession, profile: str) -> None:
    """Padding stands at the end under 'ort' and may stand anywhere under 'standard'; here: at the front."""
    lengths = [6, 4, 2]
    ids, mask, positions = np.full((3, 6), 3), np.zeros((3, 6), np.int64), np.zeros((3, 6), np.int64)
    for row, length in enumerate(lengths):
        place = slice(0, length) if profile == "ort" else slice(6 - length, 6)
        ids[row, place], mask[row, place], positions[row, place] = family.ids[row, :length], 1, np.arange(length)
    logits, cache = session.run(ids, mask, positions)
    assert np.isfinite(logits).all()
    tokens = np.stack([family.ids[row, length : length + 1] for row, length in enumerate(lengths)])
    if profile == "ort":
        mask = (np.arange(7) <= np.array(lengths)[:, None]).astype(np.int64)
    else:
        mask = np.concatenate([mask, ones(3, 1)], axis=1)
    decoded, _ = session.run(tokens, mask, np.array(lengths)[:, None], cache)
    for row, length in enumerate(lengths):
        place = slice(0, length) if profile == "ort" else slice(6 - length, 6)
        expected = family.logits(family.ids[row : row + 1, : length + 1])[0]
        np.testing.assert_allclose(logits[row, place], expected[:-1], **TOLERANCE)
        np.testing.assert_allclose(decoded[row, 0], expected[-1], **TOLERANCE)


def test_position_ids_of_new_tokens_are_honoured(family: Any, session: StockSession) -> None:
    ids = family.ids[:1, :6]
    positions = np.array([[0, 1, 2, 3, 4, 17]])
    _, cache = session.run(ids[:, :5], ones(1, 5), positions[:, :5])
    logits, _ = session.run(ids[:, 5:], ones(1, 6), positions[:, 5:], cache)
    np.testing.assert_allclose(logits, family.logits(ids, positions)[:, 5:], **TOLERANCE)
    assert np.abs(logits - family.logits(ids)[:, 5:]).max() > 1e-2


def test_a_prompt_without_a_past_is_counted_as_each_dialect_says(
    family: Any, session: StockSession, profile: str
) -> None:
    ids, positions = family.ids[:1, :5], np.array([[0, 3, 4, 9, 17]])
    logits, _ = session.run(ids, ones(1, 5), positions)
    # GroupQueryAttention counts from 0 where it rotates by itself, which it cannot for heads of 8, nor in OPT
    rotates = family.name != "llama-small-heads" and not family.name.startswith("opt")
    counted = positions_of(0, ids) if profile == "ort" and rotates else positions
    np.testing.assert_allclose(logits, family.logits(ids, counted), **TOLERANCE)


def test_our_runtime_answers_as_transformers(family: Any, folder: Path, weights: str) -> None:
    from losa_export.runtimes import native
    from losa_export.runtimes.loader import load_runtime

    try:
        native.library_path()
    except KernelError as error:
        if weights == "sparse":
            pytest.skip(f"needs the compiled kernels: {error}")
    runtime = load_runtime("ort" if weights == "sparse" else "ort-stock", folder, threads=1)
    expected = family.logits(family.ids)
    state = runtime.new_state(3, 16)
    for row in range(3):
        logits = runtime.prefill(state, row, family.ids[row, :6])
        np.testing.assert_allclose(logits, expected[row, :6], **TOLERANCE)
    for step in range(6, 9):
        logits = runtime.decode(state, family.ids[:, step])
        np.testing.assert_allclose(logits, expected[:, step], **TOLERANCE)
    runtime.close()
