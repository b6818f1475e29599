"""Weights as bytes: what kind each tensor is, what follows the number of experts, what another dtype would take.

Pure, and needs no torch: the facts come from a checkpoint's headers, or from a model built on the meta device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from streamprune.errors import SettingsError
from streamprune.source.checkpoint import DTYPE_BITS
from streamprune.source.roles import ExpertRows

WEIGHTS_DTYPES = ("source", "bf16", "fp8", "int4")
#: In the order in which they are told.
CATEGORIES = ("experts", "router", "shared/dense", "attention", "embeddings", "head", "vision", "MTP")

_FLOATS = {"F64", "F32", "F16", "BF16"}
_EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens\w*|wte|wpe|word_embeddings|embed_in|tok_embeddings|embedding|embeddings)\."
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_head|output)\.")
_VISION = re.compile(r"(^|\.)(vision\w*|visual|image\w*|audio\w*|\w*vision_tower|multi_modal_projector|mm_projector)\.")
_ATTENTION = re.compile(r"(^|\.)(\w*attn|\w*attention|mixer|mamba|conv|norm_attn_norm|kda|short_conv)\.")
_ROUTER = re.compile(r"(^|\.)(gate|router|\w*correction_bias|expert_bias|per_expert_scale)(\.|$)")
MTP_NAME = re.compile(r"(^|[._])(mtp|nextn)([._]|$)")

#: Block size of the usual FP8 checkpoints (DeepSeek-V3, arXiv:2412.19437, section 3.3.2): one float32 scale per
#: 128 × 128 weights. Group size of the usual 4-bit ones (GPTQ, AWQ): one 16-bit scale and a 4-bit zero per 128 inputs.
_FP8_BLOCK = 128
_INT4_GROUP = 128


@dataclass(frozen=True)
class WeightFact:
    """One tensor: its bytes as stored, and how they follow the number of experts.

    `expert` is the number of the one expert that it belongs to; `rows` says where in it all experts lie; both None for
    a tensor that stays whole. `block` is None outside the decoder's blocks.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    category: str
    block: int | None = None
    expert: int | None = None
    rows: ExpertRows | None = None

    def bytes_as(self, weights_dtype: str) -> float:
        """Bytes of the tensor in one of WEIGHTS_DTYPES. Only matrices of experts, feed-forward layers and attention are
        quantized, as the usual tools do; the rest is kept in 16 bits."""
        if weights_dtype == "source" or self.dtype not in _FLOATS:
            return self.nbytes
        elements = self.nbytes * 8 // DTYPE_BITS[self.dtype]
        matrix = len(self.shape) >= 2 and self.category in ("experts", "shared/dense", "attention")
        if weights_dtype == "bf16" or not matrix:
            return elements * 2
        rows, columns = self.shape[-2:]
        if weights_dtype == "fp8":
            blocks = math.ceil(rows / _FP8_BLOCK) * math.ceil(columns / _FP8_BLOCK)
            return elements + math.prod(self.shape[:-2]) * blocks * 4
        return elements * (4 + (16 + 4) / _INT4_GROUP) / 8


@dataclass(frozen=True)
class WeightSizes:
    """Bytes by category as a function of the experts kept: `fixed` stays, `per_expert` comes once per expert and block.

    `per_expert` sums over all blocks that have experts, so that `keep` experts in each take keep × that.
    """

    fixed: Mapping[str, float]
    per_expert: Mapping[str, float]
    moe_blocks: int

    def bytes_by_category(self, keep: float) -> dict[str, int]:
        """Bytes of each category that the model has, with `keep` experts in every block, or in the mean block."""
        total = {name: round(self.fixed.get(name, 0) + keep * self.per_expert.get(name, 0)) for name in CATEGORIES}
        return {name: count for name, count in total.items() if count}

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert, its router row included, in every block."""
        return sum(self.per_expert.values())


@dataclass(frozen=True)
class Weights:
    """All tensors of a model. `count` is the number of experts per block (0: none), where blocks differ the largest.

    `measured` says that the bytes were read off a checkpoint's headers, not worked out from a config. `counts` are the
    experts by block of a model whose blocks differ, whose sizes are of these alone; None where all have `count`.
    """

    facts: tuple[WeightFact, ...] = field(repr=False)
    count: int
    measured: bool
    counts: Mapping[int, int] | None = None
    _sizes: dict[tuple[str, bool], WeightSizes] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return sum(fact.nbytes for fact in self.facts)

    @property
    def quantized(self) -> bool:
        """Whether most bytes are in another form than plain floating-point numbers."""
        return 2 * sum(fact.nbytes for fact in self.facts if fact.dtype in _FLOATS) < self.nbytes

    def sizes(self, weights_dtype: str, with_mtp: bool = True) -> WeightSizes:
        """The sizes in one of WEIGHTS_DTYPES. SettingsError for another dtype of a model that is quantized already."""
        if (weights_dtype, with_mtp) not in self._sizes:
            self._sizes[weights_dtype, with_mtp] = self._add_up(weights_dtype, with_mtp)
        return self._sizes[weights_dtype, with_mtp]

    def _add_up(self, weights_dtype: str, with_mtp: bool) -> WeightSizes:
        if weights_dtype != "source" and self.quantized:
            raise SettingsError(
                f"The model is quantized already ({', '.join(sorted({fact.dtype for fact in self.facts}))}), so its "
                f"size as {weights_dtype} cannot be told. Use --weights-dtype source."
            )
        fixed = dict.fromkeys(CATEGORIES, 0.0)
        per_expert = dict.fromkeys(CATEGORIES, 0.0)
        blocks = set()
        for fact in self.facts:
            if fact.category == "MTP" and not with_mtp:
                continue
            size = fact.bytes_as(weights_dtype)
            if self.counts is not None:
                fixed[fact.category] += size
            elif fact.expert is not None:
                # Every expert of a block is alike, so each tensor is its share of all of them.
                per_expert[fact.category] += size / self.count
            elif fact.rows is not None:
                share = size * fact.rows.stride / fact.shape[fact.rows.axis]
                per_expert[fact.category] += share
                fixed[fact.category] += size - share * self.count
            else:
                fixed[fact.category] += size
            if fact.expert is not None or fact.rows is not None:
                blocks.add(fact.block)
        return WeightSizes(fixed, per_expert, len(blocks))


def category_of(name: str, expert_indexed: bool, block: int | None) -> str:
    """The kind of a tensor by its name, in one of CATEGORIES."""
    if MTP_NAME.search(name):
        return "MTP"
    if _VISION.search(name):
        return "vision"
    if expert_indexed:
        return "router" if _ROUTER.search(name) else "experts"
    if block is None:
        if _HEAD.search(name):
            return "head"
        if _EMBEDDINGS.search(name):
            return "embeddings"
    return "attention" if _ATTENTION.search(name) and "shared_" not in name else "shared/dense"
