"""Layers for multi-token prediction (MTP), which transformers' models do not have: found by the names of tensors.

Engines draft tokens with them (speculative decoding): each is a decoder layer with a few tensors of its own. No torch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from streamprune.files.json_text import show_some
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


def find_mtp_tensors(targets: Mapping[str, Target], layer_count: int) -> list[str]:
    """Of the tensors that the model ignores, those of its multi-token-prediction (MTP) layers.

    Checkpoints name them `mtp` or `nextn`, or number them as further decoder layers. All layers beyond those of the
    config are taken with them, since transformers ignores them as well (`further_layers`).
    """
    matches = {name: _NUMBERED.match(name) for name in targets}
    lists = {match.group(1) for name, match in matches.items() if match and targets[name].layer is not None}
    found = []
    for name, match in matches.items():
        if targets[name].name is not None:
            continue
        further = match is not None and match.group(1) in lists and int(match.group(2)) >= layer_count
        if further or MTP_NAME.search(name):
            found.append(name)
    return found


def further_layers(names: Iterable[str], layer_count: int, mtp_layers: int) -> list[str]:
    """Of tensors that the model ignores, those of layers beyond those which the config describes, MTP layers included.

    `mtp_layers` are as many as the config says. A layer with tensors that only MTP layers have is one of these.
    """
    layers: dict[int, list[str]] = defaultdict(list)
    for name in names:
        match = _NUMBERED.match(name)
        if match is not None and not MTP_NAME.search(name) and int(match.group(2)) >= layer_count + mtp_layers:
            layers[int(match.group(2))].append(name)
    return [name for names in layers.values() if not any(map(MTP_ONLY.search, names)) for name in names]


def ignored_notes(layout: Layout) -> Iterator[str]:
    """What an output of this layout leaves out because the model ignores it, for people; MTP layers are not told."""
    beyond = [name for name in layout.ignored if may_be_mtp(name, layout.layer_count)]
    others = [name for name in layout.ignored if not may_be_mtp(name, layout.layer_count)]
    if beyond:
        yield (
            f"layers beyond the {layout.layer_count} that config.json describes are left out, as transformers ignores "
            f"them: {show_some(beyond)}."
        )
    if others:
        yield f"tensors that the model ignores, and that only some experts have, are left out: {show_some(others)}."


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
