"""Whether an output may be published: proved against its source, or, without that, as far as its own files prove it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from streamprune.checkpoint.hub import cached_model, resolve_model
from streamprune.checkpoint.index import CONFIG_NAME, INDEX_NAME, open_checkpoint, read_json
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, ScoresError, SettingsError, VerifyError
from streamprune.hardware.memory import format_bytes
from streamprune.models.config import config_from_dict, load_config
from streamprune.models.open import check_fit
from streamprune.models.per_layer_config import counts_of, read_per_layer_experts
from streamprune.models.per_layer_experts import LoadingFacts, modeling_source
from streamprune.models.per_layer_loading import find_loading_facts
from streamprune.models.skeleton import Skeleton, Target, build_skeleton, map_checkpoint, survey
from streamprune.output.verify import check_kept, kept_experts, refuse_strays, verify
from streamprune.output.writer import REPORT_NAME
from streamprune.publish.parts import CARD_NAME, Parts, damage
from streamprune.saliency.scores_file import SCORES_FOLDER, SCORES_NAME, read_scores

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Shown:
    """What was proved: of so many tensors with so many bytes, against the source in `source`, or without one.

    `why` says in the latter case why there was none to compare with.
    """

    tensors: int
    nbytes: int
    source: Path | None
    why: str = ""

    @property
    def kind(self) -> str:
        """`source`: every byte is the source's. `files`: all is there and fits together, the bytes are not compared."""
        return "files" if self.source is None else "source"

    def __str__(self) -> str:
        what = f"{self.tensors:,} tensors, {format_bytes(self.nbytes)}"
        if self.source is not None:
            return f"verified: {what}, identical to the bytes of the source in {self.source}"
        return (
            f"verified without the source: {what}, all there, of the shapes that config.json and {REPORT_NAME} ask "
            f"for. Not proved: that their bytes are the source's, for {self.why}"
        )


def prove(parts: Parts, source: str | None, trust_remote_code: bool, ask_nobody: bool) -> Shown:
    """Prove an output against `source` (a folder or a Hub id), or against what its record names if that is here.

    Where no source is here, its own files are checked: that all tensors are there with the shapes that the model of its
    config has, and as many experts as its record says. With `ask_nobody` a Hub model counts only if it is in the cache.
    Raises VerifyError for an output that is not what it should be.
    """
    _check_card(parts)
    _check_scores(parts)
    origin, why = _source(parts, source, trust_remote_code, ask_nobody)
    if origin is not None:
        proof = verify(parts.folder, origin, trust_remote_code)
        return Shown(proof.tensors, proof.nbytes, origin)
    try:
        _check_files(parts, trust_remote_code)
    except CheckpointError as error:
        raise VerifyError(
            f"{parts.folder} is not what it should be: {damage(error)}. Prune again, or restore it."
        ) from error
    return Shown(len(parts.checkpoint.tensors), parts.checkpoint.nbytes, None, why)


def _source(parts: Parts, source: str | None, trust_remote_code: bool, ask_nobody: bool) -> tuple[Path | None, str]:
    """The folder of the source; or None, and why it is not here."""
    named, revision = parts.report["settings"].get("model"), parts.report["settings"].get("revision")
    revision = revision if isinstance(revision, str) else None
    if source is not None:
        at = revision if source == named else None
        if not ask_nobody or Path(source).expanduser().is_dir():
            return resolve_model(source, at, trust_remote_code), ""
        cached = cached_model(source, at, trust_remote_code)
        if cached is None:
            raise SettingsError(
                f"--source {source} is neither a folder nor in the Hub cache, and --dry-run asks nobody. Leave one out."
            )
        return cached, ""
    if not isinstance(named, str) or not _HUB_ID.fullmatch(named):
        return None, "no --source is given."
    cached = cached_model(named, revision, trust_remote_code)
    if cached is None:
        return None, f"{named} is not in the Hub cache, and no --source is given."
    if _fingerprint(cached) != parts.report["source"].get("fingerprint"):
        return None, f"the copy of {named} in the Hub cache is of another revision, and no --source is given."
    return cached, ""


def _fingerprint(folder: Path) -> str | None:
    try:
        return open_checkpoint(folder).fingerprint()
    except (CheckpointError, OSError):
        return None


def _check_card(parts: Parts) -> None:
    try:
        ModelCard.load(parts.folder / CARD_NAME)
    except Exception as error:
        # Whatever yaml and the card's classes find wrong. The Hub would refuse it too, once all was sent.
        line = " ".join(str(error).split())[:200]
        raise VerifyError(f"{parts.folder / CARD_NAME}: its metadata are no valid YAML ({line}). Correct it.") from None


