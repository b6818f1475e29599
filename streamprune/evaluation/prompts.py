"""Prompts for generation: the beginnings of held-out text, as plain text and as chats, and the user's own prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamprune.calibration.chat import Chat, ChatRenderer
from streamprune.calibration.sequences import Calibration
from streamprune.errors import CalibrationError
from streamprune.files.json_text import parse_json, show

#: Variables of chat templates that switch thinking on and off.
THINKING_SWITCHES = ("enable_thinking", "thinking")
#: Forms of a prompt: text that the model continues, or a chat that it answers.
TEXT, CHAT = "text", "chat"


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, with their text. `thinking` is None where the template has no switch for it."""

    source: str
    form: str
    thinking: bool | None
    ids: tuple[int, ...] = field(repr=False)
    text: str = field(repr=False)


@dataclass(frozen=True)
class Opening:
    """What prompts are made of: text (with its own token ids, if it has some), or the messages of a chat.

    `place` is for error messages.
    """

    place: str
    source: str
    text: str = ""
    ids: tuple[int, ...] | None = None
    messages: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Prompts:
    """All prompts, the template's switch for thinking if it has one, and notes for the user."""

    prompts: tuple[Prompt, ...]
    switch: str | None = None
    notes: tuple[str, ...] = ()


def collect_prompts(
    calibration: Calibration | None, path: Path | None, per_source: int, tokens: int, tokenizer: Any
) -> Prompts:
    """The lines of the JSONL file `path`, and the first `tokens` tokens of `per_source` sequences of each source.

    Raises CalibrationError if there are none, or for lines that are no prompts.
    """
    openings = [] if path is None else _read_openings(path)
    if calibration is not None:
        openings += _openings_of(calibration, per_source, tokens, tokenizer)
    made = make_prompts(openings, tokenizer)
    if not made.prompts:
        raise CalibrationError("There is no text to continue. Give other --data, or --prompts FILE.")
    return made


def _openings_of(calibration: Calibration, per_source: int, tokens: int, tokenizer: Any) -> list[Opening]:
    """The beginnings of sequences; without a tokenizer they have no text."""
    found: list[Opening] = []
    for number, name in enumerate(calibration.sources):
        pairs = zip(calibration.sequences, calibration.source_of, strict=True)
        sequences = [sequence for sequence, source in pairs if source == number]
        for index, sequence in enumerate(sequences[:per_source]):
            ids = tuple(sequence[:tokens].tolist())
            text = "" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)
            found.append(Opening(f"sequence {index + 1} of {name}", name, text, ids))
    return found


def _read_openings(path: Path) -> list[Opening]:
    """The prompts in a JSONL file: {"prompt": "…"} or {"messages": […]} on each line, with "source" if they have one.

    Raises CalibrationError, naming the line, for anything else.
    """
    try:
        with path.open("rb") as stream:
            lines = [(number, line) for number, line in enumerate(stream, 1) if line.strip()]
    except OSError as error:
        raise CalibrationError(f"The prompts {path} cannot be read: {error.strerror}.") from None
    found = [_opening(f"{path} line {number}", path.stem, line) for number, line in lines]
    if not found:
        raise CalibrationError(f'{path} holds no prompts. Give JSON lines such as {{"prompt": "Once upon a time"}}.')
    return found


def _opening(place: str, source: str, line: bytes) -> Opening:
    try:
        row = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{place} is not valid JSON: {str(error)[:300]}.") from None
    if isinstance(row, dict) and isinstance(row.get("source", source), str):
        source = row.get("source", source)
        if isinstance(row.get("messages"), list) and row["messages"]:
            messages = row["messages"]
            bad = [message for message in messages if not isinstance(message, dict) or "role" not in message]
            if bad:
                raise CalibrationError(
                    f"{place} has {show(bad[0])} among its messages: a message is an object with a 'role'."
                )
            return Opening(place, source, messages=tuple(messages))
        if isinstance(row.get("prompt"), str) and row["prompt"].strip():
            return Opening(place, source, row["prompt"])
    raise CalibrationError(
        f"{place} is {show(row)}. Each line of prompts is an object with 'prompt' (a string) or 'messages' (a chat), "
        "and perhaps 'source' (a string)."
    )


def make_prompts(openings: Sequence[Opening], tokenizer: Any) -> Prompts:
    """Every opening as text to continue, and, where the tokenizer has a chat template, as a chat.

    The chats come with thinking on and with thinking off where the template has a switch that makes a difference.
    Openings with messages are chats only. A template that fails on our own text means no chats, and a note; one that
    fails on the user's messages is a CalibrationError that names them.
    """
    prompts = [_as_text(opening, tokenizer) for opening in openings if opening.messages is None]
    given = [opening for opening in openings if opening.messages is not None]
    if tokenizer is None or not tokenizer.chat_template:
        if given:
            raise CalibrationError(
                f"{given[0].place} holds a chat, but the model's tokenizer has no chat template. Give lines with "
                "'prompt'."
            )
        return Prompts(tuple(prompts))
    with_text = [opening for opening in openings if opening.messages is not None or opening.text.strip()]
    with ChatRenderer(tokenizer) as renderer:
        try:
            switch = _thinking_switch(with_text[0], renderer) if with_text else None
            chats = [chat for opening in with_text for chat in _as_chats(opening, switch, renderer, tokenizer)]
        except CalibrationError as error:
            if given:
                raise
            return Prompts(tuple(prompts), None, (f"No chats were tried: {error}",))
    return Prompts((*prompts, *chats), switch)


def _as_text(opening: Opening, tokenizer: Any) -> Prompt:
    ids = opening.ids if opening.ids is not None else _tokens(opening, opening.text, tokenizer, special=True)
    return Prompt(opening.source, TEXT, None, ids, opening.text or " ".join(map(str, ids)))


def _as_chats(opening: Opening, switch: str | None, renderer: ChatRenderer, tokenizer: Any) -> Iterator[Prompt]:
    for thinking in (None,) if switch is None else (False, True):
        text = _rendered(opening, {} if switch is None else {switch: thinking}, renderer)
        yield Prompt(opening.source, CHAT, thinking, _tokens(opening, text, tokenizer, special=False), text)


def _thinking_switch(opening: Opening, renderer: ChatRenderer) -> str | None:
    """The variable by which the template switches thinking on and off; None if it has none.

    Found by rendering in the template's own process. Jinja's list of a template's variables would evaluate the
    template's constants, which may never end, and does not say whether a variable makes a difference.
    """
    for name in THINKING_SWITCHES:
        if _rendered(opening, {name: True}, renderer) != _rendered(opening, {name: False}, renderer):
            return name
    return None


def _rendered(opening: Opening, variables: dict[str, Any], renderer: ChatRenderer) -> str:
    messages = opening.messages or ({"role": "user", "content": opening.text},)
    return renderer.render(Chat(opening.place, list(messages), None, {"add_generation_prompt": True, **variables}))


def _tokens(opening: Opening, text: str, tokenizer: Any, special: bool) -> tuple[int, ...]:
    if tokenizer is None:
        raise CalibrationError(f"{opening.place} is text, but the model has no tokenizer. Add the tokenizer's files.")
    try:
        ids = tuple(tokenizer(text, add_special_tokens=special).input_ids)
    except Exception as error:
        # Tokenizers are programs too, and come with the model.
        raise CalibrationError(f"{opening.place}: the model's tokenizer fails on this text: {error}") from None
    if not ids:
        raise CalibrationError(f"{opening.place}: the model's tokenizer makes no token of this text.")
    return ids
