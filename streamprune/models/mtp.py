"""Layers for multi-token prediction (MTP), which transformers' models do not have: found by the names of tensors.

Engines draft tokens with them (speculative decoding): each is a decoder layer with a few tensors of its own. No torch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.files.json_text import show_some
from streamprune.hardware.memory import format_bytes
from streamprune.models.expert_layout import Layout, MtpForm, Target

#: Names of such tensors.
MTP_NAME = re.compile(r"(^|[._])(mtp|nextn)([._]|$)")
#: Tensors that only layers for multi-token prediction have.
MTP_ONLY = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")
#: In names of tensors of routed experts.
OF_EXPERTS = re.compile(r"(?<!shared)(?<!shared_)experts?[._]")
#: The norm of the next token's embedding, that of the last hidden state, and the matrix behind both, as the layer at
#: {path} in the folder {root} has them: DeepSeek-V3, GLM-4.5 and others; Qwen3-Next, Qwen3.5 and others. Engines join
#: the embedding and the hidden state in this order in all of them. (MiMo joins them the other way round, under other
#: names.)
_INPUTS = (
    ("{path}.enorm.weight", "{path}.hnorm.weight", "{path}.eh_proj.weight"),
    ("{root}.pre_fc_norm_embedding.weight", "{root}.pre_fc_norm_hidden.weight", "{root}.fc.weight"),
)
#: The dtypes in which these are read.
_FLOATS = frozenset({"F16", "BF16", "F32"})
#: What such a layer has for its predictions, behind its decoder layer; and copies of what the model has.
_BEHIND = re.compile(r"(shared_head(\.norm|\.head)?|norm|embed_tokens|lm_head)\.weight(_scale_inv)?")
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


def find_form(path: str, like: str, names: Iterable[str], tensors: Mapping[str, TensorEntry]) -> MtpForm | str:
    """How the MTP layer at `path` is computed, or why that is not known.

    `names` are the tensors of all MTP layers that feed nothing in the model's own layer at `like`.
    """
    root = path.rpartition(".")[0].rpartition(".")[0]
    for candidate in _INPUTS:
        own = [each.format(path=path, root=root) for each in candidate]
        if not all(name in tensors for name in own):
            continue
        width = tensors[own[0]].shape[0] if tensors[own[0]].shape else 0
        if [tensors[name].shape for name in own] != [(width,), (width,), (width, 2 * width)]:
            return f"{own[2]} is {list(tensors[own[2]].shape)}, not {[width, 2 * width]}"
        packed = next((name for name in own if tensors[name].dtype not in _FLOATS), None)
        if packed is not None:
            return f"{packed} is stored as {tensors[packed].dtype}"
        prefixes = tuple(name.removesuffix("weight") for name in own)
        rest = (name for name in names if not name.startswith(prefixes))
        odd = next((name for name in rest if not _BEHIND.fullmatch(_within(name, path, root))), None)
        return f"what {odd} does is not known" if odd is not None else MtpForm(path, like, *own)
    return f"what enters {path} is not known by its tensors' names"


def _within(name: str, path: str, root: str) -> str:
    """The name of a tensor within the layer at `path`, or else within the folder `root` that it lies in."""
    inside = f"{path}."
    return name.removeprefix(inside if name.startswith(inside) else f"{root}.")


def mtp_note(layout: Layout, scored: bool = False) -> str:
    """What an output of this layout does with layers for multi-token prediction; empty if there are none.

    `scored`: the experts of the MTP layer are scored, or were.
    """
    if layout.mtp:
        how, last = "as they are", layout.mtp_source
        if layout.mtp_layer is not None and scored:
            how = f"with as many of their experts as layer {last} keeps, chosen by scores of their own forward"
        elif layout.mtp_experts:
            why = layout.mtp_unscored or "this choice has no scores of theirs"
            how = f"with those of their experts that layer {last} keeps by number: nothing is scored in them ({why})"
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


def mtp_scoring_note(layout: Layout, nbytes: int) -> str:
    """Whether the experts of MTP layers are scored, and what that takes; `nbytes` are those of all MTP tensors.

    Empty without experts in such layers.
    """
    if layout.mtp_layer is not None:
        return (
            "the experts of the MTP layer are scored in its own forward behind the last layer. It takes about as "
            f"long as another layer with experts, and reads {format_bytes(nbytes)}."
        )
    if layout.mtp_experts:
        return (
            f"the experts of MTP layers are not scored ({layout.mtp_unscored}): they keep the numbers that layer "
            f"{layout.mtp_source} keeps."
        )
    return ""
