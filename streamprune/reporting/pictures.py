"""How figures look, and how they become bytes: the same figure gives the same bytes, as SVG and as PNG.

Colours are those of Okabe and Ito (2008, https://jfly.uni-koeln.de/color/), which the colour-blind tell apart; hatches,
markers and line styles show the same in black and white.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#6b6b6b"
#: Colour, line style and marker of the lines of one figure; fourteen that differ in more than their colour.
LINES = tuple(
    (colour, style, marker)
    for style, markers in (("-", "osD^vPX"), ("--", "sD^vPXo"))
    for colour, marker in zip((BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GREY), markers, strict=True)
)
#: Inches. On a screen an inch takes about 115 pixels, so that the letters are about as large as those of the text.
WIDTH = 8.0
PNG_DPI = 120
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.6,
    "axes.titlesize": 9.6,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
    # Letters stay letters: they can be searched, and read aloud.
    "svg.fonttype": "none",
    # Names come from files: a dollar sign in one must not begin a formula.
    "text.parse_math": False,
    "text.usetex": False,
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Picture:
    """A figure: `svg` is an element for a page, `png` a file's bytes; `alt` says in words what it shows."""

    name: str
    alt: str
    svg: str
    png: bytes


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """In this context figures are drawn in our style, whatever the user's own settings of matplotlib are."""
    # It writes about its caches.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes, in the picture only.
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        # Names of what is drawn follow from the figure, and differ from those of the page's other figures.
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": f"streamprune {name}"})
        yield


def picture(name: str, alt: str, draw: Callable[[], Figure]) -> Picture:
    """Draw a figure and make it bytes. `name` is a short word that no other figure of the page has."""
    with drawing(name):
        figure = draw()
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        # Where everything is has been worked out by now, which takes half of the time.
        figure.set_layout_engine("none")
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Picture(name, alt, _element(name, alt, svg.getvalue()), png.getvalue())


def new_figure(height: float, **grid: Any) -> tuple[Figure, Any]:
    """A figure of the page's width and `height` inches, and its axes as `Figure.subplots` gives them."""
    figure = Figure(figsize=(WIDTH, height), dpi=PNG_DPI)
    return figure, figure.subplots(**grid)


def _element(name: str, alt: str, svg: bytes) -> str:
    """The `svg` element alone, as wide as the page lets it be, with names that no other figure has."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")
