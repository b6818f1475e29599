"""Lengths of many vectors and the angles between them, part by part.

Widened to float32, the outputs of a micro-batch would be copied to memory that is new each time, which takes a CPU
longer than the arithmetic (15 of 33 ms for 1,024 tokens of tools/bench's `mid` shape), and a card a GiB. So the vectors
are taken in parts that stay in the caches.

Shapes: T tokens, K vectors per token, H values per vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Values that are widened at a time, by kind of device.
_PART_VALUES = {"cpu": 1 << 19, "cuda": 1 << 24}


def norms(vectors: torch.Tensor) -> torch.Tensor:
    """The 2-norms of vectors along the last axis, in float32 or wider."""
    return _by_parts(torch.linalg.vector_norm, vectors)


def peaks(vectors: torch.Tensor) -> torch.Tensor:
    """The largest absolute values along the last axis, in float32 or wider."""
    # The infinity norm is the same, and takes forty times as long on a CPU.
    return _by_parts(lambda part, dim: part.abs().amax(dim=dim), vectors)


def norms_and_peaks(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both at once, so that the vectors are read once."""

    def both(part: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.stack((torch.linalg.vector_norm(part, dim=dim), part.abs().amax(dim=dim)), dim=-1)

    found = _by_parts(both, vectors)
    return found[..., 0], found[..., 1]


def dots(vectors_TKH: torch.Tensor, with_TH: torch.Tensor) -> torch.Tensor:
    """The dot products (T, K) of a token's K vectors with one of its own, in float32 or wider."""
    exact = exact_dtype(vectors_TKH)
    size = part_rows(vectors_TKH, vectors_TKH.shape[1] * vectors_TKH.shape[2])
    parts = zip(torch.split(vectors_TKH, size), torch.split(with_TH, size), strict=True)
    # Products in half precision would overflow where an expert's output is large. (As a product of matrices it would
    # take thirty times as long on a CPU.)
    return torch.cat([(each.to(exact) * one.to(exact).unsqueeze(1)).sum(dim=-1) for each, one in parts])


def _by_parts(measure: Callable[..., torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
    exact = exact_dtype(vectors)
    parts = torch.split(vectors, part_rows(vectors, vectors[0].numel() if len(vectors) else 1))
    return torch.cat([measure(part.to(exact), dim=-1) for part in parts])


def part_rows(tensor: torch.Tensor, row_values: int) -> int:
    """How many rows of so many values are worked on at a time, where the tensor lies."""
    return max(1, _PART_VALUES.get(tensor.device.type, _PART_VALUES["cuda"]) // max(1, row_values))


def exact_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What lengths are computed in: float32, or the tensor's own dtype if that is wider."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
