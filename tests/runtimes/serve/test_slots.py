from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from losa_export.errors import InputError
from losa_export.export import ExportConfig, export_onnx
from losa_export.runtimes.ort import OrtRuntime
from losa_export.runtimes.serve.slots import LEAST_SHARED, SlotPool, pieces

Int64 = NDArray[np.int64]
CONTEXT = 64


@pytest.fixture(scope="module")
def runtime(served: Path) -> Iterator[OrtRuntime]:
    with closing(OrtRuntime.load(served, threads=1)) as opened:
        yield opened


def prompt(seed: int, size: int) -> Int64:
    return np.random.default_rng(seed).integers(3, 128, size=size)


def start(pool: SlotPool, tokens: Int64, chunk: int = 16) -> tuple[int, int]:
    """Read all but the last token of a prompt. Returns: where it decodes now, and how much of it was there."""
    row, shared = pool.claim(tokens)
    for first, last in pieces(shared, tokens.size - 1, chunk):
        pool.read(row, tokens[first:last])
    return pool.join(row), shared


def alone(runtime: OrtRuntime, tokens: Int64) -> NDArray[np.float32]:
    """Logits after a prompt that is read at once, and by itself."""
    logits: NDArray[np.float32] = runtime.prefill(runtime.new_state(1, CONTEXT), 0, tokens)[-1]
    return logits


@given(start=st.integers(0, 50), length=st.integers(0, 200), size=st.integers(1, 70))
def test_pieces_cover_a_prompt(start: int, length: int, size: int) -> None:
    found = pieces(start, start + length, size)
    assert [token for first, last in found for token in range(first, last)] == list(range(start, start + length))
    assert all(1 <= last - first <= size for first, last in found)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 64])
def test_a_prompt_in_pieces_has_the_very_numbers_of_the_whole(runtime: OrtRuntime, chunk: int) -> None:
    tokens, pool = prompt(0, 45), SlotPool(runtime, 2, CONTEXT)
    assert start(pool, tokens, chunk) == (0, 0)
    np.testing.assert_array_equal(pool.decode(tokens[-1:])[0], alone(runtime, tokens))


def test_a_shared_beginning_is_copied_and_changes_no_bit(runtime: OrtRuntime) -> None:
    pool = SlotPool(runtime, 3, CONTEXT)
    first = prompt(1, 40)
    second = np.concatenate([first[:30], prompt(2, 10)])
    pool.leave(start(pool, first)[0])
    assert start(pool, second) == (0, 30)
    np.testing.assert_array_equal(pool.decode(second[-1:])[0], alone(runtime, second))
    # The same prompt again leaves its last token to be decoded, and so does one that is a beginning of it.
    pool.leave(0)
    assert pool.claim(second)[1] == second.size - 1
    assert pool.claim(first[:20])[1] == 19


def test_a_conversation_that_goes_on_reads_only_what_is_new(runtime: OrtRuntime) -> None:
    pool = SlotPool(runtime, 2, CONTEXT)
    tokens = prompt(3, 20)
    start(pool, tokens)
    answer = [int(pool.decode(tokens[-1:])[0].argmax())]
    for _ in range(12):
        answer.append(int(pool.decode(np.array(answer[-1:]))[0].argmax()))
    longer = np.concatenate([tokens, answer, prompt(4, 5)])
    # While it runs it lends a copy; its newest token is not in the cache yet.
    assert start(pool, longer) == (1, 32)
    both = pool.decode(np.array([answer[-1], longer[-1]]))
    np.testing.assert_array_equal(both[1], alone(runtime, longer))
    pool.leave(1)
    pool.leave(0)
    row, shared = pool.claim(np.concatenate([longer, prompt(5, 3)]))
    assert shared == longer.size
    pool.release(row, keep=False)
    assert pool.claim(longer)[1] == 33  # of the other row


