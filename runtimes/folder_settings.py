"""What an exported folder says of its model, for engines whose own interface does not tell."""

from __future__ import annotations

import json
from pathlib import Path

from losa_export.errors import CheckpointError

SETTINGS_FILE = "genai_config.json"


def model_sizes(folder: Path) -> tuple[int, int]:
    """Vocabulary size and number of positions.

    Raises: CheckpointError if the folder has no genai_config.json, or it does not hold both.
    """
    try:
        model = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))["model"]
        return int(model["vocab_size"]), int(model["context_length"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{folder}' has no usable {SETTINGS_FILE} ({type(error).__name__}: {error}); export it with: losa export",
            path=folder,
        ) from error
