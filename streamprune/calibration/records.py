"""From a source's rows to token ids: the text or chat in a row, and the model's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from streamprune.calibration.chat import Chat, ChatRenderer
from streamprune.calibration.recipe import Range, Source, Turn
from streamprune.calibration.sources import Row
from streamprune.calibration.templates import MissingFieldError, filled, text_of, value_at
from streamprune.errors import CalibrationError
from streamprune.files.json_text import parse_json, show

#: The keys and roles of a conversation in ShareGPT's format.
SHAREGPT_COLUMNS = {"role": "from", "content": "value"}
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip


#: A document before tokenization: text, a chat, or token ids.
Content = str | Chat | list[Any]


def content_of(row: Row, source: Source) -> Content | None:
    """The document in a row of a source; None for rows that are filtered out or have only white space.

    Raises CalibrationError, naming the record and the field, if it lacks a field that the source needs.
    """
    try:
        if not all(_meets(value_at(row.values, path), wanted) for path, wanted in source.filter.items()):
            return None
        content = _content(row, source)
    except MissingFieldError as error:
        raise CalibrationError(
            f"{row.place} has no {error.args[0]!r}, which source {source.name!r} needs; it has {_keys(row.values)}."
        ) from None
    except RecursionError:
        raise CalibrationError(f"{row.place} is nested too deeply.") from None
    return None if isinstance(content, str) and not content.strip() else content


def _content(row: Row, source: Source) -> Content:
    values, messages, tools = _labelled(row, source.labels), source.messages, source.tools
    if source.text is not None:
        return filled(source.text, values)
    if source.field is not None:
        return text_of(value_at(values, source.field))
    if messages is None:
        # Look for the usual field names.
        ids = values.get("input_ids")
        if isinstance(ids, list):
            return ids
        messages = next((key for key in ("messages", "conversations") if isinstance(values.get(key), list)), None)
        tools = "tools" if isinstance(values.get("tools"), list) else None
    if messages is not None:
        return _chat_of(row.place, values, messages, tools, source)
    text = values.get("text")
    if isinstance(text, str):
        return text
    raise CalibrationError(
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
            raise CalibrationError(
                f"{row.place} has {show(number)} for {name!r}, where 'labels' names the numbers 0 to {len(names) - 1}."
            )
        values[name] = names[number]
    return values


def _chat_of(
    place: str, values: Mapping[str, Any], messages: str | list[Turn], tools: str | None, source: Source
) -> Chat:
    listed = [] if tools is None else _parsed(place, values, tools, "tools")
    if isinstance(messages, str):
        turns = [_message(place, message, source) for message in _parsed(place, values, messages, "messages")]
    else:
        turns = [_turn(place, values, turn) for turn in messages]
    return Chat(place, turns, [_wrapped(tool) for tool in listed] or None, source.chat_variables)


def _turn(place: str, values: Mapping[str, Any], turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": filled(turn.content or "", values)}
    if turn.tool_calls is not None:
        message["tool_calls"] = [_call(call) for call in _parsed(place, values, turn.tool_calls, "calls")]
    return message


def _parsed(place: str, values: Mapping[str, Any], path: str, what: str) -> list[Any]:
    """The list in a field, which may be JSON text, as in many parquet files; an empty list if tools are null.

    Raises CalibrationError, naming the record, if it is not a list of `what`.
    """
    value = value_at(values, path)
    if isinstance(value, str):
        try:
            value = parse_json(value.encode())
        except ValueError as error:
            raise CalibrationError(
                f"{place} has text for {path!r} that is not valid JSON: {str(error)[:300]}."
            ) from None
    if value is None and what == "tools":
        return []
    if not isinstance(value, list):
        raise CalibrationError(f"{place} has {show(value)} for {path!r}, which is not a list of {what}.")
    return value


def _message(place: str, message: Any, source: Source) -> dict[str, Any]:
    """A message with the keys that chat templates use. The template checks the values."""
    if not isinstance(message, dict):
        # Some versions of transformers would accept it, as a message without role and content.
        raise CalibrationError(
            f"{place} has {show(message)} among its messages, where an object with 'role' is needed."
        )
    columns: dict[str, str] = to_builtins(source.columns)
    roles: dict[str, str] = source.roles
    if not columns and "role" not in message and "from" in message:
        columns, roles = SHAREGPT_COLUMNS, SHAREGPT_ROLES | roles
    # In parquet every message has the keys of all messages, with null for those that it lacks.
    others = {key: value for key, value in message.items() if key not in columns.values() and value is not None}
    result = others | {key: message[column] for key, column in columns.items() if column in message}
    if isinstance(result.get("role"), str):
        result["role"] = roles.get(result["role"], result["role"])
    if result.get("content") is None:
        result["content"] = ""
    if isinstance(result.get("tool_calls"), list):
        result["tool_calls"] = [_call(call) for call in result["tool_calls"]]
    return result


def _call(call: Any) -> Any:
    """A tool call as chat templates expect it, with its arguments as an object instead of a JSON string."""
    call = _wrapped(call)
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


def _wrapped(item: Any) -> Any:
    """A tool or a call in OpenAI's format; some data sets omit the outer object."""
    if isinstance(item, dict):
        item = {key: value for key, value in item.items() if value is not None}
        if "function" not in item and "name" in item:
            return {"type": "function", "function": item}
    return item


