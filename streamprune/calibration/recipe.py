"""Text templates over the fields of a record: `{instruction}`, `{meta.language}`, `{choices[0]}`; `{{` is a brace.

They name fields and nothing else: Python's own format strings could reach into objects and ask for endless padding.

A calibration recipe: which sources, in which shares, made into sequences in which way.

The kinds of values that a recipe's keys have. A check gives the value back, or raises ValueError with what it is.

From a recipe as data to a Recipe: every key is known, and every value is of its kind, or the user is told.

Recipes in YAML or JSON: reading them as data and nothing else, and those that come with streamprune.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from streamprune.calibration import builtin_text as corpus
from streamprune.calibration import recipe as kinds
from streamprune.calibration.sources import BUILTIN, file_opened, named_path
from streamprune.config import MOST_TOKENS
from streamprune.errors import CalibrationError
from streamprune.files.json_text import parse_json, show
from streamprune.hardware.memory import format_bytes

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_PATH = re.compile(r"[^.\[\]]+(?:\.[^.\[\]]+|\[\d{1,9}\])*")
_STEP = re.compile(r"\[(\d+)\]|\.?([^.\[\]]+)")

#: Characters of a path, which has to be shown where it leads nowhere.
MOST_PATH = 200

FieldPath = tuple[str | int, ...]


class MissingFieldError(LookupError):
    """A record has no such field; the argument is the field as it was written."""


@dataclass(frozen=True)
class Template:
    """Literal pieces of text, each followed by the path of a field (None behind the last)."""

    pieces: tuple[tuple[str, FieldPath | None], ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Raises ValueError, saying what is wrong, where the text is no template."""
        pieces: list[tuple[str, FieldPath | None]] = []
        literal, position = "", 0
        for match in _PIECE.finditer(text):
            literal += text[position : match.start()]
            position = match.end()
            if match.group() in ("{{", "}}"):
                literal += match.group()[0]
            elif match.group(1) is None:
                raise ValueError(f"a single {match.group()!r} (for a brace in the text, write it twice)")
            else:
                pieces.append((literal, parse_path(match.group(1))))
                literal = ""
        pieces.append((literal + text[position:], None))
        return cls(tuple(pieces))

    @property
    def fields(self) -> tuple[FieldPath, ...]:
        """The paths of the fields, in order."""
        return tuple(path for _, path in self.pieces if path is not None)

    def fill(self, values: Mapping[str, Any]) -> str:
        """The text with the record's fields in it. Raises MissingFieldError for one that it does not have."""
        return "".join(
            literal + ("" if path is None else text_of(value_at(values, path))) for literal, path in self.pieces
        )


def parse_path(text: str) -> FieldPath:
    """The steps to a field: names, and numbers for items of a list. ValueError if it is no such path."""
    if len(text) > MOST_PATH or not _PATH.fullmatch(text):
        what = text if len(text) <= MOST_PATH else f"{text[:MOST_PATH]}…"
        raise ValueError(
            f"{{{what}}} names no field; write for example {{question}}, {{meta.language}}, {{choices[0]}}"
        )
    return tuple(int(number) if number else name for number, name in _STEP.findall(text))


def path_text(path: FieldPath) -> str:
    """A path as it is written in a template."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def value_at(values: Mapping[str, Any], path: FieldPath) -> Any:
    """The field of a record that a path leads to; a missing value on the way (null) is one itself.

    Raises MissingFieldError for a field that the record does not have.
    """
    value: Any = values
    for step in path:
        if value is None:
            return None
        is_name = isinstance(step, str) and isinstance(value, Mapping) and step in value
        if is_name or (isinstance(step, int) and isinstance(value, list) and step < len(value)):
            value = value[step]
        else:
            raise MissingFieldError(path_text(path))
    return value


def text_of(value: Any) -> str:
    """A field as text: strings as they are, nothing for null, and JSON for all else."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


#: How documents become sequences. `packed`: laid end to end and divided into full sequences. `documents`: each one by
#: itself, cut at the sequence length. `bucketed`: the same, with every length rounded down to one of sixteen per power
#: of two, so that many are equal and go through the model together; less than a sixteenth of a document is lost.
MODES = ("packed", "documents", "bucketed")


