"""What a `config.json` says, read as plain JSON, and how it is rewritten for fewer experts. Needs no torch.

Differences between the configs of model families are absorbed here, and nowhere else. `skeleton` reads the same names
from transformers' config objects, which also have every model's defaults; here a number that is not stated is None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.errors import SettingsError
from streamprune.files.json_text import MOST_LEVELS, show
from streamprune.formats.quantization import has_empty_section

#: A name found by this is only a candidate for the expert count: `skeleton` proves it by building the model with
#: another count and looking which parameters change their shape.
COUNT_NAME = re.compile(r"^(moe_)?(n|num)_(routed_|local_|moe_)?experts$")
TOP_K_NAMES = (
    "num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "top_k_experts", "moe_topk", "moe_top_k",
    "moe_k",
)  # fmt: skip
GROUP_NAMES = ("n_group", "num_expert_group", "num_expert_groups")
TOPK_GROUP_NAMES = ("topk_group", "num_limited_groups", "topk_groups")
EXPERT_WIDTH_NAMES = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size")
#: Names of the factor that the width of shared experts is of that of the routed ones, in models that have one.
SHARED_COUNT_NAME = re.compile(r"^(moe_)?(n|num)_shared_experts$")
_ROUTER_SCALE = re.compile(r"^route[rd]_scaling_factor$")
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
#: Levels of parts within parts that are looked through; real configs have two at most.
_DEEPEST = 8
#: Layers or heads that a model may have, experts (Doge has 16,384) and labels: building takes time and memory for each.
MOST_LAYERS, MOST_EXPERTS, MOST_LABELS = 10_000, 20_000, 1_000_000
#: Channels that an expert may have.
MOST_WIDTH = 1_000_000
#: What is counted, and what may be listed one by one.
_COUNTED = re.compile(r"^(\w+_)?(n|num)_(\w+_)?(layers?|blocks?|experts|heads?|groups?|labels|stages)(_|$)|^depths?$")
_LISTED = re.compile(r"layer|block|pattern|expert|depth")
_HEAD_DIM_NAMES = ("head_dim", "attention_head_dim", "qk_head_dim")


@dataclass(frozen=True)
class ExpertSpec:
    """The routed experts of a model, as its config states them.

    `path` leads from the whole config to the part that states the count (for example `("text_config",)`), `attribute`
    is the count's name there. `groups` is 1 for a router that does not limit its choice to groups of experts;
    otherwise the router first picks `topk_groups` of `groups` equal groups.
    """

    path: tuple[str, ...]
    attribute: str
    count: int
    top_k: int
    groups: int = 1
    topk_groups: int = 1


@dataclass(frozen=True)
class WidthSpec:
    """The width of a model's routed experts, that is their number of channels, as its config states it.

    `path` leads to the part of the config that states it, under one of `names`. In some models the width of the shared
    experts is a multiple of it: then `shared` is the name of that factor, and `shared_count` its value.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    width: int
    shared: str = ""
    shared_count: int = 0

    def shared_with(self, width: int) -> int | None:
        """The factor with which shared experts keep their width if the routed ones get `width`; None if none does."""
        count, rest = divmod(self.width * self.shared_count, width)
        return None if rest else count


@dataclass(frozen=True)
class ModelShape:
    """The sizes that the workspace of a forward depends on, in values (not bytes).

    `attention` is heads × head dimension of the queries, `linear` that of linear attention (value heads × the wider of
    key and value dimension), `expert` the inner width of one routed expert, `dense` the inner width of a feed-forward
    layer that every token passes; 0 for what the model does not have. `wide_routing` says that the router's weights,
    and so the experts' weighted outputs, are float32 whatever the model computes in.
    """

    hidden: int
    attention: int
    linear: int
    expert: int
    top_k: int
    experts: int
    dense: int
    vocabulary: int
    wide_routing: bool = False


