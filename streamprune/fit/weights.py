"""Weights as bytes: the kind of each tensor, and what depends on the number of experts. No torch.

The facts come from a checkpoint's headers or from a model built on the meta device. By the tensors' names takes
milliseconds (`weights_by_name`), but names are a convention: where they leave a doubt, the caller builds the model and
asks by role (`weights_by_layout`).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.formats.base import ExpertRows, Format, StoredTensor
from streamprune.formats.plain import PLAIN
from streamprune.models.config_json import ExpertSpec, first_number, text_part
from streamprune.models.expert_layout import Cut, Layout
from streamprune.models.mtp import MTP_NAME, MTP_ONLY, OF_EXPERTS, by_mtp_layer

#: In the order of display.
CATEGORIES = ("experts", "router", "shared/dense", "attention", "embeddings", "head", "vision", "MTP")

_FLOATS = {"F64", "F32", "F16", "BF16"}
_EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens\w*|wte|wpe|word_embeddings|embed_in|tok_embeddings|embedding|embeddings)\."
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_head|output)\.")
#: The last three are parts of DeepSeek-OCR and Mistral Large, as their checkpoints name them.
_VISION = re.compile(
    r"(^|\.)(vision\w*|visual|image\w*|audio\w*|\w*vision_tower|\w*projector\w*|sam_model|qwen2_model|patch_merger)\."
)
_ATTENTION = re.compile(r"(^|\.)(\w*attn|\w*attention|mixer|mamba|conv|norm_attn_norm|kda|short_conv)\.")
_ROUTER = re.compile(r"(^|\.)(gate|router|\w*correction_bias|expert_bias|router_bias|per_expert_scale)(\.|$)")


@dataclass(frozen=True)
class WeightFact:
    """One tensor: its bytes as stored, and how they depend on the number of experts.

    `expert` is the number of the one expert that it belongs to; `rows` says where in it all experts are; both are None
    for a tensor that pruning does not change. `layer` is None outside the decoder's layers. `channel_axis` is the axis
    of one expert's tensor along which its channels lie, to whose number its size is proportional; None if it has none.

    `format` names the format in which a quantized parameter is stored; it is empty for a plain one. Of the tensors that
    make up a quantized parameter, the largest has the shape of the plain parameter as `decoded_shape`, the others None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    category: str
    layer: int | None = None
    expert: int | None = None
    rows: ExpertRows | None = None
    channel_axis: int | None = None
    format: str = ""
    decoded_shape: tuple[int, ...] | None = None

    @property
    def of_experts(self) -> bool:
        """Whether the tensor belongs to one routed expert, or holds all of a layer."""
        return self.expert is not None or self.rows is not None


@dataclass(frozen=True)
class WeightSizes:
    """Bytes by category as a function of the experts kept: `fixed`, and `per_expert` for each expert and layer.

    `per_expert` sums over all layers that have experts, so that `keep` experts in each take keep × that. `of_channels`
    is the part of it that is proportional to the experts' width.
    """

    fixed: Mapping[str, float]
    per_expert: Mapping[str, float]
    of_channels: Mapping[str, float]
    expert_layers: int

    def bytes_by_category(self, keep: float) -> dict[str, int]:
        """Bytes of each category that the model has, with `keep` experts in every layer, or in the mean layer."""
        total = {name: round(self.fixed[name] + keep * self.per_expert[name]) for name in CATEGORIES}
        return {name: count for name, count in total.items() if count}

    def expert_bytes(self) -> float:
        """Bytes of one expert, its router row included, in every layer."""
        return sum(self.per_expert.values())

    def without_mtp(self) -> WeightSizes:
        """The same without layers for multi-token prediction."""
        fixed, per_expert, of_channels = (
            {**sizes, "MTP": 0.0} for sizes in (self.fixed, self.per_expert, self.of_channels)
        )
        return WeightSizes(fixed, per_expert, of_channels, self.expert_layers)

    def narrowed(self, share: float) -> WeightSizes:
        """The sizes of plain weights whose experts keep this share of their channels."""
        per_expert = {name: size - (1 - share) * self.of_channels[name] for name, size in self.per_expert.items()}
        of_channels = {name: size * share for name, size in self.of_channels.items()}
        return replace(self, per_expert=per_expert, of_channels=of_channels)


