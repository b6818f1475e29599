"""Will it fit? Every part of the memory that a model takes on a card, and the inverse: what fits a budget. Pure.

The caches and the weights are counted; the rest is modelled, with an interval. Sizes are of a model served with
transformers (or anything as frugal), with the whole model on one card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from streamprune.config import MOST_TOKENS, ServingSpec
from streamprune.errors import SettingsError
from streamprune.fit.cache import CacheSizes, prefill_workspace_bytes
from streamprune.fit.weights import Weights
from streamprune.models.config_json import ExpertSpec, ModelShape, minimum_keep

MIB = 1024**2
#: Names of terms; those of the weights are followed by one of `weights.CATEGORIES`.
WEIGHTS, KV_CACHE, STATE = "weights: ", "KV cache", "recurrent state"
#: Tokens of a prompt that are computed at a time: what vLLM and most others begin with.
PREFILL_CHUNK = 2048
#: The CUDA context with the kernels of torch and cuBLAS's workspace. Reported between 0.3 and 0.7 GiB, by driver, card
#: and libraries.
CUDA_CONTEXT = (300 * MIB, 512 * MIB, 700 * MIB)
#: What torch's allocator cannot use: the rest of its 2 and 20 MiB pieces, and holes. Share of all that it hands out.
ALLOCATOR_SHARE = (0.0, 0.01, 0.03)
#: How far the modelled workspace may be off. Below: kernels that keep less (flash, fused experts). Above: transformers'
#: growing cache copies a layer's keys and values, and attention that is not fused.
WORKSPACE_SHARE = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Footprint:
    """All that is known of a model's memory.

    `spec` is None for a model of which no experts can be removed: it has none, or its blocks keep different numbers of
    them already (`weights.counts`). `itemsize` is bytes per value in which it computes; `max_positions` the longest
    context that its config names.
    """

    model: str
    weights: Weights
    spec: ExpertSpec | None
    cache: CacheSizes
    shape: ModelShape
    itemsize: int
    max_positions: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Term:
    """One part of the memory, in bytes, with bounds. `kind` is exact (counted), modelled (worked out) or measured."""

    name: str
    bytes: int
    kind: str
    low: int
    high: int


@dataclass(frozen=True)
class Estimate:
    """What one footprint takes in one use."""

    footprint: Footprint = field(repr=False)
    use: ServingSpec

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """Every part of the memory; the total is their sum."""
        return tuple(_terms(self.footprint, self.use))

    @property
    def total(self) -> int:
        """Bytes of all terms."""
        return sum(term.bytes for term in self.terms)

    @property
    def interval(self) -> tuple[int, int]:
        """The least and the most that the total may come to, in bytes."""
        return sum(term.low for term in self.terms), sum(term.high for term in self.terms)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(term.bytes for term in self.terms if term.name.startswith(WEIGHTS))

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(term.bytes for term in self.terms if term.name == KV_CACHE)

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent and convolution states."""
        return sum(term.bytes for term in self.terms if term.name == STATE)

    @property
    def total_experts(self) -> int:
        """Experts of all blocks together in the model as asked about; 0 without experts."""
        weights = self.footprint.weights
        if weights.counts is not None:
            return sum(weights.counts.values())
        if self.use.total is not None:
            return self.use.total
        return (self.experts or 0) * weights.sizes(self.use.weights_dtype).expert_layers

    @property
    def experts(self) -> int | None:
        """Experts per block in the model as asked about; 0 without experts, None where blocks may differ."""
        if self.use.total is not None or self.footprint.weights.counts is not None:
            return None
        return self.footprint.weights.count if self.use.keep is None else self.use.keep


