from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from losa_export.errors import InputError, MissingDependencyError
from losa_export.training.journal import RoundRecord, write_journal
from losa_export.training.plot import check_plotting, plot_rounds


def record(number: int, errors: Sequence[float] = ()) -> RoundRecord:
    return RoundRecord(
        round_number=number,
        target_sparsity=0.1 * number,
        sparsity_fraction=0.1 * number,
        block_targets=(0.1 * number, 0.2 * number),
        block_ranks=(number, 2 * number),
        sparsity={},
        steps=0,
        tokens=0,
        losses=(),
        learning_rate_last=None,
        prune_seconds=0.0,
        tune_seconds=0.0,
        peak_memory_bytes=0,
        block_errors=tuple(errors),
    )


@pytest.mark.parametrize("errors", [(), (0.3, 0.4)])
def test_rounds_are_drawn_into_the_run_folder(tmp_path: Path, errors: tuple[float, ...]) -> None:
    pytest.importorskip("matplotlib")
    write_journal(tmp_path, [record(1, errors), record(2, errors)])
    path = plot_rounds(tmp_path)
    assert path == tmp_path / "rounds.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    first = path.read_bytes()
    assert plot_rounds(tmp_path).read_bytes() == first


def test_a_missing_matplotlib_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_journal(tmp_path, [record(1)])
    with pytest.raises(MissingDependencyError, match=r"drawing the rounds .*'matplotlib'.*losa-export\[plot\]"):
        check_plotting()
    with pytest.raises(MissingDependencyError, match="matplotlib"):
        plot_rounds(tmp_path)


def test_a_run_without_a_finished_round_has_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no finished round in rounds\.jsonl to draw"):
        plot_rounds(tmp_path)
