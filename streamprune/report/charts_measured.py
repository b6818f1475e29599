"""The figures of what was measured: losses and divergence by source, error along the depth, and the run's course."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from streamprune.report.charts import MOST_SOURCES
from streamprune.report.course import Course
from streamprune.report.measured import OfSource, TextResult
from streamprune.report.memory import GIB
from streamprune.report.style import BLACK, BLUE, GREEN, LINES, ORANGE, RED, layer_axis, new_figure, shortened

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
