"""Proof of a result: every byte of it compared with the source's, from the files as they lie on the disk."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from streamprune.checkpoint.index import CONFIG_NAME, Checkpoint, open_checkpoint, read_json
from streamprune.config import DEFAULT_SHARD_BYTES
from streamprune.errors import CheckpointError, VerifyError
from streamprune.files.json_text import show
from streamprune.models.config import load_config
from streamprune.models.per_layer_loading import find_loading_facts
from streamprune.models.skeleton import build_skeleton, survey
from streamprune.output.compare import Proof, compare_tensors
from streamprune.output.plan import make_plan
from streamprune.output.writer import REPORT_NAME


def verify(output: Path, source: Path, trust_remote_code: bool = False) -> Proof:
    """Compare a pruned model with the checkpoint that it was made from. Raises VerifyError at the first difference.

    What has to be in it follows from the source and from the experts that its streamprune.json names. Memory: two
    portions of a file, whatever the sizes.
    """
    pruned, origin = open_checkpoint(output), open_checkpoint(source)
    refuse_strays(output, pruned)
    kept = kept_experts(output)
    config = load_config(source, trust_remote_code)
    skeleton = build_skeleton(config, torch.bfloat16, trust_remote_code)
    check_kept(output, kept, tuple(skeleton.experts), skeleton.spec.count)
    counts = {block: len(experts) for block, experts in kept.items()}
    layout = survey(origin.config, skeleton, origin.tensors)
    # How it is divided into files is the output's own affair.
    plan = make_plan(layout, find_loading_facts(origin.config, config, skeleton), origin, counts, DEFAULT_SHARD_BYTES)
    _compare_configs(output, pruned.config, plan.config)
    expected = [tensor for shard in plan.shards for tensor in shard.tensors]
    proof = compare_tensors(expected, kept, origin, output, pruned.tensors)
    _compare_small_files(output, origin)
    for name, contents in plan.files.items():
        if not (output / name).is_file() or (output / name).read_bytes() != contents:
            raise VerifyError(f"{output / name} is not the code that loads this model. Prune again.")
    return proof


def refuse_strays(output: Path, pruned: Checkpoint) -> None:
    """Raise VerifyError for weights beside those of the index."""
    extra = sorted(path.name for path in output.glob("*.safetensors") if path.name not in pruned.files)
    if extra:
        raise VerifyError(f"{output / extra[0]} is in no index: it belongs to no part of the model. Remove it.")


def kept_experts(output: Path) -> dict[int, list[int]]:
    """The kept experts by block, as streamprune.json names them; VerifyError when it does not."""
    path = output / REPORT_NAME
    try:
        layers: Any = read_json(path)["layers"]
        kept = {layer["index"]: list(layer["kept"]) for layer in layers}
        if not all(type(number) is int for block, experts in kept.items() for number in (block, *experts)):
            raise ValueError("something else than numbers")
        return kept
    except CheckpointError as error:
        raise VerifyError(f"{error} Without it nobody knows which experts were kept.") from None
    except (KeyError, TypeError, ValueError):
        raise VerifyError(f"{path} does not list the kept experts of every layer. Was it changed?") from None


def check_kept(output: Path, kept: Mapping[int, list[int]], blocks: Sequence[int], count: int) -> None:
    """Raise VerifyError unless `kept` lists experts of a source that has `count` of them in each of `blocks`."""
    if sorted(kept) != sorted(blocks):
        raise VerifyError(
            f"{output / REPORT_NAME} names experts for blocks {_few(sorted(kept))}, but the source has them in "
            f"{_few(sorted(blocks))}. Is it another model's?"
        )
    for block, experts in kept.items():
        if experts != sorted(set(experts)) or not experts or not 0 <= experts[0] <= experts[-1] < count:
            raise VerifyError(f"{output / REPORT_NAME}: the experts kept in block {block} are no ascending numbers.")


def _compare_configs(output: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in sorted(found.keys() | wanted.keys()):
        ours, theirs = (show(config[key]) if key in config else "missing" for config in (found, wanted))
        if ours != theirs or found.get(key) != wanted.get(key):
            raise VerifyError(
                f"{output / CONFIG_NAME}: {show(key)} is {ours}, but by the source it has to be {theirs}."
            )


def _compare_small_files(output: Path, source: Checkpoint) -> None:
    for relative in source.small_files():
        ours = output / relative
        if not ours.is_file() or not filecmp.cmp(ours, source.folder / relative, shallow=False):
            raise VerifyError(f"{ours} is not the same as {source.folder / relative}.")


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
