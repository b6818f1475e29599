"""From a recipe as data to a Recipe: every key is known, and every value is of its kind, or the user is told."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from streamprune.errors import CalibrationError
from streamprune.source.shard import show
from streamprune.text import corpus
from streamprune.text import recipe_values as kinds
from streamprune.text.files import named_path
from streamprune.text.recipe import MODES, ChatForm, Condition, Recipe, Source, Turn
from streamprune.text.template import parse_path

RECIPE_KEYS = ("name", "description", "sequence_length", "samples", "tokens", "mode", "seed", "sources")
SOURCE_KEYS = (
    "name", "share", "samples", "seed", "path", "builtin", "dataset", "subset", "split", "revision", "data_files",
    "data_dir", "filter", "labels", "text", "field", "messages", "columns", "roles", "tools", "thinking",
    "template_options",
)  # fmt: skip
_ONLY_DATASET = ("subset", "split", "revision", "data_files", "data_dir")
_ONLY_CHAT = ("columns", "roles", "tools", "thinking", "template_options")
_TURN_KEYS = ("role", "content", "tool_calls")
_RANGE_KEYS = ("min", "max")
#: What `apply_chat_template` itself takes, which is not for the template.
_RESERVED = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding",
    "continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
    "return_assistant_tokens_mask", "self",
}  # fmt: skip


def recipe_of(raw: Any, path: Path) -> Recipe:
    """The recipe that a file's data describe. `path` is the file: its name is the default name, its folder that of
    relative paths. Raises CalibrationError, naming file, source and key.
    """
    place = str(path)
    try:
        given = kinds.mapping(raw)
        _known(given, RECIPE_KEYS)
        if not isinstance(given.get("sources"), list) or not given["sources"]:
            raise kinds.Fault("has no 'sources': a list of at least one")
        recipe = {
            "name": kinds.get(given, "name", kinds.name, path.stem),
            "description": kinds.get(given, "description", kinds.long_text, ""),
            "sequence_length": kinds.get(given, "sequence_length", kinds.at_least(2), None),
            "samples": kinds.get(given, "samples", kinds.at_least(1), None),
            "tokens": kinds.get(given, "tokens", kinds.at_least(1), None),
            "mode": kinds.get(given, "mode", kinds.one_of(MODES), "packed"),
            "seed": kinds.get(given, "seed", kinds.at_least(0), 0),
        }
        if recipe["samples"] is not None and recipe["tokens"] is not None:
            raise kinds.Fault("has both 'samples' and 'tokens': say the total in one way")
        sources = []
        for number, item in enumerate(given["sources"]):
            name = item.get("name") if isinstance(item, dict) else None
            place = f"{path}, source {show(name) if isinstance(name, str) else number + 1},"
            sources.append(_source(item, path.parent))
        place = str(path)
        _check_sources(sources, recipe)
    except kinds.Fault as fault:
        raise CalibrationError(f"{place} {fault}.") from None
    return Recipe(sources=tuple(sources), **recipe)


def _check_sources(sources: list[Source], recipe: Mapping[str, Any]) -> None:
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise kinds.Fault(f"has two sources named {twice!r}")
    without = [source.name for source in sources if source.share is None]
    if without and len(without) < len(sources):
        raise kinds.Fault(f"gives source {without[0]!r} no 'share', but others have one: give it to all or to none")
    if all(source.share is None and source.samples is not None for source in sources) and (
        recipe["samples"] is not None or recipe["tokens"] is not None
    ):
        raise kinds.Fault(
            "has a total ('samples' or 'tokens') beside a number of 'samples' for every source: leave one out"
        )


def _source(raw: Any, folder: Path) -> Source:
    given = kinds.mapping(raw)
    _known(given, SOURCE_KEYS)
    origins = [key for key in ("path", "builtin", "dataset") if key in given]
    if len(origins) != 1:
        raise kinds.Fault("must have exactly one of 'path', 'builtin' and 'dataset'")
    ways = [key for key in ("text", "field", "messages") if key in given]
    if len(ways) > 1:
        raise kinds.Fault(f"says in two ways how a record becomes text: {ways[0]!r} and {ways[1]!r}")
    for keys, needed in ((_ONLY_DATASET, "dataset"), (_ONLY_CHAT, "messages")):
        idle = next((key for key in keys if key in given and needed not in given), None)
        if idle is not None:
            raise kinds.Fault(f"has {idle!r}, which only goes with {needed!r}")
    paths = kinds.get(given, "path", kinds.texts, ())
    dataset = kinds.get(given, "dataset", kinds.hub_id, None)
    default = dataset.rpartition("/")[2] if dataset else Path(paths[0]).name if paths else str(given["builtin"])
    return Source(
        name=kinds.get({"name": default} | given, "name", kinds.name, ""),
        builtin=kinds.get(given, "builtin", kinds.one_of(tuple(corpus.DOMAINS)), None),
        paths=tuple(folder / named_path(text)[0] for text in paths),
        dataset=dataset,
        subset=kinds.get(given, "subset", kinds.text, None),
        split=kinds.get(given, "split", kinds.text, "train"),
        revision=kinds.get(given, "revision", kinds.text, None),
        data_files=kinds.get(given, "data_files", kinds.texts, ()),
        data_dir=kinds.get(given, "data_dir", kinds.text, None),
        share=kinds.get(given, "share", kinds.share, None),
        samples=kinds.get(given, "samples", kinds.at_least(1), None),
        seed=kinds.get(given, "seed", kinds.at_least(0), None),
        text=kinds.get(given, "text", kinds.template, None) or kinds.get(given, "field", kinds.field_template, None),
        chat=_chat(given) if "messages" in given else None,
        labels=kinds.each(given, "labels", kinds.texts),
        conditions=tuple(
            _condition(key, value) for key, value in kinds.get(given, "filter", kinds.mapping, {}).items()
        ),
        stated=given,
    )


def _chat(given: Mapping[str, Any]) -> ChatForm:
    messages = given["messages"]
    options = kinds.get(given, "template_options", kinds.mapping, {})
    for key, value in options.items():
        if not key.isidentifier() or key in _RESERVED:
            raise kinds.Fault(f"has {show(key)} in 'template_options', which is no variable of a chat template")
        if not kinds.is_scalar(value):
            raise kinds.Fault(
                f"has {show(value)} for {key!r} in 'template_options', which is not text, a number or a truth"
            )
    columns = kinds.each(given, "columns", kinds.text)
    _known(columns, ("role", "content"), "'columns'")
    return ChatForm(
        messages=None if isinstance(messages, list) else kinds.get(given, "messages", kinds.path, None),
        turns=_turns(messages) if isinstance(messages, list) else (),
        columns=columns,
        roles=kinds.each(given, "roles", kinds.text),
        tools=kinds.get(given, "tools", kinds.path, None),
        thinking=kinds.get(given, "thinking", kinds.truth, None),
        options=options,
    )


def _turns(messages: list[Any]) -> tuple[Turn, ...]:
    if not messages:
        raise kinds.Fault("has an empty list of 'messages'")
    turns = []
    for item in messages:
        turn = kinds.mapping(item, "a message in 'messages'")
        _known(turn, _TURN_KEYS, "a message")
        if "role" not in turn or len(turn) == 1:
            raise kinds.Fault("has a message without a 'role', or with neither 'content' nor 'tool_calls'")
        turns.append(
            Turn(
                kinds.get(turn, "role", kinds.text, ""),
                kinds.get(turn, "content", kinds.template, None),
                kinds.get(turn, "tool_calls", kinds.path, None),
            )
        )
    return tuple(turns)


def _condition(key: str, value: Any) -> Condition:
    try:
        path = parse_path(key)
    except ValueError as error:
        raise kinds.Fault(f"has {show(key)} in 'filter': {error}") from None
    if isinstance(value, dict):
        _known(value, _RANGE_KEYS, f"the filter for {key!r}")
        if not value:
            raise kinds.Fault(f"has an empty filter for {key!r}: give a value, a list of values, or 'min' and 'max'")
        return Condition(
            path, None, kinds.get(value, "min", kinds.number, None), kinds.get(value, "max", kinds.number, None)
        )
    values = value if isinstance(value, list) else [value]
    if not values or not all(map(kinds.is_scalar, values)):
        raise kinds.Fault(
            f"has {show(value)} in 'filter' for {key!r}, which is not a value, a list of them, or a range"
        )
    return Condition(path, tuple(values))


def _known(given: Mapping[str, Any], keys: Collection[str], what: str = "") -> None:
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(key[:100], keys, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(keys)}"
            raise kinds.Fault(f"has the unknown key {show(key)}{f' in {what}' if what else ''} ({hint})")
