"""How records become chats, and chats text: messages under many names, tools, calls, thinking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamprune.calibration.chat import Chat
from streamprune.calibration.recipe import Source
from streamprune.calibration.records import content_of
from streamprune.calibration.rows import Row
from streamprune.errors import CalibrationError
from tests.recipes import made_of, tool_model, write_lines, write_table


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tool_model(tmp_path / "model")


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("record", "form", "text"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, {}, "<user>hi"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, {},
         "<user>hi<assistant>yo"),
        ({"conversations": [{"from": "system", "value": "s"}]}, {"messages": "conversations"}, "<system>s"),
        ({"chat": '[{"role": "user", "content": "hi"}]'}, {"messages": "chat"}, "<user>hi"),
        ({"a": {"b": [{"role": "user", "content": "hi"}]}}, {"messages": "a.b"}, "<user>hi"),
        (
            {"turns": [{"who": "Q", "what": "hi"}, {"who": "A", "what": None}]},
            {"messages": "turns", "columns": {"role": "who", "content": "what"}, "roles": {"Q": "user", "A": "bot"}},
            "<user>hi<bot>",
        ),
        ({"q": "hi", "a": "yo"},
         {"messages": [{"role": "user", "content": "{{ q }}!"}, {"role": "bot", "content": "{{ a }}"}]},
         "<user>hi!<bot>yo"),
        ({"q": "hi", "c": '[{"name": "f", "arguments": "{\\"x\\": 1}"}]'},
         {"messages": [{"role": "user", "content": "{{ q }}"}, {"role": "bot", "tool_calls": "c"}]},
         '<user>hi<bot>[f {"x": 1}]'),
        # Arguments as an object, though the model wrote them as text; what is no JSON stays as it was written.
        ({"messages": [{"role": "bot", "content": None, "name": None, "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"type": "function", "function": {"name": "g", "arguments": "{oops"}}]}]},
         {"messages": "messages"}, '<bot>[f {"x": 1}][g "{oops"]'),
        # Parquet gives each object the keys of all.
        ({"messages": [{"role": "bot", "content": "", "tool_calls": [
            CALL, {"type": "function", "function": {"name": "g", "arguments": {"y": 2}}}]}]},
         {"messages": "messages"}, '<bot>[f {"x": 1}][g {"y": 2}]'),
        ({"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "f"}]}, {},
         '[[{"type": "function", "function": {"name": "f"}}]]<user>hi'),
        ({"m": [{"role": "user", "content": "hi"}], "t": '[{"type": "function", "function": {"name": "f"}}]'},
         {"messages": "m", "tools": "t"}, '[[{"type": "function", "function": {"name": "f"}}]]<user>hi'),
        ({"m": [{"role": "user", "content": "hi"}], "t": None}, {"messages": "m", "tools": "t"}, "<user>hi"),
        ({"m": [{"role": "user", "content": "hi"}]}, {"messages": "m", "thinking": True}, "[think]<user>hi"),
        ({"m": [{"role": "user", "content": "hi"}]}, {"messages": "m", "thinking": False}, "<user>hi"),
        ({"m": [{"role": "user", "content": "hi"}]}, {"messages": "m", "template_options": {"effort": "low"}},
         "<user>hilow"),
    ],
)  # fmt: skip
def test_chats(record: dict[str, Any], form: dict[str, Any], text: str, model: Path) -> None:
    write_lines(model.parent / "a.jsonl", record)
    assert made_of(model, {"path": "a.jsonl"} | form) == [text]
    write_table(model.parent / "a.parquet", [record])
    assert made_of(model, {"path": "a.parquet"} | form) == [text]


@pytest.mark.parametrize(
    ("record", "form", "words"),
    [
        ({"m": "hello"}, {}, "'m' that is not valid JSON"),
        ({"m": "5"}, {}, "has 5 for 'm', which is not a list of messages"),
        ({"n": []}, {}, "has no 'm'"),
        ({"m": ["hi"]}, {}, "has 'hi' among its messages, where an object with 'role' is needed"),
        ({"m": [], "t": "{}"}, {"tools": "t"}, "has {} for 't', which is not a list of tools"),
        ({"m": [], "t": 7}, {"tools": "t"}, "has 7 for 't', which is not a list of tools"),
        ({"m": "[" * 5000}, {}, "a.jsonl line 1"),
        (
            {"c": "{}"},
            {"messages": [{"role": "bot", "tool_calls": "c"}]},
            "has {} for 'c', which is not a list of calls",
        ),
    ],
)
def test_chats_that_are_none(record: dict[str, Any], form: dict[str, Any], words: str, model: Path) -> None:
    write_lines(model.parent / "a.jsonl", record)
    with pytest.raises(CalibrationError) as caught:
        made_of(model, {"path": "a.jsonl", "messages": "m"} | form)
    assert words in str(caught.value)
    assert "a.jsonl line 1" in str(caught.value)


def test_thinking_by_the_names_that_templates_have_for_it() -> None:
    source = Source(path="a", messages="m", thinking=False, template_options={"effort": "low"})
    assert source.chat_variables == {"enable_thinking": False, "thinking": False, "effort": "low"}
    assert content_of(Row("here", {"m": []}, 1), source) == Chat("here", [], None, source.chat_variables)
