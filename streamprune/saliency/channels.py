"""The energies of single channels: what each channel of each expert adds to the layer's output.

Channel j of an expert is row j of its gate and up projection, and column j of its down projection. For a token routed
to the expert with gate weight g, and the activation a_j that goes into the down projection, the channel adds g·a_j
times that column to the output. Its energy is Σ (g·a_j)²·‖down[:, j]‖² over these tokens.

Shapes: T tokens, K experts chosen per token, R rows (pairs sorted by expert, and padding), E experts, W channels, H
hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from streamprune.saliency.statistics import exact_dtype, part_rows

#: Rows that one thread of a GPU adds up: enough threads for any routing, also where one expert has most of the rows.
_RUN = 256


def squared_column_norms(module: Any) -> torch.Tensor:
    """‖down[:, j]‖² (E, W), float64, of every channel of an experts module in transformers' interface."""
    down = module.down_proj
    if module.is_transposed:
        parts = torch.split(down, part_rows(down, down[0].numel()))
        return torch.cat([part.to(exact_dtype(part)).square().sum(dim=2) for part in parts]).double()
    # (E, H, W): the sums over an expert's H rows.
    experts, rows, _ = down.shape
    counts = torch.full((experts,), rows, device=down.device)
    ones = torch.ones(experts * rows, dtype=exact_dtype(down), device=down.device)
    return weighted_squares(down.flatten(0, 1), ones, counts.cumsum(0), counts)


def channel_count(module: Any) -> int:
    """The channels W of each expert of a module in transformers' interface."""
    return int(module.down_proj.shape[1 if module.is_transposed else 2])


def weighted_squares(
    inner_RW: torch.Tensor, weights_R: torch.Tensor, ends_E: torch.Tensor, counts_E: torch.Tensor
) -> torch.Tensor:
    """Σ weight·activation² (E, W), float64, over the first `counts_E` rows of each expert, whose rows end at `ends_E`.

    Products are in float32 (or wider, as `inner_RW`). The order of the sums is fixed, so that they are the same every
    time. On a GPU, does not wait for it, and takes no padding: `counts_E` is not used.
    """
    if inner_RW.device.type != "cpu":
        return _in_segments(inner_RW, weights_R, ends_E)
    experts, width = len(ends_E), inner_RW.shape[1]
    dtype = exact_dtype(inner_RW)
    # A matrix-vector product per expert is ten times faster than segment_reduce, which is not vectorised on a CPU.
    sums_EW = torch.zeros((experts, width), dtype=dtype)
    buffer = torch.empty((part_rows(inner_RW, width), width), dtype=dtype)
    for expert, begin, end in _row_ranges(ends_E.tolist(), counts_E.tolist(), len(buffer)):
        squares = buffer[: end - begin].copy_(inner_RW[begin:end]).square_()
        sums_EW[expert].addmv_(squares.T, weights_R[begin:end])
    return sums_EW.double()


def _row_ranges(ends: list[int], counts: list[float], most: int) -> Iterator[tuple[int, int, int]]:
    """(expert, begin, end) of all experts' rows without padding, at most `most` rows each."""
    for expert, (first, count) in enumerate(zip([0, *ends[:-1]], counts, strict=True)):
        last = first + int(count)
        for begin in range(first, last, most):
            yield expert, begin, min(last, begin + most)


def _in_segments(inner_RW: torch.Tensor, weights_R: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """`weighted_squares` for a GPU: runs of at most _RUN rows of one expert are added up, then each expert's runs.

    (A kernel of segment_reduce adds up the rows of a segment one after the other.)
    """
    rows, width = inner_RW.shape
    sums_EW = torch.zeros((len(ends_E), width), dtype=torch.float64, device=inner_RW.device)
    size = part_rows(inner_RW, width)
    for begin in range(0, rows, size):
        part = inner_RW[begin : begin + size].to(exact_dtype(inner_RW), copy=True)
        part.square_().mul_(weights_R[begin : begin + size].unsqueeze(1))
        ends = (ends_E.long() - begin).clamp(0, len(part))
        runs = torch.arange(_RUN, len(part) + _RUN, _RUN, device=ends.device).clamp(max=len(part))
        cuts = torch.cat([ends, runs]).sort().values
        partial = _segment_sums(part, cuts).double()
        # Empty runs are zero, so it does not matter to which of two experts they are counted.
        sums_EW += _segment_sums(partial, torch.searchsorted(cuts, ends, right=True))
    return sums_EW


def _segment_sums(rows_RW: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The sums of consecutive rows, up to each of `ends`; later rows are ignored."""
    lengths = ends.diff(prepend=ends.new_zeros(1))
    # `unsafe` only skips the check of the lengths, which waits for the GPU.
    sums: torch.Tensor = torch.segment_reduce(rows_RW, "sum", lengths=lengths, axis=0, unsafe=True)
    return sums
