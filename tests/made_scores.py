"""Scores made from tokens at random: as a run would record them, but without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from streamprune.models.config_json import ExpertSpec
from streamprune.saliency.scores import FIELDS, LayerStatistics, Scores

HIDDEN = 5


@dataclass(frozen=True)
class Token:
    """One token on its way through a layer: x, and by expert that it chose the gate weight g and the output f."""

    source: int
    x: np.ndarray
    chosen: dict[int, tuple[float, np.ndarray]]

    @property
    def routed(self) -> np.ndarray:
        """The layer's routed output o."""
        return sum((g * f for g, f in self.chosen.values()), np.zeros_like(self.x))


def make_tokens(seed: int, experts: int, top_k: int, per_source: Sequence[int], unused: int = 1) -> list[Token]:
    """Tokens of each source; each source has its own favourites, and nobody chooses the last `unused` experts."""
    draw = np.random.default_rng(seed)
    tokens = []
    for source, count in enumerate(per_source):
        likely = draw.dirichlet(np.full(experts - unused, 0.7)) + 1e-3
        for _ in range(count):
            chosen = draw.choice(experts - unused, size=top_k, replace=False, p=likely / likely.sum())
            gates = draw.dirichlet(np.ones(top_k))
            outputs = draw.normal(size=(top_k, HIDDEN)) * draw.lognormal(size=(top_k, 1))
            pairs = zip(chosen.tolist(), gates.tolist(), outputs, strict=True)
            tokens.append(Token(source, draw.normal(size=HIDDEN), {expert: (g, f) for expert, g, f in pairs}))
    return tokens


def record(index: int, tokens: Sequence[Token], sources: int, experts: int) -> LayerStatistics:
    """The statistics of these tokens, by a plain loop."""
    values = np.zeros((len(FIELDS), sources, experts))
    by_name = dict(zip(FIELDS, values, strict=True))
    for token in tokens:
        output = token.routed
        top = max(token.chosen, key=lambda expert: token.chosen[expert][0])
        for expert, (g, f) in token.chosen.items():
            at, norm = (token.source, expert), float(np.linalg.norm(f))
            by_name["tokens"][at] += 1
            by_name["gates"][at] += g
            by_name["gated_norms"][at] += g * norm
            by_name["norms"][at] += norm
            by_name["squared_gated_norms"][at] += (g * norm) ** 2
            by_name["peaks"][at] = max(by_name["peaks"][at], np.abs(f).max())
            by_name["relative_energies"][at] += (g * norm) ** 2 / float(token.x @ token.x)
            by_name["cosines"][at] += float(g * f @ output) / (g * norm * np.linalg.norm(output))
            by_name["top_choices"][at] += expert == top
            by_name["squared_norms"][at] += norm**2
    return LayerStatistics(index, values)


def make_channels(layer: LayerStatistics, width: int, seed: int = 0) -> np.ndarray:
    """Energies (S, E, W) of the channels of the experts of a layer at random; 0 without tokens."""
    tokens = layer.fields["tokens"]
    energies = np.random.default_rng(seed).lognormal(sigma=2.0, size=(*tokens.shape, width)) * tokens[:, :, None]
    return energies.astype(np.float32)


def make_scores(
    layers: Sequence[int] = (1, 2, 3, 4),
    experts: int = 12,
    top_k: int = 2,
    per_source: Sequence[int] = (40, 60),
    seed: int = 0,
    width: int | None = None,
    **spec: Any,
) -> Scores:
    """Scores of so many tokens of sources named `source0`, `source1`, …; with a `width` also of so many channels."""
    recorded = tuple(
        record(index, make_tokens(seed * 1000 + index, experts, top_k, per_source), len(per_source), experts)
        for index in layers
    )
    if width is not None:
        recorded = tuple(replace(layer, channels=make_channels(layer, width, seed)) for layer in recorded)
    names = tuple(f"source{number}" for number in range(len(per_source)))
    provenance = {"model": "org/model", "calibration": {"fingerprint": "abc", "recipe": "Größe"}}
    described = ExpertSpec((), "num_experts", experts, top_k, **spec)
    return Scores(recorded, names, tuple(per_source), described, provenance, {"fused": True})
