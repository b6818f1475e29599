"""Every part of the memory of a served model on a GPU, and the largest settings that fit a budget. No torch.

Caches and weights are counted; the rest is modelled, with an interval. Sizes are those of the complete model on one
GPU, served with transformers or an engine that needs no more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self

from streamprune.errors import SettingsError, StreampruneError
from streamprune.fit.cache import CacheSizes, prefill_workspace_bytes
from streamprune.fit.engine_rules import Served
from streamprune.fit.engines import good_count
from streamprune.fit.gguf import gguf_sizes
from streamprune.fit.weights import Weights, WeightSizes
from streamprune.models.config_json import ExpertSpec, ModelShape, minimum_keep
from streamprune.quantize.gguf_types import GGUF_TYPES
from streamprune.targets import MOST_TOKENS, MTP, ServingSpec

MIB = 1024**2
#: Names of terms; those of the weights are followed by one of `weights.CATEGORIES`.
WEIGHTS, KV_CACHE, STATE = "weights: ", "KV cache", "recurrent state"
#: Tokens of a prompt that are computed at a time: the default of vLLM and most other engines.
PREFILL_CHUNK = 2048
#: The CUDA context with the kernels of torch and cuBLAS's workspace. Reported between 0.3 and 0.7 GiB, by driver, GPU
#: and libraries.
CUDA_CONTEXT = (300 * MIB, 512 * MIB, 700 * MIB)
#: Memory that torch's allocator loses: the ends of its 2 and 20 MiB segments, and gaps. Share of the allocated memory.
ALLOCATOR_SHARE = (0.0, 0.01, 0.03)
#: Bounds of the modelled workspace. Low: kernels that keep less (flash attention, fused experts). High: transformers'
#: growing cache copies a layer's keys and values, and attention that is not fused.
WORKSPACE_SHARE = (0.5, 1.0, 2.0)


class Forms(Protocol):
    """The sizes of a model's weights as its outputs would have them (`planning/sizes.py`)."""

    def sizes(self, weights: str, width: int | None) -> WeightSizes:
        """Sizes with weights that are quantized by the scheme `weights`, plain in the source's dtype ("source"), or
        decoded ("bf16"), and with `width` channels per expert (None: all). Multi-token prediction counts too.

        Raises SettingsError or UnsupportedModelError where that cannot be.
        """


