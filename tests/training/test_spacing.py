from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from losa_export.errors import ConfigError
from losa_export.training.config import TrainConfig
from losa_export.training.preflight import check_inputs
from losa_export.training.spacing import space_out, space_some

ConfigMaker = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("text", "spaced"),
    [
        ("It ended (1990, in part).", "It ended ( 1990 , in part ) ."),
        ('"No", he said: it\'s 5%.', '" No " , he said : it \' s 5 % .'),
        ("well-known  ; so", "well - known ; so"),
        ("one.\n\ntwo?\n", "one .\n\ntwo ?\n"),
        ("no marks at all", "no marks at all"),
        ("", ""),
    ],
)
def test_marks_stand_apart_and_lines_stay(text: str, spaced: str) -> None:
    assert space_out(text) == spaced
    assert space_out(spaced) == spaced


def test_a_share_of_the_paragraphs_is_spaced_whatever_the_documents() -> None:
    lines = ["a,b"] * 4000
    for documents in (["\n".join(lines)], lines):
        spaced = "\n".join(space_some(documents, 0.3, seed=1)).split("\n")
        assert set(spaced) == {"a,b", "a , b"}
        # Four standard errors of a proportion of 4,000.
        assert sum(line == "a , b" for line in spaced) / 4000 == pytest.approx(0.3, abs=0.029)
    assert space_some(lines, 0.3, seed=1) == space_some(lines, 0.3, seed=1) != space_some(lines, 0.3, seed=2)
    assert space_some(lines, 0.0, seed=1) == lines
    assert set(space_some(lines, 1.0, seed=1)) == {"a , b"}


def test_a_run_tunes_and_calibrates_on_it(tiny_config: ConfigMaker) -> None:
    plain = check_inputs(tiny_config())
    # The tiny text has spaces around its marks already but for those at a paragraph's end, which come with them.
    again = check_inputs(tiny_config(spaced_fraction=1.0))
    assert np.array_equal(plain.tuning[0], again.tuning[0])
    assert plain.fingerprint["spaced_fraction"] == 0.0
    assert again.fingerprint["spaced_fraction"] == 1.0


def test_text_that_is_not_spaced_yet_changes(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    text = tmp_path / "close.txt"
    text.write_text("the cat,the dog and the bird.the end!\n\n" * 200)
    plain, spaced = (
        check_inputs(tiny_config(tuning_text=(text,), spaced_fraction=fraction)) for fraction in (0.0, 1.0)
    )
    for field in ("tuning", "calibration"):
        assert not np.array_equal(getattr(plain, field)[0], getattr(spaced, field)[0])


def test_a_share_out_of_range_is_an_error(tiny_config: ConfigMaker) -> None:
    with pytest.raises(ConfigError, match=r"spaced_fraction is 1\.5"):
        tiny_config(spaced_fraction=1.5)