@dataclass(frozen=True)
class Weights:
    """All tensors of a model. `count` is the number of experts per layer (0: none), where layers differ the largest.

    `measured` says that the bytes were read from a checkpoint's headers, not derived from a config. `counts` are the
    experts by layer of a model whose layers differ, whose sizes are known for these counts only; None if all have
    `count`. `keeps_mtp` is whether outputs can have its layers for multi-token prediction (MTP).
    """

    facts: tuple[WeightFact, ...] = field(repr=False)
    count: int
    measured: bool
    counts: Mapping[int, int] | None = None
    keeps_mtp: bool = True

    @property
    def nbytes(self) -> int:
        return sum(fact.nbytes for fact in self.facts)

    @cached_property
    def formats(self) -> tuple[str, ...]:
        """The formats of the quantized parameters, the one with most bytes first; empty for plain weights."""
        sizes: Counter[str] = Counter()
        for fact in self.facts:
            sizes[fact.format] += fact.nbytes
        return tuple(name for name, _ in sizes.most_common() if name)

    @cached_property
    def quantized(self) -> bool:
        """Whether any parameter is quantized. In an unknown format: whether most bytes are not floating-point."""
        floats = sum(fact.nbytes for fact in self.facts if fact.dtype in _FLOATS)
        return bool(self.formats) or 2 * floats < self.nbytes

    def decoded(self, itemsize: int) -> Weights:
        """The same weights with `itemsize` bytes (2 or 4) for each value of the quantized parameters."""
        facts = []
        for fact in self.facts:
            if fact.format and fact.decoded_shape is not None:
                shape, dtype = fact.decoded_shape, {2: "BF16", 4: "F32"}[itemsize]
                fact = replace(fact, dtype=dtype, shape=shape, nbytes=math.prod(shape) * itemsize)
            elif fact.format:
                continue
            facts.append(replace(fact, format="", decoded_shape=None))
        return replace(self, facts=tuple(facts))

    def sizes(self, with_mtp: bool = True) -> WeightSizes:
        """The sizes as a function of the experts kept; of all tensors, or without multi-token prediction."""
        return self._sizes if with_mtp else self._sizes.without_mtp()

    @cached_property
    def _sizes(self) -> WeightSizes:
        fixed, per_expert, of_channels = (dict.fromkeys(CATEGORIES, 0.0) for _ in range(3))
        for fact in self.facts:
            size = fact.nbytes
            if self.counts is not None:
                fixed[fact.category] += size
            elif fact.expert is not None:
                # All experts of a layer have one size, so each tensor is its share of all of them.
                share = size / self.count
                per_expert[fact.category] += share
                of_channels[fact.category] += share if fact.channel_axis is not None else 0.0
            elif fact.rows is not None:
                share = size * fact.rows.stride / fact.shape[fact.rows.axis]
                per_expert[fact.category] += share
                of_channels[fact.category] += share if fact.channel_axis is not None else 0.0
                fixed[fact.category] += size - share * self.count
            else:
                fixed[fact.category] += size
        layers = {fact.layer for fact in self.facts if fact.of_experts and fact.category != "MTP"}
        return WeightSizes(fixed, per_expert, of_channels, len(layers))


def is_vision(name: str) -> bool:
    """Whether a parameter of this name belongs to another tower than the text decoder."""
    return _VISION.search(name) is not None


def category_of(name: str, expert_indexed: bool, layer: int | None) -> str:
    """The kind of a tensor by its name, in one of CATEGORIES."""
    if MTP_NAME.search(name):
        return "MTP"
    if is_vision(name):
        return "vision"
    if expert_indexed:
        return "router" if _ROUTER.search(name) else "experts"
    if layer is None:
        if _HEAD.search(name):
            return "head"
        if _EMBEDDINGS.search(name):
            return "embeddings"
    return "attention" if _ATTENTION.search(name) and "shared_" not in name else "shared/dense"


_LAYER = re.compile(r"^(?P<list>.*?\b(?:layers|blocks|h))\.(?P<layer>\d+)\.(?P<rest>.+)$")
_NUMBERED_EXPERT = re.compile(r"^(?P<moe>.*?)\bexperts\.(?P<expert>\d+)\.(?P<rest>.+)$")
_JOINED_EXPERTS = re.compile(r"^(?P<moe>.*?)\bexperts[._](?!\d)")
#: Other tensors of a Mixture-of-Experts layer, which belong to no single expert.
_SHARED = re.compile(r"shared_|dense|norm")


