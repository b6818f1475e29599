"""The maps of the report: which experts stay, and what the channels of experts add, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from streamprune.reporting.charts import BLACK, BLUE, GREY, Drawing, legend, new_figure
from streamprune.reporting.record import Record

#: The map has at most this many experts in a row; more are divided into panels.
_ACROSS = 256
#: The size of a cell in pixels, and the margin that the square of a removed expert leaves at each side.
_CELL, _MARGIN = 8, 2
#: Scores between these quantiles have distinct colours; lower or higher ones have the first or the last colour.
_DISTINCT = (0.02, 0.98)
#: Its lightness rises evenly, so that it can be read in grey, with more contrast than cividis has.
_COLOURS = "viridis"
#: Energies below this share of the layer's largest have the darkest colour.
_LEAST = 1e-8
#: And those below this quantile, so that a few unused channels do not take all colours.
_DARKEST = 0.01
#: Inches; the scale of colours needs them.
_LEAST_HEIGHT = 2.0
#: Few colours make a small file, without a visible difference.
_SHADES = 64


def draw_map(record: Record) -> Drawing:
    """Which experts stay, and the score of each if they have scores."""
    layers = list(record.counts)
    pixels, colours = _map_pixels(record)
    starts = range(0, record.experts, _ACROSS)
    row = _row_height(len(layers))
    figure, axes = new_figure(0.95 + len(starts) * (0.45 + row * len(layers)), nrows=len(starts), squeeze=False)
    panels = list(axes[:, 0])
    for panel, start in zip(panels, starts, strict=True):
        stop = min(start + _ACROSS, record.experts)
        extent = (start - 0.5, stop - 0.5, len(layers) - 0.5, -0.5)
        panel.imshow(pixels[:, start * _CELL : stop * _CELL], interpolation="none", aspect="auto", extent=extent)
        panel.set(xlim=(start - 0.5, start + min(_ACROSS, record.experts) - 0.5))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _layer_rows(panel, layers)
    panels[-1].set_xlabel("expert (its number in the source)")
    if colours is not None:
        bar = figure.colorbar(colours, ax=panels, extend="both", fraction=0.04, pad=0.01, aspect=18)
        bar.set_label("score / mean of its layer")
        bar.outline.set_visible(False)
    keys = [Line2D([], [], marker="s", markersize=size, linestyle="", color=GREY) for size in (8, 3)]
    legend(figure, 2, keys, ["kept: the complete cell", "removed: a square within it"])
    return figure, f"Map of {len(layers)} layers by {record.experts} experts: the score of each, and whether it stays."


def _map_pixels(record: Record) -> tuple[NDArray[np.uint8], matplotlib.cm.ScalarMappable | None]:
    """The map (layers, experts) in pixels (_CELL of each), and its scale of colours if there are scores."""
    kept = np.zeros((len(record.layers), record.experts), dtype=bool)
    for row, layer in enumerate(record.layers):
        kept[row, layer.kept] = True
    scale = None
    if record.is_scored:
        scores = np.array([layer.scores for layer in record.layers], dtype=np.float64)
        means = scores.mean(axis=1, keepdims=True)
        # Over the mean of their layer, so that layers of any scale can be seen on one map; but layers whose mean is not
        # positive (a method may give negative scores) are left as they are.
        values = scores / np.where(means > 0, means, 1.0)
        low, high = (float(end) for end in np.quantile(values, _DISTINCT))
        shares = np.clip((values - low) / (high - low or 1.0), 0, 1)
        # Few colours make a small file, without a visible difference.
        colours = matplotlib.colormaps[_COLOURS](np.round(shares * 63) / 63)[:, :, :3]
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(low, high), _COLOURS)
    else:
        colours = np.broadcast_to(matplotlib.colors.to_rgb(BLUE), (*kept.shape, 3))
    cells = np.round(colours * 255).astype(np.uint8).repeat(_CELL, axis=0).repeat(_CELL, axis=1)
    square = np.zeros((_CELL, _CELL), dtype=bool)
    square[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = True
    filled = kept.repeat(_CELL, axis=0).repeat(_CELL, axis=1) | np.tile(square, kept.shape)
    return np.where(filled[:, :, None], cells, np.uint8(255)), scale


def draw_channels(layers: Sequence[int], energies: NDArray[np.float64], width: int) -> Drawing:
    """The energy (layers, W) of the experts' best channels, their second best and so on, and the kept `width`."""
    full = energies.shape[1]
    figure, axes = new_figure(max(_LEAST_HEIGHT, 1.2 + _row_height(len(layers)) * len(layers)))
    largest = energies.max(axis=1, keepdims=True)
    shares = energies / np.where(largest > 0, largest, 1.0)
    logs = np.log10(np.maximum(shares, _LEAST))
    lowest = min(-1.0, float(np.quantile(logs, _DARKEST)))
    shades = matplotlib.colormaps[_COLOURS].resampled(_SHADES)
    image = axes.imshow(
        logs, cmap=shades, vmin=lowest, vmax=0.0, interpolation="none", aspect="auto",
        extent=(0.5, full + 0.5, len(layers) - 0.5, -0.5),
    )  # fmt: skip
    # White below black: it can be seen on any colour.
    for colour, thickness, style in (("white", 4.0, "-"), (BLACK, 1.8, "--")):
        axes.axvline(width + 0.5, color=colour, linewidth=thickness, linestyle=style)
    side = "center" if 0.15 < width / full < 0.85 else "left" if width < full / 2 else "right"
    axes.annotate(
        f"kept: {width:,} of {full:,}", (width + 0.5, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4),
        textcoords="offset points", ha=side, va="bottom",
    )  # fmt: skip
    _layer_rows(axes, layers)
    axes.set(xlabel="channels of an expert, the one with the highest energy first")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=axes, extend="min", fraction=0.04, pad=0.01, aspect=18)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar.ax.yaxis.set_major_formatter(lambda value, _: "1" if not value else f"1e{value:.0f}")
    bar.set_label("relative energy")
    bar.outline.set_visible(False)
    return (
        figure,
        f"Map of {len(layers)} layers by {full} channels: their mean energy by rank; {width} of them are kept.",
    )


def _row_height(layers: int) -> float:
    """The height in inches of each row of a map of so many layers."""
    return min(0.34, max(0.085, 3.6 / layers))


def _layer_rows(axes: Axes, layers: Sequence[int]) -> None:
    """Name the rows of a map, at most 16 of them."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 10_000) if len(layers) / step <= 16)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_ylabel("layer")
    axes.grid(False)
