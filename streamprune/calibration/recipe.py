"""A calibration recipe, read from YAML or JSON: its sources, their shares, and how sequences are made of them."""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal

import msgspec
import yaml

from streamprune.calibration.builtin_text import BUILTIN, DOMAINS
from streamprune.calibration.rows import ARRAY, LINES, json_kind
from streamprune.calibration.templates import compiled, parse_path
from streamprune.errors import CalibrationError
from streamprune.files.json_text import parse_json, show
from streamprune.hardware.memory import format_bytes
from streamprune.tables import plain
from streamprune.targets import MOST_TOKENS

SUFFIXES = (".yaml", ".yml", ".json")
#: Recipes have a few kilobytes, and parsing a megabyte of YAML takes a minute.
MOST_BYTES = 1 << 18

#: How documents become sequences.
MODES = ("packed", "documents", "bucketed")
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
#: Sources are named on the command line (`--mix code=0.5`) and in files.
Name = Annotated[str, msgspec.Meta(pattern=r"^[^\s=,:][^=,:\n]{0,99}$")]
HubId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)?$")]
Count = Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]
Share = Annotated[float, msgspec.Meta(gt=0, lt=1e9)]
Bound = Annotated[float, msgspec.Meta(gt=-1e300, lt=1e300)]
Scalar = str | bool | int | float
TextList = Annotated[list[Text], msgspec.Meta(min_length=1)]

#: Parameters of `apply_chat_template` itself, which are no variables of the template.
RESERVED = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding",
    "continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
    "return_assistant_tokens_mask", "self",
}  # fmt: skip


#: The fields of a record that count where nothing else is stated, in this order.
USUAL_FIELDS = ("input_ids", "messages", "conversations", "text")


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a chat that is built from a record's fields: its text as a template, and the field with the tool
    calls.
    """

    role: Text
    content: str | None = None
    tool_calls: Text | None = None

    def __post_init__(self) -> None:
        if self.content is None and self.tool_calls is None:
            raise ValueError("A message needs 'content' or 'tool_calls'")
        if self.content is not None:
            compiled(self.content)
        if self.tool_calls is not None:
            parse_path(self.tool_calls)


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A filter for a number: from `min` to `max`, either of which may be left out."""

    min: Bound | None = None
    max: Bound | None = None

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise ValueError("An empty filter: give a value, a list of values, or 'min' or 'max'")