@dataclass(frozen=True)
class Turn:
    """One message of a chat that is built from a record's fields; `tool_calls` is the field that holds them."""

    role: str
    content: Template | None = None
    tool_calls: FieldPath | None = None


@dataclass(frozen=True)
class ChatForm:
    """Where a record's chat is, and how the model's chat template is to render it.

    `messages` is the field with the messages; without it they are made of templates, `turns`. `columns` are the keys of
    role and content in a message, and `roles` what its roles are called in chat templates. `tools` is the field with
    the tools; `options` are variables for the template.
    """

    messages: FieldPath | None = None
    turns: tuple[Turn, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    tools: FieldPath | None = None
    thinking: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What the chat template is given beside messages and tools."""
        # Qwen's templates and their kin ask for the first name, those of DeepSeek and Granite for the second.
        thinking = {} if self.thinking is None else {"enable_thinking": self.thinking, "thinking": self.thinking}
        return {**thinking, **self.options}


@dataclass(frozen=True)
class Condition:
    """What a record's field must be for the record to be used: one of `values`, or within `least` and `most`."""

    path: FieldPath
    values: tuple[Any, ...] | None = None
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Source:
    """One named source of a recipe: `builtin`, `paths` or `dataset` says where it is.

    `share` is its part of all tokens, and `samples` how many records are drawn from it at most (or, where no source
    has a share, exactly). Without `text` and `chat`, a record's own `input_ids`, `messages`, `conversations` or `text`
    count.
    """

    name: str
    builtin: str | None = None
    paths: tuple[Path, ...] = ()
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    data_dir: str | None = None
    share: float | None = None
    samples: int | None = None
    seed: int | None = None
    text: Template | None = None
    chat: ChatForm | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    #: The recipe's own words, for the record of how the tokens were made.
    stated: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def public(self) -> dict[str, Any]:
        """What may be published of it, as JSON: no local folder is in it."""
        stated = {key: value for key, value in self.stated.items() if key not in ("name", "share", "samples", "path")}
        if self.paths:
            stated["path"] = [path.resolve().name for path in self.paths]
        elif self.builtin is not None:
            stated["builtin"] = self.builtin
        return stated


@dataclass(frozen=True)
class Recipe:
    """How calibration tokens are made. The total is `tokens`, or `samples` times the sequence length.

    With `strict` a source that is too short is an error; else it gives what it has, and the others fill up.
    """

    name: str
    sources: tuple[Source, ...]
    description: str = ""
    sequence_length: int | None = None
    samples: int | None = None
    tokens: int | None = None
    mode: str = "packed"
    seed: int = 0
    strict: bool = True

    @property
    def by_count(self) -> bool:
        """Whether each source gives a stated number of records, instead of a share of the tokens."""
        return all(source.share is None and source.samples is not None for source in self.sources)


#: Sources are told apart by name on the command line (`--mix code=0.5`) and in files.
_NAME = re.compile(r"[^\s=,:][^=,:\n]{0,99}")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


#: Characters of a key, and of a value that is no template: they have to be shown where something is wrong with them.
MOST_KEY, MOST_TEXT = 200, 1000


class Fault(Exception):
    """What is wrong with a recipe, to be told behind its place."""


def get(given: Mapping[str, Any], key: str, check: Callable[[Any], Any], default: Any) -> Any:
    """The checked value of a key, or the default where it is missing. (null is no value of any key.)"""
    if key not in given:
        return default
    try:
        return check(given[key])
    except ValueError as error:
        raise Fault(f"has {show(given[key])} for {key!r}, which is {error}") from None


def mapping(value: Any, what: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Fault(f"holds {what + ': ' if what else ''}{_kind(value)} where names with values are wanted")
    odd = [key for key in value if not isinstance(key, str) or not _is_text(key) or len(key) > MOST_KEY]
    if odd:
        raise Fault(f"has {show(odd[0])} as a key, which is no text of up to {MOST_KEY} characters")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _is_text(value: str) -> bool:
    """Whether a string could be written to a file: YAML's escapes can make halves of characters."""
    return "\0" not in value and value == value.encode("utf-8", "ignore").decode()


def is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return _is_text(value)
    return isinstance(value, (int, float)) and abs(value) < 1e300


def long_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not _is_text(value):
        raise ValueError("no text (numbers and dates that are meant as text need quotes)")
    return value


def text(value: Any) -> str:
    if len(long_text(value)) > MOST_TEXT:
        raise ValueError(f"longer than {MOST_TEXT} characters")
    return str(value)


def texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("an empty list")
    return tuple(text(item) for item in values)


def each(given: Mapping[str, Any], key: str, check: Callable[[Any], Any]) -> dict[str, Any]:
    """The checked values of a mapping's own keys."""
    inner = get(given, key, mapping, {})
    return {name: get(inner, name, check, None) for name in inner}


def hub_id(value: Any) -> str:
    if not isinstance(value, str) or not _HUB_ID.fullmatch(value):
        raise ValueError("no Hub id such as org/name (for files of your own use 'path')")
    return value


def name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or not value.isprintable():
        raise ValueError("no name: up to 100 characters, without '=', ',' and ':'")
    return value.strip()


def at_least(least: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= MOST_TOKENS:
            raise ValueError(f"no whole number from {least} to {MOST_TOKENS}")
        return value

    return check


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise ValueError("no number")
    return float(value)


def share(value: Any) -> float:
    share = number(value)
    if not 0 < share < 1e9 or not math.isfinite(share):
        raise ValueError("no share: a number above 0, such as 0.4 (shares need not add up to 1)")
    return share


def truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


def one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"none of {', '.join(choices)}")
        return value

    return check


def template(value: Any) -> Template:
    return Template.parse(long_text(value))


def field_template(value: Any) -> Template:
    return Template((("", path(value)), ("", None)))


def path(value: Any) -> FieldPath:
    return parse_path(text(value))


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


SUFFIXES = (".yaml", ".yml", ".json")
#: Recipes have a few kilobytes; YAML is parsed by Python, a megabyte of it in a minute.
MOST_BYTES = 1 << 18


def shipped_recipes() -> dict[str, Path]:
    """The recipes of `configs/calibration` by name, wherever the package is installed."""
    # In the repository `recipes` is a link to that folder; a wheel holds the files themselves.
    folder = Path(str(files("streamprune.calibration"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path | None:
    """The recipe file that the user means: a path, or the name of a shipped one; None if it is neither.

    Raises CalibrationError for a name that is nearly that of a shipped recipe, and of nothing else.
    """
    path, exists = named_path(name)
    if path.suffix.lower() in SUFFIXES:
        return path
    if exists or name.partition(":")[0] == BUILTIN:
        return None
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    if near := difflib.get_close_matches(name, shipped, 1, 0.7):
        raise CalibrationError(f"There is neither a file nor a recipe {name!r}. Did you mean {near[0]!r}?")
    return None


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file. Raises CalibrationError, naming the file, for whatever is wrong with it."""
    with file_opened(path) as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise CalibrationError(
            f"{path} has more than {format_bytes(MOST_BYTES)}, which no recipe has. If it holds records, one per line, "
            "name it .jsonl."
        )
    raw = _parse_json(path, data) if path.suffix.lower() == ".json" else _parse_yaml(path, data)
    try:
        return recipe_of(raw, path)
    except RecursionError:
        raise CalibrationError(f"{path} is nested too deeply for a recipe.") from None


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        return parse_json(data, unique=True)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{path} is not a recipe in JSON: {_one_line(error)}. If it holds records, one per line, name it .jsonl."
        ) from None


def _parse_yaml(path: Path, data: bytes) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Plain data only; no aliases, with which a few lines stand for more than any memory holds."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has an alias (*), which recipes do not use")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
            if twice is not None:
                raise ValueError(f"{twice[:200]!r} stands twice, line {node.start_mark.line + 1} and behind")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(data.decode("utf-8"), Loader)  # Loader is a SafeLoader.
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start:,}).") from None
    except (Exception, RecursionError) as error:
        # pyyaml fails in many ways of its own and of Python's: a date without a month, a number of 5,000 digits.
        raise CalibrationError(f"{path} is not a recipe in YAML: {_one_line(error)}.") from None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(char if char.isprintable() else "?" for char in text)[:300].rstrip(".")
