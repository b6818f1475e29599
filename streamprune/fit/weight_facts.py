"""Facts about weights from a checkpoint's headers: by the tensors' names alone, or by what they feed in the model.

By name needs no torch and takes milliseconds, but names are a convention: where they leave a doubt, it says so, and the
caller builds the model and asks by role.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from streamprune.fit.weights import MTP_NAME, WeightFact, Weights, category_of
from streamprune.output.cuts import MTP_ONLY
from streamprune.output.layout import Layout
from streamprune.source.checkpoint import TensorEntry
from streamprune.source.config_facts import ExpertSpec, first_number, text_part
from streamprune.source.roles import ExpertRows

_BLOCK = re.compile(r"^(?P<list>.*?\b(?:layers|blocks|h))\.(?P<block>\d+)\.(?P<rest>.+)$")
_NUMBERED_EXPERT = re.compile(r"^(?P<moe>.*?)\bexperts\.(?P<expert>\d+)\.(?P<rest>.+)$")
_JOINED_EXPERTS = re.compile(r"^(?P<moe>.*?)\bexperts[._](?!\d)")
_ROUTER = re.compile(r"(^|\.)(gate|router|\w*correction_bias|expert_bias|per_expert_scale)(\.|$)")
#: What stands beside the experts in a Mixture-of-Experts layer and belongs to no single expert.
_BESIDE = re.compile(r"shared_|dense|norm")


def weights_by_name(
    tensors: Mapping[str, TensorEntry],
    config: Mapping[str, object],
    spec: ExpertSpec | None,
    differing: Mapping[int, int] | None = None,
) -> Weights | None:
    """The weights as their names tell them; None where names do not tell for certain which tensors hold experts.

    Certain means: every block that has experts has all `spec.count` of them, or as many as `differing` says, alike and
    under the usual names, and a router with one row for each.
    """
    depth = first_number((text_part(config)[1],), ("num_hidden_layers", "n_layer", "n_layers"))
    if depth is None:
        return None
    count = spec.count if spec else 0
    counts = _Counts(count, differing or {})
    facts = [_fact(entry, depth, counts) for entry in tensors.values()]
    if spec is None:
        return Weights(tuple(facts), 0, True) if not any("expert" in name for name in tensors) else None
    found = _certain(facts, counts)
    if found is None or not set(counts.differing) <= set(found):
        return None
    return weights_with(facts, {block: counts.of(block) for block in found})


def weights_with(facts: Iterable[WeightFact], counts: Mapping[int, int], measured: bool = True) -> Weights:
    """The weights of a model with `counts` experts, by the index of every block that has some."""
    uneven = len(set(counts.values())) > 1
    return Weights(tuple(facts), max(counts.values(), default=0), measured, dict(counts) if uneven else None)


@dataclass(frozen=True)
class _Counts:
    """The number of experts of a block, if it has any."""

    usual: int
    differing: Mapping[int, int]

    def of(self, block: int | None) -> int:
        return self.usual if block is None else self.differing.get(block, self.usual)


def _fact(entry: TensorEntry, depth: int, counts: _Counts) -> WeightFact:
    match = _BLOCK.match(entry.name)
    block = int(match["block"]) if match else None
    rest = match["rest"] if match else entry.name
    if MTP_NAME.search(entry.name) or (
        block is not None and block >= depth and category_of(entry.name, False, 0) != "vision"
    ):
        return WeightFact(entry.name, entry.dtype, entry.shape, entry.nbytes, "MTP", block)
    count = counts.of(block)
    numbered = _NUMBERED_EXPERT.match(rest)
    if block is not None and numbered and count:
        category = category_of(entry.name, True, block)
        return WeightFact(entry.name, entry.dtype, entry.shape, entry.nbytes, category, block, int(numbered["expert"]))
    joined = _JOINED_EXPERTS.match(rest) is not None or (_ROUTER.search(rest) is not None and "shared_" not in rest)
    rows = ExpertRows(0, 1, 0) if block is not None and joined and count and entry.shape[:1] == (count,) else None
    return WeightFact(
        entry.name,
        entry.dtype,
        entry.shape,
        entry.nbytes,
        category_of(entry.name, rows is not None, block),
        block,
        rows=rows,
    )


def _certain(facts: Sequence[WeightFact], counts: _Counts) -> list[int] | None:
    """The blocks that have experts, in order, if it is certain what each of their tensors is; else None."""
    blocks: dict[int, list[WeightFact]] = defaultdict(list)
    further: dict[int | None, list[str]] = defaultdict(list)
    for fact in facts:
        if fact.category not in ("MTP", "vision") and fact.block is not None:
            blocks[fact.block].append(fact)
        elif fact.category == "MTP" and not MTP_NAME.search(fact.name):
            further[fact.block].append(fact.name)
    if not all(any(MTP_ONLY.search(name) for name in names) for names in further.values()):
        # More blocks than the config states: it may be wrong.
        return None
    moe = [block for block in sorted(blocks) if any("expert" in fact.name for fact in blocks[block])]
    return moe if moe and all(_complete(blocks[block], counts.of(block)) for block in moe) else None


def _complete(members: Sequence[WeightFact], count: int) -> bool:
    """Whether the tensors of one block hold `count` like experts, a router for them, and nothing doubtful beside."""
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
    doubtful = [
        fact
        for fact in members
        if fact.expert is None
        and fact.rows is None
        and not _BESIDE.search(fact.name)
        and any(fact.name.startswith(home) and home.count(".") > 2 for home in homes)
    ]
    return alike and len(homes) == 1 and len(routers) == 1 and not doubtful


def weights_by_layout(tensors: Mapping[str, TensorEntry], layout: Layout, counts: Mapping[int, int]) -> Weights:
    """The weights as the model uses them, with `counts` experts by block. What has no cut is multi-token prediction."""
    facts = []
    for name, entry in tensors.items():
        cut = layout.cuts.get(name)
        indexed = cut is not None and (cut.rows is not None or cut.expert is not None)
        block, expert, rows = (cut.block, cut.expert, cut.rows) if cut is not None else (None, None, None)
        category = category_of(name, indexed, block) if cut is not None else "MTP"
        facts.append(WeightFact(name, entry.dtype, entry.shape, entry.nbytes, category, block, expert, rows))
    return weights_with(facts, counts)
