"""The figures of what was chosen: experts by layer, tokens, what is kept of each source, and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from streamprune.choice.retention import Retention
from streamprune.fit.estimate import KV_CACHE, STATE, WEIGHTS, Estimate
from streamprune.report.memory import GIB, Line, Memory
from streamprune.report.record import Record
from streamprune.report.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    YELLOW,
    layer_axis,
    new_figure,
    shortened,
)

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
