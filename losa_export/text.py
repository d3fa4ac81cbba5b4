"""Text in, token windows out: calibration, tuning and validation all start here.

Needs numpy and tokenizers only, so that an edge box can measure perplexity as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from losa_export.errors import CheckpointError, TextError
from losa_export.text_rows import ROW_SHAPES, RenderChat, text_of_row

PLAIN_SUFFIXES = (".txt", ".text", ".raw", ".tokens", ".md")

Encode = Callable[[str], Sequence[int]]

# Documents encoded in one call: enough to keep the tokenizer busy, few enough that their encodings,
# which hold offsets and masks as well as ids, stay small beside the ids that are kept.
_BATCH = 64


def read_documents(paths: Iterable[Path], render_chat: RenderChat | None = None) -> list[str]:
    """Read the documents of some text files, in the order given.

    A plain file (``.txt``, ``.text``, ``.raw``, ``.tokens``, ``.md``) is *one* document: where a
    paragraph ends is the author's affair, and a separator token after each would teach the model
    to stop there. A ``.jsonl`` file holds one row a line, a ``.json`` file a list of rows, and each row is a
    document: a ``text``, an instruction with its answer, or a conversation, as `text_rows.text_of_row`
    turns them into text. Documents of nothing but white space are left out.

    Args:
        paths: the files.
        render_chat: turns a conversation into text, such as a model's chat template; a plain form if not given.
    Returns: at least one document.
    Raises: TextError for a missing file, another kind of file, bytes that are not UTF-8, a row of none of
        the shapes above (file and row are named, rows count from 1), or no text at all.
    """
    listed = [Path(path) for path in paths]
    documents = [text for path in listed for text in _documents_of(path, render_chat) if text.strip()]
    if not documents:
        names = ", ".join(f"'{path}'" for path in listed) or "no file"
        raise TextError(f"there is no text in {names}; name files that hold some", paths=listed)
    return documents


def _documents_of(path: Path, render_chat: RenderChat | None) -> Iterator[str]:
    if path.suffix in (".jsonl", ".json"):
        yield from (text for _, text in read_rows(path, render_chat))
    elif path.suffix in PLAIN_SUFFIXES:
        yield _read_utf8(path)
    else:
        raise TextError(
            f"'{path}' is not a kind of text that can be read; "
            f"give .jsonl or .json with a field 'text', instructions or messages, "
            f"or plain text ({', '.join(PLAIN_SUFFIXES)})",
            path=path,
        )


def read_rows(path: Path, render_chat: RenderChat | None = None) -> Iterator[tuple[dict[str, object], str]]:
    """Yield each row of a ``.jsonl`` or ``.json`` file, with its text. Raises: TextError, as `read_documents`."""
    for number, row in _parsed_list(path) if path.suffix == ".json" else _parsed_lines(path):
        text = text_of_row(row, render_chat)
        if text is None or not isinstance(row, dict):
            raise TextError(
                f"row {number} of '{path}' has no string field 'text', nor an instruction or messages; "
                f"each row must look like {ROW_SHAPES}",
                path=path,
                row=number,
            )
        yield row, text


def _parsed_list(path: Path) -> Iterator[tuple[int, object]]:
    try:
        rows = json.loads(_read_utf8(path))
    except json.JSONDecodeError as error:
        raise TextError(
            f"'{path}' is not JSON ({error.msg} at line {error.lineno}); "
            "mend it, or name it .jsonl if it holds one row a line",
            path=path,
        ) from error
    if not isinstance(rows, list):
        raise TextError(f"'{path}' is not a list of rows; each row must look like {ROW_SHAPES}", path=path)
    yield from enumerate(rows, start=1)


def _parsed_lines(path: Path) -> Iterator[tuple[int, object]]:
    # Not splitlines(): that also splits at U+2028 and its like, which JSON allows inside a string.
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise TextError(
                f"row {number} of '{path}' is not JSON ({error.msg} at column {error.colno}); "
                "mend the row or take it out",
                path=path,
                row=number,
            ) from error


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        row = error.object[: error.start].count(b"\n") + 1
        raise TextError(
            f"'{path}' is not UTF-8: byte {error.start}, row {row}; save it again as UTF-8",
            path=path,
            row=row,
        ) from error
    except OSError as error:
        raise TextError(
            f"the text file '{path}' cannot be read ({error.strerror}); check the path", path=path
        ) from error


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the fast tokenizer of a checkpoint or export folder, without transformers.

    Raises: CheckpointError when ``tokenizer.json`` is missing or cannot be parsed.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        definition = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"'{folder}' has no readable tokenizer.json ({error.strerror}); "
            "save the checkpoint's fast tokenizer there (tokenizer.save_pretrained)",
            path=path,
        ) from error
    try:
        return Tokenizer.from_buffer(definition)
    except Exception as error:  # tokenizers raises bare Exception, whatever the fault
        raise CheckpointError(
            f"'{path}' is not a tokenizer that can be read ({error}); copy it from the model again", path=path
        ) from error


def _encoded(documents: Sequence[str], tokenizer: Tokenizer | Encode) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(documents), _BATCH):
        batch = list(documents[start : start + _BATCH])
        if isinstance(tokenizer, Tokenizer):
            encodings = tokenizer.encode_batch(batch, add_special_tokens=False)
            rows: Iterable[Sequence[int]] = (encoding.ids for encoding in encodings)
        else:
            rows = (tokenizer(text) for text in batch)
        yield from (np.asarray(row, dtype=np.int64) for row in rows)


def encode_documents(
    documents: Sequence[str], tokenizer: Tokenizer | Encode, separator: int | None, bos: int | None = None
) -> NDArray[np.int64]:
    """Encode all documents as one stream of token ids, without special tokens but those named here.

    Args:
        documents: the texts, in order.
        tokenizer: a fast tokenizer, or a function from text to ids.
        separator: id put *between* documents, usually end-of-text; None joins them bare.
        bos: id put before each document, usually beginning-of-text; None puts nothing.

    Returns: (tokens,) int64.
    """
    pieces: list[NDArray[np.int64]] = []
    for row in _encoded(documents, tokenizer):
        if pieces and separator is not None:
            pieces.append(np.array([separator], dtype=np.int64))
        if bos is not None:
            pieces.append(np.array([bos], dtype=np.int64))
        pieces.append(row)
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


def token_examples(
    documents: Sequence[str],
    tokenizer: Tokenizer | Encode,
    longest: int,
    *,
    bos: int | None,
    eos: int | None,
) -> list[NDArray[np.int64]]:
    """Encode each document on its own, cut to `longest` tokens.

    A document that is cut gets no end-of-text token: it does not end there. One of a single token is left out, since
    it holds nothing to predict.

    Args:
        documents: the texts, in order.
        tokenizer: a fast tokenizer, or a function from text to ids.
        longest: most tokens of an example, ≥ 2.
        bos: id put before each document; None puts nothing.
        eos: id put behind each document; None puts nothing.
    Returns: (tokens,) int64 each, of 2 to `longest` tokens.
    Raises: TextError when no document has two tokens.
    """
    first, last = ([] if token is None else [token] for token in (bos, eos))
    examples = [np.array([*first, *row, *last], dtype=np.int64)[:longest] for row in _encoded(documents, tokenizer)]
    examples = [example for example in examples if example.size >= 2]
    if not examples:
        raise TextError(
            f"none of the {len(documents)} documents has two tokens, one to read and one to predict; give more text",
            documents=len(documents),
        )
    return examples


def token_windows(
    documents: Sequence[str],
    tokenizer: Tokenizer | Encode,
    window: int,
    count: int | None,
    seed: int | None,
    *,
    separator: int | None,
    bos: int | None = None,
) -> NDArray[np.int64]:
    """Cut non-overlapping windows out of the joined documents, in an order fixed by the seed.

    The tail that fills no window is dropped. A window may start inside a document and span several.

    Args:
        documents: the texts, in order.
        tokenizer: a fast tokenizer, or a function from text to ids.
        window: tokens in a window, ≥ 1.
        count: how many windows; None takes all there are.
        seed: of the shuffle, done before `count` is taken; None keeps the order of the text.
        separator: id put between documents, usually end-of-text; None joins them bare.
        bos: id put before each document, usually beginning-of-text; None puts nothing.

    Returns: (windows, window) int64.
    Raises: TextError when the text fills fewer than `count` windows (or none at all): it tells
        the tokens there are and the tokens needed.
    """
    stream = encode_documents(documents, tokenizer, separator, bos)
    there, wanted = stream.size // window, 1 if count is None else count
    if there < max(wanted, 1):
        needed = max(wanted, 1) * window
        raise TextError(
            f"the text has {stream.size} tokens, {there} windows of {window}, but {needed} tokens "
            f"({wanted} windows) are needed; give more text, or ask for shorter or fewer windows",
            tokens=int(stream.size),
            needed=needed,
            window=window,
        )
    windows = stream[: there * window].reshape(there, window)
    if seed is not None:
        windows = windows[np.random.default_rng(seed).permutation(there)]
    return np.ascontiguousarray(windows[:count])


def check_token_ids(windows: NDArray[np.int64], vocab_size: int, model: Path, file: Path) -> None:
    """Check that the model has an embedding for every token that its tokenizer gave for `file`.

    Raises: CheckpointError naming the largest token if not.
    """
    largest = int(windows.max())
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer of '{model}' gives the token {largest} for '{file}', but the model has only "
            f"{vocab_size} embeddings; use the tokenizer that belongs to the model",
            token=largest,
        )
