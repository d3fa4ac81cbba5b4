from __future__ import annotations

import threading
import time
from multiprocessing import Pipe

import numpy as np
import pytest

from losa_export.errors import BenchmarkError
from losa_export.eval.answers import answers_of, make_workload, workload_logits, workload_positions
from losa_export.eval.parity import GateThresholds, gate
from losa_export.eval.worker import EngineSession, memory_use, reset_peak_memory, serve, settle, spin_probe


@pytest.fixture
def session(fake_runtime):
    session = EngineSession(lambda name, folder, threads: fake_runtime())
    session.load("ort", "folder", 1)
    return session


def test_loading_reports_time_size_and_memory(fake_runtime):
    loaded = EngineSession(lambda name, folder, threads: fake_runtime()).load("ort", "folder", 1)
    assert loaded.load_s >= 0
    assert loaded.vocab_size == 11
    assert loaded.peak_load.peak_rss_bytes >= loaded.peak_load.rss_bytes > 0


def test_a_sample_has_one_time_for_the_prefill_and_one_for_each_token(session):
    sample = session.sample(np.array([1, 2, 3]), np.array([4, 5, 6, 7]))
    assert sample.prefill_s > 0
    assert len(sample.decode_s) == 4
    assert min(sample.decode_s) > 0
    assert min(sample.probe_s) > 0
    assert sample.idle_wall_s >= 0


def test_every_sample_does_the_same_work(session):
    runtime = session._ready()
    for _ in range(2):
        runtime.calls.clear()
        session.sample(np.array([1, 2, 3]), np.array([4, 5]))
        assert runtime.calls == [("prefill", 0, 3), ("decode", 1), ("decode", 1)]


def test_rows_of_a_batch_are_prefilled_apart_and_decoded_together(session):
    runtime = session._ready()
    sample = session.sample(np.array([1, 2, 3]), np.array([4, 5]), batch=2)
    assert runtime.calls == [("prefill", 0, 3), ("prefill", 1, 3), ("decode", 2), ("decode", 2)]
    assert len(sample.decode_s) == 2


def test_a_timed_answer_that_is_nan_is_an_error(fake_runtime):
    def disturb(kind, row, state, logits):
        return logits * np.float32("nan")

    session = EngineSession(lambda name, folder, threads: fake_runtime(disturb=disturb))
    session.load("ort", "folder", 1)
    with pytest.raises(BenchmarkError, match=r"runtime 'fake' gave NaN or infinite logits while it was timed"):
        session.sample(np.array([1]), np.array([2]))


def test_nothing_runs_before_an_engine_is_loaded():
    with pytest.raises(BenchmarkError, match=r"no engine is loaded"):
        EngineSession().sample(np.array([1]), np.array([2]))


def test_answers_of_a_runtime_pass_the_gate_on_the_same_runtime(fake_runtime):
    runtime = fake_runtime()
    workload = make_workload(11, 512, 6, 3, np.random.default_rng(0))
    answers = answers_of(runtime, workload.check_prompts, workload.check_new_tokens)
    assert answers.logits.shape == (3, 16, 11)
    assert answers.greedy.shape == answers.greedy_margin.shape == (3, 32)
    assert answers.decode_logits.shape == (3, 4, 11)
    report = gate(answers, runtime, GateThresholds())
    assert report.greedy.equal == 96


def test_answers_agree_with_what_a_reference_would_hold(fake_runtime, reference_of):
    reference = reference_of(fake_runtime(), length=5, new_tokens=8)
    answers = answers_of(fake_runtime(), reference.prompts, 8)
    for name in ("logits", "greedy", "decode_logits", "greedy_margin"):
        np.testing.assert_array_equal(getattr(answers, name), getattr(reference, name))


def test_the_check_is_shortened_for_a_model_of_few_positions():
    workload = make_workload(11, 20, 6, 3, np.random.default_rng(0))
    assert len(workload.check_prompts[0]) == 10
    assert workload.check_new_tokens == 10


@pytest.mark.parametrize("length", [1, 2, 16, 17, 128])
def test_checked_positions_ascend_and_end_with_the_last(length):
    positions = workload_positions(length)
    assert len(positions) == min(16, length)
    assert (np.diff(positions) > 0).all()
    assert positions[-1] == length - 1


def test_workload_logits_hold_prefill_positions_and_the_last_step(fake_runtime):
    workload = make_workload(11, 512, 40, 3, np.random.default_rng(0))
    logits = workload_logits(fake_runtime(), workload)
    assert logits.shape == (17, 11)
    runtime = fake_runtime()
    whole = runtime.prefill(runtime.new_state(1, 43), 0, np.concatenate([workload.prompt, workload.forced]))
    np.testing.assert_array_equal(logits[-1], whole[-1])


def test_the_probe_leaves_the_affinity_as_it_was():
    import os

    before = os.sched_getaffinity(0)
    assert len(spin_probe()) == min(8, len(before))
    assert os.sched_getaffinity(0) == before


def test_settling_waits_for_threads_that_still_spin():
    stop = time.monotonic() + 0.1

    def spin():
        while time.monotonic() < stop:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    settle()
    assert time.monotonic() >= stop or not thread.is_alive()
    thread.join()


def test_memory_of_a_system_that_tells_nothing_is_none(tmp_path):
    use = memory_use(tmp_path)
    assert use.peak_rss_bytes is use.rss_bytes is use.pss_bytes is None
    assert reset_peak_memory(tmp_path / "none") is False


def test_memory_fields_are_read_in_bytes(tmp_path):
    (tmp_path / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t 3 kB\nVmRSS:\t 2 kB\n")
    (tmp_path / "smaps_rollup").write_text("Rss:  2 kB\nPss:  1 kB\nPss_Dirty: 1 kB\n")
    use = memory_use(tmp_path)
    assert (use.peak_rss_bytes, use.rss_bytes, use.pss_bytes) == (3072, 2048, 1024)


def test_a_reset_peak_forgets_memory_that_is_gone(session):
    block = np.ones(64 << 20, dtype=np.uint8)
    peak = session.memory().peak_rss_bytes
    del block
    if not session.reset_peak():
        pytest.skip("this system does not allow the peak to be reset")
    assert session.memory().peak_rss_bytes < peak - (32 << 20)


def test_the_served_session_answers_and_reports_errors_by_class(fake_runtime):
    ours, theirs = Pipe()
    session = EngineSession(lambda name, folder, threads: fake_runtime())
    thread = threading.Thread(target=serve, args=(theirs, session))
    thread.start()
    try:
        ours.send(("sample", {"prompt": np.array([1]), "forced": np.array([2])}))
        assert ours.recv()[:2] == ("error", "BenchmarkError")
        ours.send(("load", {"name": "ort", "folder": "x", "threads": 1}))
        assert ours.recv()[0] == "ok"
        ours.send(("no_such_command", {}))
        kind, name, _, trace = ours.recv()
        assert (kind, name) == ("error", "AttributeError")
        assert "Traceback" in trace
    finally:
        ours.close()
        thread.join(timeout=10)
    assert not thread.is_alive()