class TokenMaker:
    """The model's tokenizer, loaded when the first record needs it. Use as a context manager.

    `vocab_size` is the model's number of tokens, and `max_positions` its longest sequence, if it has a limit.
    """

    def __init__(self, folder: Path, trust_remote_code: bool, vocab_size: int, max_positions: int | None) -> None:
        self._folder, self._trust_remote_code = folder, trust_remote_code
        self._vocab_size, self._max_positions = vocab_size, max_positions
        self._renderer: ChatRenderer | None = None

    def __enter__(self) -> TokenMaker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._renderer is not None:
            self._renderer.__exit__()

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises CalibrationError if there is none that works."""
        return load_tokenizer(self._folder, self._trust_remote_code)

    @property
    def prefix(self) -> list[int]:
        """The token that the model expects before every text, if its tokenizer adds one."""
        ids = self.tokenizer("a").input_ids
        return [self.tokenizer.bos_token_id] if ids and ids[0] == self.tokenizer.bos_token_id is not None else []

    def document(self, place: str, content: str | Chat) -> list[int]:
        """The tokens of a text or chat, with the end-of-text token after text (a chat template writes its own).

        Raises CalibrationError, naming the record, if the template or the tokenizer fails on it.
        """
        text = self._rendered(content) if isinstance(content, Chat) else content
        try:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        except Exception as error:
            # The tokenizer may be code from the model's folder, and raise anything.
            raise CalibrationError(f"{place}: the model's tokenizer fails on this text: {error}") from None
        if isinstance(content, str) and self.tokenizer.eos_token_id is not None:
            ids = [*ids, self.tokenizer.eos_token_id]
        if (largest := max(ids, default=0)) >= self._vocab_size:
            raise CalibrationError(
                f"{place}: the tokenizer produced token {largest}, but the model has only {self._vocab_size} tokens. "
                "The tokenizer does not belong to this model."
            )
        return ids

    def _rendered(self, chat: Chat) -> str:
        if not self.tokenizer.chat_template:
            raise CalibrationError(
                f"{chat.place} is a chat, but this model's tokenizer has no chat template. Give records with 'text'."
            )
        self._renderer = self._renderer or ChatRenderer(self.tokenizer)
        return self._renderer.render(chat)

    def ready(self, place: str, ids: list[Any]) -> list[int]:
        """A record's own token ids. Raises CalibrationError if the model cannot process them."""
        bad = [item for item in ids if type(item) is not int or not 0 <= item < self._vocab_size]
        if bad or not ids:
            what = f"{show(bad[0])} in 'input_ids'" if bad else "an empty 'input_ids'"
            raise CalibrationError(
                f"{place} has {what}; the model's tokens are the numbers 0 to {self._vocab_size - 1}."
            )
        if self._max_positions is not None and len(ids) > self._max_positions:
            raise CalibrationError(
                f"{place} has {len(ids):,} tokens, but the model has only {self._max_positions:,} positions. "
                "Sequences of token ids are never cut: shorten it."
            )
        return ids


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer in a model's folder. Raises CalibrationError if there is none that works."""
    from transformers import AutoTokenizer

    advice = "Add the tokenizer's files, or calibrate on JSONL records with 'input_ids'."
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        works = bool(tokenizer("The answer is 42.").input_ids)
    except Exception as error:
        # Tokenizers raise all kinds of errors; the user needs one sentence.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CalibrationError(f"The tokenizer in {folder} cannot be loaded: {reason}\n{advice}") from error
    if not works:
        # If its files are missing, transformers creates a tokenizer with an empty vocabulary for some models.
        raise CalibrationError(f"{folder} has no tokenizer. {advice}")
    return tokenizer
