"""What chats have beside plain messages: contents in parts, columns as JSON text, the date; and templates for them."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from streamprune.calibration.chat import Chat, ChatRenderer
from streamprune.calibration.sequences import Calibration
from streamprune.calibration.tokens import load_tokenizer
from streamprune.errors import CalibrationError
from tests.recipes import load, made_of, texts_of, tool_model, write_lines, write_table
from tests.tokenizer import save_tokenizer

#: Templates that read contents as text, as text or parts, and as parts. The last two write a mark for each image.
LOOP = (
    "{% for p in m.content %}{% if 'image' in p %}[IMG]{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
)
TEXT = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
STRICT = "{% for m in messages %}<{{ m.role }}>{{ m.content.strip() }}{% endfor %}"
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}"
    "{% endfor %}"
)
PARTS = "{% for m in messages %}<{{ m.role }}>" + LOOP + "{% endfor %}"
#: As Llama's: text in the system's message, either in the others.
MIXED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string or m.role == 'system' %}{{ m.content | trim }}"
    "{% else %}" + LOOP + "{% endif %}{% endfor %}"
)


def model_of(folder: Path, template: str) -> Path:
    tokenizer = save_tokenizer(folder, chat=False)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def part(text: str, **keys: Any) -> dict[str, Any]:
    return {"type": "text", "text": text} | keys


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("template", "several"),
    [(TEXT, "a\nb"), (STRICT, "a\nb"), (BOTH, "ab"), (PARTS, "ab"), (MIXED, "ab")],
    ids=["text", "strict", "both", "parts", "mixed"],
)
def test_contents_reach_every_template_in_its_form(template: str, several: str, tmp_path: Path) -> None:
    """Also of parquet, whose parts have the keys of all parts: an empty `image` is none."""
    model = model_of(tmp_path / "model", template)
    for record, text in (
        (user("hi"), "<user>hi"),
        (user([part("hi", image=None)]), "<user>hi"),
        (user([part("a", image=None), part("b", image=None)]), f"<user>{several}"),
        (user([{"text": "hi"}]), "<user>hi"),
        (user(["hi"]), "<user>hi"),
        (user({"type": "input_text", "text": "hi"}), "<user>hi"),
    ):
        write_lines(tmp_path / "a.jsonl", record)
        write_table(tmp_path / "a.parquet", [record])
        for name in ("a.jsonl", "a.parquet"):
            assert made_of(model, {"path": name}) == [text], record


def test_parts_stay_text_where_a_template_reads_some_roles_as_text(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", MIXED)
    chat = {
        "messages": [{"role": "system", "content": [part("a"), part("b")]}, *user([part("c"), part("d")])["messages"]]
    }
    write_lines(tmp_path / "a.jsonl", chat)
    assert made_of(model, {"path": "a.jsonl"}) == ["<system>a\nb<user>c\nd"]


def test_what_is_no_text_is_left_out_and_counted(tmp_path: Path) -> None:
    """Never a mark of an image without the image, and no chat of nothing but marks."""
    model = model_of(tmp_path / "model", BOTH)
    image = {"type": "image_url", "image_url": {"url": "data:…"}}
    write_lines(
        tmp_path / "a.jsonl", user([{"type": "image"}, part("what is it?")]), user([image, image]),
        {**user("one"), "image": "org/img:1"},
        {**user("two"), "images": ["a.png"]}, user(""), {"messages": []}, {"messages": None}, {"text": None},
        {"text": ""},
    )  # fmt: skip
    made = load([tmp_path / "a.jsonl"], model, samples=2, seq_len=35)
    (text,) = texts_of(model, made)
    assert sorted(text.split("<user>")) == ["", "one", "two", "what is it?"]
    (parts, empty) = (note for note in made.notes if note.startswith("a.jsonl: ") and "gave" not in note)
    assert "4 parts that are not text (2 image_url, 1 image" in parts
    assert " in 3 chats are left out" in parts
    assert "6 of 9 records have no text" in empty


def test_tokens_that_stand_for_an_image_are_left_out(tmp_path: Path) -> None:
    """A data set's text may have the name of the token, where its image was."""
    model = model_of(tmp_path / "model", TEXT)
    (model / "config.json").write_text(json.dumps({"part": {"image_token_id": 3 + ord("$") - 33}, "eos_token_id": 5}))
    write_lines(tmp_path / "a.jsonl", user("$$what is it?"))
    made = load([tmp_path / "a.jsonl"], model, samples=1, seq_len=10)
    assert texts_of(model, made) == ["<user>what"]
    assert any("2 tokens that stand for images or the like are left out" in note for note in made.notes)
    write_lines(tmp_path / "ids.jsonl", {"input_ids": [7, 6]})
    with pytest.raises(CalibrationError, match=r"line 1 has the token that config\.json names as 'image_token_id'"):
        load([tmp_path / "ids.jsonl"], model)


