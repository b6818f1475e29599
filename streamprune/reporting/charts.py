"""The figures of the report. The same facts give the same bytes, as SVG and as PNG.

Colours are those of Okabe and Ito (2008, https://jfly.uni-koeln.de/color/), which colour-blind readers can distinguish;
hatches, markers and line styles show the same in black and white.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from streamprune.fit.estimate import KV_CACHE, STATE, WEIGHTS, Estimate
from streamprune.hardware.memory import format_bytes
from streamprune.reporting.evaluations import Interval, TextResult
from streamprune.reporting.facts import GPU_SIZES, Course, Memory
from streamprune.reporting.record import Record
from streamprune.reporting.record_computed import RecordedRefit
from streamprune.selection.retention import Retention
from streamprune.tables import plain

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
MIB, GIB = 2**20, 2**30
#: Figures show at most so many sources; the tables have all.
MOST_SOURCES = 30
#: The stacked parts of the memory: name, colour, hatch, and how the terms of the estimate begin that belong to it.
_PARTS = (
    ("experts", BLUE, "", (f"{WEIGHTS}experts",)),
    ("other weights", SKY, "///", (WEIGHTS,)),
    ("KV cache and states", ORANGE, "...", (KV_CACHE, STATE)),
    ("prefill workspace", YELLOW, "\\\\\\", ("prefill workspace",)),
    ("CUDA context, allocator", PURPLE, "xxx", ("CUDA context", "allocator margin")),
)
#: The line of a GPU's memory is only drawn up to this multiple of the widest bar; otherwise bars would be too short.
_FARTHEST = 2.5
#: The distance of a model and its original from the middle of their row.
_APART = 0.15
#: A figure, and in words what it shows.
Drawing = tuple[Figure, str]


@dataclass(frozen=True)
class Picture:
    """A figure: `svg` is an element for a page, `png` a file's bytes; `alt` says in words what it shows."""

    name: str
    alt: str
    svg: str
    png: bytes


def draw_picture(name: str, draw: Callable[[], Drawing]) -> Picture:
    """Draw a figure and render it. `name` is a short word that no other figure of the page has."""
    # matplotlib logs about its caches.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    style = Path(__file__).parent / "templates" / "report.mplstyle"
    # The ids in the SVG only depend on the figure, and differ from those of the page's other figures.
    salt: Any = {"svg.hashsalt": f"streamprune {name}"}
    with matplotlib.rc_context(salt, str(style)), warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes, in the picture only.
        warnings.simplefilter("ignore")
        figure, alt = draw()
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        # The layout is computed by now; do not compute it a second time, which takes half of the time.
        figure.set_layout_engine("none")
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Picture(name, alt, _element(name, alt, svg.getvalue()), png.getvalue())


def _element(name: str, alt: str, svg: bytes) -> str:
    """The `svg` element alone, as wide as the page lets it be, with names that no other figure has."""
    for prefix, namespace in (("", "http://www.w3.org/2000/svg"), ("xlink", "http://www.w3.org/1999/xlink")):
        ElementTree.register_namespace(prefix, namespace)
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key.endswith("}href") and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    return ElementTree.tostring(root, encoding="unicode")


def new_figure(height: float, **grid: Any) -> tuple[Figure, Any]:
    """A figure of the page's width and `height` inches, and its axes as `Figure.subplots` gives them."""
    figure = Figure(figsize=(WIDTH, height), dpi=PNG_DPI)
    return figure, figure.subplots(**grid)


def layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    """Name the axis of layers, with whole numbers, and leave half a layer of room at both ends."""
    axes.set(xlabel="layer", xlim=(layers[0] - 0.6, layers[-1] + 0.6))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(False, axis="x")


def legend(figure: Figure, columns: int, *handles: Any, **options: Any) -> None:
    """A legend above the axes."""
    figure.legend(*handles, loc="outside upper left", ncols=columns, **options)


