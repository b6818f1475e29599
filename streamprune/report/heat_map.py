"""The saliency map: the score of every expert as a colour; what stays fills its cell, what went does not."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from streamprune.choice.choose import ChosenLayer
from streamprune.report.record import Record
from streamprune.report.style import BLUE, GREY, new_figure

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
        _label_rows(panel, [layer.block for layer in layers])
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
    layers: Sequence[ChosenLayer], values: NDArray[np.float64] | None, start: int, stop: int, low: float, high: float
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
