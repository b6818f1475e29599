"""Prompts for generation: the beginnings of held-out text, raw and as chats, and prompts of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamprune.calibration.chat import Chat, ChatRenderer
from streamprune.calibration.sequences import Calibration
from streamprune.errors import CalibrationError
from streamprune.files.json_text import parse_json, show

#: What templates call the switch for thinking.
THINKING_SWITCHES = ("enable_thinking", "thinking")
#: How a prompt is put to the model: as text that it goes on with, or as a chat that it answers.
TEXT, CHAT = "text", "chat"


@dataclass(frozen=True)
class Prompt:
    """Token ids to go on from, with what they say. `thinking` is None where the template has no switch for it."""

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
    """All prompts, the name of the template's switch for thinking if it has one, and remarks for the user."""

    prompts: tuple[Prompt, ...]
    switch: str | None = None
    notes: tuple[str, ...] = ()


def openings_of(calibration: Calibration, per_source: int, tokens: int, tokenizer: Any) -> list[Opening]:
    """The first `tokens` tokens of the first `per_source` sequences of each source.

    Without a tokenizer they have no text.
    """
    found: list[Opening] = []
    for number, name in enumerate(calibration.sources):
        pairs = zip(calibration.sequences, calibration.source_of, strict=True)
        mine = [sequence for sequence, source in pairs if source == number]
        for index, sequence in enumerate(mine[:per_source]):
            ids = tuple(sequence[:tokens].tolist())
            text = "" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)
            found.append(Opening(f"sequence {index + 1} of {name}", name, text, ids))
    return found


def read_openings(path: Path) -> list[Opening]:
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


def make_prompts(openings: Sequence[Opening], tokenizer: Any) -> Prompts:
    """Every opening as text to go on with, and, where the tokenizer has a chat template, as a chat.

    The chats come with thinking on and with thinking off where the template has a switch that makes a difference.
    Openings with messages are chats only. A template that fails on text of ours costs the chats, and a note says so;
    with messages of the user's own it is a CalibrationError, which names them.
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
    talkative = [opening for opening in openings if opening.messages is not None or opening.text.strip()]
    with ChatRenderer(tokenizer) as renderer:
        try:
            switch = _thinking_switch(talkative[0], renderer) if talkative else None
            chats = [chat for opening in talkative for chat in _as_chats(opening, switch, renderer, tokenizer)]
        except CalibrationError as error:
            if given:
                raise
            return Prompts(tuple(prompts), None, (f"No chats were tried: {error}",))
    return Prompts((*prompts, *chats), switch)


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
                raise CalibrationError(f"{place} has {show(bad[0])} among its messages, which is no message of a role.")
            return Opening(place, source, messages=tuple(messages))
        if isinstance(row.get("prompt"), str) and row["prompt"].strip():
            return Opening(place, source, row["prompt"])
    raise CalibrationError(
        f"{place} is {show(row)}. Each line of prompts is an object with 'prompt' (a string) or 'messages' (a chat), "
        "and perhaps 'source' (a string)."
    )


def _as_text(opening: Opening, tokenizer: Any) -> Prompt:
    ids = opening.ids if opening.ids is not None else _tokens(opening, opening.text, tokenizer, special=True)
    return Prompt(opening.source, TEXT, None, ids, opening.text or " ".join(map(str, ids)))


def _as_chats(opening: Opening, switch: str | None, renderer: ChatRenderer, tokenizer: Any) -> Iterator[Prompt]:
    for thinking in (None,) if switch is None else (False, True):
        text = _rendered(opening, {} if switch is None else {switch: thinking}, renderer)
        yield Prompt(opening.source, CHAT, thinking, _tokens(opening, text, tokenizer, special=False), text)


def _thinking_switch(opening: Opening, renderer: ChatRenderer) -> str | None:
    """The variable by which the template switches thinking on and off; None if it has none.

    Found by rendering, which the template's process is there for: Jinja's own list of a template's variables works out
    its constants, which may take for ever, and says nothing of whether a variable makes a difference.
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
