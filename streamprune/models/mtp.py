"""Layers for multi-token prediction (MTP), which transformers' models do not have: found by the names of tensors.

Engines draft tokens with them (speculative decoding): each is a decoder layer with a few tensors of its own. No torch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from streamprune.errors import CheckpointError
from streamprune.models.expert_layout import Layout, Target

#: Names of such tensors.
MTP_NAME = re.compile(r"(^|[._])(mtp|nextn)([._]|$)")
#: Tensors that only layers for multi-token prediction have.
MTP_ONLY = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")
#: In names of tensors of routed experts.
OF_EXPERTS = re.compile(r"(?<!shared)(?<!shared_)experts?[._]")
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")
#: The path of an MTP layer: to the first number behind what says that it is one, else to the first number of all.
_PATH = re.compile(r"(?:(?:.*?[._])?(?:mtp|nextn)(?:[._][a-z_]+)*|.*?)\.\d+(?=\.)")


def find_mtp_tensors(targets: Mapping[str, Target], layer_count: int, mtp_layers: int) -> list[str]:
    """Of the tensors that the model ignores, those of its multi-token-prediction (MTP) layers.

    Checkpoints name them `mtp` or `nextn`, or number them as further decoder layers: as many as the config says
    (`mtp_layers`), or layers with tensors that only MTP layers have. Raises CheckpointError for any other further
    layer: it is one of the model's own, and the config is wrong.
    """
    matches = {name: _NUMBERED.match(name) for name in targets}
    lists = {match.group(1) for name, match in matches.items() if match and targets[name].layer is not None}
    found = set()
    further: dict[int, list[str]] = defaultdict(list)
    for name, match in matches.items():
        if targets[name].name is not None:
            continue
        if match is not None and match.group(1) in lists and int(match.group(2)) >= layer_count:
            further[int(match.group(2))].append(name)
        elif MTP_NAME.search(name):
            found.add(name)
    for number, names in further.items():
        if number >= layer_count + mtp_layers and not any(MTP_ONLY.search(name) for name in names):
            raise CheckpointError(
                f"The checkpoint has {names[0]}, but config.json describes only {layer_count} layers and {mtp_layers} "
                "multi-token-prediction layers. Config and shards do not belong together; download both again."
            )
        found.update(names)
    return [name for name in targets if name in found]


def may_be_mtp(name: str, layer_count: int) -> bool:
    """Whether a tensor of this name, which the model ignores, may be found by `find_mtp_tensors`."""
    match = _NUMBERED.match(name)
    return bool(MTP_NAME.search(name)) or (match is not None and int(match.group(2)) >= layer_count)


def by_mtp_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """The tensors of MTP layers by the path of their layer, such as `mtp.layers.0` or `model.layers.61`.

    Those that lie in no layer, such as `mtp.fc.weight`, are left out.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        match = _PATH.match(name)
        if match is not None:
            found[match.group()].append(name)
    return dict(found)


def mtp_note(layout: Layout) -> str:
    """What an output of this layout does with layers for multi-token prediction; empty if there are none."""
    if layout.mtp:
        how, last = "as they are", layout.mtp_source
        if layout.mtp_experts:
            how = f"with those of their experts that layer {last} keeps by number: nothing is scored in them"
        return (
            f"layers for multi-token prediction (MTP, {len(layout.mtp):,} tensors) are kept, {how}. Text stays the "
            "same with speculative decoding; fewer of its drafts may be accepted."
        )
    if not layout.dropped:
        return ""
    why = f" ({layout.mtp_problem})" if layout.mtp_problem else ""
    return (
        f"{len(layout.dropped):,} multi-token-prediction (MTP) tensors are dropped{why}, and config.json is changed to "
        "match. Without them, speculative decoding needs a separate draft model, and llama.cpp's converter wants "
        "--no-mtp for Qwen3-Next and Qwen3.5."
    )
