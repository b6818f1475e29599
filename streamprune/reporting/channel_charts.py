"""The figures of the report about narrower and refitted experts: energies of channels, and the errors of a refit."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from streamprune.reporting.charts import (
    BLACK,
    BLUE,
    COLOURS,
    GREY,
    RED,
    Drawing,
    layer_axis,
    layer_rows,
    legend,
    new_figure,
)
from streamprune.reporting.record import RecordedRefit

#: Energies below this share of the layer's largest have the darkest colour.
_LEAST = 1e-8
#: And those below this quantile, so that a few unused channels do not take all colours.
_DARKEST = 0.01
#: Inches; the scale of colours needs them.
_LEAST_HEIGHT = 2.0
#: Few colours make a small file, without a visible difference.
_SHADES = 64


def draw_channels(layers: Sequence[int], energies: NDArray[np.float64], width: int) -> Drawing:
    """The energy (layers, W) of the experts' best channels, their second best and so on, and the kept `width`."""
    full = energies.shape[1]
    figure, axes = new_figure(max(_LEAST_HEIGHT, 1.2 + layer_rows(len(layers)) * len(layers)))
    largest = energies.max(axis=1, keepdims=True)
    shares = energies / np.where(largest > 0, largest, 1.0)
    logs = np.log10(np.maximum(shares, _LEAST))
    lowest = min(-1.0, float(np.quantile(logs, _DARKEST)))
    shades = matplotlib.colormaps[COLOURS].resampled(_SHADES)
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
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 10_000) if len(layers) / step <= 16)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set(ylabel="layer", xlabel="channels of an expert, the one with the highest energy first")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, extend="min", fraction=0.04, pad=0.01, aspect=18)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar.ax.yaxis.set_major_formatter(lambda value, _: "1" if not value else f"1e{value:.0f}")
    bar.set_label("relative energy")
    bar.outline.set_visible(False)
    return (
        figure,
        f"Map of {len(layers)} layers by {full} channels: their mean energy by rank; {width} of them are kept.",
    )


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
