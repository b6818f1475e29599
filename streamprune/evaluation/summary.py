"""From what came of every token to what is told of every source: means, intervals, and the table for people.

Losses and KL divergence are nats per token; perplexity is e^loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from streamprune.errors import NonFiniteError
from streamprune.streaming.examining import SequenceFigures

#: Times that the sequences are drawn anew for an interval, and the share of all draws that lies within it.
_DRAWS, _WITHIN = 1000, 0.95


@dataclass(frozen=True)
class _Sums:
    """Sums over the tokens of each of N sequences, (N,) float64 each; `kl` are all tokens' (T,)."""

    tokens: torch.Tensor
    columns: Mapping[str, torch.Tensor]
    kl: torch.Tensor | None

    def mean(self, name: str) -> float:
        return float(self.columns[name].sum() / self.tokens.sum())

    def interval(self, name: str, draw: torch.Tensor) -> tuple[float, float]:
        means = self.columns[name][draw].sum(1) / self.tokens[draw].sum(1)
        low, high = torch.quantile(means, torch.tensor([(1 - _WITHIN) / 2, (1 + _WITHIN) / 2], dtype=torch.float64))
        return float(low), float(high)


def summarize(
    found: Sequence[SequenceFigures], sources: Sequence[str], errors: Mapping[str, Sequence[float]] | None = None
) -> dict[str, Any]:
    """`sources` and `all` of an evaluation, as `result.evaluations` describes them.

    `errors` are the mean relative errors behind every block by source, and under "all". Intervals are percentiles of a
    bootstrap (Efron 1979) that draws whole sequences, since the tokens of one are not independent, each source's among
    themselves; with a fixed seed, so that the same figures give the same intervals. Raises NonFiniteError where a model
    predicts no numbers.
    """
    told, draws, parts = [], [], []
    for source, name in enumerate(sources):
        sums = _sums([each.figures for each in found if each.source == source], name)
        draw = _draw(len(sums.tokens), source)
        told.append({"name": name, **_figures(sums, draw)})
        draws.append(draw)
        parts.append(sums)
    whole = _joined(parts)
    offsets = [sum(len(part.tokens) for part in parts[:number]) for number in range(len(parts))]
    together = torch.cat([draw + offset for draw, offset in zip(draws, offsets, strict=True)], dim=1)
    everything = {"name": "all", **_figures(whole, together)}
    for each in (*told, everything):
        if errors is not None:
            each["hidden_error"] = list(errors[each["name"] if each is not everything else "all"])
    return {"sources": told, "all": everything}


def mean_kl(found: Sequence[SequenceFigures]) -> float:
    """The mean KL divergence over all tokens, in nats."""
    values = torch.cat([each.figures.kl.flatten() for each in found if each.figures.kl is not None])
    return float(values.mean())


def _sums(figures: Sequence[Any], name: str) -> _Sums:
    columns: dict[str, list[torch.Tensor]] = {}
    for each in figures:
        values = {"loss": each.loss}
        if each.kl is not None:
            values |= {"original_loss": each.original_loss, "kl": each.kl, "top1_agreement": each.agrees}
            values["loss_increase"] = each.loss - each.original_loss
        for column, of_tokens in values.items():
            columns.setdefault(column, []).append(of_tokens.sum())
    summed = {column: torch.stack(values) for column, values in columns.items()}
    for column, sums in summed.items():
        bad = int((~torch.isfinite(sums)).sum())
        if bad:
            raise NonFiniteError(
                f"The {column.replace('_', ' ')} of {bad} of {len(sums)} sequences of {name} is no number: the model "
                "predicts NaN or infinity there. Try --dtype float32, and check that the model itself works."
            )
    tokens = torch.tensor([each.loss.numel() for each in figures], dtype=torch.float64)
    kl = torch.cat([each.kl.flatten() for each in figures]) if "kl" in summed else None
    return _Sums(tokens, summed, kl)


def _joined(parts: Sequence[_Sums]) -> _Sums:
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    known = [part.kl for part in parts if part.kl is not None]
    return _Sums(torch.cat([part.tokens for part in parts]), columns, torch.cat(known) if known else None)


def _draw(count: int, seed: int) -> torch.Tensor:
    """Numbers of sequences, (draws, count): each row as many as there are, with repetition."""
    return torch.randint(count, (_DRAWS, count), generator=torch.Generator().manual_seed(seed))


def _figures(sums: _Sums, draw: torch.Tensor) -> dict[str, Any]:
    told: dict[str, Any] = {"sequences": len(sums.tokens), "tokens": int(sums.tokens.sum())}
    for name in ("loss", "perplexity", "original_loss", "original_perplexity", "loss_increase", "kl", "top1_agreement"):
        column, change = (name.replace("perplexity", "loss"), _exp) if name.endswith("perplexity") else (name, float)
        if column not in sums.columns:
            continue
        told[name] = change(sums.mean(column))
        if name.startswith("original"):
            continue
        # Of a single sequence nothing can be said.
        several = len(sums.tokens) > 1
        told[f"{name}_interval"] = [change(end) for end in sums.interval(column, draw)] if several else None
    if sums.kl is not None:
        # (torch.quantile sorts no more than 2**24 values.)
        rank = max(1, math.ceil(0.99 * len(sums.kl)))
        told["kl_p99"] = float(sums.kl.kthvalue(rank).values)
    return told


def _exp(loss: float) -> float:
    # A loss beyond any model's would overflow.
    return math.exp(min(loss, 700.0))


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines for people, aligned: a row for each source, and for all of them if there are several."""
    pair = result["against"] is not None
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("source", lambda each: str(each["name"])),
        ("tokens", lambda each: f"{each['tokens']:,}"),
        ("loss", lambda each: f"{each['loss']:.3f}{_span(each, 'loss')}"),
        ("perplexity", lambda each: f"{each['perplexity']:,.2f}"),
    ]
    if pair:
        columns += [
            ("original's", lambda each: f"{each['original_loss']:.3f}"),
            ("KL", lambda each: f"{each['kl']:.4f}{_span(each, 'kl', 4)}"),
            ("99 %", lambda each: f"{each['kl_p99']:.3f}"),
            ("same top token", lambda each: f"{each['top1_agreement']:.1%}"),
        ]
    rows = [*result["sources"], *([result["all"]] if len(result["sources"]) > 1 else [])]
    cells = [[title for title, _ in columns], *([show(row) for _, show in columns] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    for row in cells:
        first = row[0].ljust(widths[0])
        yield "  " + "  ".join([first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])


def _span(each: Mapping[str, Any], name: str, digits: int = 3) -> str:
    span = each[f"{name}_interval"]
    return f" ({span[0]:.{digits}f} to {span[1]:.{digits}f})" if span is not None else ""
