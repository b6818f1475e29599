"""Recipes in YAML or JSON: reading them as data and nothing else, and those that come with streamprune."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path
from typing import Any

from streamprune.errors import CalibrationError
from streamprune.machine import format_bytes
from streamprune.source.shard import parse_json
from streamprune.text.files import BUILTIN, file_opened, named_path
from streamprune.text.recipe import Recipe
from streamprune.text.recipe_keys import recipe_of

SUFFIXES = (".yaml", ".yml", ".json")
#: Recipes have a few kilobytes; YAML is parsed by Python, a megabyte of it in a minute.
MOST_BYTES = 1 << 18


def shipped_recipes() -> dict[str, Path]:
    """The recipes of `configs/calibration` by name, wherever the package is installed."""
    # In the repository `recipes` is a link to that folder; a wheel holds the files themselves.
    folder = Path(str(files("streamprune.text"))) / "recipes"
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