def absurdity(raw: Mapping[str, Any]) -> str | None:
    """A number in a config that is too large for any model, in words; None where there is none.

    Configs and models are built by loops over layers, experts, heads and labels, and a config may name any number.
    """
    parts: list[tuple[Any, int]] = [(raw, 0)]
    while parts:
        part, depth = parts.pop()
        if depth > MOST_LEVELS:
            return f"parts nested more than {MOST_LEVELS} deep"
        if isinstance(part, list):
            parts += [(item, depth + 1) for item in part if isinstance(item, (Mapping, list))]
            continue
        for name, value in part.items():
            counted = len(value) if isinstance(value, (list, str)) and _LISTED.search(name) else value
            most = MOST_LABELS if "label" in name else MOST_EXPERTS if "expert" in name else MOST_LAYERS
            if isinstance(counted, (int, float)) and counted > most and (_COUNTED.search(name) or counted is not value):
                what = "" if counted is value else " entries"
                return f"{name}: {show(counted)}{what}, where {most:,} are the most"
            if isinstance(value, int) and abs(value) >= 2**63:
                return f"{name}: a number of {value.bit_length()} bits"
            if isinstance(value, (Mapping, list)):
                parts.append((value, depth + 1))
    return None


def text_part(raw: Mapping[str, Any]) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """The part of a config that describes the text decoder, and the path to it."""
    path: tuple[str, ...] = ()
    while len(path) < _DEEPEST:
        part = next((name for name in _TEXT_PARTS if isinstance(raw.get(name), Mapping)), None)
        if part is None:
            break
        path, raw = (*path, part), raw[part]
    return path, raw


