"""Templates over the fields of a record, in Jinja's language: `{{ instruction }}`, `{{ meta.language }}`.

A recipe may be untrusted, so a template can read fields and choose between them, and do nothing else: no
loops, no calls, no attributes of Python objects, and only the filters of `FILTERS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.filters import FILTERS as JINJA_FILTERS

#: Most characters of a path; messages show it.
MOST_PATH = 200
#: The filters that a template may use.
FILTERS = ("default", "first", "join", "last", "length", "lower", "replace", "tojson", "trim", "upper")

_PATH = re.compile(r"[^.\[\]{}]+(?:\.[^.\[\]{}]+|\[\d{1,9}\])*")
_STEP = re.compile(r"\[(\d+)\]|\.?([^.\[\]]+)")
#: A field as str.format writes it, which Jinja takes for plain text.
_SINGLE_BRACES = re.compile(r"(?<!\{)\{\w[\w .\[\]]{0,99}\}(?!\})")
_ALLOWED = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Const,
    nodes.Filter, nodes.If, nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.Not, nodes.And, nodes.Or, nodes.Test,
    nodes.Keyword,
)  # fmt: skip


class MissingFieldError(LookupError):
    """A record has no such field; the argument is the field's name or path."""


class _MissingField(jinja2.StrictUndefined):
    def _fail_with_undefined_error(self, *args: Any, **kwargs: Any) -> Any:
        raise MissingFieldError(str(self._undefined_name))

    __str__ = __iter__ = __len__ = __bool__ = __eq__ = __hash__ = _fail_with_undefined_error


class _Environment(jinja2.Environment):
    """Fields of records only: a dot or a bracket never reaches an attribute of a Python object."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item of an object or a list. Every item of null is null."""
        if obj is None or isinstance(obj, jinja2.Undefined):
            return obj
        if isinstance(obj, Mapping) and argument in obj:
            return obj[argument]
        if isinstance(obj, list) and isinstance(argument, int) and -len(obj) <= argument < len(obj):
            return obj[argument]
        return self.undefined(obj=obj, name=argument)

    getattr = getitem  # type: ignore[assignment]


def text_of(value: Any) -> str:
    """A field as text: strings as they are, nothing for null, and JSON for all else."""
    if value is None:
        return ""
    if isinstance(value, jinja2.Undefined):
        return str(value)
    return value if isinstance(value, str) else _as_json(value)


def _as_json(value: Any) -> str:
    """A value as JSON, without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=False, default=str)


_ENVIRONMENT = _Environment(undefined=_MissingField, finalize=text_of, keep_trailing_newline=True, autoescape=False)
_ENVIRONMENT.globals.clear()
_ENVIRONMENT.filters = {name: JINJA_FILTERS[name] for name in FILTERS} | {"tojson": _as_json}


@cache
def compiled(text: str) -> jinja2.Template:
    """A template, to be rendered by `filled`. Raises ValueError, with the reason, for an invalid template."""
    try:
        tree = _ENVIRONMENT.parse(text)
        for node in tree.find_all(nodes.Node):
            if not isinstance(node, _ALLOWED):
                what = type(node).__name__.lower()
                raise ValueError(f"`{what}` is not allowed in a template: only fields, conditions and some filters")
        template = _ENVIRONMENT.from_string(text)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"not a template: {str(error)[:300]}") from None
    for data in tree.find_all(nodes.TemplateData):
        if single := _SINGLE_BRACES.search(data.data):
            field = single.group()
            raise ValueError(f"{field} is plain text: write {{{field}}} for the field")
    return template


def filled(text: str, values: Mapping[str, Any]) -> str:
    """A template rendered with a record's fields. Raises MissingFieldError if the record lacks one of them."""
    return compiled(text).render({"record": values, **values})


@cache
def parse_path(text: str) -> tuple[str | int, ...]:
    """The names and numbers in a path such as `meta.language`, `choices[0]`. Raises ValueError for an invalid path."""
    if len(text) > MOST_PATH or not _PATH.fullmatch(text):
        what = text if len(text) <= MOST_PATH else f"{text[:MOST_PATH]}…"
        raise ValueError(f"{what!r} is not a field path, such as question, meta.language or choices[0]")
    return tuple(int(number) if number else name for number, name in _STEP.findall(text))


def value_at(values: Mapping[str, Any], path: str) -> Any:
    """The field of a record at `path`, such as `meta.language`; None if a value on the path is null.

    Raises MissingFieldError if the record lacks the field.
    """
    value: Any = values
    for step in parse_path(path):
        value = _ENVIRONMENT.getitem(value, step)
        if isinstance(value, jinja2.Undefined):
            raise MissingFieldError(path)
    return value
