"""From some layers of a model to all of them: what a streamed run of the whole model would take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from measuring.processes import ProcessError

#: The first layers do not count: nothing is read ahead for the first, and libraries compile and allocate in both.
UNCOUNTED = 2
HOW = (
    f"seconds_for_all_layers: the median of the layers after layer {UNCOUNTED}, times the model's number of layers. "
    "seconds_for_the_model: with what the run took beside its layers; of a whole run that is scaled up with the number "
    "of layers (the proof against the source takes most of it)"
)


def extrapolate(layer_seconds: Sequence[float], total_seconds: float, layers: int, scale_rest: bool) -> dict[str, Any]:
    """Seconds for a model of `layers` equal layers, from those of the measured ones and of the whole run.

    With `scale_rest` what is beside the layers grows with their number too; else it stays. Raises ProcessError with
    fewer than three measured layers.
    """
    counted = layer_seconds[UNCOUNTED:]
    if not counted:
        raise ProcessError(
            f"{len(layer_seconds)} layers were measured, of which the first {UNCOUNTED} do not count: "
            f"give --layers {UNCOUNTED + 1} or more"
        )
    each = statistics.median(counted)
    rest = max(0.0, total_seconds - sum(layer_seconds))
    rest_of_all = rest * layers / len(layer_seconds) if scale_rest else rest
    return {
        "seconds_of_layers": [round(seconds, 3) for seconds in layer_seconds],
        "seconds_per_layer": round(each, 4),
        "seconds_beside_layers": round(rest, 3),
        "layers_of_the_model": layers,
        "seconds_for_all_layers": round(each * layers, 2),
        "seconds_for_the_model": round(each * layers + rest_of_all, 2),
    }
