"""From some blocks of a model to all of them: what a streamed run of the whole model would take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from measuring.processes import ProcessError

#: The first blocks do not count: nothing is read ahead for the first, and libraries compile and allocate in both.
UNCOUNTED = 2
HOW = (
    f"seconds_for_all_blocks: the median of the blocks after block {UNCOUNTED}, times the model's number of blocks. "
    "seconds_for_the_model: with what the run took beside its blocks; of a whole run that is scaled up with the number "
    "of blocks (the proof against the source takes most of it)"
)


def extrapolate(block_seconds: Sequence[float], total_seconds: float, blocks: int, scale_rest: bool) -> dict[str, Any]:
    """Seconds for a model of `blocks` equal blocks, from those of the measured ones and of the whole run.

    With `scale_rest` what is beside the blocks grows with their number too; else it stays. Raises ProcessError with
    fewer than three measured blocks.
    """
    counted = block_seconds[UNCOUNTED:]
    if not counted:
        raise ProcessError(
            f"{len(block_seconds)} blocks were measured, of which the first {UNCOUNTED} do not count: "
            f"give --layers {UNCOUNTED + 1} or more"
        )
    each = statistics.median(counted)
    rest = max(0.0, total_seconds - sum(block_seconds))
    rest_of_all = rest * blocks / len(block_seconds) if scale_rest else rest
    return {
        "seconds_of_blocks": [round(seconds, 3) for seconds in block_seconds],
        "seconds_per_block": round(each, 4),
        "seconds_beside_blocks": round(rest, 3),
        "blocks_of_the_model": blocks,
        "seconds_for_all_blocks": round(each * blocks, 2),
        "seconds_for_the_model": round(each * blocks + rest_of_all, 2),
    }
