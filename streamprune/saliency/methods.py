"""The scoring methods. To add one, enter it in METHODS with its formula.

A score function gives the scores (E,), float64, of the experts of one layer: the higher, the longer an expert stays. An
expert that no token was routed to scores 0. For a token routed to expert j, g is its gate weight, f the expert's output
before the gate, x the residual stream that enters the layer, and o the layer's routed output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from streamprune.errors import ScoresError
from streamprune.saliency.scores import FIELDS, Array


@dataclass(frozen=True)
class MixedStatistics:
    """The statistics (E,) of layer `index` by field of FIELDS, with the sources mixed; `seed` is for `random`."""

    index: int
    fields: Mapping[str, Array]
    seed: int = 0

    def total(self, name: str) -> Array:
        """A field: a sum over the tokens routed to each expert, or a maximum."""
        return self.fields[name].copy()

    def mean(self, name: str) -> Array:
        """A sum divided by the tokens routed to each expert; 0 where there were none."""
        sums, tokens = self.fields[name], self.fields["tokens"]
        return np.divide(sums, tokens, out=np.zeros_like(sums), where=tokens > 0)


def random_scores(statistics: MixedStatistics) -> Array:
    """Uniform numbers in [0, 1) that depend on seed, layer and expert alone, not on a library's generator."""
    experts = range(len(statistics.fields["tokens"]))
    digests = (hashlib.sha256(f"{statistics.seed}:{statistics.index}:{expert}".encode()).digest() for expert in experts)
    return np.array([int.from_bytes(digest[:8], "big") >> 11 for digest in digests], dtype=np.float64) / 2**53


@dataclass(frozen=True)
class Method:
    """A way to score experts: its function, what a score means (for the model card), and its publication."""

    score: Callable[[MixedStatistics], Array]
    meaning: str
    publication: str = ""
    #: Whether its scores depend on the seed.
    is_random: bool = False


#: The mean activation norm, which has two names: `man` and `ean-mean`.
_MAN = Method(
    lambda statistics: statistics.mean("norms"),
    "the mean, over the tokens routed to it, of the norm of its output before the router weight",
    "MAN, arXiv:2606.15716",
)
#: Every method by its name on the command line, in the order of the help text.
METHODS: Mapping[str, Method] = {
    # Mean of g·‖f‖: router-weighted expert activation.
    "reap": Method(
        lambda statistics: statistics.mean("gated_norms"),
        "the mean, over the tokens routed to it, of its router weight times the norm of its output",
        "REAP, arXiv:2510.13999",
    ),
    # The usage that much older work prunes by (compared in arXiv:2504.05586).
    "frequency": Method(lambda statistics: statistics.total("tokens"), "the number of tokens routed to it"),
    # Σ g (frequency and gate in the terms of arXiv:2606.15716).
    "weighted-frequency": Method(
        lambda statistics: statistics.total("gates"), "the sum of its router weights over the tokens routed to it"
    ),
    # Σ ‖f‖: the expert activation norm of Jaiswal et al., 2025.
    "ean": Method(
        lambda statistics: statistics.total("norms"), "the sum of the norms of its outputs", "arXiv:2504.05586"
    ),
    # Mean of ‖f‖.
    "man": _MAN,
    "ean-mean": _MAN,
    # Mean of ‖f‖².
    "msan": Method(
        lambda statistics: statistics.mean("squared_norms"),
        "the mean, over the tokens routed to it, of the squared norm of its output before the router weight",
        "MSAN, arXiv:2606.15716",
    ),
    # Σ g·‖f‖: how often an expert is used counts too.
    "weighted-ean": Method(
        lambda statistics: statistics.total("gated_norms"),
        "the sum, over the tokens routed to it, of its router weight times the norm of its output",
        "the sum of which REAP, arXiv:2510.13999, takes the mean",
    ),
    # The largest |value| in any f: super experts are recognised by such peaks (Su et al., 2025).
    "max-activation": Method(
        lambda statistics: statistics.total("peaks"),
        "the largest value in any of its outputs",
        "as in arXiv:2507.23279",
    ),
    # Σ (g·‖f‖)² / ‖x‖²: relative to x, layers are comparable whatever the scale of their residual stream.
    "relative-energy": Method(
        lambda statistics: statistics.total("relative_energies"),
        "the energy that its weighted output adds, relative to that of the residual stream",
        "unpublished",
    ),
    # Tokens × mean g × mean cos(g·f, o): used often, with a large gate, and in the direction of the layer's output. An
    # expert that mostly works against the others scores below 0.
    "composite": Method(
        lambda statistics: statistics.fields["gates"] * statistics.mean("cosines"),
        "how often it is used, times its mean router weight, times the mean cosine of its output with the layer's",
        "unpublished",
    ),
    "random": Method(
        random_scores, "a number drawn at random: the control that every method has to beat", is_random=True
    ),
}
DEFAULT_METHOD = "reap"


def score_experts(method: str, statistics: MixedStatistics) -> Array:
    """The scores (E,) of the experts of one layer by a method of METHODS.

    Raises ScoresError if statistics are so large that a score is infinite or NaN, or if they are of an earlier version
    that did not record what the method needs.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            scores = METHODS[method].score(statistics)
    except KeyError as error:
        raise ScoresError(
            f"--method {method} needs {error.args[0]!r} ({FIELDS[error.args[0]]}), which the version of streamprune "
            "that made these scores did not record. Score the model again, or choose another --method."
        ) from None
    if not np.isfinite(scores).all():
        expert = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ScoresError(
            f"Layer {statistics.index}, expert {expert}: the {method} score is {scores[expert]}. Its statistics "
            "are too large: score the model again, or choose another --method."
        )
    return scores
