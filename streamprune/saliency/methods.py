"""What experts are ranked by. To add a method: write its function, and enter it in METHODS with a line about it.

Every function gives the scores (E,), float64, of the experts of one layer: the higher, the longer an expert stays. An
expert that no token was routed to scores 0. For a token routed to expert j, g is its gate weight, f the expert's output
before the gate, x the residual stream that enters the layer, and o the layer's routed output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from streamprune.errors import ScoresError
from streamprune.saliency.scores import Array


@dataclass(frozen=True)
class MixedStatistics:
    """The statistics (E,) of layer `index` by field of FIELDS, with the sources mixed; `seed` is for `random`."""

    index: int
    fields: Mapping[str, Array]
    seed: int = 0

    def __getitem__(self, name: str) -> Array:
        return self.fields[name]

    def per_token(self, sums: Array) -> Array:
        """Sums (E,) divided by the tokens routed to each expert; 0 where there were none."""
        tokens = self.fields["tokens"]
        return np.divide(sums, tokens, out=np.zeros_like(sums), where=tokens > 0)


def reap(statistics: MixedStatistics) -> Array:
    """Mean of g·‖f‖ over the tokens routed to the expert: router-weighted expert activation (arXiv:2510.13999)."""
    return statistics.per_token(statistics["gated_norms"])


def frequency(statistics: MixedStatistics) -> Array:
    """Tokens routed to the expert; the usage that much older work prunes by (compared in arXiv:2504.05586)."""
    return statistics["tokens"].copy()


def weighted_frequency(statistics: MixedStatistics) -> Array:
    """Σ g: the usage, each token counted by its gate weight (frequency and gate in the terms of arXiv:2606.15716)."""
    return statistics["gates"].copy()


def ean(statistics: MixedStatistics) -> Array:
    """Σ ‖f‖: the expert activation norm of Jaiswal et al., 2025 (arXiv:2504.05586)."""
    return statistics["norms"].copy()


def ean_mean(statistics: MixedStatistics) -> Array:
    """Mean of ‖f‖ over the tokens routed to the expert (the mean activation norm of arXiv:2606.15716)."""
    return statistics.per_token(statistics["norms"])


def weighted_ean(statistics: MixedStatistics) -> Array:
    """Σ g·‖f‖: REAP's sum before it is divided by the tokens, so that how often an expert is used counts too."""
    return statistics["gated_norms"].copy()


def max_activation(statistics: MixedStatistics) -> Array:
    """The largest |value| in any f: super experts are recognised by such peaks (Su et al., 2025, arXiv:2507.23279)."""
    return statistics["peaks"].copy()


def relative_energy(statistics: MixedStatistics) -> Array:
    """Σ (g·‖f‖)² / ‖x‖²: the energy that the expert adds, relative to that of the stream it is added to.

    Of no publication known to us. Relative to x, layers are comparable whatever the scale of their residual stream.
    """
    return statistics["relative_energies"].copy()


def composite(statistics: MixedStatistics) -> Array:
    """Frequency × mean g × mean cos(g·f, o): used often, with a large gate, and in the direction of the layer's output.

    Of no publication known to us. Frequency is the tokens routed to the expert, the means are over these. An expert
    that mostly works against the others scores below 0.
    """
    return statistics["gates"] * statistics.per_token(statistics["cosines"])


def random_scores(statistics: MixedStatistics) -> Array:
    """Uniform numbers in [0, 1): the control that every method has to beat.

    They depend on seed, layer and expert alone: not on statistics, the number of layers, or a library's generator.
    """
    experts = range(len(statistics["tokens"]))
    digests = (hashlib.sha256(f"{statistics.seed}:{statistics.index}:{expert}".encode()).digest() for expert in experts)
    return np.array([int.from_bytes(digest[:8], "big") >> 11 for digest in digests], dtype=np.float64) / 2**53


@dataclass(frozen=True)
class Method:
    """A way to score experts: its function, what a score is (in words, for the model card), and where it is from."""

    score: Callable[[MixedStatistics], Array]
    meaning: str
    publication: str = ""
    #: Whether its scores depend on the seed.
    is_random: bool = False


#: Every method by its name on the command line, in the order of the help text.
METHODS: Mapping[str, Method] = {
    "reap": Method(
        reap,
        "the mean, over the tokens routed to it, of its router weight times the norm of its output",
        "REAP, arXiv:2510.13999",
    ),
    "frequency": Method(frequency, "the number of tokens routed to it"),
    "weighted-frequency": Method(
        weighted_frequency, "the sum of its router weights over the tokens routed to it"
    ),
    "ean": Method(ean, "the sum of the norms of its outputs", "arXiv:2504.05586"),
    "ean-mean": Method(ean_mean, "the mean norm of its outputs"),
    "weighted-ean": Method(
        weighted_ean,
        "the sum, over the tokens routed to it, of its router weight times the norm of its output",
        "the sum of which REAP, arXiv:2510.13999, takes the mean",
    ),
    "max-activation": Method(
        max_activation, "the largest value in any of its outputs", "as in arXiv:2507.23279"
    ),
    "relative-energy": Method(
        relative_energy,
        "the energy that its weighted output adds, relative to that of the residual stream",
        "unpublished",
    ),
    "composite": Method(
        composite,
        "how often it is used, times its mean router weight, times the mean cosine of its output with the layer's",
        "unpublished",
    ),
    "random": Method(
        random_scores, "a number drawn at random: the control that every method has to beat", is_random=True
    ),
}  # fmt: skip
DEFAULT_METHOD = "reap"


def score_experts(method: str, statistics: MixedStatistics) -> Array:
    """The scores (E,) of the experts of one layer by a method of METHODS.

    Raises ScoresError where statistics are so large that a score is infinite or not a number.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scores = METHODS[method].score(statistics)
    if not np.isfinite(scores).all():
        expert = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ScoresError(
            f"Layer {statistics.index}, expert {expert}: {method} gives {scores[expert]}, which ranks nothing. Its "
            "statistics are too large: score the model again, or choose another --method."
        )
    return scores
