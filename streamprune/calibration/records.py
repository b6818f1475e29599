"""From a source's rows to documents: the text, the chat or the token ids in a row."""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from typing import Any

from streamprune.calibration.chat import Chat
from streamprune.calibration.messages import (
    call_of,
    is_json_text,
    message_of,
    parsed,
    parsed_list,
    without_nulls,
    wrapped,
)
from streamprune.calibration.recipe import RESERVED, USUAL_FIELDS, Range, Source, Turn
from streamprune.calibration.rows import BYTE_ORDER_MARK, Row
from streamprune.calibration.templates import MissingFieldError, filled, text_of, value_at
from streamprune.errors import BadRecordError
from streamprune.files.json_text import show

#: Fields of a record with what is not text: it is left out, with a note.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
#: A field with the template's variables, by the name that TRL has for it too.
_VARIABLES = "chat_template_kwargs"
#: Fields that are no variables of the template themselves; the last line has names that templates give to parts of a
#: chat, some of them only for messages that have such a part.
_NO_VARIABLES = {
    *RESERVED, *USUAL_FIELDS, *_MEDIA, _VARIABLES,
    "message", "role", "content", "reasoning_content", "tool", "tool_call", "tool_calls",
}  # fmt: skip
#: A document before tokenization: text, a chat, or token ids.
Content = str | Chat | list[Any]


def content_of(row: Row, source: Source) -> Content | None:
    """The document in a row of a source; None for rows that are filtered out. It may be empty: white space, or a chat
    that `is_empty`.

    Raises BadRecordError, naming the record and the field, if it lacks a field that the source needs.
    """
    if row.error is not None:
        raise row.error
    try:
        if not all(_meets(value_at(row.values, path), wanted) for path, wanted in source.filter.items()):
            return None
        content = _content(row, source)
    except MissingFieldError as error:
        raise BadRecordError(
            f"{row.place} has no {error.args[0]!r}, which source {source.name!r} needs; it has {_keys(row.values)}."
        ) from None
    except RecursionError:
        raise BadRecordError(f"{row.place} is nested too deeply.") from None
    return content.lstrip(BYTE_ORDER_MARK) if isinstance(content, str) else content


def _content(row: Row, source: Source) -> Content:
    values = _labelled(row, source.labels)
    if source.text is not None:
        return filled(source.text, values)
    if source.field is not None:
        return text_of(value_at(values, source.field))
    if source.messages is not None:
        return _chat(row.place, values, source.messages, source)
    ids = values.get("input_ids")
    if isinstance(ids, list):
        return ids
    for key in ("messages", "conversations"):
        if isinstance(values.get(key), list) or is_json_text(values.get(key), "["):
            return _chat(row.place, values, key, source)
    text = values.get("text")
    if isinstance(text, str):
        return text
    if any(key in values and values[key] is None for key in USUAL_FIELDS):
        return ""
    if (stated := next((key for key in USUAL_FIELDS if key in values), None)) is not None:
        raise BadRecordError(
            f"{row.place} has {show(values[stated])} for {stated!r}. 'text' is a string, 'messages' a list of objects, "
            "'input_ids' a list of token numbers. A recipe can state which other fields to use."
        )
    raise BadRecordError(
        f"{row.place} has no 'text' (a string), 'messages' (a chat) or 'input_ids' (token numbers); it has "
        f"{_keys(values)}. A recipe can state which other fields to use."
    )


def _keys(values: Mapping[str, Any]) -> str:
    return ", ".join(show(key) for key in list(values)[:10]) or "nothing"


def _meets(value: Any, wanted: Any) -> bool:
    """Whether a field's value equals `wanted`, is in that list, or is a number within that range."""
    if isinstance(wanted, Range):
        within = _is_number(value) and (wanted.min is None or value >= wanted.min)
        return within and (wanted.max is None or value <= wanted.max)
    # In Python True == 1; here they differ.
    return any(
        value == each and (type(value) is type(each) or (_is_number(value) and _is_number(each)))
        for each in (wanted if isinstance(wanted, list) else [wanted])
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _labelled(row: Row, labels: Mapping[str, list[str]]) -> dict[str, Any]:
    """The row's fields, with label numbers replaced by their names."""
    values = dict(row.values)
    for name, names in labels.items():
        if name not in values:
            raise MissingFieldError(name)
        number = values[name]
        if type(number) is not int or not 0 <= number < len(names):
            raise BadRecordError(
                f"{row.place} has {show(number)} for {name!r}, where 'labels' names the numbers 0 to {len(names) - 1}."
            )
        values[name] = names[number]
    return values


def _chat(place: str, values: Mapping[str, Any], messages: str | list[Turn], source: Source) -> Chat:
    """The chat in the field `messages`, or built of several fields, with the other fields that templates use."""
    if isinstance(messages, str):
        turns, left_out = _messages(place, values, messages, source)
    else:
        turns, left_out = [_turn(place, values, turn) for turn in messages], []
    # (A chat that is built of fields takes only the fields that the recipe names.)
    usual = values if isinstance(messages, str) else {}
    listed = {
        what: parsed_list(place, value_at(values, path), path, what) if path is not None else _usual(place, usual, what)
        for what, path in (("tools", source.tools), ("documents", source.documents))
    }
    tools = [wrapped(tool) for tool in listed["tools"]] or None
    variables = _variables(place, usual) | source.chat_variables
    columns = {name: _column(value) for name, value in usual.items() if name not in {*_NO_VARIABLES, messages}}
    columns = {name: value for name, value in columns.items() if value is not None}
    return Chat(place, turns, tools, variables, listed["documents"] or None, tuple(left_out), columns)


def _column(value: Any) -> Any:
    """A field as a template's variable: also of true and false as JSON text, which would both count as true."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _usual(place: str, values: Mapping[str, Any], name: str) -> list[Any]:
    """The list in the field `name`, if there is one, which may be JSON text; of a single object a list with it."""
    value = values.get(name)
    value = parsed(place, value, name) if is_json_text(value, "[{") else value
    value = [value] if isinstance(value, dict) else value
    return parsed_list(place, value, name, name) if isinstance(value, list) else []


def _variables(place: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The template's variables in a record's field for them."""
    name = _VARIABLES
    found = values.get(name)
    found = parsed(place, found, name) if is_json_text(found, "{") else found
    found = without_nulls(found) if isinstance(found, dict) else {}
    return {key: value for key, value in found.items() if key.isidentifier() and key not in RESERVED}


def _messages(
    place: str, values: Mapping[str, Any], path: str, source: Source
) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages in a field, and what is left out of the record: the types of parts and fields that are not text."""
    turns, left_out = [], [key for key in _MEDIA if _is_media(values.get(key))]
    for message in parsed_list(place, value_at(values, path), path, "messages"):
        turn, others = message_of(place, message, source)
        turns.append(turn)
        left_out += others
    return turns, left_out


def _is_media(value: Any) -> bool:
    """Whether a field has an image or the like: its bytes, a list of some, or the name of its file.

    (Records of software agents have the name of a container's image.)
    """
    if isinstance(value, str):
        return (mimetypes.guess_type(value)[0] or "").partition("/")[0] in ("image", "video", "audio")
    return bool(value) and isinstance(value, (list, dict))


def _turn(place: str, values: Mapping[str, Any], turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": filled(turn.content or "", values)}
    if turn.tool_calls is not None:
        message["tool_calls"] = [
            call_of(call) for call in parsed_list(place, value_at(values, turn.tool_calls), turn.tool_calls, "calls")
        ]
    return message
