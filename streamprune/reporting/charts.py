"""How figures look, and how they become bytes: the same figure gives the same bytes, as SVG and as PNG.

Colours are those of Okabe and Ito (2008, https://jfly.uni-koeln.de/color/), which the colour-blind tell apart; hatches,
markers and line styles beside them say the same in black and white.

The figures of what was chosen: experts by layer, tokens, what is kept of each source, and memory.

The figures of what was measured: losses and divergence by source, error along the depth, and the run's course.

The saliency map: the score of every expert as a colour; what stays fills its cell, what went does not.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from streamprune.fit.estimate import KV_CACHE, STATE, WEIGHTS, Estimate
from streamprune.reporting.facts import GIB, Course, Line, Memory
from streamprune.reporting.measured import OfSource, TextResult
from streamprune.reporting.read_record import Record
from streamprune.selection.retention import Retention
from streamprune.selection.select import LayerSelection

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
    """A figure as it is shown: `svg` is an element for a page, `png` a file's bytes; `alt` says in words what it is."""

    name: str
    alt: str
    svg: str
    png: bytes


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Within the block figures are drawn in our style, whatever the user's own settings of matplotlib are."""
    # It tells of its caches, which nobody asked for.
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


def layer_axis(axes: Axes, blocks: list[int], label: str = "layer") -> None:
    """Name the axis of layers, with whole numbers, and leave half a layer of room at both ends."""
    axes.set_xlim(blocks[0] - 0.6, blocks[-1] + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(label)
    axes.grid(False, axis="x")


def shortened(name: str, length: int = 28) -> str:
    """A name that fits beside an axis; its table has it in full."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


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


#: More sources than this are told in the table alone.
MOST_SOURCES = 30
#: What the stacked parts of the memory are: name, colour, hatch, and the terms of the estimate that belong to it.
_PARTS = (
    ("experts", BLUE, "", (f"{WEIGHTS}experts",)),
    ("other weights", SKY, "///", (WEIGHTS,)),
    ("KV cache and states", ORANGE, "...", (KV_CACHE, STATE)),
    ("prefill workspace", YELLOW, "\\\\\\", ("prefill workspace",)),
    ("CUDA context, allocator", PURPLE, "xxx", ("CUDA context", "allocator margin")),
)  # fmt: skip
#: A card's line is drawn if it lies within so many times the widest bar: else the bars would be too short to be seen.
_FARTHEST = 2.5


def draw_experts(record: Record) -> Figure:
    """Experts kept and removed of each layer, the mean, and protected super experts."""
    blocks, counts = list(record.counts), list(record.counts.values())
    figure, axes = new_figure(2.9)
    removed = [record.experts - count for count in counts]
    axes.bar(blocks, counts, 0.8, color=BLUE, label="kept")
    axes.bar(
        blocks, removed, 0.8, bottom=counts, facecolor="white", edgecolor=GREY, linewidth=0.5, hatch="////",
        label="removed",
    )  # fmt: skip
    mean = sum(counts) / len(counts)
    axes.axhline(mean, color=RED, linestyle="--", linewidth=1.3, label=f"mean kept: {mean:.4g}")
    protected = [block for block, experts in record.choice.protected.items() if experts]
    if protected:
        axes.plot(
            protected, [record.counts[block] for block in protected], "v", color=BLACK, markerfacecolor=YELLOW,
            label="with protected super experts",
        )  # fmt: skip
    layer_axis(axes, blocks)
    axes.set_ylabel("experts")
    axes.set_ylim(0, record.experts)
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def draw_tokens(record: Record) -> Figure:
    """How the calibration's tokens were divided among the experts of each layer, and how many got none."""
    blocks = list(record.counts)
    counts = np.array([layer.tokens for layer in record.choice.layers], dtype=np.float64)
    low, first, middle, third, high = np.percentile(counts, (0, 25, 50, 75, 100), axis=1)
    figure, axes = new_figure(3.0)
    # A single layer would be a band without width.
    wide = np.array([blocks[0] - 0.4, blocks[0] + 0.4]) if len(blocks) == 1 else np.array(blocks)
    bands = [np.repeat(each, 2) if len(blocks) == 1 else each for each in (low, first, middle, third, high)]
    axes.fill_between(wide, bands[0], bands[4], color=SKY, alpha=0.35, linewidth=0, label="least to most")
    axes.fill_between(wide, bands[1], bands[3], color=BLUE, alpha=0.45, linewidth=0, label="middle half")
    axes.plot(wide, bands[2], color=BLACK, linewidth=1.5, label="median")
    fewest = [
        min(layer.tokens[expert] for expert in layer.kept) for layer in record.choice.layers
    ]  # fmt: skip
    axes.plot(blocks, fewest, "_", color=RED, markersize=7, markeredgewidth=1.6, label="fewest of a kept one")
    if low.min() * 10 >= high.max():
        axes.set_ylim(0, 1.05 * high.max())
    elif low.min() > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=-0.15)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    layer_axis(axes, blocks)
    axes.set_ylabel("tokens per expert")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def draw_retention(retained: Sequence[Retention]) -> Figure:
    """The share of each source's saliency that stays, and the most that as many experts could keep of it."""
    shown = sorted(retained, key=lambda each: each.kept)[:MOST_SOURCES]
    shown = [each for each in retained if each in shown][::-1]
    figure, axes = new_figure(0.9 + 0.34 * len(shown))
    rows = range(len(shown))
    axes.barh(rows, [each.kept for each in shown], 0.62, color=BLUE, label="kept")
    axes.plot(
        [each.best for each in shown], rows, "D", color=BLACK, markerfacecolor=ORANGE, markersize=6,
        label="at best: as many experts chosen for this source alone",
    )  # fmt: skip
    for row, each in zip(rows, shown, strict=True):
        axes.text(max(each.kept - 0.01, 0.005), row, f"{each.kept:.1%}", ha="right" if each.kept > 0.12 else "left",
                  va="center", color="white" if each.kept > 0.12 else BLACK, fontsize=8.5)  # fmt: skip
    axes.set_yticks(rows, [shortened(each.source) for each in shown])
    axes.set_xlim(0, 1.02)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(False, axis="y")
    axes.set_xlabel("share of the source's saliency")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def parts_of(estimate: Estimate) -> dict[str, int]:
    """Bytes of every part that the figure stacks."""
    found = {name: 0 for name, *_ in _PARTS}
    for term in estimate.terms:
        name = next(name for name, _, _, beginnings in _PARTS if term.name.startswith(beginnings))
        found[name] += term.bytes
    return found


