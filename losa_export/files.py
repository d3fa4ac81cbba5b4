"""Writing so that nothing is left half done, and reading so that nothing outside a folder is touched."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from losa_export.errors import InputError, OutputError, UnsafePathError

_CHUNK_BYTES = 1 << 22


def cache_folder() -> Path:
    """Where we keep what can be made again: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "losa-export"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def input_folder(path: Path, *, what: str) -> Path:
    """`path` as an existing, non-empty folder.

    Args:
        path: as the user gave it.
        what: how the message calls it, for example "checkpoint".
    Raises: InputError naming what is wrong with the path.
    """
    if not path.exists():
        raise InputError(f"{what} folder '{path}' does not exist; check the path", path=path)
    if not path.is_dir():
        raise InputError(f"{what} '{path}' is a file; give the folder that holds it", path=path)
    if not any(path.iterdir()):
        raise InputError(f"{what} folder '{path}' is empty; give the folder that holds the files", path=path)
    return path


def safe_child(folder: Path, name: str) -> Path:
    """The regular file `name` inside `folder`, for names that come from inside a file we do not trust.

    Raises:
        UnsafePathError: the name is absolute, leaves the folder, or is a symbolic or hard link
            (a hard link lets another name's owner change the bytes after they were checked).
        InputError: there is no such file.
    """
    relative = Path(name)
    if not name or relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name:
        raise UnsafePathError(
            f"'{folder}' refers to the file '{name}', which is outside it; only plain names inside the folder are read",
            folder=folder,
            name=name,
        )
    path = folder
    for part in relative.parts:
        path = path / part
        if path.is_symlink():
            raise UnsafePathError(
                f"'{path}' is a symbolic link; replace it by a copy of the file it points to",
                folder=folder,
                name=name,
            )
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"'{folder}' refers to '{name}', which is missing: {error.strerror}", path=path) from error
    if not stat.S_ISREG(status.st_mode):
        raise UnsafePathError(f"'{path}' is not a regular file", folder=folder, name=name)
    if status.st_nlink > 1:
        raise UnsafePathError(
            f"'{path}' is a hard link with {status.st_nlink} names; replace it by a copy",
            folder=folder,
            name=name,
        )
    return path


def check_output(path: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse a destination that would destroy something, before any work is done.

    Raises: OutputError for a file, for a non-empty folder without `overwrite`, and for a folder that is,
        holds or lies inside one of `inputs`.
    """
    target = path.resolve()
    for source in inputs:
        resolved = source.resolve()
        if target == resolved:
            raise OutputError(f"output '{path}' is the input itself; choose another folder with -o", path=path)
        if resolved.is_relative_to(target):
            raise OutputError(
                f"output '{path}' contains the input '{source}', which would be replaced; choose another folder",
                path=path,
            )
        if target.is_relative_to(resolved) and resolved.is_dir():
            raise OutputError(f"output '{path}' lies inside the input '{source}'; choose a folder beside it", path=path)
    if path.is_symlink():
        raise OutputError(f"output '{path}' is a symbolic link; give the folder itself", path=path)
    if path.exists() and not path.is_dir():
        raise OutputError(f"output '{path}' is a file; give a folder", path=path)
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(f"output folder '{path}' is not empty; add --overwrite to replace it", path=path)


@contextlib.contextmanager
def output_folder(path: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` if the block succeeds, and vanishes if not.

    Args:
        path: the destination. Its parent is made if missing.
        overwrite: replace a non-empty destination.
        inputs: folders the work reads; the destination may not touch them.
    Yields: the temporary folder to write into.
    Raises: OutputError as `check_output`, and when the disk is full or the folder cannot be written.
    """
    check_output(path, overwrite=overwrite, inputs=inputs)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        temporary.chmod(0o755)
    try:
        with disk_errors(path):
            yield temporary
            _replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace_folder(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; a former `path` is set aside first, so one of the two always exists whole."""
    if not path.exists():
        temporary.rename(path)
        return
    former = path.with_name(f"{temporary.name}.former")
    path.rename(former)
    try:
        temporary.rename(path)
    except OSError:
        former.rename(path)
        raise
    shutil.rmtree(former, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's complaints while writing `path` into an OutputError with the mend."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"no space left while writing '{path}'; free some, or choose another disk with -o", path=path
            ) from error
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"'{path}' would hold a file larger than its disk or 'ulimit -f' allows; choose another disk with -o",
                path=path,
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"'{path}' cannot be written: {error.strerror}; choose another folder", path=path
            ) from error
        raise


def check_output_file(path: Path) -> None:
    """Refuse a file name that could not be written, before the work whose result it shall hold.

    Raises: OutputError for a folder, and for a parent folder that is missing or cannot be written.
    """
    if path.is_dir():
        raise OutputError(f"output '{path}' is a folder; give a file name in it", path=path)
    parent = path.resolve().parent
    if not parent.is_dir():
        raise OutputError(f"output '{path}' cannot be written: there is no folder '{path.parent}'; make it", path=path)
    if not os.access(parent, os.W_OK):
        raise OutputError(f"output '{path}' cannot be written: permission denied; choose another place", path=path)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to a temporary name, flush it to the disk, and rename it to `path`."""
    with disk_errors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` of `text` as UTF-8."""
    write_bytes_atomic(path, text.encode("utf-8"))
