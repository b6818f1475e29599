"""Messages, tools and tool calls as chat templates expect them, from the forms in which data sets have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import to_builtins

from streamprune.calibration.recipe import Source
from streamprune.errors import BadRecordError
from streamprune.files.json_text import json_fault, parse_json, show
from streamprune.tables import plain

#: The keys and roles of a conversation in ShareGPT's format.
SHAREGPT_COLUMNS = {"role": "from", "content": "value"}
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
#: The types of parts that are text: of Chat Completions, and of OpenAI's Responses.
_TEXT_TYPES = ("text", "input_text", "output_text")


def text_part(text: str) -> dict[str, str]:
    """A part of a message's content, as templates for parts expect it: without keys of other types, even empty ones.

    (Some templates write an image's placeholder for every part with a key `image`.)
    """
    return {"type": "text", "text": text}


def texts_of(content: list[Any]) -> tuple[list[str], list[str]]:
    """The texts among the parts of a message's content, and the types of all other parts."""
    texts, others = [], []
    for part in content:
        kind = "text"
        if isinstance(part, dict):
            named = next((key for key, value in part.items() if value is not None), "nothing")
            kind = part["type"] if isinstance(part.get("type"), str) else "text" if "text" in part else named
            part = part.get("text") if kind in _TEXT_TYPES else None
        if isinstance(part, str):
            texts.append(part)
        else:
            others.append(plain(kind, 40))
    return [text for text in texts if text], others


def content_of_parts(content: list[Any]) -> tuple[str | list[dict[str, str]], list[str]]:
    """A list of parts as a message's content: text, or the parts if several are text; and the types of the others."""
    texts, others = texts_of(content)
    return (list(map(text_part, texts)) if len(texts) > 1 else "".join(texts)), others


def message_of(place: str, message: Any, source: Source) -> tuple[dict[str, Any], list[str]]:
    """A message with the keys that chat templates use, and the types of its parts that are not text.

    The template checks the values. Raises BadRecordError, naming the record, if it is not an object.
    """
    if not isinstance(message, dict):
        # Some versions of transformers would accept it, as a message without role and content.
        raise BadRecordError(f"{place} has {show(message)} among its messages, where an object with 'role' is needed.")
    columns: dict[str, str] = to_builtins(source.columns)
    roles: dict[str, str] = source.roles
    if not columns and "role" not in message and "from" in message:
        columns, roles = SHAREGPT_COLUMNS, SHAREGPT_ROLES | roles
    # In parquet every message has the keys of all messages, with null for those that it lacks.
    others = {key: value for key, value in message.items() if key not in columns.values() and value is not None}
    result = others | {key: message[column] for key, column in columns.items() if column in message}
    if isinstance(result.get("role"), str):
        result["role"] = roles.get(result["role"], result["role"])
    left_out: list[str] = []
    content = result.get("content")
    if content is None:
        result["content"] = ""
    elif isinstance(content, (list, dict)):
        result["content"], left_out = content_of_parts(content if isinstance(content, list) else [content])
    if isinstance(result.get("tool_calls"), str):
        result["tool_calls"] = parsed_list(place, result["tool_calls"], "tool_calls", "calls")
    if isinstance(result.get("tool_calls"), list):
        result["tool_calls"] = [call_of(call) for call in result["tool_calls"]]
    return result, left_out


def parsed_list(place: str, value: Any, path: str, what: str) -> list[Any]:
    """The list in a field, of which all or each item may be JSON text, as in many parquet files; [] for null.

    Raises BadRecordError, naming the record, if it is not a list of `what`.
    """
    value = parsed(place, value, path)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRecordError(f"{place} has {show(value)} for {path!r}, which is not a list of {what}.")
    return [parsed(place, item, path) if is_json_text(item, "{") else item for item in value]


def parsed(place: str, value: Any, path: str) -> Any:
    """The value of a field, which may be JSON text. Raises BadRecordError, naming the record, for other text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value.encode()) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"{place} has text for {path!r} that is not valid JSON: {json_fault(error)}.") from None


def is_json_text(value: Any, begins: str) -> bool:
    """Whether a value is text that begins as JSON does: with one of the characters `begins`."""
    return isinstance(value, str) and value.lstrip()[:1] in tuple(begins)


def call_of(call: Any) -> Any:
    """A tool call as chat templates expect it, with its arguments as an object instead of a JSON string."""
    call = wrapped(call)
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    function = {key: value for key, value in call["function"].items() if value is not None}
    if isinstance(function.get("arguments"), dict):
        function["arguments"] = {key: value for key, value in function["arguments"].items() if value is not None}
    elif isinstance(function.get("arguments"), str):
        try:
            arguments = parse_json(function["arguments"].encode())
        except (ValueError, RecursionError):
            arguments = None
        # A model may have written invalid JSON: the template gets it unchanged.
        function["arguments"] = arguments if isinstance(arguments, dict) else function["arguments"]
    return call | {"function": function}


def wrapped(item: Any) -> Any:
    """A tool or a call in OpenAI's format; some data sets omit the outer object."""
    if isinstance(item, dict):
        item = {key: value for key, value in item.items() if value is not None}
        if "function" not in item and "name" in item:
            return {"type": "function", "function": item}
    return item


def is_empty(messages: list[Any]) -> bool:
    """Whether messages have nothing but their roles, so that a template could only write its own marks."""
    return not any(value for message in messages for key, value in message.items() if key != "role")


def without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """The items of an object whose values are not null, which parquet adds."""
    return {key: value for key, value in values.items() if value is not None}