def stated_counts(part: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of experts above one that a part of a config states, by their names in it."""
    numbers = {name: single_number(value) or 0 for name, value in part.items() if COUNT_NAME.match(str(name))}
    return {name: number for name, number in numbers.items() if number > 1}


def expert_spec(path: tuple[str, ...], name: str, count: int, parts: Sequence[Mapping[str, Any]]) -> ExpertSpec | None:
    """The `count` experts that the config at `path` states as `name`; None where no part states a top-k."""
    top_k = first_number(parts, TOP_K_NAMES)
    if top_k is None:
        return None
    groups, topk_groups = first_number(parts, GROUP_NAMES) or 1, first_number(parts, TOPK_GROUP_NAMES) or 1
    return ExpertSpec(path, name, count, top_k, groups, topk_groups)


def stated_experts(raw: Mapping[str, Any]) -> ExpertSpec | None:
    """The routed experts if the text part states count and top-k plainly; None otherwise."""
    path, text = text_part(raw)
    counts = stated_counts(text)
    if len(set(counts.values())) != 1:
        return None
    name, count = next(iter(counts.items()))
    return expert_spec(path, name, count, (text,))


def states_experts(raw: Mapping[str, Any]) -> bool:
    """Whether the text part, or a part of it, names any number of experts above one."""
    return any(
        (first_number((part,), (name,)) or 0) > 1
        for part in _with_parts(text_part(raw)[1])
        for name in part
        if COUNT_NAME.match(str(name))
    )


def _with_parts(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A part of a config, and the parts in it: some models keep their feed-forward sizes in one of their own (DBRX)."""
    return [part, *(value for value in part.values() if isinstance(value, Mapping))]


def stated_shape(raw: Mapping[str, Any]) -> ModelShape | None:
    """The sizes that the text part states; None where hidden size, heads or vocabulary are missing."""
    _, text = text_part(raw)
    hidden = first_number((text,), ("hidden_size", "n_embd", "d_model"))
    heads = first_number((text,), ("num_attention_heads", "n_head", "n_heads"))
    vocabulary = first_number((text, raw), ("vocab_size",))
    if hidden is None or heads is None or vocabulary is None:
        return None
    nope, rope = first_number((text,), ("qk_nope_head_dim",)), first_number((text,), ("qk_rope_head_dim",))
    latent = nope + rope if nope is not None and rope is not None else None
    head_dim = latent or first_number((text,), _HEAD_DIM_NAMES) or hidden // heads
    parts = _with_parts(text)
    experts = max((count for part in parts for count in stated_counts(part).values()), default=0)
    width = first_number(parts, EXPERT_WIDTH_NAMES) or 0
    return ModelShape(
        hidden=hidden,
        attention=heads * head_dim,
        linear=(first_number((text,), ("linear_num_value_heads",)) or 0)
        * max(first_number((text,), (name,)) or 0 for name in ("linear_key_head_dim", "linear_value_head_dim")),
        expert=width if experts else 0,
        top_k=(first_number(parts, TOP_K_NAMES) or 1) if experts else 0,
        experts=experts,
        dense=first_number(parts, ("intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size")) or 0,
        vocabulary=vocabulary,
        # Routers that scale what they choose (as in DeepSeek-V2) leave it in float32; the others cast it back.
        wide_routing=experts > 0 and any(_ROUTER_SCALE.search(name) and text[name] is not None for name in text),
    )


def first_number(parts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> int | None:
    """The first positive whole number that a part states under one of the names; of a list the largest."""
    for part in parts:
        for name in names:
            value = part.get(name)
            if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
                value = max(value)
            if type(value) is int and value > 0:
                return value
    return None


def single_number(value: Any) -> int | None:
    """`value` if it is a whole number, or the one number that a list repeats."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    return value if type(value) is int else None


_MTP_NAME = re.compile(r"mtp|nextn")
_MTP_COUNT = re.compile(r"^num_|^n_|layer|modules")


def rewrite_config(
    raw: Mapping[str, Any],
    spec: ExpertSpec,
    names: Iterable[str],
    count: int,
    narrower: tuple[WidthSpec, int] | None = None,
    keeps_mtp: bool = False,
) -> dict[str, Any]:
    """The source's `config.json` with `count` experts, which `names` may state, and, unless `keeps_mtp`, no MTP layers.

    With `narrower` also with another number of channels per expert. Only those keys change, wherever the file keeps
    them: the name itself, its aliases, and copies of the same number of experts under another usual name, at the top
    and in the text part. Key order and everything else stay.
    """
    stating = set(names)
    sizes: dict[str, tuple[int, int]] = {}
    if narrower is not None:
        old, width = narrower
        sizes = dict.fromkeys(old.names, (old.width, width))
        if old.shared:
            sizes[old.shared] = (old.shared_count, old.shared_with(width) or 0)

    def rewrite(node: Mapping[str, Any], depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.items():
            named = key in stating or bool(COUNT_NAME.match(key))
            if has_empty_section(key, value):
                continue
            if named and single_number(value) == spec.count:
                result[key] = [count] * len(value) if isinstance(value, list) else count
            elif key in sizes and single_number(value) == sizes[key][0]:
                result[key] = [sizes[key][1]] * len(value) if isinstance(value, list) else sizes[key][1]
            elif _MTP_NAME.search(key) and not keeps_mtp:
                result[key] = _without_mtp(key, value)
            elif isinstance(value, dict) and depth < len(spec.path) and key == spec.path[depth]:
                result[key] = rewrite(value, depth + 1)
            else:
                result[key] = value
        return result

    return rewrite(raw, 0)


def unstated_width(raw: Mapping[str, Any], spec: WidthSpec) -> str | None:
    """What a `config.json` leaves to the model's defaults of what changes with the experts' width, as `key: value`.

    None if it states the width, and the factor of the shared experts' width if there is one.
    """
    parts = [raw]
    for name in spec.path:
        parts.append(parts[-1].get(name) or {})
    wanted = [(spec.names, spec.width), *([((spec.shared,), spec.shared_count)] if spec.shared else [])]
    for names, value in wanted:
        if not any(single_number(part.get(name)) == value for part in parts for name in names):
            return f'"{names[0]}": {value}'
    return None


def _without_mtp(key: str, value: Any) -> Any:
    """The value that says "no MTP layers": 0 for a number of them, [] for a list over them, False for `use_mtp`."""
    if key.startswith("use_") and isinstance(value, bool):
        return False
    if not _MTP_COUNT.search(key):
        return value
    return 0 if type(value) is int else [] if isinstance(value, list) else value


def mtp_layers(raw: Mapping[str, Any]) -> int:
    """How many MTP layers a `config.json` names, at its top or in a part of it."""
    counts = [
        value
        for part in _with_parts(raw)
        for key, value in part.items()
        if _MTP_NAME.search(key) and _MTP_COUNT.search(key) and type(value) is int
    ]
    return max(counts, default=0)


def drop_missing_code(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`raw` without its `auto_map` if that names Python files which `folder` lacks.

    Models that transformers knows often name code that it no longer needs; without the files, the output could not be
    loaded by anyone who trusts remote code.
    """
    auto_map = raw.get("auto_map")
    references = list(auto_map.values()) if isinstance(auto_map, Mapping) else []
    # "repo--module.Class" names a module of another repository.
    local = [name for name in references if isinstance(name, str) and "--" not in name]
    if all((folder / f"{name.partition('.')[0]}.py").is_file() for name in local):
        return dict(raw)
    return {key: value for key, value in raw.items() if key != "auto_map"}


def resolve_keep(spec: ExpertSpec, keep: int | None, ratio: float | None, all_may_stay: bool = False) -> int:
    """How many experts stay per layer. Raises SettingsError when the router could not work with so few.

    `all_may_stay` if something else changes. With a ratio, floor(ratio × count) are removed, or as many fewer as the
    router's equal groups require.
    """
    least = minimum_keep(spec)
    if keep is None:
        assert ratio is not None
        # The tolerance keeps 0.7 of 10 experts from becoming 6.999…
        keep = spec.count - math.floor(ratio * spec.count + 1e-9)
        keep = math.ceil(keep / spec.groups) * spec.groups
        asked = f"--ratio {ratio:g} would keep {keep} of {spec.count} experts"
    else:
        asked = f"--keep {keep}"
    if keep < spec.top_k:
        raise SettingsError(
            f"{asked}, but the router picks {spec.top_k} experts per token. Keep at least {least} of {spec.count} "
            f"(--keep {least})."
        )
    if keep > spec.count or (keep == spec.count and not all_may_stay):
        raise SettingsError(
            f"{asked}: the model has {spec.count} experts per layer, so nothing would be removed. "
            f"Keep between {least} and {spec.count - spec.groups}."
        )
    if keep % spec.groups:
        below, above = keep // spec.groups * spec.groups, math.ceil(keep / spec.groups) * spec.groups
        choices = [choice for choice in (below, above) if least <= choice < spec.count]
        raise SettingsError(
            f"{asked}: the router chooses among {spec.groups} groups of experts, which must stay equal in size, and "
            f"{keep} is not a multiple of {spec.groups}. Use --keep {' or '.join(map(str, choices)) or least}."
        )
    if keep < least:
        raise SettingsError(
            f"{asked} leaves {keep // spec.groups} experts in each of {spec.groups} groups, of which the router opens "
            f"{spec.topk_groups} to pick {spec.top_k} experts per token. Keep at least {least} (--keep {least})."
        )
    return keep


def minimum_keep(spec: ExpertSpec) -> int:
    """The fewest experts per layer with which the router still works.

    A group-limited router rates a group by its two best experts (DeepSeek-V3, arXiv:2412.19437, section 2.1.2), and the
    groups it opens must together hold top_k experts.
    """
    if spec.groups == 1:
        return spec.top_k
    per_group = max(2, math.ceil(spec.top_k / spec.topk_groups))
    return per_group * spec.groups