def _check_scores(parts: Parts) -> None:
    if not any(part.name == f"{SCORES_FOLDER}/{SCORES_NAME}" for part in parts.files):
        return
    try:
        scores = read_scores(parts.folder)
    except ScoresError as error:
        raise VerifyError(f"{damage(error)}. Prune again, or restore it.") from None
    blocks, count = sorted(kept_experts(parts.folder)), parts.report["source"].get("experts")
    if (sorted(scores.layer_indices), scores.spec.count) != (blocks, count):
        raise VerifyError(
            f"{parts.folder / SCORES_FOLDER / SCORES_NAME} holds scores of {len(scores.layer_indices)} blocks with "
            f"{scores.spec.count} experts, but by {REPORT_NAME} the source has {len(blocks)} with {count}. Prune again."
        )


def _check_files(parts: Parts, trust_remote_code: bool) -> None:
    """Raise CheckpointError or VerifyError unless the files fit together and make the model of their config."""
    checkpoint, folder = parts.checkpoint, parts.folder
    refuse_strays(folder, checkpoint)
    stated = read_json(folder / INDEX_NAME).get("metadata")
    if not isinstance(stated, dict) or stated.get("total_size") != checkpoint.nbytes:
        raise VerifyError(f"{folder / INDEX_NAME} does not state the {checkpoint.nbytes:,} bytes of all tensors.")
    uneven = read_per_layer_experts(checkpoint.config)
    config = load_config(folder, trust_remote_code)
    raw: Mapping[str, Any] = checkpoint.config
    if uneven is not None:
        raw, config = uneven.stock, config_from_dict(config, uneven.stock)
    skeleton = build_skeleton(config, torch.bfloat16, trust_remote_code)
    counts = counts_of(uneven, skeleton.experts) if uneven else dict.fromkeys(skeleton.experts, skeleton.spec.count)
    _check_counts(parts, skeleton, counts)
    targets = map_checkpoint(skeleton.model, checkpoint.tensors)
    check_fit(skeleton, targets, _as_even(skeleton, targets, checkpoint.tensors, counts))
    survey(raw, skeleton, checkpoint.tensors, targets, counts)
    if uneven is not None:
        _check_code(parts, find_loading_facts(raw, config, skeleton))


def _as_even(
    skeleton: Skeleton,
    targets: Mapping[str, Target | None],
    tensors: Mapping[str, TensorEntry],
    counts: Mapping[int, int],
) -> dict[str, TensorEntry]:
    """The tensors with the shapes that they have in a model with the skeleton's experts everywhere.

    Raises CheckpointError for one whose own shape is not that of `counts` experts in its block.
    """
    found = dict(tensors)
    for name, target in targets.items():
        rows = skeleton.expert_rows.get(target.name) if target is not None and target.pattern is None else None
        if target is None or rows is None:
            continue
        even = tuple(skeleton.model.get_parameter_or_buffer(target.name).shape)
        block = skeleton.layer_of(target.name)
        assert block is not None  # whatever depends on the number of experts lies in a block
        wanted = list(even)
        wanted[rows.axis] = rows.stride * counts[block] + rows.tail
        if list(tensors[name].shape) != wanted:
            raise CheckpointError(
                f"{name} is {list(tensors[name].shape)}, but with {counts[block]} experts it has to be {wanted}. Prune "
                "again."
            )
        found[name] = replace(tensors[name], shape=even)
    return found


def _check_counts(parts: Parts, skeleton: Skeleton, counts: Mapping[int, int]) -> None:
    kept, count = kept_experts(parts.folder), parts.report["source"].get("experts")
    if type(count) is not int:
        raise VerifyError(f"{parts.folder / REPORT_NAME} does not tell how many experts the source has.")
    check_kept(parts.folder, kept, tuple(skeleton.experts), count)
    for block, experts in kept.items():
        if len(experts) != counts[block]:
            raise VerifyError(
                f"{parts.folder / REPORT_NAME} lists {len(experts)} experts for block {block}, but by its config.json "
                f"the model has {counts[block]}. They do not belong together: prune again."
            )


def _check_code(parts: Parts, facts: LoadingFacts) -> None:
    """The code that builds the blocks unevenly is run by everybody who loads the model: it has to be ours."""
    path = parts.folder / facts.file_name
    if not path.is_file() or path.read_bytes() != modeling_source(facts).encode():
        raise VerifyError(f"{path} is not the code that loads this model. Prune again.")
    named = parts.checkpoint.config.get("auto_map")
    models = {
        str(code).partition(".")[0]
        for auto, code in (named.items() if isinstance(named, dict) else ())
        if str(auto).startswith("AutoModel")
    }
    if models != {path.stem}:
        raise VerifyError(f"{parts.folder / CONFIG_NAME} does not name {path.name} as its model's code. Prune again.")
