"""Masks survive storage bit by bit, and damage is noticed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import save_file

from losa_export.errors import MaskError
from losa_export.masks import digest, load_masks, save_masks, sparsity_fraction, zeros_count

KEEP = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=37))


@given(keep=KEEP)
def test_round_trip_keeps_every_bit(tmp_path_factory: pytest.TempPathFactory, keep: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    save_masks(path, {"w": keep}, {"base": "abc"})
    file = load_masks(path)
    assert file.names == ("w",)
    assert file.shape("w") == keep.shape
    assert file.metadata["base"] == "abc"
    np.testing.assert_array_equal(file.read("w"), keep)
    np.testing.assert_array_equal(file.read_all()["w"], keep)


@given(keep=KEEP, flip=st.randoms())
def test_digest_tells_patterns_apart(keep: np.ndarray, flip: object) -> None:
    other = keep.copy()
    row, column = flip.randrange(keep.shape[0]), flip.randrange(keep.shape[1])  # type: ignore[attr-defined]
    other[row, column] ^= True
    assert digest(keep) == digest(np.asfortranarray(keep))
    assert digest(keep) != digest(other)
    if keep.shape[0] != keep.shape[1]:
        assert digest(keep) != digest(keep.reshape(keep.shape[::-1]))


def test_digest_is_stable_across_releases() -> None:
    # artefacts on users' disks carry it; the bits of a 3 x 3 identity are 1,0,0,0,1,0,0,0 and 1
    expected = hashlib.sha256(b"losa-masks-1:3x3:" + bytes([0b00010001, 0b1])).hexdigest()
    assert digest(np.eye(3, dtype=np.bool_)) == expected


def test_counts() -> None:
    keep = np.array([[True, False], [False, False]])
    assert zeros_count(keep) == 3
    assert sparsity_fraction(keep) == 0.75
    assert sparsity_fraction(np.zeros((0, 4), np.bool_)) == 0.0


def test_missing_damaged_and_foreign_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match="does not exist; run 'losa train' first"):
        load_masks(tmp_path / "absent")
    (tmp_path / "short").write_bytes(b"\x05")
    with pytest.raises(MaskError, match="is damaged"):
        load_masks(tmp_path / "short")
    save_file({"w": np.zeros(1, np.uint8)}, tmp_path / "foreign")
    with pytest.raises(MaskError, match="is not a losa masks file"):
        load_masks(tmp_path / "foreign")
    save_file({"w": np.zeros(1, np.uint8)}, tmp_path / "tableless", metadata={"format": "losa-masks-1"})
    with pytest.raises(MaskError, match="no readable table of shapes"):
        load_masks(tmp_path / "tableless")
    metadata = {"format": "losa-masks-1", "shapes": '{"w": [3, 7]}'}
    save_file({"w": np.zeros(1, np.uint8)}, tmp_path / "small", metadata=metadata)
    with pytest.raises(MaskError, match=r"'w' of shape \(3, 7\) needs 3 bytes, found \[1\]"):
        load_masks(tmp_path / "small")
    save_masks(tmp_path / "good", {"w": np.ones((2, 2), np.bool_)}, {})
    assert "w" in load_masks(tmp_path / "good")
    with pytest.raises(MaskError, match="holds no mask for tensor 'other'"):
        load_masks(tmp_path / "good").read("other")
