"""Jinja templates of the report (HTML) and of the model card (Markdown). No name from a file is more than text in them.

What an expression gives is escaped: in `.html.j2` templates by Jinja, in `.md.j2` templates by `markdown`. Filters that
return `Markup` give HTML or Markdown already.
"""

from __future__ import annotations

import html
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from streamprune.hardware.memory import format_bytes
from streamprune.tables import code, count, interval, longest_fence, markdown, number, percent, plain


def render(template: str, **values: Any) -> str:
    """The text of a template in this folder with these values."""
    return _environment(template.endswith(".html.j2")).get_template(template).render(**values)


@cache
def _environment(is_html: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader(__name__, ""),
        autoescape=is_html,
        finalize=None if is_html else lambda value: value if isinstance(value, Markup) else markdown(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"bytes": format_bytes, "count": count, "percent": percent, "plain": plain}
    environment.filters |= {"number": number, "interval": interval}
    if is_html:
        environment.filters |= {"prose": _prose, "table": lambda table: Markup(table.html())}
    else:
        environment.filters |= {
            "code": lambda text: Markup(code(text)),
            "fenced": _fenced,
            "table": lambda table: Markup("\n".join(table.markdown())),
        }
    return environment


def _fenced(text: str, language: str = "") -> Markup:
    """A block of code, whatever is in it."""
    fence = "`" * max(3, longest_fence(text) + 1)
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def _prose(text: str) -> Markup:
    """A sentence in HTML; what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(plain(text, None))))