def weights_by_name(
    tensors: Mapping[str, TensorEntry],
    config: Mapping[str, object],
    spec: ExpertSpec | None,
    differing: Mapping[int, int] | None = None,
    stored: Mapping[str, StoredTensor] | None = None,
) -> Weights | None:
    """The weights classified by tensor name; None if the names leave a doubt about which tensors hold experts.

    `stored` says how tensors are stored; without it, all are counted as plain.

    No doubt: every MoE layer has all its experts (`spec.count`, or the layer's number in `differing`), equal in shape
    and dtype, under the usual names, and a router with one row per expert. Layers for multi-token prediction (MTP) have
    as many as the last of these, or none.
    """
    depth = first_number((text_part(config)[1],), ("num_hidden_layers", "n_layer", "n_layers"))
    if depth is None:
        return None
    quantized = _quantized(tensors, stored)
    if spec is None:
        facts = tuple(_fact(entry, depth, lambda layer: 0, quantized) for entry in tensors.values())
        return Weights(facts, count=0, measured=True) if not any("expert" in name for name in tensors) else None

    def count_of(layer: int) -> int:
        return (differing or {}).get(layer, spec.count)

    facts = tuple(_fact(entry, depth, count_of, quantized) for entry in tensors.values())
    layers: dict[int, list[WeightFact]] = defaultdict(list)
    unnamed_mtp: dict[int | None, list[str]] = defaultdict(list)
    for fact in facts:
        if fact.category == "MTP" and not MTP_NAME.search(fact.name):
            unnamed_mtp[fact.layer].append(fact.name)
        elif fact.category not in ("MTP", "vision") and fact.layer is not None:
            layers[fact.layer].append(fact)
    if not all(any(MTP_ONLY.search(name) for name in names) for names in unnamed_mtp.values()):
        # Layers beyond num_hidden_layers that are not MTP: the config may be wrong.
        return None
    found = {layer: count_of(layer) for layer in sorted(layers) if any("expert" in fact.name for fact in layers[layer])}
    certain = found and all(_complete(layers[layer], count) for layer, count in found.items())
    if not certain or not set(differing or {}) <= set(found):
        return None
    mtp = _mtp_facts(facts, max(found), found[max(found)])
    return weights_with([mtp.get(fact.name, fact) for fact in facts], found) if mtp is not None else None


def _mtp_facts(facts: Iterable[WeightFact], layer: int, count: int) -> dict[str, WeightFact] | None:
    """The tensors of MTP layers that are of experts, by name: they keep what `layer` keeps, which has `count` experts.

    None if their names leave a doubt.
    """
    names = {fact.name: fact for fact in facts if fact.category == "MTP"}
    result: dict[str, WeightFact] = {}
    for path, members in by_mtp_layer(names).items():
        if not any(OF_EXPERTS.search(name) for name in members):
            continue
        found = []
        for fact in (names[name] for name in members):
            expert, rows = _experts_of(fact.name.removeprefix(f"{path}."), fact.shape, count)
            kind = "experts" if expert is not None or rows is not None else "shared/dense"
            kind = "router" if kind == "experts" and _ROUTER.search(fact.name) else kind
            found.append(replace(fact, layer=layer, expert=expert, rows=rows, category=kind))
        if not _complete(found, count):
            return None
        result |= {fact.name: replace(fact, category="MTP") for fact in found if fact.of_experts}
    return result


def weights_with(facts: Iterable[WeightFact], counts: Mapping[int, int], measured: bool = True) -> Weights:
    """The weights of a model with `counts` experts, by the index of every layer that has some."""
    differ = len(set(counts.values())) > 1
    return Weights(tuple(facts), max(counts.values(), default=0), measured, dict(counts) if differ else None)


def _quantized(
    tensors: Mapping[str, TensorEntry], stored: Mapping[str, StoredTensor] | None
) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """For each tensor of a quantized parameter its format, and the decoded shape that `WeightFact` notes."""
    groups: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    formats: dict[str, Format] = {}
    for name, each in (stored or {}).items():
        if each.format is not PLAIN:
            groups[each.parameter][each.part] = tensors[name]
            formats[each.parameter] = each.format
    found: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for parameter, parts in groups.items():
        decoded = formats[parameter].plain_shape({part: entry.shape for part, entry in parts.items()})
        largest = max(parts.values(), key=lambda entry: entry.nbytes)
        for entry in parts.values():
            found[entry.name] = formats[parameter].name, decoded if entry is largest else None
    return found


