"""The text on which an exporter looks at a model's activations: read, cut and checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losa_export.architecture import DecoderSpec
from losa_export.files import sha256_of
from losa_export.text import check_token_ids, load_tokenizer, read_documents, token_windows

# Tokens in a window, or as many as the model reads.
WINDOW = 512

# Of the order in which windows are drawn, so that text sorted by subject is met in all its kinds.
_SEED = 0


@dataclass(frozen=True)
class CalibrationText:
    """Windows of calibration text.

    Attributes:
        windows: (n, tokens) int64 token ids.
        files: name and SHA-256 of each file.
    """

    windows: NDArray[np.int64]
    files: tuple[tuple[str, str], ...]

    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "files": [{"name": name, "sha256": sha256} for name, sha256 in self.files],
            "windows": self.windows.shape[0],
            "window": self.windows.shape[1],
            "tokens": int(self.windows.size),
        }


def read_calibration(paths: Sequence[Path], model: Path, spec: DecoderSpec, count: int) -> CalibrationText:
    """Read `count` windows from some text files, drawn from all over them.

    Args:
        paths: files as `losa_export.text.read_documents` reads them.
        model: checkpoint folder with the tokenizer.
        spec: its decoder.
        count: how many windows.

    Raises:
        TextError: a file cannot be read, or all together fill too few windows.
        CheckpointError: the tokenizer is missing, or not the model's.
    """
    documents = read_documents(paths)
    separator = spec.eos_token_ids[0] if spec.eos_token_ids else None
    length = min(WINDOW, spec.max_positions)
    windows = token_windows(documents, load_tokenizer(model), length, count, _SEED, separator=separator)
    check_token_ids(windows, spec.vocab_size, model, paths[0])
    return CalibrationText(windows, tuple((path.name, sha256_of(path)) for path in paths))
