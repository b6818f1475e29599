"""Tensors of layers for multi-token prediction (MTP), which the model itself does not have. No torch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from streamprune.errors import CheckpointError
from streamprune.models.expert_layout import Target

#: Names of such tensors.
MTP_NAME = re.compile(r"(^|[._])(mtp|nextn)([._]|$)")
#: Tensors that only layers for multi-token prediction have.
MTP_ONLY = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")


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