class Columns(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The keys of role and content in a message."""

    role: Text | None = None
    content: Text | None = None


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One named source of a recipe: `path`, `dataset` or `builtin` says where it is.

    `share` is its part of all tokens, and `samples` how many records are drawn from it at most (or, where no source
    has a share, exactly). Without `text`, `field` and `messages` a record's own `input_ids`, `messages`,
    `conversations` or `text` count. configs/README.md explains every key.
    """

    name: Name = ""
    share: Share | None = None
    samples: Count | None = None
    seed: Seed | None = None
    path: Text | TextList | None = None
    builtin: Literal[tuple(DOMAINS)] | None = None  # type: ignore[valid-type]
    dataset: HubId | None = None
    subset: Text | None = None
    split: Text | None = None
    revision: Text | None = None
    data_files: Text | TextList | None = None
    data_dir: Text | None = None
    filter: dict[str, Scalar | Annotated[list[Scalar], msgspec.Meta(min_length=1)] | Range] = {}
    labels: dict[str, TextList] = {}
    text: str | None = None
    field: str | None = None
    messages: str | Annotated[list[Turn], msgspec.Meta(min_length=1)] | None = None
    columns: Columns = Columns()
    roles: dict[str, Text] = {}
    tools: str | None = None
    documents: str | None = None
    thinking: bool | None = None
    template_options: dict[str, Scalar] = {}

    def __post_init__(self) -> None:
        stated = {key for key in SOURCE_KEYS if getattr(self, key) not in (None, {}, Columns())}
        if len(stated & {"path", "builtin", "dataset"}) != 1:
            raise ValueError("Exactly one of 'path', 'builtin' and 'dataset' is needed")
        ways = [key for key in ("text", "field", "messages") if key in stated]
        if len(ways) > 1:
            raise ValueError(f"Both {ways[0]!r} and {ways[1]!r} say how a record becomes text: give one")
        for needed, keys in (
            ("dataset", ("subset", "split", "revision", "data_files", "data_dir")),
            ("messages", ("columns", "roles", "tools", "documents", "thinking", "template_options")),
        ):
            idle = next((key for key in keys if key in stated), None)
            if idle is not None and needed not in stated:
                raise ValueError(f"{idle!r} only goes with {needed!r}")
        for key in self.template_options:
            if not key.isidentifier() or key in RESERVED:
                raise ValueError(f"{show(key)} in 'template_options' is not a variable of a chat template")
        # Compiled here to report errors before the first record is read.
        if self.text is not None:
            compiled(self.text)
        for path in (self.field, self.messages, self.tools, self.documents, *self.filter):
            if isinstance(path, str):
                parse_path(path)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files and folders of the source."""
        return tuple(map(Path, [self.path] if isinstance(self.path, str) else self.path or ()))

    @property
    def chat_variables(self) -> dict[str, Any]:
        """The variables of the chat template, in addition to messages and tools."""
        # Templates of Qwen and similar models use the first name, those of DeepSeek and Granite the second.
        thinking = {} if self.thinking is None else {"enable_thinking": self.thinking, "thinking": self.thinking}
        return {**thinking, **self.template_options}

    def public(self) -> dict[str, Any]:
        """The source as JSON that may be published: without local folders."""
        stated = dict(msgspec.to_builtins(self))
        stated = {key: value for key, value in stated.items() if key not in ("name", "share", "samples", "path")}
        return stated | ({"path": [path.resolve().name for path in self.paths]} if self.path is not None else {})


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """How calibration tokens are made. The total is `tokens`, or `samples` times the sequence length.

    `mode` is how documents become sequences. `packed`: concatenated and divided into full sequences. `documents`:
    each by itself, cut at the sequence length. `bucketed`: the same, with every length rounded down to one of sixteen
    per power of two, so that many are equal and go through the model together.
    """

    sources: Annotated[list[Source], msgspec.Meta(min_length=1)]
    name: Name = ""
    description: str = ""
    sequence_length: Annotated[int, msgspec.Meta(ge=2, le=MOST_TOKENS)] | None = None
    samples: Count | None = None
    tokens: Count | None = None
    mode: Literal[MODES] = "packed"  # type: ignore[valid-type]
    seed: Seed = 0
    #: Whether a source that is too short is an error. Otherwise more is taken from the others.
    strict: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples is not None and self.tokens is not None:
            raise ValueError("Both 'samples' and 'tokens' are given: give one of them")
        without = [number for number, source in enumerate(self.sources) if source.share is None]
        if without and len(without) < len(self.sources):
            name = self.sources[without[0]].name or without[0]
            raise ValueError(f"Source {name!r} has no 'share', but others do: give it to all or to none")
        if self.by_count and (self.samples is not None or self.tokens is not None):
            raise ValueError(
                "Both a total ('samples' or 'tokens') and 'samples' of every source are given: omit one of them"
            )

    @property
    def by_count(self) -> bool:
        """Whether each source gives a stated number of records, instead of a share of the tokens."""
        return all(source.share is None and source.samples is not None for source in self.sources)


class NamedSources(Recipe, frozen=True):
    """Sources that the user named without a recipe: equal parts, but more of the others if one is too short."""

    strict: ClassVar[bool] = False


RECIPE_KEYS, SOURCE_KEYS = Recipe.__struct_fields__, Source.__struct_fields__
_KEYS = sorted({key for kind in (Recipe, Source, Turn, Range, Columns) for key in kind.__struct_fields__})


def named_path(text: str) -> tuple[Path, bool]:
    """The path that the user wrote, and whether it exists. Raises CalibrationError for an invalid path."""
    try:
        if "\0" in text:
            raise ValueError("it has a null character in it")
        path = Path(text).expanduser()
        return path, path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # No permission, a name too long for the file system, or the home of a user who does not exist.
        reason = getattr(error, "strerror", None) or str(error)
        raise CalibrationError(f"{text[:300]!r} cannot be opened: {reason}.") from None


@contextmanager
def file_opened(path: Path) -> Iterator[BinaryIO]:
    """A file that the user named, open for reading. Raises CalibrationError if it cannot be read."""
    try:
        if path.is_dir():
            raise CalibrationError(f"{path} is a folder, not a file.")
        with path.open("rb") as stream:
            yield stream
    except FileNotFoundError:
        raise CalibrationError(
            f"There is no calibration file {path}. Give a recipe, a text, JSON or parquet file, a folder of them, or "
            f"{BUILTIN} for built-in text."
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}.") from None


def shipped_recipes() -> dict[str, Path]:
    """The recipes of `configs/calibration` by name, wherever the package is installed."""
    # In the repository `recipes` is a link to that folder; a wheel has the files themselves.
    folder = Path(str(files("streamprune.calibration"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path | None:
    """The recipe file that the user means: a path, or the name of a shipped one; None if it is neither.

    Raises CalibrationError for a name that is neither, but similar to that of a shipped recipe.
    """
    path, exists = named_path(name)
    if path.suffix.lower() in SUFFIXES:
        return None if exists and _holds_records(path) else path
    if exists or name.partition(":")[0] == BUILTIN:
        return None
    shipped = shipped_recipes()
    if name not in shipped and (near := difflib.get_close_matches(name, shipped, 1, 0.7)):
        raise CalibrationError(f"There is neither a file nor a recipe {name!r}. Did you mean {near[0]!r}?")
    return shipped.get(name)


def _holds_records(path: Path) -> bool:
    """Whether a file that is named like a recipe has records."""
    if path.suffix.lower() != ".json" or path.is_dir():
        return False
    with file_opened(path) as stream:
        kind, first = json_kind(stream)
    return kind == ARRAY or (kind == LINES and "sources" not in first and not first.keys() <= set(RECIPE_KEYS))


def builtin_domains(source: str) -> list[str]:
    """The domains that `builtin` or `builtin:code,prose` names. Raises CalibrationError for unknown ones."""
    domains = source.partition(":")[2]
    names = domains.split(",") if domains else list(DOMAINS)
    if unknown := [name for name in names if name not in DOMAINS]:
        raise CalibrationError(f"{source}: unknown domain {unknown[0]!r}. Domains: {', '.join(DOMAINS)}.")
    return list(dict.fromkeys(names))


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file. Raises CalibrationError, naming file and key, if it is invalid.

    The file's name is the recipe's if it states none; relative paths in it start from the file's folder.
    """
    with file_opened(path) as stream:
        data = stream.read(MOST_BYTES + 1)
    data = data.removeprefix(codecs.BOM_UTF8)
    hint = "If it has records, make them one array, or one object per line (.jsonl)."
    if len(data) > MOST_BYTES:
        raise CalibrationError(f"{path} has more than {format_bytes(MOST_BYTES)}, the limit for a recipe. {hint}")
    kind, hint = ("JSON", f" {hint}") if path.suffix.lower() == ".json" else ("YAML", "")
    try:
        raw = parse_json(data, unique=True) if kind == "JSON" else yaml.load(data.decode(), _Loader)
    except Exception as error:
        # pyyaml fails in many ways of its own and of Python's: a date without a month, a number of 5,000 digits.
        raise CalibrationError(f"{path} is not a recipe in {kind}: {_one_line(error)}.{hint}") from None
    try:
        _check_plain(raw)
        recipe = msgspec.convert(raw, Recipe)
        sources = [_completed(source, path.parent) for source in recipe.sources]
    except RecursionError:
        raise CalibrationError(f"{path} is nested too deeply for a recipe.") from None
    except (msgspec.ValidationError, ValueError) as error:
        hint = hint if not isinstance(raw, dict) or "sources" not in raw else ""
        raise CalibrationError(f"{path}: {_one_line(_explained(str(error), raw))}.{hint}") from None
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CalibrationError(f"{path}: Two sources are named {twice!r}.")
    return msgspec.structs.replace(recipe, sources=sources, name=recipe.name or path.stem)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain data only, and no aliases, since nested aliases can expand to more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias (*), which recipes do not use")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise ValueError(f"the key {twice[:200]!r} occurs twice, from line {node.start_mark.line + 1} on")
        return super().construct_mapping(node, deep)


def _completed(source: Source, folder: Path) -> Source:
    """The source with a name, and with its paths relative to the recipe's folder resolved."""
    paths = [folder / named_path(str(path))[0] for path in source.paths]
    default = source.dataset.rpartition("/")[2] if source.dataset else paths[0].name if paths else source.builtin
    name = msgspec.convert(plain(source.name or default or ""), Name)
    return msgspec.structs.replace(source, name=name, path=[str(path) for path in paths] or None)


def _check_plain(value: Any) -> None:
    """Raise ValueError for null, and for keys and text that could not be written to the output's files."""
    if value is None:
        raise ValueError("A value is empty (null): give one, or omit the key")
    if isinstance(value, str) and ("\0" in value or value != value.encode("utf-8", "ignore").decode()):
        raise ValueError(f"{show(value)} has characters that cannot be written to a file")
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str) or len(key) > 200]:
            raise ValueError(f"{show(wrong[0])} is a key; keys are text of up to 200 characters")
        value = [*value, *value.values()]
    for part in value if isinstance(value, list) else ():
        _check_plain(part)


