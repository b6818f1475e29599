"""What experts are ranked by: one small function per method over the statistics of a block.

To add a method: write its function, enter it in METHODS, and its name in `settings.METHODS`.

Every function takes the statistics (E,) by field of `statistics.FIELDS`, the sources already mixed, and gives the
scores (E,), float64: the higher, the sooner an expert stays. An expert that no token was routed to scores 0. For a
token routed to expert j, g is its gate weight, f the expert's output before the gate, x the residual stream that enters
the block, and o the layer's routed output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np

from streamprune.errors import ScoresError
from streamprune.saliency.scores import Array

Statistics = Mapping[str, Array]
Method = Callable[[Statistics], Array]


def reap(statistics: Statistics) -> Array:
    """Mean of g·‖f‖ over the tokens routed to the expert: router-weighted expert activation (arXiv:2510.13999)."""
    return _per_token(statistics["gated_norms"], statistics)


def frequency(statistics: Statistics) -> Array:
    """Tokens routed to the expert; the usage that much older work prunes by (compared in arXiv:2504.05586)."""
    return statistics["tokens"].copy()


def weighted_frequency(statistics: Statistics) -> Array:
    """Σ g: the usage, each token counted by its gate weight (frequency and gate in the terms of arXiv:2606.15716)."""
    return statistics["gates"].copy()


def ean(statistics: Statistics) -> Array:
    """Σ ‖f‖: the expert activation norm of Jaiswal et al., 2025 (arXiv:2504.05586)."""
    return statistics["norms"].copy()


def ean_mean(statistics: Statistics) -> Array:
    """Mean of ‖f‖ over the tokens routed to the expert (the mean activation norm of arXiv:2606.15716)."""
    return _per_token(statistics["norms"], statistics)


def weighted_ean(statistics: Statistics) -> Array:
    """Σ g·‖f‖: REAP's sum before it is divided by the tokens, so that how often an expert is used counts too."""
    return statistics["gated_norms"].copy()


def max_activation(statistics: Statistics) -> Array:
    """The largest |value| in any f: by such peaks super experts are told (Su et al., 2025, arXiv:2507.23279)."""
    return statistics["peaks"].copy()


def relative_energy(statistics: Statistics) -> Array:
    """Σ (g·‖f‖)² / ‖x‖²: the energy that the expert adds, relative to that of the stream it is added to.

    Of no publication known to us. Relative to x, layers are comparable whatever the scale of their residual stream.
    """
    return statistics["relative_energies"].copy()


def composite(statistics: Statistics) -> Array:
    """Frequency × mean g × mean cos(g·f, o): used often, with a large gate, and in the direction of the layer's output.

    Of no publication known to us. Frequency is the tokens routed to the expert, the means are over these. An expert
    that mostly works against the others scores below 0.
    """
    return statistics["gates"] * _per_token(statistics["cosines"], statistics)


#: Every method that statistics decide. `random` is not one of them.
METHODS: Mapping[str, Method] = {
    "reap": reap,
    "frequency": frequency,
    "weighted-frequency": weighted_frequency,
    "ean": ean,
    "ean-mean": ean_mean,
    "weighted-ean": weighted_ean,
    "max-activation": max_activation,
    "relative-energy": relative_energy,
    "composite": composite,
}
RANDOM = "random"


def random_scores(count: int, block: int, seed: int) -> Array:
    """Uniform numbers in [0, 1) for the experts (count,) of a block: the control that every method has to beat.

    They depend on seed, block and expert alone: not on statistics, the number of layers, or a library's generator.
    """
    digests = (hashlib.sha256(f"{seed}:{block}:{expert}".encode()).digest() for expert in range(count))
    return np.array([int.from_bytes(digest[:8], "big") >> 11 for digest in digests], dtype=np.float64) / 2**53


def score_experts(method: str, statistics: Statistics, block: int, seed: int = 0) -> Array:
    """The scores (E,) of the experts of one block by a method of `settings.METHODS`; `seed` matters to `random` only.

    Raises ScoresError where statistics are so large that a score is infinite or no number.
    """
    if method == RANDOM:
        return random_scores(len(statistics["tokens"]), block, seed)
    with np.errstate(over="ignore", invalid="ignore"):
        scores = METHODS[method](statistics)
    if not np.isfinite(scores).all():
        expert = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ScoresError(
            f"Layer {block}, expert {expert}: {method} gives {scores[expert]}, which ranks nothing. Its statistics are "
            "too large: score the model again, or choose another --method."
        )
    return scores


def _per_token(sums: Array, statistics: Statistics) -> Array:
    tokens = statistics["tokens"]
    return np.divide(sums, tokens, out=np.zeros_like(sums), where=tokens > 0)