def draw_memory(memory: Memory, lines: Sequence[Line], budget: int | None) -> Figure:
    """The parts of the memory, before and after, against the sizes of cards and the budget."""
    bars = {"this model": memory.after, **({"source": memory.before} if memory.before else {})}
    widest = max(estimate.interval[1] for estimate in bars.values())
    marks = {line.label: line.nbytes for line in lines if line.nbytes <= _FARTHEST * widest}
    beyond = [line.label for line in lines if line.label not in marks]
    if budget is not None:
        marks["budget"] = budget
    figure, axes = new_figure(1.35 + 0.55 * len(bars))
    limit = 1.06 * max([widest, *marks.values()]) / GIB
    _stack(axes, bars)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(-0.5, len(bars) - 0.1)
    axes.set_xlim(0, limit)
    for number, (label, nbytes) in enumerate(sorted(marks.items(), key=lambda mark: mark[1])):
        own = label == "budget"
        axes.axvline(nbytes / GIB, color=RED if own else BLACK, linestyle=":" if own else "--", linewidth=1.6)
        right = nbytes / GIB > 0.75 * limit
        axes.annotate(
            label, (nbytes / GIB, 1.0), xycoords=("data", "axes fraction"), fontsize=8.5, va="bottom",
            xytext=(-3 if right else 3, 2 + 11 * (number % 2)), textcoords="offset points",
            ha="right" if right else "left", color=RED if own else BLACK,
        )  # fmt: skip
    axes.grid(False, axis="y")
    axes.set_xlabel("GiB" + (f"     ({' and '.join(beyond)}: far to the right)" if beyond else ""))
    keys = [Patch(facecolor=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.5) for _, colour, hatch, _ in _PARTS]
    figure.legend(keys, [name for name, *_ in _PARTS], loc="outside upper left", ncols=5, columnspacing=1.0,
                  handlelength=1.4)  # fmt: skip
    return figure