def _shortened(name: str, length: int = 28) -> str:
    """A name that fits next to an axis; its table has it in full."""
    name = plain(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def draw_experts(record: Record) -> Drawing:
    """Experts kept and removed of each layer, the mean, and protected super experts."""
    layers, counts = list(record.counts), list(record.counts.values())
    removed = [record.experts - count for count in counts]
    mean, protected = sum(counts) / len(counts), list(record.protected_layers)
    figure, axes = new_figure(2.9)
    axes.bar(layers, counts, 0.8, color=BLUE, label="kept")
    hatched = {"facecolor": "white", "edgecolor": GREY, "linewidth": 0.5, "hatch": "////"}
    axes.bar(layers, removed, 0.8, bottom=counts, label="removed", **hatched)
    axes.axhline(mean, color=RED, linestyle="--", linewidth=1.3, label=f"mean kept: {mean:.4g}")
    if protected:
        heights = [record.counts[layer] for layer in protected]
        axes.plot(protected, heights, "v", color=BLACK, markerfacecolor=YELLOW, label="with protected super experts")
    layer_axis(axes, layers)
    axes.set(ylabel="experts", ylim=(0, record.experts))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, 4)
    spread = f"{counts[0]} of {record.experts} in every layer"
    if len(set(counts)) > 1:
        spread = f"{min(counts)} to {max(counts)} of {record.experts} per layer"
    return figure, f"Bars by layer: {spread} are kept."


def draw_tokens(record: Record) -> Drawing:
    """How the calibration's tokens were divided among the experts of each layer, and how many got none."""
    layers = list(record.counts)
    counts = np.array([layer.counts for layer in record.layers], dtype=np.float64)
    low, first, middle, third, high = quartiles = np.percentile(counts, (0, 25, 50, 75, 100), axis=1)
    figure, axes = new_figure(3.0)
    ends: Sequence[float] = layers
    if len(layers) == 1:
        # A single layer would be a band without width.
        ends = [layers[0] - 0.4, layers[0] + 0.4]
        low, first, middle, third, high = np.repeat(quartiles, 2, axis=1)
    axes.fill_between(ends, low, high, color=SKY, alpha=0.35, linewidth=0, label="min to max")
    axes.fill_between(ends, first, third, color=BLUE, alpha=0.45, linewidth=0, label="middle half")
    axes.plot(ends, middle, color=BLACK, linewidth=1.5, label="median")
    fewest = [min(layer.counts[expert] for expert in layer.kept) for layer in record.layers]
    axes.plot(layers, fewest, "_", color=RED, markersize=7, markeredgewidth=1.6, label="min of kept experts")
    if low.min() * 10 >= high.max():
        axes.set_ylim(0, 1.05 * high.max())
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    elif low.min() > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=-0.15)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    layer_axis(axes, layers)
    axes.set_ylabel("tokens per expert")
    legend(figure, 4)
    return figure, "Bands by layer: the least, the middle half and the most tokens that an expert was given."


def draw_retention(retained: Sequence[Retention], what: str = "saliency", unit: str = "experts") -> Drawing:
    """The share of each source's saliency that stays, and the most that as many experts could keep of it."""
    least = sorted(retained, key=lambda each: each.kept)[:MOST_SOURCES]
    shown = [each for each in retained if each in least][::-1]
    figure, axes = new_figure(0.9 + 0.34 * len(shown))
    rows = range(len(shown))
    axes.barh(rows, [each.kept for each in shown], 0.62, color=BLUE, label="kept")
    ideal = f"if as many {unit} were selected for this source alone"
    best = [each.best for each in shown]
    axes.plot(best, rows, "D", color=BLACK, markerfacecolor=ORANGE, markersize=6, label=ideal)
    for row, each in zip(rows, shown, strict=True):
        side, colour = ("right", "white") if each.kept > 0.12 else ("left", BLACK)
        place = max(each.kept - 0.01, 0.005)
        axes.text(place, row, f"{each.kept:.1%}", ha=side, va="center", color=colour, fontsize=8.5)
    axes.set_yticks(rows, [_shortened(each.source) for each in shown])
    axes.set(xlabel=f"share of the source's {what}", xlim=(0, 1.02))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(False, axis="y")
    legend(figure, 2)
    return figure, f"Bars by source: {least[0].source} keeps least of its {what}, {least[0].kept:.1%}."


