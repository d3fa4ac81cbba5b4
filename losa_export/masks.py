"""Zero patterns of weight matrices: identity, storage, bookkeeping. True means the weight is kept.

Masks are stored explicitly and never inferred from `weight != 0`: a kept weight may be exactly zero, and
then belongs to the pattern all the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losa_export.errors import MaskError
from losa_export.files import write_bytes_atomic

BoolArray = NDArray[np.bool_]

_FORMAT = "losa-masks-1"


def digest(keep: BoolArray) -> str:
    """Identity of a zero pattern, whatever file or layout it is stored in.

    Args:
        keep: (out, in) bool.
    Returns: hexadecimal SHA-256 over the shape and the row-major bits, packed little-endian.
    """
    identity = hashlib.sha256(f"{_FORMAT}:{'x'.join(map(str, keep.shape))}:".encode())
    identity.update(np.packbits(keep.reshape(-1), bitorder="little").tobytes())
    return identity.hexdigest()


def sparsity_fraction(keep: BoolArray) -> float:
    """Fraction of pruned positions, in [0, 1]; 0 for an empty matrix."""
    return 1.0 - int(np.count_nonzero(keep)) / keep.size if keep.size else 0.0


def zeros_count(keep: BoolArray) -> int:
    """Number of pruned positions."""
    return int(keep.size - np.count_nonzero(keep))


def save_masks(path: Path, masks: Mapping[str, BoolArray], metadata: Mapping[str, str]) -> None:
    """Write masks as one safetensors file, eight positions to a byte.

    Args:
        path: the file, written under a temporary name and renamed.
        masks: tensor name → (out, in) bool.
        metadata: free text kept in the header, for example the hash of the base weights.
    """
    from safetensors.numpy import save

    packed, shapes = {}, {}
    for name, keep in masks.items():
        packed[name], shapes[name] = np.packbits(keep.reshape(-1), bitorder="little"), list(keep.shape)
    header = {**metadata, "format": _FORMAT, "shapes": json.dumps(shapes, sort_keys=True)}
    write_bytes_atomic(path, save(packed, metadata=header))


class ReadOnDemand(Mapping[str, BoolArray]):
    """Masks that are read each time they are asked for, so that saving them holds one unpacked mask at a time.

    Args:
        readers: tensor name → what reads its mask, given the name.
    """

    def __init__(self, readers: Mapping[str, Callable[[str], BoolArray]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> BoolArray:
        return self._readers[name](name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


class MaskFile:
    """A masks file opened for reading; masks are unpacked one at a time.

    Use `load_masks` to open one.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self._shapes = dict(shapes)

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names, in file order."""
        return tuple(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the mask of tensor `name`. Raises: MaskError if there is none."""
        if name not in self._shapes:
            raise MaskError(f"'{self.path}' holds no mask for tensor '{name}'", path=self.path, tensor=name)
        return self._shapes[name]

    def read(self, name: str) -> BoolArray:
        """The mask of tensor `name`, (out, in) bool."""
        from safetensors import safe_open

        shape = self.shape(name)
        with safe_open(self.path, framework="numpy") as file:
            packed: NDArray[np.uint8] = file.get_tensor(name)
        count = int(np.prod(shape))
        return np.unpackbits(packed, count=count, bitorder="little").astype(np.bool_).reshape(shape)

    def read_all(self) -> dict[str, BoolArray]:
        """Every mask, tensor name → (out, in) bool. One byte a position: 0.1 GB for SmolLM2-135M."""
        return {name: self.read(name) for name in self.names}


def load_masks(path: Path) -> MaskFile:
    """Open a masks file and check that every packed tensor has the length its shape asks for.

    Raises: MaskError if the file is missing, damaged or not a masks file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            lengths = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise MaskError(f"masks file '{path}' does not exist; run 'losa train' first", path=path) from None
    except (SafetensorError, OSError) as error:
        raise MaskError(f"masks file '{path}' is damaged ({error}); run 'losa train' again", path=path) from error
    if metadata.get("format") != _FORMAT:
        raise MaskError(
            f"'{path}' is not a losa masks file (format {metadata.get('format')!r}, expected {_FORMAT!r})", path=path
        )
    shapes = _parse_shapes(path, metadata.get("shapes", ""))
    for name, shape in shapes.items():
        expected = (int(np.prod(shape)) + 7) // 8
        if lengths.get(name) != [expected]:
            raise MaskError(
                f"masks file '{path}' is damaged: tensor '{name}' of shape {shape} needs {expected} bytes, "
                f"found {lengths.get(name)}; run 'losa train' again",
                path=path,
                tensor=name,
            )
    return MaskFile(path, shapes, metadata)


def _parse_shapes(path: Path, text: str) -> dict[str, tuple[int, ...]]:
    try:
        parsed: Any = json.loads(text)
        return {str(name): (int(rows), int(columns)) for name, (rows, columns) in parsed.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise MaskError(
            f"masks file '{path}' has no readable table of shapes; run 'losa train' again", path=path
        ) from error
