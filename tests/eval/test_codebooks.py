from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from losa_export.checkpoint import open_checkpoint
from losa_export.errors import ConfigError
from losa_export.eval.studies import codebooks
from losa_export.eval.studies.codebooks import (
    BUILT_INT4,
    METHODS,
    Method,
    StudyConfig,
    geometric_mean,
    layer_errors,
    linear_codebook,
    markdown,
    relative_output_error,
    rise,
    rounded_to,
)
from losa_export.masks import save_masks
from losa_export.quantise import quantise_int4, quantise_int8


def wanda(rows, columns, sparsity, seed=0):
    """A weight pruned by |w| times its input's norm, with the mean squares of those inputs."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, columns)).astype(np.float32)
    squares = generator.lognormal(0, 1.5, columns).astype(np.float32)
    score = np.abs(weight) * np.sqrt(squares)
    keep = score >= np.quantile(score, sparsity, axis=1, keepdims=True)
    return np.where(keep, weight, np.float32(0)), keep, squares


def test_output_error_is_that_of_the_outputs():
    generator = np.random.default_rng(1)
    inputs = generator.standard_normal((50, 7))
    weight = generator.standard_normal((5, 7)).astype(np.float32)
    restored = weight + generator.standard_normal((5, 7)).astype(np.float32) * np.float32(0.1)
    exact, rounded = inputs @ weight.T.astype(float), inputs @ restored.T.astype(float)
    wanted = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert relative_output_error(weight, restored, inputs.T @ inputs / 50) == pytest.approx(wanted, rel=1e-5)


def test_the_built_methods_are_what_the_exporter_does():
    weight, keep, squares = wanda(64, 200, 0.5)
    np.testing.assert_array_equal(
        codebooks.BUILT_INT8.restore(weight, keep, 64, squares), quantise_int8(weight, keep, 64).dequantise()
    )
    np.testing.assert_array_equal(
        BUILT_INT4.restore(weight, keep, 64, squares), quantise_int4(weight, keep, 64).dequantise(keep)
    )


def test_a_linear_codebook_has_even_steps():
    levels = linear_codebook().astype(int)
    assert levels[0] == -127
    assert levels[-1] == 127
    assert set(np.diff(levels)) <= {16, 17}
    np.testing.assert_array_equal(levels, -levels[::-1])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_keeps_zeros_and_comes_near(method):
    weight, keep, squares = wanda(64, 200, 0.6)
    before = weight.copy()
    restored = method.restore(weight, keep, 64, squares)
    assert restored.dtype == np.float32
    assert not restored[~keep].any()
    # a method that left out most columns or scales would be off by 1
    assert relative_output_error(weight, restored, np.diag(squares).astype(float)) < 0.15
    np.testing.assert_array_equal(weight, before)


def test_methods_rank_as_their_objectives_say():
    weight, keep, squares = wanda(256, 512, 0.5)
    rows = layer_errors("c", "t", weight, keep, squares, np.diag(squares).astype(float), (128,))
    by_name = {row.method: row for row in rows}
    lloyd = by_name[Method("int4", "fitted", "searched", "even").name]
    calibrated = by_name[Method("int4", "fitted", "searched", "calibration").name]
    masked = by_name[BUILT_INT4.name]
    int4 = [row for row in rows if row.method.startswith("int4")]
    assert lloyd.weight_error == min(row.weight_error for row in int4)
    plain = [row for row in int4 if "smoothed" not in row.method]
    assert calibrated.output_error == min(row.output_error for row in plain)
    assert calibrated.output_error < masked.output_error < 0.9 * lloyd.output_error
    # A wider search finds no larger error; the trials are those of the weight's error, group by group.
    absmax, searched = (by_name[Method("int8", "none", scales, "even").name] for scales in ("absmax", "searched"))
    assert searched.weight_error <= absmax.weight_error


def test_names_of_methods_differ():
    assert len({method.name for method in METHODS}) == len(METHODS)


def test_bf16_rounds_to_nearest_even():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    weight = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)
    weight[0, :2] = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)  # ties, to even both ways
    keep = np.ones(weight.shape, bool)
    np.testing.assert_array_equal(
        rounded_to("bf16", weight, keep, 0, None), weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    assert rounded_to("fp32", weight, keep, 0, None) is weight


def test_rise_and_its_error():
    found, error = rise([1.0, 2.0, 3.0, 4.0], [1.1, 2.2, 3.1, 4.2])
    assert found == pytest.approx(math.exp(0.15) - 1)
    assert error == pytest.approx(math.exp(0.15) * np.std([0.1, 0.2, 0.1, 0.2], ddof=1) / 2)
    assert math.isnan(rise([1.0], [1.0])[1])


def test_a_page_says_which_bars_were_held():
    row = {
        "checkpoint": "m",
        "head": "fp32",
        "group": 128,
        "perplexity": 10.0,
        "rise_error": 0.001,
        "kl_divergence": 0.1,
    }
    rows = [
        {**row, "linears": "fp32", "rise_fraction": 0.0},
        {**row, "linears": "bf16", "rise_fraction": 0.0021},
        {**row, "linears": codebooks.BUILT_INT8.name, "rise_fraction": -0.01},
        {**row, "linears": BUILT_INT4.name, "rise_fraction": 0.041},
    ]
    error = {"checkpoint": "m", "method": "x", "group": 128, "weight_error": 0.1, "output_error": 0.2}
    document = {
        "command": "c",
        "checkpoints": [{"name": "m", "zeros": 0.5}],
        "groups": [128],
        "blocks": [0],
        "layers": 1,
        "windows": 2,
        "built": [],
        "errors": [error],
        "perplexity": rows,
    }
    page = markdown(document)
    assert "| x | 0.2000 (0.1000) |" in page
    exact, *rounded = [line for line in page.splitlines() if line.startswith("| m, 50% zeros |")]
    assert "held" not in exact
    assert "missed" not in exact
    assert "| +0.21% ± 0.10% | 0.2%, missed |" in rounded[0]
    assert "| -1.00% ± 0.10% | 0.5%, held |" in rounded[1]
    assert "| 4.0%, missed | 0.10000 |" in rounded[2]


def test_geometric_mean():
    assert geometric_mean([0.1, 10.0]) == pytest.approx(1.0)


@pytest.fixture
def merged(tiny_checkpoint, tmp_path):
    """The tiny checkpoint with half of each linear pruned, as 'losa merge' would leave it."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "merged-50"
    shutil.copytree(tiny_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    masks = {}
    for name in [name for name in tensors if "_proj" in name]:
        masks[name] = np.abs(tensors[name]) >= np.median(np.abs(tensors[name]))
        tensors[name] = np.where(masks[name], tensors[name], np.float32(0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_masks(folder / "masks.safetensors", masks, {})
    return folder


def test_a_study_writes_both_files(merged, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr(codebooks, "WINDOW", 32)
    cases = (("bf16", "fp32", 0), (BUILT_INT4, "fp32", 128), (BUILT_INT4, BUILT_INT4, 128))
    monkeypatch.setattr(codebooks, "_CASES", cases)
    weights = open_checkpoint(merged).weights_sha256()
    arguments = ["--checkpoint", str(merged), "--calibration", str(tiny_text), "--text", str(tiny_text)]
    output = tmp_path / "made" / "here"
    assert codebooks.main([*arguments, "--windows", "2", "--block-step", "1", "-o", str(output)]) == 0
    document = json.loads((output / "codebooks.json").read_text())
    assert document["schema"] == "losa-study-codebooks"
    assert document["checkpoints"] == [
        {"name": "merged-50", "zeros": pytest.approx(0.5, abs=0.01), "weights_sha256": weights}
    ]
    assert len(document["errors"]) == 2 * 7 * 2 * len(METHODS)
    exact, *rounded = document["perplexity"]
    assert exact["linears"] == exact["head"] == "fp32"
    by_case = {(row["linears"], row["head"], row["group"]): row for row in rounded}
    assert len(by_case) == len(cases)
    assert all(0 < row["kl_divergence"] < 1 for row in rounded)
    bf16 = by_case["bf16", "fp32", 0]
    int4 = by_case[BUILT_INT4.name, "fp32", 128]
    with_head = by_case[BUILT_INT4.name, BUILT_INT4.name, 128]
    assert bf16["kl_divergence"] < int4["kl_divergence"] < with_head["kl_divergence"]

    page = (output / "codebooks.md").read_text()
    assert page == markdown(document)
    assert str(tmp_path) not in page
    assert "merged-50, 50% zeros, group 128" in page
    assert f"**{BUILT_INT4.name}** (what is built)" in page
    assert page.count("| merged-50, 50% zeros |") == len(document["perplexity"])


def test_layers_alone_need_no_perplexity(merged, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr(codebooks, "WINDOW", 32)
    config = StudyConfig((merged,), tiny_text, tiny_text, groups=(32,), block_step=2, windows=1, perplexity=False)
    document = codebooks.study(config, "a command")
    assert document["blocks"] == [0]
    assert {row["group"] for row in document["errors"]} == {32}
    assert "## Perplexity" not in markdown(document)


def test_errors_are_told_and_not_raised(tmp_path, capsys):
    missing = str(tmp_path / "missing")
    code = codebooks.main(["--checkpoint", missing, "--calibration", missing, "--text", missing, "-o", missing])
    assert code == 1
    assert "does not exist; check the path" in capsys.readouterr().err


def test_configurations_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint is named; give one or more folders"):
        StudyConfig((), tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="block_step is 0; give 1 or more"):
        StudyConfig((tmp_path,), tmp_path, tmp_path, block_step=0)