def _explained(message: str, raw: Any) -> str:
    """A message of msgspec with the key's location in front, and with a suggestion."""
    message, _, place = message.partition(" - at ")
    if unknown := re.search(r"unknown field `(.*)`", message, re.DOTALL):
        near = difflib.get_close_matches(unknown.group(1)[:100], _KEYS, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"a recipe has {', '.join(RECIPE_KEYS)}"
        message = f"Unknown key {show(unknown.group(1))} ({hint})"
    elif "matching regex" in message and place.endswith("dataset`"):
        message = "Not a Hub id such as org/name (for files of your own use 'path')"
    elif "matching regex" in message:
        message = "Not a name: up to 100 characters, without '=', ',' and ':'"
    elif "enum value" in message:
        message += f"; allowed: {', '.join(DOMAINS if place.endswith('builtin`') else MODES)}"
    elif "Expected `str" in message and "got" in message:
        message += " (numbers and dates that are meant as text need quotes)"
    place = place.strip("`").removeprefix("$").removeprefix(".")
    if source := re.match(r"sources\[(\d+)\]", place):
        name = raw["sources"][int(source.group(1))]
        name = name.get("name") if isinstance(name, dict) else None
        if isinstance(name, str):
            place = f"source {show(name)}{place[source.end() :]}"
    return f"{place}: {message}" if place else message


def _one_line(message: object) -> str:
    return plain(message, 500).rstrip(".") or "unknown error"
