"""From metrics of every token to metrics of every source: means and intervals.

Losses and KL divergence are nats per token; perplexity is e^loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from streamprune.errors import NonFiniteError
from streamprune.streaming.predictions import SequenceFigures, TokenFigures

#: Bootstrap resamples, and the confidence level of an interval.
_DRAWS, _WITHIN = 1000, 0.95
#: The column of `Sums` that counts tokens.
TOKENS = "tokens"


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of one or more sources: `columns` by name; `drawn` (draws,) has the same for every resample.

    `kl` has the KL of all tokens (T,). `sequences` is their number, `fewest` that of the source with the fewest.
    """

    columns: Mapping[str, torch.Tensor]
    drawn: Mapping[str, torch.Tensor]
    kl: torch.Tensor | None
    sequences: int
    fewest: int

    def mean(self, name: str) -> float:
        """The mean of a column over all tokens."""
        return float(self.columns[name] / self.columns[TOKENS])

    def interval(self, name: str) -> tuple[float, float] | None:
        """The interval of the mean; None if a source has a single sequence, since the variance is unknown."""
        if self.fewest < 2:
            return None
        means = self.drawn[name] / self.drawn[TOKENS]
        low, high = torch.quantile(means, torch.tensor([(1 - _WITHIN) / 2, (1 + _WITHIN) / 2], dtype=torch.float64))
        return float(low), float(high)


def sums_by_source(found: Sequence[SequenceFigures], sources: Sequence[str]) -> list[Sums]:
    """The sums of each source. Raises NonFiniteError if a model predicts NaN or infinity.

    Complete sequences are resampled, since the tokens of one are not independent, within each source; with a fixed
    seed, so that the intervals are reproducible, and the resamples of all models have the same sequences.
    """
    return [
        _sums([each.figures for each in found if each.source == source], name, seed=source)
        for source, name in enumerate(sources)
    ]


def summary_of(
    parts: Sequence[Sums], sources: Sequence[str], errors: Sequence[Sequence[float]] | None = None
) -> dict[str, Any]:
    """`sources` and `all` of an evaluation, as `reporting.evaluations` describes them, from the sums of each source.

    `errors` are the mean relative errors after every layer by source, then those of all together.
    Intervals are percentiles of a bootstrap (Efron 1979).
    """
    figures = [{"name": name, **_figures(sums)} for name, sums in zip(sources, parts, strict=True)]
    everything = {"name": "all", **_figures(joined(parts))}
    if errors is not None:
        for each, after_layers in zip((*figures, everything), errors, strict=True):
            each["hidden_error"] = list(after_layers)
    return {"sources": figures, "all": everything}


def mean_kl(found: Sequence[SequenceFigures]) -> float:
    """The mean KL divergence over all tokens, in nats."""
    values = torch.cat([each.figures.kl.flatten() for each in found if each.figures.kl is not None])
    return float(values.mean())


def _sums(figures: Sequence[TokenFigures], name: str, seed: int) -> Sums:
    columns: dict[str, list[torch.Tensor]] = {}
    for each in figures:
        values = {TOKENS: torch.ones_like(each.loss), "loss": each.loss}
        if each.kl is not None and each.original_loss is not None and each.agrees is not None:
            values |= {"original_loss": each.original_loss, "kl": each.kl, "top1_agreement": each.agrees}
            values["loss_increase"] = each.loss - each.original_loss
        for column, of_tokens in values.items():
            columns.setdefault(column, []).append(of_tokens.sum())
    summed = {column: torch.stack(values) for column, values in columns.items()}
    for column, sums in summed.items():
        bad = int((~torch.isfinite(sums)).sum())
        if bad:
            raise NonFiniteError(
                f"The {column.replace('_', ' ')} of {bad} of {len(sums)} sequences of {name} is NaN or infinite. "
                "Try --dtype float32, and check that the model itself works."
            )
    # Each resample has as many sequences, with repetition. They are drawn one after the other: all of them together may
    # take more memory than the model.
    generator, count = torch.Generator().manual_seed(seed), len(figures)
    table = torch.stack(list(summed.values()))
    draws = [table[:, torch.randint(count, (count,), generator=generator)].sum(1) for _ in range(_DRAWS)]
    known = [each.kl.flatten() for each in figures if each.kl is not None]
    return Sums(
        {column: sums.sum() for column, sums in summed.items()},
        dict(zip(summed, torch.stack(draws, dim=1), strict=True)),
        torch.cat(known) if known else None,
        count,
        count,
    )


def joined(parts: Sequence[Sums]) -> Sums:
    """All sources together: a resample of all has one of each."""
    known = [part.kl for part in parts if part.kl is not None]
    return Sums(
        {name: torch.stack([part.columns[name] for part in parts]).sum() for name in parts[0].columns},
        {name: torch.stack([part.drawn[name] for part in parts]).sum(0) for name in parts[0].drawn},
        torch.cat(known) if known else None,
        sum(part.sequences for part in parts),
        min(part.fewest for part in parts),
    )


def _figures(sums: Sums) -> dict[str, Any]:
    figures: dict[str, Any] = {"sequences": sums.sequences, "tokens": int(sums.columns[TOKENS])}
    for name in ("loss", "perplexity", "original_loss", "original_perplexity", "loss_increase", "kl", "top1_agreement"):
        column, change = (name.replace("perplexity", "loss"), _exp) if name.endswith("perplexity") else (name, float)
        if column not in sums.columns:
            continue
        figures[name] = change(sums.mean(column))
        if not name.startswith("original"):
            interval = sums.interval(column)
            figures[f"{name}_interval"] = [change(end) for end in interval] if interval is not None else None
    if sums.kl is not None:
        # Not torch.quantile: it takes at most 2**24 values.
        rank = max(1, math.ceil(0.99 * len(sums.kl)))
        figures["kl_p99"] = float(sums.kl.kthvalue(rank).values)
    return figures


def _exp(loss: float) -> float:
    # An extremely large loss would overflow.
    return math.exp(min(loss, 700.0))