def draw_memory(memory: Memory, budget: int | None) -> Drawing:
    """The parts of the memory, before and after, against the sizes of GPUs and the budget."""
    bars = {"this model": memory.after, **({"source": memory.before} if memory.before else {})}
    widest = max(estimate.interval[1] for estimate in bars.values())
    marks = {label: nbytes for label, nbytes, _ in GPU_SIZES if nbytes <= _FARTHEST * widest}
    beyond = [label for label, *_ in GPU_SIZES if label not in marks]
    if budget is not None:
        marks["budget"] = budget
    figure, axes = new_figure(1.35 + 0.55 * len(bars))
    for row, estimate in enumerate(bars.values()):
        _stack(axes, row, estimate)
    axes.set_yticks(range(len(bars)), list(bars))
    limit = 1.06 * max([widest, *marks.values()]) / GIB
    axes.set(xlim=(0, limit), ylim=(-0.5, len(bars) - 0.1))
    for number, (label, nbytes) in enumerate(sorted(marks.items(), key=lambda mark: mark[1])):
        colour, style = (RED, ":") if label == "budget" else (BLACK, "--")
        axes.axvline(nbytes / GIB, color=colour, linestyle=style, linewidth=1.6)
        side, shift = ("right", -3) if nbytes / GIB > 0.75 * limit else ("left", 3)
        axes.annotate(
            label, (nbytes / GIB, 1.0), xycoords=("data", "axes fraction"), fontsize=8.5, va="bottom",
            xytext=(shift, 2 + 11 * (number % 2)), textcoords="offset points", ha=side, color=colour,
        )  # fmt: skip
    axes.grid(False, axis="y")
    axes.set_xlabel("GiB" + (f"     ({' and '.join(beyond)}: far to the right)" if beyond else ""))
    keys = [Patch(facecolor=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.5) for _, colour, hatch, _ in _PARTS]
    legend(figure, 5, keys, [name for name, *_ in _PARTS], columnspacing=1.0, handlelength=1.4)
    before = f"{format_bytes(memory.before.total)} before, " if memory.before else ""
    return figure, f"Stacked bars of the memory: {before}{format_bytes(memory.after.total)} after."


def _stack(axes: Axes, row: int, estimate: Estimate) -> None:
    """The parts of an estimate as one bar, with its bounds at the end."""
    sizes = dict.fromkeys((name for name, *_ in _PARTS), 0)
    for term in estimate.terms:
        name = next(name for name, _, _, beginnings in _PARTS if term.name.startswith(beginnings))
        sizes[name] += term.bytes
    left = 0.0
    for name, colour, hatch, _ in _PARTS:
        width = sizes[name] / GIB
        axes.barh(row, width, 0.55, left=left, facecolor=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.5)
        left += width
    low, high = (bound / GIB for bound in estimate.interval)
    axes.errorbar(left, row, xerr=[[left - low], [high - left]], color=BLACK, capsize=4, linewidth=1.2)


def draw_losses(text: TextResult) -> Drawing:
    """Loss of the model and of the original by source, and the divergence between them, with intervals."""
    shown = text.rows[::-1]
    if len(text.sources) > MOST_SOURCES:
        # The sources with the largest losses, and all together.
        worst = sorted(text.sources, key=lambda each: -(each.loss if each.kl is None else each.kl))[:MOST_SOURCES]
        shown = [each for each in shown if each in worst or each is text.all]
    height = 1.1 + 0.36 * len(shown)
    figure, axes = new_figure(height, ncols=2 if text.compared else 1, sharey=True, squeeze=False)
    left = axes[0][0]
    before = {row: each.original_loss for row, each in enumerate(shown) if each.original_loss is not None}
    # One above the other, since they are often so close that one would hide the other.
    losses = [(each.loss, each.loss_interval) for each in shown]
    _points(left, losses, ("s", BLUE, "this model"), -_APART if before else 0.0)
    if before:
        heights = [row + _APART for row in before]
        hollow = {"color": BLACK, "markerfacecolor": "white", "markersize": 6}
        left.plot(list(before.values()), heights, "o", label="original", **hollow)
    left.set_yticks(range(len(shown)), [_shortened(each.name, 22) for each in shown])
    left.set(title="Loss, nats per token", ylim=(-0.6, len(shown) - 0.4))
    if text.compared:
        right = axes[0][1]
        _points(right, [(each.kl, each.kl_interval) for each in shown], ("D", RED, "KL divergence"))
        right.set(title="KL divergence from the original, nats per token", xlim=(0, None))
    legend(figure, 3, *left.get_legend_handles_labels())
    return figure, "Loss of every source, with its interval."