def _stack(axes: object, bars: Mapping[str, Estimate]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    for row, estimate in enumerate(bars.values()):
        left, sizes = 0.0, parts_of(estimate)
        for name, colour, hatch, _ in _PARTS:
            width = sizes[name] / GIB
            axes.barh(row, width, 0.55, left=left, facecolor=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.5)
            left += width
        low, high = (bound / GIB for bound in estimate.interval)
        axes.errorbar(left, row, xerr=[[left - low], [high - left]], color=BLACK, capsize=4, linewidth=1.2)


MIB = 1024**2
#: How far a model and its original stand from the middle of their row.
_APART = 0.15


def draw_losses(text: TextResult) -> Figure:
    """Loss of the model and of the original by source, and the divergence between them, with intervals."""
    shown = _shown(text)[::-1]
    names = [shortened(each.name, 22) for each in shown]
    height = 1.1 + 0.36 * len(shown)
    figure, axes = new_figure(height, ncols=2 if text.compared else 1, sharey=True, squeeze=False)
    left = axes[0][0]
    rows = [row for row, each in enumerate(shown) if "original_loss" in each.values]
    # One above the other: they are often so close that one would hide the other.
    _points(left, shown, "loss", "s", BLUE, "this model", -_APART if rows else 0.0)
    if rows:
        before = [shown[row].values["original_loss"] for row in rows]
        left.plot(before, [row + _APART for row in rows], "o", color=BLACK, markerfacecolor="white", markersize=6,
                  label="original")  # fmt: skip
    left.set_title("Loss, nats per token")
    left.set_yticks(range(len(shown)), names)
    left.set_ylim(-0.6, len(shown) - 0.4)
    if text.compared:
        right = axes[0][1]
        _points(right, shown, "kl", "D", RED, "KL divergence")
        right.set_xlim(left=0)
        right.set_title("KL divergence from the original, nats per token")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


def _points(
    axes: Axes, shown: Sequence[OfSource], key: str, marker: str, colour: str, label: str, shift: float = 0.0
) -> None:
    rows = [row for row, each in enumerate(shown) if key in each.values]
    values = [shown[row].values[key] for row in rows]
    ends = [shown[row].intervals.get(key, (value, value)) for row, value in zip(rows, values, strict=True)]
    errors = [
        [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
    ]
    axes.errorbar(
        values, [row + shift for row in rows], xerr=errors, fmt=marker, color=colour, markersize=6, capsize=4,
        linewidth=1.2, label=f"{label}, 95 % interval",
    )  # fmt: skip


def _shown(text: TextResult) -> list[OfSource]:
    """The sources that a figure has room for: those of which most was lost; and all together."""
    if len(text.sources) <= MOST_SOURCES:
        return list(text.rows)
    damage = sorted(text.sources, key=lambda each: -each.values.get("kl", each.values["loss"]))[:MOST_SOURCES]
    return [each for each in text.rows if each in damage or each is text.whole]


def draw_depth(text: TextResult) -> Figure:
    """The relative error of the hidden states after every block, a line for each source."""
    with_error = [each for each in text.sources if each.hidden_error]
    shown = sorted(with_error, key=lambda each: -each.hidden_error[-1])[: len(LINES)]
    shown = [each for each in with_error if each in shown]
    figure, axes = new_figure(3.0 + 0.17 * (len(shown) // 4))
    last = max(len(each.hidden_error) for each in with_error)
    every = max(1, last // 12)
    for number, (each, (colour, style, marker)) in enumerate(zip(shown, LINES, strict=False)):
        axes.plot(range(len(each.hidden_error)), each.hidden_error, style, color=colour, marker=marker, markersize=5,
                  markevery=(number % every, every), linewidth=1.5, label=shortened(each.name, 20))  # fmt: skip
    if text.whole and text.whole.hidden_error:
        axes.plot(range(len(text.whole.hidden_error)), text.whole.hidden_error, ":", color=BLACK, linewidth=2.2,
                  label="all")  # fmt: skip
    layer_axis(axes, list(range(last)), "block")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("relative error of the hidden states")
    short = all(len(each.name) <= 14 for each in shown)
    figure.legend(loc="outside upper left", ncols=5 if short else 4)
    return figure


def draw_course(course: Course) -> Figure:
    """What every block of a run took, in seconds and in memory."""
    blocks = [each.block for each in course.blocks]
    figure, (above, below) = new_figure(3.6, nrows=2, sharex=True)
    above.bar(blocks, [each.seconds for each in course.blocks], 0.8, color=GREEN)
    above.set_ylabel("seconds")
    above.set_title("Time of each block")
    peaks = [each.peak_bytes for each in course.blocks]
    unit, name = (GIB, "GiB") if max(peaks) >= GIB else (MIB, "MiB")
    below.plot(blocks, [peak / unit for peak in peaks], color=ORANGE, marker="o", markersize=4, markeredgecolor=BLACK,
               markevery=max(1, len(blocks) // 24))  # fmt: skip
    below.set_ylim(0, 1.12 * max(peaks) / unit)
    below.set_ylabel(name)
    below.set_title("Peak memory of the process by then")
    layer_axis(below, blocks, "block")
    return figure


#: So many experts stand beside each other; of more there are several panels.
_ACROSS = 256
#: A cell's pixels, and how many of them an expert that went leaves free at each side.
_CELL, _MARGIN = 8, 2
#: Scores between these shares of all have colours of their own; those beyond have the first or the last one.
_DISTINCT = (0.02, 0.98)
_COLOURS = "cividis"


def relative_scores(record: Record) -> NDArray[np.float64]:
    """Scores (layers, experts) over the mean of their layer, so that layers of any scale can be seen on one map.

    Layers whose mean is not positive (a method may give negative scores) are left as they are.
    """
    scores = np.array([layer.scores for layer in record.choice.layers], dtype=np.float64)
    means = scores.mean(axis=1, keepdims=True)
    return np.asarray(scores / np.where(means > 0, means, 1.0))


def draw_map(record: Record) -> Figure:
    """The map of a record whose experts have scores, or, without scores, of what stays alone."""
    layers = record.choice.layers
    values = relative_scores(record) if record.scored else None
    starts = range(0, record.experts, _ACROSS)
    row = min(0.34, max(0.085, 3.6 / len(layers)))
    figure, panels = new_figure(0.95 + len(starts) * (0.45 + row * len(layers)), nrows=len(starts), squeeze=False)
    panels = panels[:, 0]
    low = high = 0.0
    if values is not None:
        low, high = (float(end) for end in np.quantile(values, _DISTINCT))
    for panel, start in zip(panels, starts, strict=True):
        stop = min(start + _ACROSS, record.experts)
        panel.imshow(
            _pixels(layers, values, start, stop, low, high), interpolation="none", aspect="auto",
            extent=(start - 0.5, stop - 0.5, len(layers) - 0.5, -0.5),
        )  # fmt: skip
        panel.set_xlim(start - 0.5, start + min(_ACROSS, record.experts) - 0.5)
        panel.grid(False)
        panel.set_ylabel("layer")
        _label_rows(panel, [layer.index for layer in layers])
    panels[-1].set_xlabel("expert (its number in the source)")
    if values is not None:
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(low, high), _COLOURS)
        bar = figure.colorbar(scale, ax=list(panels), extend="both", fraction=0.04, pad=0.01, aspect=18)
        bar.set_label("score / mean of its layer")
        bar.outline.set_visible(False)
    keys = [Line2D([], [], marker="s", markersize=size, linestyle="", color=GREY) for size in (8, 3)]
    figure.legend(keys, ["kept: the whole cell", "removed: a square within it"], loc="outside upper left", ncols=2)
    return figure


def _label_rows(panel: matplotlib.axes.Axes, blocks: Sequence[int]) -> None:
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 10_000) if len(blocks) / step <= 16)
    rows = range(0, len(blocks), step)
    panel.set_yticks(list(rows), [str(blocks[row]) for row in rows])


def _pixels(
    layers: Sequence[LayerSelection], values: NDArray[np.float64] | None, start: int, stop: int, low: float, high: float
) -> NDArray[np.uint8]:
    kept = np.zeros((len(layers), stop - start), dtype=bool)
    for row, layer in enumerate(layers):
        kept[row, [expert - start for expert in layer.kept if start <= expert < stop]] = True
    if values is None:
        colours = np.broadcast_to(matplotlib.colors.to_rgb(BLUE), (*kept.shape, 3))
    else:
        shares = np.clip((values[:, start:stop] - low) / (high - low or 1.0), 0, 1)
        # Few colours, which make a small file; nobody tells more apart.
        colours = matplotlib.colormaps[_COLOURS](np.round(shares * 63) / 63)[:, :, :3]
    whole = np.repeat(np.repeat(np.round(colours * 255).astype(np.uint8), _CELL, axis=0), _CELL, axis=1)
    inside = np.zeros((_CELL, _CELL), dtype=bool)
    inside[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = True
    filled = np.repeat(np.repeat(kept, _CELL, axis=0), _CELL, axis=1) | np.tile(inside, kept.shape)
    return np.where(filled[:, :, None], whole, np.uint8(255))