COLUMNS = (
    "{{ tools | map(attribute='function') | map(attribute='name') | join(' ') if tools }}|"
    "{{ documents | map(attribute='title') | join(' ') if documents }}|{{ effort }}|"
    "{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("as_text", [False, True], ids=["as they are", "as JSON text"])
def test_every_column_that_a_template_uses_reaches_it(as_text: bool, tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", COLUMNS)
    columns: dict[str, Any] = {
        "messages": [{"role": "assistant", "content": "hi", "tool_calls": [{"name": "h", "arguments": {}}]}],
        "tools": [{"name": "f"}, {"type": "function", "function": {"name": "g"}}],
        "documents": [{"title": "d", "text": "t"}],
        "chat_template_kwargs": {"effort": "low", "tokenize": True, "none": None},
    }
    if as_text:
        columns["messages"][0]["tool_calls"] = json.dumps(columns["messages"][0]["tool_calls"])
        columns = {name: json.dumps(value) for name, value in columns.items()}
        columns["tools"] = [json.dumps({"name": "f"}), json.dumps({"name": "g"})]
    write_lines(tmp_path / "a.jsonl", columns)
    assert made_of(model, {"path": "a.jsonl"}) == ["f g|d|low|hih"]
    assert made_of(model, {"path": "a.jsonl", "messages": "messages", "documents": "documents"}) == ["f g|d|low|hih"]
    write_lines(tmp_path / "a.jsonl", columns | {"tools": "none", "documents": None, "chat_template_kwargs": ""})
    assert made_of(model, {"path": "a.jsonl"}) == ["|||hih"]


def test_columns_with_the_names_of_variables_reach_the_template(tmp_path: Path) -> None:
    """And no others: `content` is what this template calls a message's, `range` and the end token are transformers'."""
    template = (
        "{% if enable_thinking is defined and enable_thinking is false %}[off]{% endif %}{{ effort }}{{ eos_token }}"
        "{% for m in messages %}{% generation %}{% if m.role == 'user' %}{% set content = m.content %}{% endif %}"
        "{{ content }}{% endgeneration %}{% if range(2)[1] %}.{% endif %}{% endfor %}"
    )
    model = model_of(tmp_path / "model", template)
    end = load_tokenizer(model, False).eos_token or ""
    columns = {"content": "wrong", "range": 3, "eos_token": "wrong", "unread": "x", "effort": None}
    for given, text in (
        ({"enable_thinking": False}, "[off]"),
        ({"enable_thinking": "false"}, "[off]"),
        ({"enable_thinking": True}, ""),
        ({"effort": "low"}, "low"),
        # What is stated for the template comes first, then the recipe.
        ({"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}}, ""),
    ):
        messages = [*user("hi")["messages"], {"role": "none", "content": "left out by the template"}]
        write_lines(tmp_path / "a.jsonl", {"messages": messages} | columns | given)
        assert made_of(model, {"path": "a.jsonl"}) == [f"{text}{end}hi.."], given
    write_lines(tmp_path / "a.jsonl", user("hi") | {"enable_thinking": False})
    assert made_of(model, {"path": "a.jsonl", "messages": "messages", "thinking": True}) == [f"{end}hi."]


def test_a_messages_column_that_is_no_chat_is_no_reason_to_refuse_the_text(tmp_path: Path) -> None:
    model = tool_model(tmp_path / "model")
    write_lines(tmp_path / "a.jsonl", {"messages": "see below", "text": "hi"})
    assert made_of(model, {"path": "a.jsonl"}) == ["hi</s>"]
    write_lines(tmp_path / "a.jsonl", {"messages": "[oops", "text": "hi"})
    with pytest.raises(CalibrationError, match="has text for 'messages' that is not valid JSON"):
        made_of(model, {"path": "a.jsonl"})


def test_a_template_that_only_the_processor_has(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tokenizer(model, chat=False)
    (model / "chat_template.json").write_text(json.dumps({"chat_template": TEXT}))
    write_lines(tmp_path / "a.jsonl", user("hi"))
    assert made_of(model, {"path": "a.jsonl"}) == ["<user>hi"]
    (model / "chat_template.json").write_text("{oops")
    with pytest.raises(CalibrationError, match=r"chat_template\.json cannot be read"):
        made_of(model, {"path": "a.jsonl"})


DATED = "{% if messages|length > 0 %}{{ strftime_now('%Y-%m-%d %H:%M') }}{% endif %}" + TEXT


def dated(tmp_path: Path, template: str = DATED, **options: Any) -> Calibration:
    model = model_of(tmp_path / "model", template)
    write_lines(tmp_path / "a.jsonl", *[user("hello there")] * 9)
    return load([tmp_path / "a.jsonl"], model, samples=2, seq_len=20, **options)


def test_a_date_gives_the_same_tokens_on_every_day(tmp_path: Path) -> None:
    then, today = dated(tmp_path, date="2024-02-29"), dated(tmp_path)
    assert texts_of(tmp_path / "model", then)[0] == "2024-02-29 00:00<use"
    assert then.recipe["given"]["date"] == "2024-02-29"
    assert not any("date" in note for note in then.notes)
    # (Midnight may pass within the test.)
    day = today.recipe["given"]["date"]
    assert day in {str(date.today()), str(date.today() - timedelta(1))}
    assert texts_of(tmp_path / "model", today)[0].startswith(f"{day} 00:00")
    assert any(f"--date {day} gives the same tokens later" in note for note in today.notes)
    assert dated(tmp_path, date=day).fingerprint == today.fingerprint != then.fingerprint
    plain = dated(tmp_path, TEXT, date="2024-02-29")
    assert "date" not in plain.recipe["given"]


def test_a_renderer_says_whether_the_date_was_written(tmp_path: Path) -> None:
    model_of(tmp_path, "{% if messages[0].role == 'x' %}{{ strftime_now('%d %b %Y') }}{% endif %}" + TEXT)
    from transformers import AutoTokenizer

    with ChatRenderer(AutoTokenizer.from_pretrained(tmp_path), date(2024, 7, 26)) as renderer:
        assert renderer.render(Chat("here", [{"role": "y", "content": "hi"}])) == "<y>hi"
        assert not renderer.wrote_date
        assert renderer.render(Chat("here", [{"role": "x", "content": "hi"}])) == "26 Jul 2024<x>hi"
        assert renderer.wrote_date
