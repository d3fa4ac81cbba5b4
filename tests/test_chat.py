from __future__ import annotations

import json
from pathlib import Path

import pytest

from losa_export.chat import ChatTemplate, load_chat_template
from losa_export.errors import CheckpointError, InputError

HELLO = [{"role": "user", "content": 'hello <you> & "me"'}]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source, tokens, Path("somewhere/chat_template.jinja"))


def test_a_chatml_conversation_ends_where_the_assistant_speaks() -> None:
    assert template(CHATML).render(HELLO) == ('<|im_start|>user\nhello <you> & "me"<|im_end|>\n<|im_start|>assistant\n')
    assert template(CHATML).render(HELLO, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_blocks_leave_no_blank_lines_and_loops_may_break() -> None:
    source = (
        "{% for m in messages %}\n    {% if loop.index > 1 %}\n{% break %}\n    {% endif %}\n"
        "{{ m.content }}\n{% endfor %}"
    )
    assert template(source).render([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]) == "a\n"


def test_special_tokens_json_time_and_generation_marks_are_offered() -> None:
    source = "{{ bos_token }}{{ messages | tojson }}{% generation %}!{% endgeneration %}{{ strftime_now('%%') }}"
    assert template(source, bos_token="<s>").render([{"role": "user", "content": "<é>"}]) == (
        '<s>[{"role": "user", "content": "<é>"}]!%'
    )


def test_a_template_that_raises_is_an_input_error_with_its_words() -> None:
    with pytest.raises(InputError, match=r"chat_template.jinja' refused these messages: roles must alternate; change"):
        template("{{ raise_exception('roles must alternate') }}").render(HELLO)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}x{% endfor %}",
    ],
)
def test_a_hostile_template_stays_in_the_sandbox(attack: str) -> None:
    with pytest.raises(InputError, match="refused these messages"):
        template(attack).render(HELLO)


def test_a_template_that_cannot_be_parsed_names_its_file_and_line() -> None:
    with pytest.raises(CheckpointError, match=r"chat_template.jinja' is not valid Jinja \(line 2: .*mend it"):
        template("ok\n{% if %}").render(HELLO)


def test_rendering_leaves_the_messages_alone() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(InputError, match="refused"):
        template("{{ messages[0].update(role='system') }}").render(messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_a_folder_without_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert load_chat_template(tmp_path) is None


def test_the_template_is_found_in_its_own_file_first(tmp_path: Path) -> None:
    settings = {"chat_template": "from config", "bos_token": {"content": "<b>"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<p>"}))
    found = load_chat_template(tmp_path)
    assert found is not None
    assert (found.source, found.tokens) == ("from config", {"bos_token": "<b>", "pad_token": "<p>"})
    (tmp_path / "chat_template.jinja").write_text("from file é", encoding="utf-8")
    found = load_chat_template(tmp_path)
    assert found is not None
    assert (found.source, found.origin.name) == ("from file é", "chat_template.jinja")


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.source == "D"


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja' cannot be read as UTF-8 text"):
        load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json' cannot be read as JSON.*copy it again"):
        load_chat_template(tmp_path)
