from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa_export.errors import ConfigError
from losa_export.runtimes.serve.memory import DEFAULT_CONTEXT, available_bytes, plan_pool

GIB = 2**30


@given(
    slots=st.integers(1, 64),
    memory=st.integers(1, 8 * GIB),
    token_bytes=st.integers(64, 2**20),
    positions=st.integers(16, 2**17),
)
def test_a_pool_never_takes_more_than_it_may(slots: int, memory: int, token_bytes: int, positions: int) -> None:
    try:
        plan = plan_pool(
            slots=slots, context_tokens=None, memory=memory, token_bytes=token_bytes, max_positions=positions
        )
    except ConfigError:
        assert slots * token_bytes * 16 > memory
        return
    assert plan.total_bytes <= memory
    assert 16 <= plan.context_tokens <= positions
    # and takes all it may
    assert plan.context_tokens == positions or plan.total_bytes + slots * token_bytes > memory


def test_without_a_limit_a_slot_has_the_default_or_what_the_model_knows() -> None:
    for positions, tokens in ((8192, DEFAULT_CONTEXT), (256, 256)):
        plan = plan_pool(slots=4, context_tokens=None, memory=None, token_bytes=100, max_positions=positions)
        assert plan.context_tokens == tokens


def test_what_does_not_fit_is_refused_with_figures() -> None:
    with pytest.raises(ConfigError, match=r"4 slots of 1000 tokens take 4,000,000 bytes .* memory is 3,999,999"):
        plan_pool(slots=4, context_tokens=1000, memory=3_999_999, token_bytes=1000, max_positions=4096)
    with pytest.raises(ConfigError, match="the model knows 4096 positions"):
        plan_pool(slots=4, context_tokens=5000, memory=None, token_bytes=1000, max_positions=4096)
    with pytest.raises(ConfigError, match=r"in 2 worker\(s\) take 8,000,000 bytes, but this machine has 7,999,999"):
        plan_pool(
            slots=4,
            context_tokens=1000,
            memory=None,
            token_bytes=1000,
            max_positions=4096,
            workers=2,
            available=7_999_999,
        )


def test_the_tightest_limit_counts(tmp_path: Path) -> None:
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    proc.mkdir()
    (sys / "fs/cgroup").mkdir(parents=True)
    assert available_bytes(proc=proc, sys=sys) is None
    (proc / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:      50 kB\n")
    assert available_bytes(proc=proc, sys=sys) == 50 * 1024
    (proc / "self").mkdir()
    (proc / "self/cgroup").write_text("0::/system.slice/losa.service\n")
    unit = sys / "fs/cgroup/system.slice/losa.service"
    unit.mkdir(parents=True)
    (unit / "memory.current").write_text("1000\n")
    (unit / "memory.max").write_text("max\n")
    assert available_bytes(proc=proc, sys=sys) == 50 * 1024
    (unit / "memory.max").write_text("21000\n")
    assert available_bytes(proc=proc, sys=sys) == 20000
    (unit.parent / "memory.current").write_text("9000\n")
    (unit.parent / "memory.max").write_text("10000\n")
    assert available_bytes(proc=proc, sys=sys) == 1000
    # the first version, in a container, which sees its own group at the mount point alone
    (proc / "self/cgroup").write_text("4:memory:/docker/abc\n")
    (sys / "fs/cgroup/memory").mkdir()
    (sys / "fs/cgroup/memory/memory.limit_in_bytes").write_text("7000\n")
    (sys / "fs/cgroup/memory/memory.usage_in_bytes").write_text("6500\n")
    assert available_bytes(proc=proc, sys=sys) == 500