def _points(
    axes: Axes, values: Sequence[tuple[float | None, Interval | None]], look: tuple[str, str, str], shift: float = 0.0
) -> None:
    """A point in each row for each value, with its interval; `look` is its marker, colour and name."""
    points = [(row, value, ends or (value, value)) for row, (value, ends) in enumerate(values) if value is not None]
    below = [max(0.0, value - low) for _, value, (low, _) in points]
    above = [max(0.0, high - value) for _, value, (_, high) in points]
    marker, colour, label = look
    axes.errorbar(
        [value for _, value, _ in points], [row + shift for row, *_ in points], xerr=[below, above], fmt=marker,
        color=colour, markersize=6, capsize=4, linewidth=1.2, label=f"{label}, 95 % interval",
    )  # fmt: skip


def draw_depth(text: TextResult) -> Drawing:
    """The relative error of the hidden states after every layer, a line for each source."""
    known = [(each.name, each.hidden_error) for each in text.sources if each.hidden_error]
    largest = sorted(known, key=lambda each: -each[1][-1])[: len(LINES)]
    shown = [each for each in known if each in largest]
    of_all = text.all.hidden_error if text.all and len(text.sources) > 1 else None
    figure, axes = new_figure(3.0 + 0.17 * (len(shown) // 4))
    last = max(len(errors) for errors in (*(errors for _, errors in known), of_all or []))
    every = max(1, last // 12)
    for number, ((name, errors), (colour, style, marker)) in enumerate(zip(shown, LINES, strict=False)):
        axes.plot(
            range(len(errors)), errors, style, color=colour, marker=marker, markersize=5, linewidth=1.5,
            markevery=(number % every, every), label=_shortened(name, 20),
        )  # fmt: skip
    if of_all:
        axes.plot(range(len(of_all)), of_all, ":", color=BLACK, linewidth=2.2, label="all")
    layer_axis(axes, range(last))
    axes.set(ylabel="relative error of the hidden states", ylim=(0, None))
    legend(figure, 5 if all(len(name) <= 14 for name, _ in shown) else 4)
    return figure, "Lines by source: the relative error of the hidden states after each layer."


def draw_refit(refit: RecordedRefit) -> Drawing:
    """The error of each layer's output before and after the refit, and the shares that were taken of the changes."""
    layers = [layer.index for layer in refit.layers]
    figure, (above, below) = new_figure(3.9, nrows=2, sharex=True)
    above.plot(layers, [layer.before for layer in refit.layers], "--s", color=RED, markersize=4.5, label="before")
    above.plot(
        layers, [layer.after for layer in refit.layers], "-o", color=BLUE, markersize=4.5, label="after the refit"
    )
    highest = max(max(layer.before, layer.after) for layer in refit.layers)
    above.set(title="Relative error of each layer's output, on the judging tokens", ylim=(0, 1.12 * highest or 1))
    above.grid(False, axis="x")
    above.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    means = [float(np.mean(layer.shares)) for layer in refit.layers]
    ends = [
        [mean - min(layer.shares) for mean, layer in zip(means, refit.layers, strict=True)],
        [max(layer.shares) - mean for mean, layer in zip(means, refit.layers, strict=True)],
    ]
    below.errorbar(layers, means, yerr=np.maximum(ends, 0), fmt="D", color=BLACK, ecolor=GREY, markersize=4, capsize=3)
    below.set(title="Share taken of each expert's change: mean, min and max", ylim=(-0.04, 1.04))
    layer_axis(below, layers)
    legend(figure, 2)
    first, last = refit.error_before, refit.error_after
    return figure, f"Errors by layer before and after the refit: {first:.1%} and {last:.1%} in the mean."


def draw_course(course: Course) -> Drawing:
    """The time and memory of every layer of a run."""
    layers = [each.layer for each in course.layers]
    figure, (above, below) = new_figure(3.6, nrows=2, sharex=True)
    above.bar(layers, [each.seconds for each in course.layers], 0.8, color=GREEN)
    above.set(title="Time of each layer", ylabel="seconds")
    peaks = [each.peak_bytes for each in course.layers]
    unit, name = (GIB, "GiB") if max(peaks) >= GIB else (MIB, "MiB")
    marks = {"marker": "o", "markersize": 4, "markeredgecolor": BLACK, "markevery": max(1, len(layers) // 24)}
    below.plot(layers, [peak / unit for peak in peaks], color=ORANGE, **marks)
    below.set(title="Peak memory of the process so far", ylabel=name, ylim=(0, 1.12 * max(peaks) / unit))
    layer_axis(below, layers)
    longest = max(course.layers, key=lambda each: each.seconds)
    return figure, f"Time and peak memory by layer; layer {longest.layer} took longest, {longest.seconds:.1f} s."
