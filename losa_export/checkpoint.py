"""Hugging Face checkpoint folders, read and written one tensor at a time, without torch or transformers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import CheckpointError, InputError, OutputError, UnsafePathError
from losa_export.files import input_folder, sha256_of, write_text_atomic

FloatArray = NDArray[np.float32]

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Carried along unchanged from a checkpoint to everything made of it.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

_READABLE_DTYPES = ("F32", "BF16", "F16")


class Checkpoint:
    """An open checkpoint folder. Use `open_checkpoint` to make one.

    Attributes:
        folder: where it lies.
        config: the parsed `config.json`.
        replaced: names of tensors that are read from another file than the folder's own (`overlaid`).
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        tensors: dict[str, _TensorEntry],
        replacements: dict[str, _TensorEntry] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.replaced = frozenset(replacements or {})
        self._own = tensors
        self._tensors = {**tensors, **(replacements or {})}

    def overlaid(self, path: Path) -> Checkpoint:
        """The same checkpoint with the tensors of the safetensors file `path` in place of its own.

        Raises: CheckpointError if the file is damaged, or holds a tensor that the checkpoint lacks or that has
            another shape there.
        """
        replacements = _read_header(path)
        for name, entry in replacements.items():
            if not self.exists(name) or self.shape(name) != entry.shape:
                own = self.shape(name) if self.exists(name) else "missing"
                raise CheckpointError(
                    f"tensor '{name}' of '{path}' is {entry.shape}, but {own} in '{self.folder}'; give the "
                    "checkpoint it was made for",
                    tensor=name,
                )
        return Checkpoint(self.folder, self.config, self._own, replacements)

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._tensors))

    def exists(self, name: str) -> bool:
        """Whether there is a tensor `name`."""
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`. Raises: CheckpointError if there is none."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Stored dtype of tensor `name` as safetensors spells it: 'F32', 'BF16' or 'F16'."""
        return self._entry(name).dtype

    def read(self, name: str) -> FloatArray:
        """Tensor `name` as float32; narrower types are widened exactly.

        Raises: CheckpointError if it is missing, not of a floating type we read, or damaged.
        """
        import ml_dtypes  # noqa: F401  (teaches NumPy the bfloat16 that safetensors asks it for)

        return np.asarray(self._get(name, "numpy"), dtype=np.float32)

    def mapped(self, name: str) -> Any:
        """Tensor `name` for torch, in its stored dtype and mapped from the file: do not write to it.

        Raises: as `read`.
        """
        return self._get(name, "pt")

    def _get(self, name: str, framework: str) -> Any:
        entry = self._entry(name)
        if entry.dtype not in _READABLE_DTYPES:
            raise CheckpointError(
                f"tensor '{name}' in '{entry.file}' has dtype {entry.dtype}; only "
                f"{', '.join(_READABLE_DTYPES)} are read: save the checkpoint unquantised",
                tensor=name,
            )
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(entry.file, framework=framework) as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(entry.file, error) from error

    def weight_files(self) -> tuple[Path, ...]:
        """The folder's safetensors files, sorted."""
        return tuple(sorted({entry.file for entry in self._own.values()}))

    def weights_sha256(self) -> str:
        """Identity of the weights: the SHA-256 of the one weight file, or of the list of those of all shards."""
        files = self.weight_files()
        if len(files) == 1:
            return sha256_of(files[0])
        listing = "".join(f"{path.name} {sha256_of(path)}\n" for path in files)
        return hashlib.sha256(listing.encode()).hexdigest()

    def _entry(self, name: str) -> _TensorEntry:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"checkpoint '{self.folder}' has no tensor '{name}'; it is incomplete or of another architecture "
                "than its config.json says",
                tensor=name,
            ) from None


class _TensorEntry:
    __slots__ = ("dtype", "file", "shape")

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: str) -> None:
        self.file = file
        self.shape = shape
        self.dtype = dtype


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder and read the headers of all its weight files.

    Args:
        folder: holds config.json and model.safetensors, or shards with model.safetensors.index.json.
    Raises:
        InputError: missing, a file, or empty.
        CheckpointError: no config.json, no safetensors, a truncated or damaged file, a shard without a tensor
            that the index puts there.
        UnsafePathError: the index names a file outside the folder.
    """
    input_folder(folder, what="checkpoint")
    config = read_json(folder / CONFIG_FILE, what="checkpoint", mend="give a Hugging Face checkpoint folder")
    tensors: dict[str, _TensorEntry] = {}
    if (folder / INDEX_FILE).is_file():
        index = read_json(folder / INDEX_FILE, what="checkpoint", mend="download the checkpoint again")
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"'{folder / INDEX_FILE}' has no weight_map; download the checkpoint again")
        for file_name in sorted(set(weight_map.values())):
            tensors.update(_read_header(_shard(folder, file_name)))
        for name, file_name in weight_map.items():
            if name not in tensors:
                raise CheckpointError(
                    f"'{folder / INDEX_FILE}' puts tensor '{name}' into '{file_name}', which does not hold it; "
                    "download the checkpoint again",
                    tensor=name,
                )
    elif (folder / SINGLE_FILE).is_file():
        tensors.update(_read_header(folder / SINGLE_FILE))
    else:
        other = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.gguf"))
        hint = f" (found {', '.join(other[:3])}, which is not read)" if other else ""
        raise CheckpointError(
            f"checkpoint '{folder}' has no {SINGLE_FILE} and no {INDEX_FILE}{hint}; "
            "save it with save_pretrained(..., safe_serialization=True)"
        )
    return Checkpoint(folder, config, tensors)


def _shard(folder: Path, name: str) -> Path:
    """A shard named by the index. Links are allowed when the user's own cache made them (hub snapshots are links)."""
    relative = Path(name)
    if relative.is_absolute() or len(relative.parts) != 1 or ".." in relative.parts:
        raise UnsafePathError(
            f"'{folder / INDEX_FILE}' refers to '{name}', which is outside the folder", folder=folder, name=name
        )
    path = folder / relative
    if not path.is_file():
        raise CheckpointError(f"checkpoint '{folder}' lacks its shard '{name}'; download it again", path=path)
    return path


def _read_header(path: Path) -> dict[str, _TensorEntry]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            entries = {}
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                view = file.get_slice(name)
                entries[name] = _TensorEntry(path, tuple(view.get_shape()), view.get_dtype())
            return entries
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"'{path}' is truncated or damaged ({error}); download or save it again", path=path)


def read_json(path: Path, *, what: str, mend: str) -> dict[str, Any]:
    """A JSON object from `path`.

    Raises: CheckpointError saying that the file is missing, unreadable or not an object, with `mend`.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{what} '{path.parent}' has no {path.name}; {mend}", path=path) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read as JSON ({error}); {mend}", path=path) from error
    except RecursionError:
        raise CheckpointError(f"'{path}' is nested too deeply to be one of ours; {mend}", path=path) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"'{path}' holds no JSON object; {mend}", path=path)
    return parsed


def read_json_if_any(path: Path, *, mend: str) -> dict[str, Any]:
    """A JSON object from `path`, empty where there is no such file. Raises: CheckpointError as `read_json`."""
    return read_json(path, what="folder", mend=mend) if path.is_file() else {}


def copy_companions(source: Path, destination: Path) -> tuple[str, ...]:
    """Copy tokenizer, chat template and generation files that `source` has. Returns: the names copied."""
    copied = []
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
            copied.append(name)
    return tuple(copied)


class CheckpointWriter:
    """Writes tensors into a folder as safetensors, holding at most one shard in memory.

    Args:
        folder: an existing folder, usually the temporary one of `files.output_folder`.
        config: written as config.json on close.
        max_shard_bytes: a new file is begun before one grows beyond this.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, max_shard_bytes: int = 1 << 30) -> None:
        self._folder = folder
        self._config = config
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, FloatArray] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def add(self, name: str, tensor: FloatArray) -> None:
        """Append one float32 tensor. Raises: InputError for a name given twice."""
        if name in self._pending or any(name in shard for shard in self._shards):
            raise InputError(f"tensor '{name}' was written twice", tensor=name)
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._pending[name] = np.ascontiguousarray(tensor, dtype=np.float32)
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is pending, the index if there are several files, and config.json."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_text_atomic(self._folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
        write_text_atomic(self._folder / CONFIG_FILE, json.dumps(self._config, indent=2, sort_keys=True) + "\n")

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        part = self._part(len(self._shards))
        try:
            # transformers refuses files without this key
            save_file(self._pending, part, metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a full disk
            raise OutputError(
                f"the weights could not be written into '{self._folder.parent}' ({error}); "
                "free some space, or choose another disk with -o",
                path=self._folder,
            ) from error
        part.chmod(0o644)  # safetensors makes files that only their owner can read
        self._shards.append(list(self._pending))
        self._pending = {}
        self._pending_bytes = 0