@dataclass(frozen=True)
class Fit(Estimate):
    """An estimate held against a budget (bytes)."""

    budget: int

    @property
    def left(self) -> int:
        """Bytes of the budget that are not needed; negative when it does not fit."""
        return self.budget - self.total

    @property
    def fits(self) -> bool:
        """Whether the budget holds the total."""
        return self.left >= 0

    @cached_property
    def max_experts(self) -> int | None:
        """The most experts per block that fit, a number with which the router works; None if not even the fewest do."""
        spec = self.footprint.spec
        if spec is None:
            return None
        if self._fits(keep=None):
            return spec.count
        steps = range(minimum_keep(spec), spec.count, spec.groups)
        return _largest(steps, lambda keep: self._fits(keep=keep))

    @cached_property
    def max_total_experts(self) -> int | None:
        """The most experts of all blocks together, for a schedule that keeps different numbers per block."""
        spec = self.footprint.spec
        if spec is None:
            return None
        sizes = self.footprint.weights.sizes(self.use.weights_dtype, with_mtp=False)
        if not sizes.expert_layers or self._fits(keep=None):
            return spec.count * sizes.expert_layers
        # In whole units of one expert in one block; blocks are alike in all models that have such experts.
        rest = sum(term.bytes for term in _terms(self.footprint, replace(self.use, keep=0), routed=spec.count))
        fitting = int((self.budget - rest) * sizes.expert_layers // sizes.expert_bytes)
        # The workspace was that of a block which keeps all; where all keep equally few, it may be a little less.
        fitting = max(fitting, (self.max_experts or 0) * sizes.expert_layers)
        # All of them do not fit, with the multi-token prediction that only the unpruned model has.
        fitting = min(fitting, spec.count * sizes.expert_layers - 1)
        return fitting if fitting >= minimum_keep(spec) * sizes.expert_layers else None

    @cached_property
    def max_context(self) -> int:
        """The longest context (tokens, no longer than the model's own limit) that fits; 0 if none does."""
        longest = min(self.footprint.max_positions or max(self.use.context, 2**20), MOST_TOKENS // self.use.batch)
        return _largest(range(1, longest + 1), lambda context: self._fits(context=context)) or 0

    def _fits(self, **changes: int | str | None) -> bool:
        return Fit(self.footprint, replace(self.use, **changes), self.budget).fits  # type: ignore[arg-type]


def _terms(footprint: Footprint, use: ServingSpec, routed: int | None = None) -> Iterator[Term]:
    """The terms; `routed` is the number of experts that the routers choose among, if not the number kept."""
    weights = footprint.weights
    kept: float = weights.count if use.keep is None else use.keep
    # The pruned model has no multi-token prediction layers: those are never scored, and left out.
    sizes = weights.sizes(use.weights_dtype, with_mtp=use.total is None and kept == weights.count)
    if use.total is not None:
        # Blocks are alike, so that the mean tells their bytes. As long as nobody knows, one may keep all its experts.
        kept, routed = use.total / max(1, sizes.expert_layers), use.widest or weights.count
    exact = weights.measured and use.weights_dtype == "source"
    for name, size in sizes.bytes_by_category(kept).items():
        yield Term(f"{WEIGHTS}{name}", size, "exact" if exact else "modelled", size, size)
    kv_bytes = footprint.cache.kv_bytes(use.context, use.batch, use.kv_dtype)
    yield Term(KV_CACHE, kv_bytes, "exact", kv_bytes, kv_bytes)
    state = footprint.cache.state_bytes(use.batch)
    if state:
        yield Term(STATE, state, "exact", state, state)
    shape = replace(footprint.shape, experts=round(kept) if routed is None else routed)
    workspace = prefill_workspace_bytes(shape, PREFILL_CHUNK, use.context, use.batch, footprint.itemsize)
    yield _modelled("prefill workspace", *(round(workspace * share) for share in WORKSPACE_SHARE))
    yield _modelled("CUDA context", *CUDA_CONTEXT)
    handed_out = kv_bytes + state + workspace
    yield _modelled("allocator margin", *(round(handed_out * share) for share in ALLOCATOR_SHARE))


def _modelled(name: str, low: int, middle: int, high: int) -> Term:
    return Term(name, middle, "modelled", low, high)


def _largest(values: range, fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending values that fits, when all below a fitting one fit too."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if fits(values[middle]):
            low = middle + 1
        else:
            high = middle
    return values[low - 1] if low else None


def per_layer_note(footprint: Footprint) -> str:
    """Why a model whose blocks keep different numbers of experts has no other number, and what to do instead."""
    counts = footprint.weights.counts or {}
    return (
        f"the blocks of {footprint.model} keep different numbers of experts already ({min(counts.values())} to "
        f"{max(counts.values())}), and it cannot be pruned again. For another size, prune the model that it was made "
        "from once more, from the same scores (`streamprune prune SOURCE --scores ...`); `streamprune fit SOURCE` says "
        "how many experts fit."
    )


def check_keep(footprint: Footprint, keep: int) -> None:
    """Raise SettingsError for a number of experts that the model cannot have."""
    spec = footprint.spec
    if footprint.weights.counts is not None:
        raise SettingsError(f"--keep {keep} is not possible: {per_layer_note(footprint)}")
    if spec is None:
        raise SettingsError(f"--keep {keep}: {footprint.model} has no experts.")
    least = minimum_keep(spec)
    if not least <= keep <= spec.count or keep % spec.groups:
        step = f" in steps of {spec.groups}" if spec.groups > 1 else ""
        raise SettingsError(f"--keep {keep} is not possible: choose from {least} to {spec.count}{step}.")
