"""The grouped product of a layer's experts in several ways, compared and timed.

torch fuses it for bfloat16 on compute capability 9 and 10 only. On other GPUs, and in float16 on all, it waits for the
counts and starts a product per expert: what else could pay there is measured here.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.integrations.moe import _grouped_linear, _grouped_mm_fallback

from measuring.milliseconds import milliseconds


def library(input_RI: torch.Tensor, weight_ENI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """As a forward computes it."""
    output: torch.Tensor = _grouped_linear(input_RI, weight_ENI, ends_E)
    return output


def per_expert(input_RI: torch.Tensor, weight_ENI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """A product per expert, behind a wait for the counts."""
    output: torch.Tensor = _grouped_mm_fallback(input_RI, weight_ENI.transpose(1, 2), ends_E)
    return output


def padded(input_RI: torch.Tensor, weight_ENI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """One batched product, in which each expert has as many rows as the one with the most. Waits for that number."""
    begins_E = pad(ends_E[:-1], (1, 0))
    most = int((ends_E - begins_E).max())
    rows_EM = begins_E.unsqueeze(1) + torch.arange(most, device=ends_E.device)
    is_row_EM = rows_EM < ends_E.unsqueeze(1)
    input_EMI = input_RI[rows_EM.clamp(max=len(input_RI) - 1)]
    output_EMN = torch.bmm(input_EMI, weight_ENI.transpose(1, 2))
    output_RN = input_RI.new_zeros((len(input_RI) + 1, weight_ENI.shape[1]))
    # What only fills up goes to one row behind all others.
    output_RN[torch.where(is_row_EM, rows_EM, len(input_RI)).reshape(-1)] = output_EMN.flatten(0, 1)
    return output_RN[:-1]


def by_triton(input_RI: torch.Tensor, weight_ENI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Our kernel, which waits for nothing."""
    from measuring.grouped_kernel import grouped_product

    return grouped_product(input_RI, weight_ENI, ends_E)


WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "library": library, "per_expert": per_expert, "padded": padded, "triton": by_triton,
}  # fmt: skip


def measure_products(
    input_RI: torch.Tensor, weight_ENI: torch.Tensor, ends_E: torch.Tensor, dtypes: tuple[torch.dtype, ...]
) -> dict[str, Any]:
    """For each dtype and way: milliseconds, and the largest difference from the library's over its largest value.

    A way that fails leaves its error. On the CPU the kernel is left out, unless Triton interprets it. All rows belong
    to an expert.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    ways = {name: way for name, way in WAYS.items() if way is not by_triton or input_RI.is_cuda or interpreted}
    figures: dict[str, Any] = {"rows": len(input_RI), "weight": list(weight_ENI.shape)}
    for dtype in dtypes:
        given = (input_RI.to(dtype), weight_ENI.to(dtype), ends_E)
        expected = library(*given).float()
        found = figures[str(dtype).removeprefix("torch.")] = dict[str, Any]()
        for name, way in ways.items():
            try:
                difference = (way(*given).float() - expected).abs().max() / expected.abs().max()
                taken = milliseconds(partial(way, *given), input_RI.device)
                found[name] = {"ms": statistics.median(taken), "max_difference_over_max": float(difference)}
            except Exception as error:
                found[name] = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return figures
