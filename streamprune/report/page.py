"""The report as one page of HTML that needs nothing else: no script, no font, no file, nothing from the net."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence

from streamprune import __version__
from streamprune.report.parts import Part
from streamprune.report.style import Picture
from streamprune.report.tables import table_html

#: Forbids the browser whatever would leave the page, should something in it ever ask for that.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; padding-top: .6rem; border-top: 1px solid #ccc; }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; }
code { font-size: .92em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 0; }
dt { color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
.warning { border-left: .3rem solid #D55E00; padding: .3rem .8rem; background: #fdf1ea; }
figure { margin: .8rem 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 20rem; height: auto; }
details { margin: .6rem 0; }
summary { cursor: pointer; }
.wide { overflow-x: auto; max-height: 32rem; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .15rem .7rem .15rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #e3e3e3; }
thead th { vertical-align: bottom; border-bottom: 1px solid #888; color: #444; position: sticky; top: 0;
  background: #fff; }
tr > :first-child { text-align: left; max-width: 24rem; overflow: hidden; text-overflow: ellipsis; }
tbody th { font-weight: normal; }
s { color: #666; }
footer { margin-top: 2.5rem; color: #555; font-size: .85rem; }
@media (max-width: 36rem) {
  body { padding: .7rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .together, .wide, tr, dl { break-inside: avoid; }
  figure svg { min-width: 0; max-height: 20cm; }
  .wide { overflow: visible; max-height: none; }
  details:not([open]) { display: none; }
}
""".strip()


def page(
    name: str, summary: Sequence[tuple[str, str]], parts: Sequence[Part], pictures: Mapping[str, Picture], loops: bool
) -> str:
    """The page about the model `name`, with the pictures of its parts. `loops` raises a warning at the top."""
    return "\n".join(_lines(name, summary, parts, pictures, loops)) + "\n"


def _lines(
    name: str, summary: Sequence[tuple[str, str]], parts: Sequence[Part], pictures: Mapping[str, Picture], loops: bool
) -> Iterator[str]:
    title = html.escape(f"{name}: what was pruned")
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title>\n<style>\n{_CSS}\n</style>\n</head>\n<body>\n<h1>{title}</h1>"
    if loops:
        yield '<p class="warning">This model runs into loops when it writes. <a href="#generation">What helps.</a></p>'
    yield "<dl>"
    yield from (f"<dt>{html.escape(word)}</dt><dd>{_prose(text)}</dd>" for word, text in summary)
    yield "</dl>"
    for part in parts:
        yield from _part(part, pictures.get(part.name))
    yield f"<footer>Made by streamprune {html.escape(__version__)} (`streamprune report`)</footer>".replace("`", "")
    yield "</body>\n</html>"


def _part(part: Part, picture: Picture | None) -> Iterator[str]:
    yield f'<section id="{part.name}">\n<div class="together">\n<h2>{html.escape(part.title)}</h2>'
    yield from (f"<p>{_prose(sentence)}</p>" for sentence in part.text)
    if picture is not None:
        yield f"<figure>{picture.svg}</figure>"
    yield "</div>"
    if part.points:
        yield "<ul>"
        yield from (f"<li>{_prose(sentence)}" for sentence in part.points)
        yield "</ul>"
    for number, table in enumerate(part.tables):
        if number < part.open:
            yield from table_html(table)
        else:
            yield f"<details><summary>Numbers: {html.escape(table.caption)}</summary>"
            yield from table_html(table)
            yield "</details>"
    yield "</section>"


def _prose(text: str) -> str:
    """A sentence with what stands between backticks as code, all of it escaped."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
