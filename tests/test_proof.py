"""The proof of a merge must notice each kind of damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from losa_export import proof
from losa_export.checkpoint import open_checkpoint
from losa_export.errors import MergeProofError
from losa_export.proof import compare_logits, prove_logits, prove_tensor, prove_tensors

KEEP = np.array([[True, False], [True, True]])
BEFORE = np.array([[1.0, 2.0], [0.0, 4.0]], np.float32)
AFTER = np.array([[1.5, 0.0], [0.0, 4.0]], np.float32)
NAME = "model.layers.0.mlp.up_proj.weight"


def test_a_sound_weight_is_described() -> None:
    found = prove_tensor("w", BEFORE, AFTER, KEEP, KEEP)
    assert (found.shape, found.size, found.pruned, found.kept_zeros, found.lost) == ((2, 2), 4, 1, 1, 0)


def test_a_kept_weight_that_became_zero_is_counted_as_lost() -> None:
    after = AFTER.copy()
    after[0, 0] = 0.0
    assert prove_tensor("w", BEFORE, after, KEEP, KEEP).lost == 1


@pytest.mark.parametrize("value", [-0.0, 1e-45])
def test_anything_but_positive_zero_at_a_pruned_position_is_noticed(value: float) -> None:
    after = AFTER.copy()
    after[0, 1] = value
    with pytest.raises(MergeProofError, match="1 pruned positions of 'w' are not exactly zero after the merge"):
        prove_tensor("w", BEFORE, after, KEEP, KEEP)


def test_another_mask_in_the_output_is_noticed() -> None:
    with pytest.raises(MergeProofError, match="the mask of 'w' in the output is not the one of the input"):
        prove_tensor("w", BEFORE, AFTER, KEEP, ~KEEP)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_noticed(value: float) -> None:
    after = AFTER.copy()
    after[1, 1] = value
    with pytest.raises(MergeProofError, match="merged weight 'w' holds values that are not finite"):
        prove_tensor("w", BEFORE, after, KEEP, KEEP)


@pytest.fixture
def changed(tiny_checkpoint: Path, tmp_path: Path):
    """Writes a copy of the tiny checkpoint after a change of its tensors, and opens both."""

    def write(change):
        shutil.copytree(tiny_checkpoint, tmp_path / "changed")
        tensors = load_file(tmp_path / "changed" / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
        return open_checkpoint(tiny_checkpoint), open_checkpoint(tmp_path / "changed")

    return write


def ones(_: str) -> np.ndarray:
    return np.ones((176, 64), bool)


def test_a_changed_tensor_without_mask_or_adapter_is_noticed(changed) -> None:
    def change(tensors):
        tensors["model.norm.weight"][0] = -0.0

    base, written = changed(change)
    with pytest.raises(MergeProofError, match=r"'model\.norm\.weight' has neither mask nor adapter, but changed"):
        prove_tensors(base, written, {}, ones, frozenset())


def test_a_missing_tensor_is_noticed(changed) -> None:
    base, written = changed(lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(MergeProofError, match=r"do not hold the same tensors \(for example 'model\.norm\.weight'\)"):
        prove_tensors(base, written, {}, ones, frozenset())


def test_an_unmasked_weight_with_adapter_may_change_but_must_be_finite(changed) -> None:
    def change(tensors):
        tensors[NAME][0, 0] = np.inf

    base, written = changed(change)
    with pytest.raises(MergeProofError, match=r"up_proj\.weight' holds values that are not finite; check the base"):
        prove_tensors(base, written, {}, ones, frozenset({NAME}))


def test_more_lost_weights_than_rounding_explains_are_noticed(changed) -> None:
    def change(tensors):
        tensors[NAME][3, :5] = 0.0

    base, written = changed(change)
    with pytest.raises(MergeProofError, match=r"would lose 5 of 11264 kept weights \(most in '.*up_proj\.weight'\)"):
        prove_tensors(base, written, {NAME: ones}, ones, frozenset())


def test_logits_are_compared_by_the_worst_position() -> None:
    before = np.array([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0]], np.float32)
    after = np.array([[3.0, 4.0, 0.5], [0.0, 1.0, 0.0]], np.float32)
    figures = compare_logits(before, after)
    assert figures.max_relative_error == pytest.approx(2**0.5)  # the first position alone: 0.5 / 5 = 0.1
    assert figures.max_absolute_error == 1.0
    assert figures.argmax_agreement == 0.5
    assert (figures.positions, figures.dtype) == (2, "float32")


def test_rounding_in_float32_is_told_from_a_change_by_float64(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs the 'train' extra")
    from losa_export.reference import compute_reference

    base, reference = open_checkpoint(tiny_checkpoint), compute_reference(tiny_checkpoint)
    assert prove_logits(base, {}, None, tiny_checkpoint, reference).dtype == "float32"
    # logits that only look different in float32, as after many more blocks
    noisy = reference.logits * np.float32(1 + 1e-4)
    object.__setattr__(reference, "logits", noisy)
    found = prove_logits(base, {}, None, tiny_checkpoint, reference)
    assert found.dtype == "float64"
    assert found.max_relative_error == 0.0
    monkeypatch.setattr(proof, "MAX_RELATIVE_ERROR", -1.0)
    with pytest.raises(MergeProofError, match=r"the merged model answers differently: relative error .* 0\.00e\+00"):
        prove_logits(base, {}, None, tiny_checkpoint, reference)