@dataclass(frozen=True)
class Footprint:
    """Everything that determines a model's memory.

    `spec` is None for a model from which no experts can be removed: it has none, or its layers keep different numbers
    of them already (`weights.counts`). `itemsize` is the bytes per value in which it computes; `max_positions` the
    longest context that its config names. `width` is the number of channels per expert; None if it cannot change.
    `quantization` is the config's `quant_method`; empty for plain weights. `forms` tells what other forms of weights
    take; None where it is unknown. `config` is the config.json; empty where it is not at hand.
    """

    model: str
    weights: Weights
    spec: ExpertSpec | None
    cache: CacheSizes
    shape: ModelShape
    itemsize: int
    max_positions: int | None
    notes: tuple[str, ...] = ()
    width: int | None = None
    quantization: str = ""
    forms: Forms | None = field(default=None, repr=False, compare=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def sizes(
        self, weights: str = "source", width: int | None = None, with_mtp: bool = True, experts: float | None = None
    ) -> WeightSizes:
        """Sizes of the weights in one of targets.WEIGHTS or GGUF_TYPES, with `width` channels per expert (None: all).

        Layers for multi-token prediction count unless `with_mtp` is false. `experts` is how many each layer is to have,
        for the few forms in which other tensors depend on it; None for all. Raises SettingsError or
        UnsupportedModelError where the weights cannot be so.
        """
        sizes = self._sizes(weights, width, experts)
        return sizes if with_mtp else sizes.without_mtp()

    def _sizes(self, weights: str, width: int | None, experts: float | None) -> WeightSizes:
        if weights in GGUF_TYPES:
            self._refuse_unread(f"--gguf {weights}")
            return gguf_sizes(self.weights, self.shape, weights, width, experts)
        if weights == "source" and (width is None or self.width is not None or self.forms is None):
            return self.weights.sizes().narrowed(self.width_share(width))
        if self.weights.counts is not None:
            raise SettingsError(f"--weights {weights} is not possible: {per_layer_note(self)}")
        if weights == "bf16":
            return self._decoded()
        if self.forms is None:
            raise SettingsError(f"The size of {self.model} with --weights {weights} is unknown here.")
        return self.forms.sizes(weights, width)

    def why_not(self, weights: str, width: int | None = None) -> str | None:
        """Why the weights cannot be in this form; None if they can."""
        try:
            self.sizes(weights, width)
        except StreampruneError as error:
            return str(error)
        return None

    def served(self, use: ServingSpec) -> Served | None:
        """The model as an engine meets it, used as `use` says; None without experts."""
        counts, count = self.weights.counts, use.keep or self.weights.count
        if not count:
            return None
        spec = self.spec or ExpertSpec((), "", count, 1)
        numbers = tuple(sorted(set(counts.values()))) if counts is not None else (count,)
        width = use.width or self.width or self.shape.expert or None
        # (llama.cpp's quantization comes after its converter, which reads the weights as they are stored.)
        weights = use.stored if use.weights in GGUF_TYPES else use.weights
        return Served(spec, numbers, weights, width, self.itemsize, self.config)

    def expert_bytes(self, weights: str, width: int | None) -> float | None:
        """Bytes of one expert in every layer in this form; None where it is not possible or not known."""
        if self.weights.counts is not None or self.why_not(weights, width) is not None:
            return None
        return self.sizes(weights, width, with_mtp=False).expert_bytes()

    def _decoded(self) -> WeightSizes:
        if self.weights.formats:
            return self.weights.decoded(2).sizes()
        self._refuse_unread("--weights bf16")
        raise SettingsError(
            f"--weights bf16 decodes quantized weights, but those of {self.model} are plain already. Leave it out."
        )

    def _refuse_unread(self, option: str) -> None:
        """Raise SettingsError if the weights cannot be decoded, so that their size with this option is unknown."""
        if self.weights.quantized and not self.weights.formats:
            dtypes = ", ".join(sorted({fact.dtype for fact in self.weights.facts}))
            raise SettingsError(
                f"The weights of {self.model} are quantized in a format that is not read here ({dtypes}), so their "
                f"size with {option} is unknown. Leave it out."
            )

    def width_share(self, width: int | None) -> float:
        """The share of its channels that each expert keeps with `width` of them (None: all)."""
        if width is None:
            return 1.0
        assert self.width is not None, "only models whose width can change are planned with another one"
        return width / self.width


@dataclass(frozen=True)
class Term:
    """One part of the memory, in bytes, with bounds. `kind` is exact (counted), modelled (estimated) or measured."""

    name: str
    bytes: int
    kind: str
    low: int
    high: int


@dataclass(frozen=True)
class Estimate:
    """The memory of a model when it is served as `use` says."""

    footprint: Footprint = field(repr=False)
    use: ServingSpec

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """Every part of the memory; the total is their sum."""
        return tuple(_terms(self.footprint, self.use))

    def _bytes_of(self, names: str) -> int:
        return sum(term.bytes for term in self.terms if term.name.startswith(names))

    @property
    def total(self) -> int:
        return sum(term.bytes for term in self.terms)

    @property
    def weights_bytes(self) -> int:
        return self._bytes_of(WEIGHTS)

    @property
    def kv_cache_bytes(self) -> int:
        return self._bytes_of(KV_CACHE)

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent and convolution states."""
        return self._bytes_of(STATE)

    @property
    def interval(self) -> tuple[int, int]:
        """The bounds of the total, in bytes."""
        return sum(term.low for term in self.terms), sum(term.high for term in self.terms)

    @property
    def total_experts(self) -> int:
        """Experts of all layers together; 0 without experts."""
        weights = self.footprint.weights
        if weights.counts is not None:
            return sum(weights.counts.values())
        if self.use.total is not None:
            return self.use.total
        return (self.experts or 0) * weights.sizes().expert_layers

    def changed(self, **use: Any) -> Self:
        """The same estimate with changes to `use`."""
        return replace(self, use=replace(self.use, **use))

    @property
    def experts(self) -> int | None:
        """Experts per layer; 0 without experts, None where layers may differ."""
        if self.use.total is not None or self.footprint.weights.counts is not None:
            return None
        return self.footprint.weights.count if self.use.keep is None else self.use.keep


@dataclass(frozen=True)
class Fit(Estimate):
    """An estimate compared with a budget (bytes)."""

    budget: int

    @property
    def left(self) -> int:
        """Bytes of the budget that are not needed; negative when it does not fit."""
        return self.budget - self.total

    @property
    def fits(self) -> bool:
        return self.left >= 0

    def with_equal(self, keep: int | None, **use: Any) -> Self:
        """The same with `keep` experts in every layer (None: all), and changes to `use`."""
        return self.changed(keep=keep, total=None, widest=None, last=None, **use)

    @cached_property
    def max_experts(self) -> int | None:
        """The most experts per layer that fit, a number that the router allows; None if not even the fewest fit.

        It is rounded down for `use.round_for`; None if no number that is left is good.
        """
        most, served = self.most_experts, self.footprint.served(self.use)
        if self.use.round_for is None or most is None or served is None or most == served.spec.count:
            return most
        return good_count(served.with_count(most), self.use.round_for)

    @cached_property
    def most_experts(self) -> int | None:
        """The most experts per layer that fit, before they are rounded for an engine."""
        spec = self.footprint.spec
        if spec is None:
            return None
        if self.with_equal(None).fits:
            return spec.count
        steps = range(minimum_keep(spec), spec.count, spec.groups)
        return _largest(steps, lambda keep: self.with_equal(keep).fits)

    @cached_property
    def max_total_experts(self) -> int | None:
        """The most experts of all layers together, for a schedule that keeps different numbers per layer."""
        spec = self.footprint.spec
        if spec is None:
            return None
        keeps_mtp = self.use.mtp == MTP[0] and self.footprint.weights.keeps_mtp
        sizes = self.footprint.sizes(self.use.weights, self.use.width, keeps_mtp)
        if not sizes.expert_layers or self.with_equal(None).fits:
            return spec.count * sizes.expert_layers
        # In units of one expert in one layer: experts of all layers have the same size.
        rest = sum(term.bytes for term in _terms(self.footprint, self.with_equal(0).use, routed=spec.count))
        each = sizes.without_mtp().expert_bytes()
        fitting = int((self.budget - rest) * sizes.expert_layers // each)
        # Above, the workspace is that of a layer with all experts; if all layers keep equally few, it may be less.
        fitting = max(fitting, (self.max_experts or 0) * sizes.expert_layers)
        # Never all experts: then the model is unpruned.
        fitting = min(fitting, spec.count * sizes.expert_layers - 1)
        return fitting if fitting >= minimum_keep(spec) * sizes.expert_layers else None

    @cached_property
    def max_context(self) -> int:
        """The longest context (tokens, no longer than the model's own limit) that fits; 0 if none does."""
        longest = min(self.footprint.max_positions or max(self.use.context, 2**20), MOST_TOKENS // self.use.batch)
        return _largest(range(1, longest + 1), lambda context: self.changed(context=context).fits) or 0


def _terms(footprint: Footprint, use: ServingSpec, routed: int | None = None) -> Iterator[Term]:
    """The terms; `routed` is the number of experts that the routers choose from, if not the number kept."""
    weights = footprint.weights
    kept: float = weights.count if use.keep is None else use.keep
    is_pruned = use.total is not None or kept != weights.count or use.width is not None or use.weights != "source"
    keeps_mtp = use.mtp == MTP[0] and weights.keeps_mtp
    sizes = footprint.sizes(use.weights, use.width, keeps_mtp or not is_pruned, kept)
    if use.total is not None:
        # Layers have experts of one size, so their mean number gives the bytes. Until it is decided, some layer may
        # keep all its experts.
        kept, routed = use.total / max(1, sizes.expert_layers), use.widest or weights.count
    found, fewest = sizes.bytes_by_category(kept), {}
    if sizes.per_expert["MTP"] and routed is not None:
        # Layers for multi-token prediction have as many experts as the last of the others. Until it is known how many
        # that keeps, it may be any number up to the widest's.
        found["MTP"] = sizes.bytes_by_category(use.last or routed)["MTP"]
        if use.last is None and footprint.spec is not None:
            fewest["MTP"] = sizes.bytes_by_category(minimum_keep(footprint.spec))["MTP"]
    for name, size in found.items():
        # Which type llama.cpp gives a tensor goes by names that its converter makes.
        is_counted = weights.measured and use.weights not in GGUF_TYPES and name not in fewest
        low = fewest.get(name, size)
        yield Term(f"{WEIGHTS}{name}", size, "exact" if is_counted else "modelled", low, size)
    kv_bytes = footprint.cache.kv_bytes(use.context, use.batch, use.kv_dtype)
    yield Term(KV_CACHE, kv_bytes, "exact", kv_bytes, kv_bytes)
    state = footprint.cache.state_bytes(use.batch)
    if state:
        yield Term(STATE, state, "exact", state, state)
    shape = replace(footprint.shape, experts=round(kept) if routed is None else routed)
    if use.width is not None:
        shape = replace(shape, expert=use.width)
    workspace = prefill_workspace_bytes(shape, PREFILL_CHUNK, use.context, use.batch, footprint.itemsize)
    allocated = kv_bytes + state + workspace
    for name, bounds in (
        ("prefill workspace", [round(workspace * share) for share in WORKSPACE_SHARE]),
        ("CUDA context", CUDA_CONTEXT),
        ("allocator margin", [round(allocated * share) for share in ALLOCATOR_SHARE]),
    ):
        low, middle, high = bounds
        yield Term(name, middle, "modelled", low, high)


def _largest(values: range, fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending values that fits, when all below a fitting one fit too."""
    fitting = bisect_left(values, True, key=lambda value: not fits(value))
    return values[fitting - 1] if fitting else None


def per_layer_note(footprint: Footprint) -> str:
    """Why a model with different numbers of experts per layer cannot be pruned again, and what to do instead."""
    counts = footprint.weights.counts or {}
    return (
        f"the layers of {footprint.model} keep different numbers of experts already ({min(counts.values())} to "
        f"{max(counts.values())}), and it cannot be pruned again. For another size, prune its source "
        "again, from the same scores (`streamprune prune SOURCE --scores ...`); `streamprune fit SOURCE` says how many "
        "experts fit."
    )


def check_keep(footprint: Footprint, keep: int, option: str | None = None) -> None:
    """Raise SettingsError for a number of experts that the model cannot have; `option` gave it, if not --keep."""
    asked = option or f"--keep {keep}"
    spec = footprint.spec
    if footprint.weights.counts is not None:
        raise SettingsError(f"{asked} is not possible: {per_layer_note(footprint)}")
    if spec is None:
        raise SettingsError(f"{asked}: {footprint.model} has no experts.")
    least = minimum_keep(spec)
    if not least <= keep <= spec.count or keep % spec.groups:
        step = f" in steps of {spec.groups}" if spec.groups > 1 else ""
        raise SettingsError(f"{asked} is not possible: choose from {least} to {spec.count}{step}.")
