"""The kinds of values that a recipe's keys have. A check gives the value back, or raises ValueError with what it is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from streamprune.settings import MOST_TOKENS
from streamprune.source.shard import show
from streamprune.text.template import Path as FieldPath
from streamprune.text.template import Template, parse_path

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
