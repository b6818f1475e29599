"""The gated sum of each token's experts, and what is measured of their outputs on the way.

By torch, which is the reference. On a GPU one kernel of ours (`pair_kernel`) may do the same with a twentieth of the
memory traffic: the first micro-batch shows on each machine whether it gives the same sums to the bit. How fast it is
does not decide, since what is measured differs in its last digits: the same run must give the same scores again. With
STREAMPRUNE_PAIR_KERNEL=0 in the environment it is not tried. The log says what was chosen.

Shapes: T tokens, K experts chosen per token, R rows of the experts' outputs, H hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from streamprune.hardware.device import is_gpu, is_out_of_memory
from streamprune.saliency.statistics import cosines, measure, part_rows

#: The environment variable that turns the kernel off: an error of it on a GPU may end the process.
SWITCH = "STREAMPRUNE_PAIR_KERNEL"
#: Outputs (T·K·H values) from which on the kernel is used: for fewer, starting it takes as long as what it saves.
FEWEST_VALUES = 1 << 22
#: Outputs with which it is tried: so many that sums in another order would differ somewhere.
TRIAL_VALUES = 1 << 26


@dataclass(frozen=True)
class Combined:
    """Of T tokens: the gated sums (T, H), in the dtype of output times gate; and in float32 or wider the norms, peaks
    and cosines (T, K) of `statistics.Pairs`."""

    sums: torch.Tensor
    norms: torch.Tensor
    peaks: torch.Tensor
    cosines: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """Whether the kernel is used for outputs of some dtypes and sizes on a device, and why, for the log."""

    kernel: bool
    why: str


#: The choices of this process. What is not here has not been computed yet.
_choices: dict[tuple[Any, ...], Choice] = {}


def combine(output_RH: torch.Tensor, row_TK: torch.Tensor, gates_TK: torch.Tensor) -> Combined:
    """Combine the chosen experts of T tokens: `row_TK` are the rows of their outputs, before the gates."""
    if _choice(output_RH, row_TK, gates_TK).kernel:
        return by_kernel(output_RH, row_TK, gates_TK)
    return by_torch(output_RH, row_TK, gates_TK)


def gated_sums(output_RH: torch.Tensor, row_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    """The sums of `combine` alone."""
    if _choice(output_RH, row_TK, gates_TK).kernel:
        # What it measures on the way costs nothing that shows.
        return by_kernel(output_RH, row_TK, gates_TK).sums
    return _in_parts(output_RH, row_TK, gates_TK, lambda *_: ())[0]


def by_torch(output_RH: torch.Tensor, row_TK: torch.Tensor, gates_TK: torch.Tensor) -> Combined:
    """`combine` by torch, for every device and dtype."""
    return Combined(*_in_parts(output_RH, row_TK, gates_TK, measure))


def by_kernel(output_RH: torch.Tensor, row_TK: torch.Tensor, gates_TK: torch.Tensor) -> Combined:
    """`combine` by the kernel. Raises ImportError without Triton, and its errors if it cannot compile the kernel."""
    from streamprune.saliency.pair_kernel import combine_tokens

    sums, norms, peaks, dots, sum_norms = combine_tokens(output_RH, row_TK, gates_TK)
    return Combined(sums, norms, peaks, cosines(dots * gates_TK, gates_TK, norms, sum_norms))


def choices() -> list[dict[str, Any]]:
    """What was chosen so far in this process for outputs on a GPU, for the log."""
    return [
        {
            "device": device,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in dtypes],
            "hidden": hidden,
            "chosen": chosen,
            **vars(choice),
        }
        for (device, *dtypes, hidden, chosen), choice in _choices.items()
    ]


def _in_parts(
    output_RH: torch.Tensor,
    row_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    measured: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]],
) -> tuple[torch.Tensor, ...]:
    """The gated sums (T, H), and what `measured` gives of the outputs (T, K, H), the gates and the sums."""
    tokens, chosen = row_TK.shape
    size = part_rows(output_RH, chosen * output_RH.shape[1])
    done = []
    for begin in range(0, tokens, size):
        gates = gates_TK[begin : begin + size]
        rows_TK = row_TK[begin : begin + size]
        output_TKH = output_RH.index_select(0, rows_TK.reshape(-1)).view(*rows_TK.shape, -1)
        # In the model's own dtypes, as in transformers: these are the values that the model continues with.
        sum_TH = (output_TKH * gates.unsqueeze(-1)).sum(dim=1)
        done.append((sum_TH, *measured(output_TKH, gates, sum_TH)))
    return tuple(map(torch.cat, zip(*done, strict=True)))


def _choice(output_RH: torch.Tensor, row_TK: torch.Tensor, gates_TK: torch.Tensor) -> Choice:
    hidden, chosen = output_RH.shape[1], row_TK.shape[1]
    few = row_TK.numel() * hidden < FEWEST_VALUES
    # (torch's grouped product aligns rows to 16 bytes, with gaps between those of odd lengths.)
    if few or not is_gpu(output_RH.device) or not output_RH.is_contiguous():
        return Choice(False, "too little, not on a GPU, or with gaps")
    key = (str(output_RH.device), output_RH.dtype, gates_TK.dtype, hidden, chosen)
    if key not in _choices:
        tokens = max(1, TRIAL_VALUES // (chosen * hidden))
        try:
            _choices[key] = try_kernel(output_RH, row_TK[:tokens], gates_TK[:tokens])
        except torch.AcceleratorError as error:
            error.add_note(
                f"This came while our Triton kernel was tried. Set {SWITCH}=0 in the environment, then go on."
            )
            raise
    return _choices[key]


def try_kernel(output_RH: torch.Tensor, row_TK: torch.Tensor, gates_TK: torch.Tensor) -> Choice:
    """Whether the kernel gives what torch gives for these tokens. Waits for the GPU.

    Raises torch's error if memory runs out, or the GPU fails.
    """
    given = (output_RH, row_TK, gates_TK)
    if os.environ.get(SWITCH) == "0":
        return Choice(False, f"{SWITCH}=0")
    if torch.float64 in (output_RH.dtype, gates_TK.dtype):
        return Choice(False, "the kernel is for dtypes of at most 32 bits")
    try:
        ours = by_kernel(*given)
    except Exception as error:
        # Triton compiles with a C compiler and the GPU's driver, each of which may be missing or too old. (After an
        # error of the GPU itself nothing works in this process any more.)
        if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        return Choice(False, f"Triton: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")
    difference = _difference(ours, by_torch(*given))
    if difference is not None:
        return Choice(False, f"the kernel's {difference} differ from torch's")
    return Choice(True, f"the same as torch for {len(row_TK)} tokens")


def _difference(ours: Combined, theirs: Combined) -> str | None:
    """What is not the same: the sums to the bit, what is measured up to its rounding."""
    if not torch.equal(ours.sums, theirs.sums):
        return "sums"
    for name, most in (("norms", 1e-5), ("peaks", 0.0), ("cosines", 1e-5)):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if not torch.allclose(mine, other, rtol=most, atol=most if name == "cosines" else 0.0):
            return name
    return None