def _fact(
    entry: TensorEntry,
    depth: int,
    count_of: Callable[[int], int],
    quantized: Mapping[str, tuple[str, tuple[int, ...] | None]],
) -> WeightFact:
    match = _LAYER.match(entry.name)
    layer, rest = (int(match["layer"]), match["rest"]) if match else (None, entry.name)
    expert = rows = None
    is_mtp = MTP_NAME.search(entry.name) is not None
    if layer is not None and layer >= depth and category_of(entry.name, False, 0) != "vision":
        is_mtp = True
    if layer is not None and not is_mtp:
        expert, rows = _experts_of(rest, entry.shape, count_of(layer))
    category = "MTP" if is_mtp else category_of(entry.name, expert is not None or rows is not None, layer)
    storage, decoded = quantized.get(entry.name, ("", None))
    return WeightFact(
        entry.name, entry.dtype, entry.shape, entry.nbytes, category, layer, expert, rows, format=storage,
        decoded_shape=decoded,
    )  # fmt: skip


def _experts_of(name: str, shape: tuple[int, ...], count: int) -> tuple[int | None, ExpertRows | None]:
    """The expert that a tensor of a layer with `count` experts belongs to, or where in it all of them are; or neither.

    `name` is the tensor's within the layer.
    """
    numbered = _NUMBERED_EXPERT.match(name)
    joined = _JOINED_EXPERTS.match(name) or (_ROUTER.search(name) and "shared_" not in name)
    if count and numbered:
        return int(numbered["expert"]), None
    return None, ExpertRows(0, 1, 0) if count and joined and shape[:1] == (count,) else None


def _complete(members: Sequence[WeightFact], count: int) -> bool:
    """Whether the tensors of one layer are `count` equal experts, a router, and none that may belong to experts."""
    kinds: dict[str, list[WeightFact]] = defaultdict(list)
    homes = set()
    for fact in members:
        if fact.expert is not None or (fact.rows is not None and fact.category == "experts"):
            match = _NUMBERED_EXPERT.match(fact.name) or _JOINED_EXPERTS.match(fact.name)
            if match is None:
                return False
            homes.add(match["moe"])
        if fact.expert is not None:
            kinds[re.sub(r"\bexperts\.\d+\.", "experts.*.", fact.name)].append(fact)
    alike = all(
        {fact.expert for fact in kind} == set(range(count)) and len({(fact.dtype, fact.shape) for fact in kind}) == 1
        for kind in kinds.values()
    )
    routers = [fact for fact in members if fact.category == "router" and len(fact.shape) == 2]
    doubtful = any(
        not fact.of_experts and not _SHARED.search(fact.name) and fact.name.startswith(home) and home.count(".") > 2
        for fact in members
        for home in homes
    )
    return alike and len(homes) == 1 and len(routers) == 1 and not doubtful


def weights_by_layout(
    tensors: Mapping[str, TensorEntry],
    layout: Layout,
    counts: Mapping[int, int],
    stored: Mapping[str, StoredTensor] | None = None,
) -> Weights:
    """The weights as the model uses them, with `counts` experts by layer; without what no output has of the source.

    `stored` says how tensors are stored; without it, all are counted as plain.
    """
    facts, quantized, mtp, ignored = [], _quantized(tensors, stored), set(layout.mtp), set(layout.ignored)
    for name, entry in tensors.items():
        if name in ignored:
            continue
        cut, category = layout.cuts.get(name, Cut(None)), "MTP"
        if name in layout.cuts and name not in mtp:
            category = category_of(name, cut.rows is not None or cut.expert is not None, cut.layer)
        storage, decoded = quantized.get(name, ("", None))
        # (MTP layers have as many experts as the last layer with some.)
        layer = cut.layer if cut.layer is None or cut.layer < layout.layer_count else layout.mtp_source
        fact = WeightFact(
            name, entry.dtype, entry.shape, entry.nbytes, category, layer, cut.expert, cut.rows,
            channel_axis=cut.channels.axis if cut.channels is not None else None, format=storage, decoded_shape=decoded,
        )  # fmt: skip
        facts.append(fact)
    return replace(weights_with(facts, counts), keeps_mtp=not layout.dropped)
