"""Prompts for generation: the beginnings of held-out text, as plain text and as chats, and the user's own prompts."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import msgspec

from streamprune.calibration.chat import Chat, ChatRenderer
from streamprune.calibration.messages import content_of_parts
from streamprune.calibration.sequences import Calibration
from streamprune.errors import CalibrationError
from streamprune.files.json_text import json_fault, parse_json, show
from streamprune.tables import plain

#: Variables of chat templates that switch thinking on and off.
THINKING_SWITCHES = ("enable_thinking", "thinking")
#: Forms of a prompt: text that the model continues, or a chat that it answers.
TEXT, CHAT = "text", "chat"


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, with their text. `thinking` is None if the template has no variable for it."""

    source: str
    form: str
    thinking: bool | None
    ids: tuple[int, ...] = field(repr=False)
    text: str = field(repr=False)


@dataclass(frozen=True)
class _Opening:
    """The source of prompts: text (with its own token ids, if it has some), or the messages of a chat.

    `place` is for error messages.
    """

    place: str
    source: str
    text: str = ""
    ids: tuple[int, ...] | None = None
    messages: list[Any] | None = None


class _Message(msgspec.Struct):
    role: Any


class _Line(msgspec.Struct):
    """A line of the user's prompts."""

    prompt: str | None = None
    messages: list[_Message] | None = None
    source: str | None = None


def collect_prompts(
    data: Calibration | None, path: Path | None, per_source: int, tokens: int, tokenizer: Any, day: date
) -> tuple[list[Prompt], str | None, list[str]]:
    """The lines of the JSONL file `path`, and the first `tokens` tokens of `per_source` sequences of each source.

    Returns the prompts, the template's variable for thinking if it has one, and notes for the user. Each opening is
    text to continue, and also a chat if the tokenizer has a chat template: with thinking off and on if it has a
    variable for that, and the date of `day` if it writes one. Without a tokenizer prompts are only token
    ids. If the template fails there are no chats. Raises CalibrationError if there are no prompts, for invalid lines,
    and for chats of the user that do not render.
    """
    openings = [] if path is None else _read_openings(path)
    if data is not None:
        openings += _openings_of(data, per_source, tokens, tokenizer)
    given = [opening for opening in openings if opening.messages is not None]
    prompts = [_text_prompt(opening, tokenizer) for opening in openings if opening.messages is None]
    switch: str | None = None
    notes: list[str] = []
    if tokenizer is not None and tokenizer.chat_template:
        try:
            with ChatRenderer(tokenizer, day) as renderer:
                usable = [each for each in openings if each.messages or each.text.strip()]
                switch, chats = _chat_prompts(usable, tokenizer, renderer)
            prompts += chats
            if renderer.wrote_date:
                notes.append(f"The chat template writes the date, {day} here; --date {day} gives the same prompts.")
        except CalibrationError as error:
            if given:
                raise
            notes.append(f"No chats were tried: {error}")
    elif given:
        raise CalibrationError(
            f"{given[0].place} is a chat, but the model's tokenizer has no chat template. Give lines with 'prompt'."
        )
    if not prompts:
        raise CalibrationError("There is no text to continue. Give other --data, or --prompts FILE.")
    return prompts, switch, notes


def _openings_of(data: Calibration, per_source: int, tokens: int, tokenizer: Any) -> Iterator[_Opening]:
    """The beginnings of sequences; without a tokenizer they have no text."""
    for number, name in enumerate(data.sources):
        pairs = zip(data.sequences, data.source_of, strict=True)
        sequences = [sequence for sequence, source in pairs if source == number]
        for index, sequence in enumerate(sequences[:per_source]):
            ids = tuple(sequence[:tokens].tolist())
            text = "" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)
            yield _Opening(f"sequence {index + 1} of {name}", name, text, ids)


def _read_openings(path: Path) -> list[_Opening]:
    """The prompts in a JSONL file. Raises CalibrationError, naming the line, for an invalid one."""
    try:
        with path.open("rb") as stream:
            stripped = (line.removeprefix(codecs.BOM_UTF8).strip() for line in stream)
            lines = [(number, line) for number, line in enumerate(stripped, 1) if line]
    except OSError as error:
        raise CalibrationError(f"The prompts {path} cannot be read: {error.strerror}.") from None
    if not lines:
        raise CalibrationError(f'{path} has no prompts. Give JSON lines such as {{"prompt": "Once upon a time"}}.')
    return [_opening(f"{path} line {number}", path.stem, line) for number, line in lines]


def _opening(place: str, source: str, text: bytes) -> _Opening:
    reason = ""
    try:
        row = parse_json(text)
        line = msgspec.convert(row, _Line)
    except msgspec.ValidationError as error:
        line, reason = _Line(), f" ({error})"
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{place} is not valid JSON: {json_fault(error)}.") from None
    # The name becomes that of a source in the result.
    source = plain(line.source or source) or "prompts"
    if line.messages:
        return _Opening(place, source, messages=[_message(place, message) for message in row["messages"]])
    if line.prompt and line.prompt.strip():
        return _Opening(place, source, line.prompt)
    raise CalibrationError(
        f"{place} is {show(row)}{reason}. Each line of prompts is an object with 'prompt' (a string) or 'messages' (a "
        "chat: objects with a 'role'), and perhaps 'source' (a string)."
    )


def _message(place: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message with its parts as templates expect them. Raises CalibrationError for parts that are not text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    content, others = content_of_parts(content)
    if others:
        raise CalibrationError(f"{place} has a part of a message that is not text ({others[0]}). Give only text.")
    return message | {"content": content}


def _text_prompt(opening: _Opening, tokenizer: Any) -> Prompt:
    ids = opening.ids if opening.ids is not None else _tokens(opening, opening.text, tokenizer, special=True)
    return Prompt(opening.source, TEXT, None, ids, opening.text or " ".join(map(str, ids)))


def _chat_prompts(
    openings: Sequence[_Opening], tokenizer: Any, renderer: ChatRenderer
) -> tuple[str | None, list[Prompt]]:
    """The template's variable for thinking, and a chat of every opening for each of its values."""

    def rendered(opening: _Opening, variables: dict[str, Any]) -> str:
        messages = opening.messages or [{"role": "user", "content": opening.text}]
        return renderer.render(Chat(opening.place, messages, None, {"add_generation_prompt": True, **variables}))

    # Jinja's list of a template's variables would evaluate the template's constants in this process, not in the
    # renderer's, and might never end; nor does it show whether a variable makes a difference.
    def makes_a_difference(name: str) -> bool:
        return rendered(openings[0], {name: True}) != rendered(openings[0], {name: False})

    switch = next(filter(makes_a_difference, THINKING_SWITCHES), None) if openings else None
    prompts = []
    for opening in openings:
        for thinking in (None,) if switch is None else (False, True):
            text = rendered(opening, {} if switch is None else {switch: thinking})
            ids = _tokens(opening, text, tokenizer, special=False)
            prompts.append(Prompt(opening.source, CHAT, thinking, ids, text))
    return switch, prompts


def _tokens(opening: _Opening, text: str, tokenizer: Any, special: bool) -> tuple[int, ...]:
    try:
        ids = tuple(tokenizer(text, add_special_tokens=special).input_ids)
    except Exception as error:
        # The tokenizer may be code from the model's folder, and raise anything.
        raise CalibrationError(f"{opening.place}: the model's tokenizer fails on this text: {error}") from None
    if not ids:
        raise CalibrationError(f"{opening.place}: the model's tokenizer returns no tokens for this text.")
    return ids
