"""Where models and texts come from when the user names them, and when not."""

from __future__ import annotations

import re
from pathlib import Path

from losa_export.embedded import EMBEDDED_TEXT, TextParts, write_embedded_text
from losa_export.errors import CheckpointError, InputError, MissingDependencyError
from losa_export.files import cache_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")


def resolve_model(name: str) -> Path:
    """The local folder of model `name`.

    Args:
        name: a folder, or a hub id such as "HuggingFaceTB/SmolLM2-135M"; an existing folder wins.
    Raises:
        InputError: neither a folder nor shaped like a hub id.
        CheckpointError: the hub could not be reached, or has no such model.
        MissingDependencyError: a hub id without the package that downloads it.
    """
    path = Path(name)
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(name):
        raise InputError(f"model '{name}' is no folder; give a checkpoint folder or a hub id 'owner/model'", path=path)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingDependencyError.for_extra("huggingface_hub", "train", "downloading a model") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_PATTERNS)))
    except Exception as error:  # the hub client raises a wide family, from connection errors to missing repositories
        raise CheckpointError(
            f"model '{name}' is no local folder and could not be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}); "
            "check the id and the network, or give a folder",
            model=name,
        ) from error


def default_text() -> TextParts:
    """Wikipedia paragraphs for a run whose user named no text, split by title and kept in the user's cache folder.

    Raises: MissingDependencyError with the command that installs the text; OutputError if the cache cannot be written.
    """
    folder = cache_folder() / f"{EMBEDDED_TEXT.package}-{EMBEDDED_TEXT.version}"
    parts = TextParts.inside(folder)
    if all(path.is_file() for path in (parts.calibration, parts.tuning, parts.validation)):
        return parts
    return write_embedded_text(folder, overwrite=True)
