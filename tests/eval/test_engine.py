from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from losa_export.errors import BenchmarkError, CheckpointError, RuntimeFailureError
from losa_export.eval.engine import EngineProcess


def child(body):
    """A program that answers each command by `body`, which sees `command` and `arguments`."""
    return (
        "import sys, os, time\n"
        "from multiprocessing.connection import Connection\n"
        "pipe = Connection(int(sys.argv[1]))\n"
        "while True:\n"
        "    command, arguments = pipe.recv()\n" + "".join(f"    {line}\n" for line in body.splitlines())
    )


def test_a_child_answers_with_values():
    with EngineProcess("the child", timeout_s=30, program=child("pipe.send(('ok', arguments['x'] + 1))")) as engine:
        assert engine.call("add", x=41) == 42


def test_the_real_worker_starts_and_reports_its_own_errors_by_their_class():
    with EngineProcess("the candidate", timeout_s=60) as engine:
        assert engine.call("memory").rss_bytes > 0
        with pytest.raises(BenchmarkError, match=r"the candidate: no engine is loaded"):
            engine.call("sample", prompt=[1], forced=[2])


def test_a_folder_the_runtime_refuses_is_refused_by_the_same_class(tmp_path):
    with EngineProcess("the candidate", timeout_s=60) as engine, pytest.raises(CheckpointError, match=r"model\.onnx"):
        engine.call("load", name="ort-stock", folder=tmp_path, threads=1)


def test_a_child_that_dies_is_reported_with_its_last_output():
    program = child("print('about to fail', flush=True)\nos._exit(3)")
    with (
        EngineProcess("the child", timeout_s=30, program=program) as engine,
        pytest.raises(
            RuntimeFailureError, match=r"(?s)the child ended with code 3 during 'load'.*about to fail"
        ) as caught,
    ):
        engine.call("load")
    assert caught.value.code == 3


def test_a_child_that_is_killed_names_the_signal_and_the_likely_cause():
    with (
        EngineProcess("the child", timeout_s=30, program=child("os.kill(os.getpid(), 9)")) as engine,
        pytest.raises(RuntimeFailureError, match=r"(?s)died of signal 9 during 'load' without a word.*out of memory"),
    ):
        engine.call("load")


def test_a_child_that_hangs_is_ended():
    engine = EngineProcess("the child", timeout_s=0.5, program=child("time.sleep(600)"))
    start = time.monotonic()
    with pytest.raises(RuntimeFailureError, match=r"the child gave no answer to 'load' within 0\.5 s and was ended"):
        engine.call("load")
    assert engine._process.returncode is not None
    assert time.monotonic() - start < 30  # not the 600 s of its sleep


def test_a_failure_of_another_kind_carries_its_last_line():
    body = "pipe.send(('error', 'ValueError', 'odd', 'Traceback\\n  line\\nValueError: odd'))"
    with (
        EngineProcess("the child", timeout_s=30, program=child(body)) as engine,
        pytest.raises(RuntimeFailureError, match=r"the child failed in 'load': ValueError: odd"),
    ):
        engine.call("load")


def test_closing_ends_the_child_and_may_be_repeated():
    engine = EngineProcess("the child", timeout_s=30)
    engine.close()
    engine.close()
    assert engine._process.returncode is not None


def test_a_closed_engine_cannot_be_asked():
    engine = EngineProcess("the child", timeout_s=30)
    engine.close()
    with pytest.raises(RuntimeFailureError, match=r"during 'memory'"):
        engine.call("memory")


# The signal comes between Python's last look at its signals and the system's wait, so that this wait does not end.
UNSEEN_AT_FIRST = """
wait = engine._connection.poll
def poll(timeout):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    print(engine.pid, flush=True)
    try:
        return wait(timeout)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
engine._connection.poll = poll
"""


@pytest.mark.parametrize("moment", ["print(engine.pid, flush=True)", UNSEEN_AT_FIRST], ids=["any", "before a wait"])
def test_an_interrupt_of_the_parent_ends_the_child(moment):
    program = (
        "import signal, sys\n"
        "from losa_export.eval.engine import EngineProcess\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"engine = EngineProcess('the child', timeout_s=600, program={child('time.sleep(600)')!r})\n"
        "with engine:\n" + textwrap.indent(f"{moment}\nengine.call('load')\n", "    ")
    )
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with parent:
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGINT)
        try:
            parent.wait(timeout=30)
        finally:
            parent.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
