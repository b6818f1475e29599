"""The chart of a search, and the page with it in the search's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from streamprune import __version__
from streamprune.files.durable import write_atomically, writing
from streamprune.hardware.memory import GIB
from streamprune.output.search_folder import SEARCH_NAME
from streamprune.reporting import charts
from streamprune.reporting.search import Measured, SearchResult, search_result, search_tables
from streamprune.reporting.templates import render

#: The page with table and chart, in the folder of a search.
PAGE_NAME = "report.html"
#: Where a label may be, in points from its point, and which side of it is there.
_BESIDE = (((4, 3), "left"), ((4, -8), "left"), ((-4, 3), "right"), ((-4, -8), "right"))


def draw_search(result: SearchResult) -> charts.Drawing:
    """Damage over memory, with intervals, and the Pareto front as a line."""
    measured = result.measured
    figure, axes = charts.new_figure(4.2)
    for number, kind in enumerate(sorted({_kind(each) for each in measured})):
        colour, _, marker = charts.LINES[number % len(charts.LINES)]
        rows = [each for each in measured if _kind(each) == kind]
        for row in rows:
            low, high = row.all.kl_interval if row.all and row.all.kl_interval else (row.kl, row.kl)
            axes.plot([row.total_bytes / GIB] * 2, [low, high], color=colour, linewidth=1.0)
        points = [row.total_bytes / GIB for row in rows], [row.kl for row in rows]
        axes.plot(*points, marker, color=colour, label=kind)
    front = sorted((each.total_bytes / GIB, each.kl) for each in measured if each.on_front)
    if front:
        axes.plot(*zip(*front, strict=True), color=charts.GREY, linestyle=":", linewidth=1.2, label="Pareto front")
    axes.set(xlabel="memory, GiB", ylabel="KL divergence, nats per token")
    if all(each.kl > 0 for each in measured):
        axes.set_yscale("log")
        # (matplotlib's own labels are formulas, which this style does not set.)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    charts.legend(figure, 3)
    _label_points(figure, axes, result)
    best = result.best
    return figure, (
        f"{len(measured)} candidates by memory and KL divergence; the best, {best.name}, loses {best.kl:.4f} nats per "
        "token."
    )


def _label_points(figure: Figure, axes: Axes, result: SearchResult) -> None:
    """Experts and width beside each point, from the best on; a label without room among them is left out."""
    # Room for labels at the edges: they do not count in the layout, so that it stays as it is computed here.
    axes.margins(x=0.12, y=0.1)
    figure.draw_without_rendering()
    placed: list[Bbox] = []
    for row in result.measured:
        text = f"{row.keep} x {row.width or result.width or 'all'}"
        for offset, side in _BESIDE:
            label = axes.annotate(
                text, (row.total_bytes / GIB, row.kl), offset, textcoords="offset points", ha=side, fontsize=7
            )
            label.set_in_layout(False)
            box = label.get_window_extent()
            if not any(map(box.overlaps, placed)):
                placed.append(box)
                break
            label.remove()


def _kind(each: Measured) -> str:
    return f"weights {each.weights}{', refitted' if each.refit else ''}"


def write_search_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `search.json` and the page in a folder. Raises OutputError, ResourceError."""
    found = search_result(result)
    picture = charts.draw_picture("search", lambda: draw_search(found))
    page = render(
        "search.html.j2", result=found, tables=search_tables(found), picture=picture, version=__version__
    )  # fmt: skip
    with writing(f"Writing the result to {folder}", folder):
        write_atomically(folder / SEARCH_NAME, (json.dumps(result, indent=2) + "\n").encode())
        write_atomically(folder / PAGE_NAME, page.encode())
