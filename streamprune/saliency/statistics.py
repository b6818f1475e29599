"""Measuring what each chosen expert contributes to a token, and summing it on the device (see `saliency.scores`).

Shapes: T tokens, K experts chosen per token, E experts, W channels of an expert, H hidden size, F fields of the
statistics, S sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from streamprune.distributed.processes import Processes
from streamprune.hardware.device import is_gpu
from streamprune.saliency.scores import FIELDS, MAXIMA, MAXIMA_PLACES, LayerStatistics

#: Values that are converted to float32 at a time, few enough to stay in the caches. Converting all outputs of a
#: micro-batch at once would allocate new memory each time, which takes a CPU longer than the arithmetic (15 of 33 ms
#: for 1,024 tokens of tools/bench's `mid` shape), and a GPU a GiB.
CPU_PART_VALUES, GPU_PART_VALUES = 1 << 19, 1 << 24


@dataclass(frozen=True)
class Pairs:
    """The measurements of each pair of a token and one of its chosen experts, all (T, K).

    `index` are the experts; E or more means no expert (zero-computation experts, padding). `gates` are the weights with
    which the model combines the experts' outputs, `ranks` order a token's choices (usually the gates). `norms` and
    `peaks` are the 2-norm and the largest absolute value of the expert's output before the gate; `cosines` are between
    the gated output and the gated sum over the chosen experts.
    """

    index: torch.Tensor
    gates: torch.Tensor
    ranks: torch.Tensor
    norms: torch.Tensor
    peaks: torch.Tensor
    cosines: torch.Tensor


class ExpertStatistics:
    """Statistics of the experts of one layer: `values` (F, S, E), float64, on the layer's device.

    `channels` (S, E, W), float64, are the energies of the `width` channels of each expert (see `saliency.channels`);
    None if they are not recorded.
    """

    def __init__(self, experts: int, device: torch.device, sources: int = 1, width: int | None = None) -> None:
        self.values = torch.zeros((len(FIELDS), sources, experts), dtype=torch.float64, device=device)
        self.channels: torch.Tensor | None = None
        if width is not None:
            self.channels = torch.zeros((sources, experts, width), dtype=torch.float64, device=device)

    def add(self, pairs: Pairs, residual_T: torch.Tensor, source: int = 0) -> None:
        """Add T tokens of one source; `residual_T` are the norms of the residual stream that enters the layer."""
        experts = self.values.shape[-1]
        column_TK = pairs.index.clamp(max=experts)
        # One row per token, at most one value per cell: so the order of the sums is fixed, and they are the same in
        # every run, unlike with scatter_add on a GPU. All fields fill the same cells of one table; its last column
        # collects entries without an expert.
        table = torch.zeros((len(column_TK), experts + 1), dtype=torch.float64, device=column_TK.device)
        for field, value_TK in _fields(pairs, residual_T):
            table.scatter_(1, column_TK, value_TK)
            place = self.values[list(FIELDS).index(field), source]
            if field in MAXIMA:
                torch.maximum(place, table.amax(0)[:experts], out=place)
            else:
                place += table.sum(0)[:experts]

    def merge(self, other: ExpertStatistics, source: int) -> None:
        """Add the statistics of one source. Allocates no memory, so it cannot fail half-way."""
        for number, field in enumerate(FIELDS):
            place = self.values[number, source]
            if field in MAXIMA:
                torch.maximum(place, other.values[number, 0], out=place)
            else:
                place += other.values[number, 0]
        if self.channels is not None and other.channels is not None:
            self.channels[source] += other.channels[0]

    def add_up(self, processes: Processes) -> None:
        """Add up the statistics of all ranks."""
        processes.add_up(self.values, MAXIMA_PLACES)
        if self.channels is not None:
            processes.add_up(self.channels)

    def of_layer(self, index: int) -> LayerStatistics:
        """The statistics of layer `index`, as they are recorded."""
        channels = self.channels.float().cpu().numpy() if self.channels is not None else None
        return LayerStatistics(index, self.values.cpu().numpy(), channels)


def _fields(pairs: Pairs, residual_T: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Every field's values of all pairs, (T, K) float64."""
    gates, norms = pairs.gates.double(), pairs.norms.double()
    gated = gates * norms
    energy_T1 = residual_T.double().square().unsqueeze(1)
    top_T1 = pairs.ranks.argmax(dim=1, keepdim=True)
    yield "tokens", torch.ones_like(gated)
    yield "gates", gates
    yield "gated_norms", gated
    yield "norms", norms
    yield "squared_gated_norms", gated.square()
    yield "peaks", pairs.peaks.double()
    # A residual stream of zeros has no energy to divide by.
    yield "relative_energies", torch.where(energy_T1 > 0, gated.square() / energy_T1, 0.0)
    yield "cosines", pairs.cosines.double()
    yield "top_choices", torch.zeros_like(gated).scatter_(1, top_T1, 1.0)
    yield "squared_norms", norms.square()


def part_rows(tensor: torch.Tensor, row_values: int) -> int:
    """How many rows of `row_values` values are converted at a time on the tensor's device."""
    return max(1, (GPU_PART_VALUES if is_gpu(tensor.device) else CPU_PART_VALUES) // max(1, row_values))


def exact_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype for norms: float32, or the tensor's own dtype if that is wider."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def norms(vectors: torch.Tensor) -> torch.Tensor:
    """The 2-norms of vectors along the last axis, in float32 or wider."""
    parts = torch.split(vectors, part_rows(vectors, vectors[0].numel() if len(vectors) else 1))
    return torch.cat([torch.linalg.vector_norm(part.to(exact_dtype(part)), dim=-1) for part in parts])


def measure(output_TKH: torch.Tensor, gates_TK: torch.Tensor, sum_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Norms, peaks and cosines (T, K) of `Pairs`, in float32 or wider, from the outputs of a token's experts.

    `sum_TH` is the gated sum of these outputs. Returns (norms, peaks, cosines).
    """
    exact = exact_dtype(output_TKH)
    size = part_rows(output_TKH, output_TKH.shape[1] * output_TKH.shape[2])
    measured = []
    for parts in zip(*(torch.split(each, size) for each in (output_TKH, gates_TK, sum_TH)), strict=True):
        output, gates, total = parts[0].to(exact), parts[1], parts[2].to(exact)
        length = torch.linalg.vector_norm(output, dim=-1)
        # Equals the infinity norm, which is forty times slower on a CPU.
        peak = output.abs().amax(dim=-1)
        # In float32, since half precision overflows for large outputs. (A matrix product is thirty times slower on a
        # CPU.)
        dot = (output * total.unsqueeze(1)).sum(dim=-1) * gates
        together = cosines(dot, gates, length, torch.linalg.vector_norm(total, dim=-1))
        measured.append((length, peak, together))
    return tuple(map(torch.cat, zip(*measured, strict=True)))


def cosines(dot_TK: torch.Tensor, gates_TK: torch.Tensor, norms_TK: torch.Tensor, sum_T: torch.Tensor) -> torch.Tensor:
    """cos(g·f, o) of all pairs (T, K), from the dot products of g·f and o, the gates, ‖f‖, and ‖o‖ (T,).

    0 if either of the two is zero. Clipped to -1 to 1, which rounding may exceed.
    """
    length_TK = gates_TK.to(norms_TK.dtype).abs() * norms_TK * sum_T.unsqueeze(1)
    return torch.where(length_TK > 0, dot_TK.to(norms_TK.dtype) / length_TK, 0.0).clamp(-1.0, 1.0)
