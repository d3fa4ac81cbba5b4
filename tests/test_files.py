"""Nothing is written half, nothing outside a folder is read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from losa_export.errors import InputError, OutputError, UnsafePathError
from losa_export.files import check_output_file, input_folder, output_folder, safe_child, sha256_of, write_text_atomic


def test_output_folder_appears_whole_with_its_files(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_output_folder_leaves_nothing_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="midway"), output_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "a").write_text("1")
        raise RuntimeError("midway")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_keeps_the_former_folder_when_the_work_fails(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(RuntimeError), output_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_overwrite_replaces_the_former_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with output_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_filled_destination_is_refused_and_the_message_names_the_mend(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with (
        pytest.raises(OutputError, match=r"out' is not empty; add --overwrite"),
        output_folder(tmp_path / "out", overwrite=False),
    ):
        pass


@pytest.mark.parametrize(
    ("output", "message"),
    [("in", "is the input itself"), (".", "contains the input"), ("in/deeper", "lies inside the input")],
)
def test_a_destination_that_touches_an_input_is_refused(tmp_path: Path, output: str, message: str) -> None:
    (tmp_path / "in").mkdir()
    with (
        pytest.raises(OutputError, match=message),
        output_folder(tmp_path / output, overwrite=True, inputs=[tmp_path / "in"]),
    ):
        pass


def test_a_destination_that_is_a_file_or_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="is a file; give a folder"), output_folder(tmp_path / "file", overwrite=True):
        pass
    with pytest.raises(OutputError, match="is a symbolic link"), output_folder(tmp_path / "link", overwrite=True):
        pass


def test_a_full_disk_is_a_typed_error_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="no space left while writing"),
        output_folder(tmp_path / "out", overwrite=False),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_destination_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"), output_folder(tmp_path / "out", overwrite=False):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "a/../../secret", "", "a\\b", "a\0b"])
def test_a_name_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafePathError, match="outside it"):
        safe_child(tmp_path, name)


def test_links_are_refused_and_a_plain_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    assert safe_child(tmp_path, "plain") == tmp_path / "plain"
    (tmp_path / "soft").symlink_to(tmp_path / "plain")
    with pytest.raises(UnsafePathError, match="symbolic link"):
        safe_child(tmp_path, "soft")
    os.link(tmp_path / "plain", tmp_path / "hard")
    with pytest.raises(UnsafePathError, match="hard link with 2 names"):
        safe_child(tmp_path, "hard")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnsafePathError, match="not a regular file"):
        safe_child(tmp_path, "folder")
    with pytest.raises(InputError, match="which is missing"):
        safe_child(tmp_path, "absent")


def test_input_folder_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        input_folder(tmp_path / "absent", what="checkpoint")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        input_folder(tmp_path / "file", what="checkpoint")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is empty"):
        input_folder(tmp_path / "empty", what="checkpoint")


def test_atomic_write_replaces_and_hash_is_sha256(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a", "one")
    write_text_atomic(tmp_path / "a", "abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_result_file_that_could_not_be_written_is_refused_early(tmp_path: Path) -> None:
    check_output_file(tmp_path / "bench.json")
    with pytest.raises(OutputError, match="is a folder; give a file name in it"):
        check_output_file(tmp_path)
    with pytest.raises(OutputError, match="there is no folder"):
        check_output_file(tmp_path / "absent" / "bench.json")