def test_short_beginnings_are_not_worth_a_copy_and_sharing_can_be_off(runtime: OrtRuntime) -> None:
    pool = SlotPool(runtime, 2, CONTEXT)
    tokens = prompt(4, 30)
    pool.leave(start(pool, tokens)[0])
    assert pool.claim(np.concatenate([tokens[: LEAST_SHARED - 1], prompt(5, 20)]))[1] == 0
    apart = SlotPool(runtime, 2, CONTEXT, share_prefixes=False)
    apart.leave(start(apart, tokens)[0])
    assert apart.claim(tokens)[1] == 0


def test_the_least_recently_used_row_is_given_away(runtime: OrtRuntime) -> None:
    pool = SlotPool(runtime, 3, CONTEXT)
    old, new = prompt(6, 20), prompt(7, 20)
    for tokens in (old, new, prompt(8, 20), prompt(9, 20)):
        pool.leave(start(pool, tokens)[0])
    assert pool.claim(old)[1] == 0
    assert pool.claim(new)[1] in (0, 19)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_that_join_and_leave_in_any_order_keep_their_own_numbers(runtime: OrtRuntime, data: st.DataObject) -> None:
    pool = SlotPool(runtime, 3, CONTEXT)
    running: list[tuple[Int64, list[int]]] = []  # prompt, and its last token with the answer, in the order of rows
    seed = 0
    for _ in range(data.draw(st.integers(3, 12))):
        action = data.draw(st.sampled_from(["join", "leave", "decode"]))
        if action == "join" and len(running) < 3:
            seed += 1
            tokens = np.concatenate([prompt(100, 12), prompt(seed, data.draw(st.integers(1, 9)))])
            assert start(pool, tokens, data.draw(st.integers(1, 20)))[0] == len(running)
            running.append((tokens, [int(tokens[-1])]))
        elif action == "leave" and running:
            row = data.draw(st.integers(0, len(running) - 1))
            assert pool.leave(row) == len(running) - 1
            running[row] = running[-1]
            running.pop()
        elif action == "decode" and running:
            logits = pool.decode(np.array([answer[-1] for _, answer in running]))
            for (_, answer), line in zip(running, logits, strict=True):
                answer.append(int(line.argmax()))
    for tokens, answer in running:
        state = runtime.new_state(1, CONTEXT)
        expected = [int(tokens[-1]), int(runtime.prefill(state, 0, tokens)[-1].argmax())]
        while len(expected) < len(answer):
            expected.append(int(runtime.decode(state, np.array(expected[-1:]))[0].argmax()))
        assert answer == expected[: len(answer)]


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("rows", [2, 5, 9, 16])
def test_company_changes_no_bit_of_a_row(
    pruned: Path, row: str, values: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promise of the server, for each kernel row of this machine."""
    monkeypatch.setenv("LOSA_KERNEL", row)
    folder = tmp_path / "onnx"
    export_onnx(ExportConfig(pruned, folder, values=values, smoothing=0, gate=False, progress=False))  # type: ignore[arg-type]
    with closing(OrtRuntime.load(folder, threads=1)) as runtime:
        prompts = [prompt(seed, 1 + 3 * seed) for seed in range(rows)]
        pool = SlotPool(runtime, rows, CONTEXT)
        for tokens in prompts:
            start(pool, tokens)
        together = [pool.decode(np.array([tokens[-1] for tokens in prompts]))]
        for _ in range(3):
            together.append(pool.decode(together[-1].argmax(axis=1)))
        for index, tokens in enumerate(prompts):
            state = runtime.new_state(1, CONTEXT)
            apart = [runtime.prefill(state, 0, tokens)[-1]]
            for _ in range(3):
                apart.append(runtime.decode(state, np.array([apart[-1].argmax()]))[0])
            np.testing.assert_array_equal(np.stack(apart), np.stack([step[index] for step in together]))


def test_a_cache_that_grows_cannot_be_a_pool(pruned: Path, kernels: Path, tmp_path: Path) -> None:
    export_onnx(ExportConfig(pruned, tmp_path / "onnx", profile="standard", gate=False, progress=False))
    with (
        closing(OrtRuntime.load(tmp_path / "onnx", threads=1)) as runtime,
        pytest.raises(InputError, match="cache grows with each token"),
    ):
        SlotPool(runtime, 2, CONTEXT)
