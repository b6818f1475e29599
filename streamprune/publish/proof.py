"""Whether an output may be published: compared with its source, or, without that, as far as its own files show it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

from streamprune.checkpoint.hub import cached_model, resolve_model
from streamprune.checkpoint.index import CONFIG_NAME, INDEX_NAME, open_checkpoint, read_json
from streamprune.errors import CheckpointError, ScoresError, SettingsError, VerifyError
from streamprune.hardware.memory import format_bytes
from streamprune.models.open import describe_model, open_moe
from streamprune.models.per_layer_experts import LoadingFacts, has_per_layer_experts, modeling_source
from streamprune.models.per_layer_loading import find_loading_facts
from streamprune.output.plan import REPORT_NAME
from streamprune.output.verify import check_kept, refuse_extra_weights, verify
from streamprune.publish.parts import CARD_NAME, Parts
from streamprune.reporting.record import damage
from streamprune.saliency.scores_file import SCORES_FOLDER, SCORES_NAME, read_scores

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class PublishProof:
    """How many tensors, with how many bytes, were compared with the source in the folder `source`, or without one.

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


def prove(parts: Parts, source: str | None, trust_remote_code: bool, ask_nobody: bool) -> PublishProof:
    """Compare an output with `source` (a folder or a Hub id), or with what its record names if that is here.

    Where no source is here, its own files are checked: that all tensors are there with the shapes that the model of its
    config has, and as many experts as its record says. With `ask_nobody` a Hub model counts only if it is in the cache.
    Raises VerifyError for an output that is not what it should be.
    """
    _check_card(parts)
    _check_scores(parts)
    origin, why = _recorded_source(parts, trust_remote_code) if source is None else (None, "")
    if source is not None:
        origin = _named_source(parts, source, trust_remote_code, ask_nobody)
    if origin is not None:
        proof = verify(parts.folder, origin, trust_remote_code)
        return PublishProof(proof.tensors, proof.nbytes, origin)
    try:
        _check_files(parts, trust_remote_code)
    except CheckpointError as error:
        raise VerifyError(
            f"{parts.folder} is not what it should be: {damage(error)}. Prune again, or restore it."
        ) from error
    return PublishProof(len(parts.checkpoint.tensors), parts.checkpoint.nbytes, None, why)


def _named_source(parts: Parts, source: str, trust_remote_code: bool, ask_nobody: bool) -> Path:
    """The folder of the source that the user names; a Hub model is downloaded unless `ask_nobody`."""
    settings = parts.record.settings
    revision = settings.revision if source == settings.model else None
    if not ask_nobody or Path(source).expanduser().is_dir():
        return resolve_model(source, revision, trust_remote_code)
    cached = cached_model(source, revision, trust_remote_code)
    if cached is None:
        raise SettingsError(
            f"--source {source} is neither a folder nor in the Hub cache, and --dry-run asks nobody. Leave one out."
        )
    return cached


def _recorded_source(parts: Parts, trust_remote_code: bool) -> tuple[Path | None, str]:
    """The folder of the source that the record names; or None, and why it is not here."""
    model, revision = parts.record.settings.model, parts.record.settings.revision
    if not _HUB_ID.fullmatch(model):
        return None, "no --source is given."
    cached = cached_model(model, revision, trust_remote_code)
    if cached is None:
        return None, f"{model} is not in the Hub cache, and no --source is given."
    try:
        fingerprint = open_checkpoint(cached).fingerprint()
    except (CheckpointError, OSError):
        fingerprint = None
    if fingerprint != parts.record.source.fingerprint:
        return None, f"the copy of {model} in the Hub cache is of another revision, and no --source is given."
    return cached, ""


def _check_card(parts: Parts) -> None:
    try:
        ModelCard.load(parts.folder / CARD_NAME)
    except Exception as error:
        # Whatever yaml and the card's classes find wrong. The Hub would refuse it too, once all was sent.
        line = " ".join(str(error).split())[:200]
        raise VerifyError(f"{parts.folder / CARD_NAME}: its metadata are no valid YAML ({line}). Correct it.") from None


def _check_scores(parts: Parts) -> None:
    if not any(file.name == f"{SCORES_FOLDER}/{SCORES_NAME}" for file in parts.files):
        return
    try:
        scores = read_scores(parts.folder)
    except ScoresError as error:
        raise VerifyError(f"{damage(error)}. Prune again, or restore it.") from None
    layers, experts = list(parts.record.counts), parts.record.experts
    if (list(scores.layer_indices), scores.spec.count) != (layers, experts):
        raise VerifyError(
            f"{parts.folder / SCORES_FOLDER / SCORES_NAME} holds scores of {len(scores.layers)} layers with "
            f"{scores.spec.count} experts, but by {REPORT_NAME} the source has {len(layers)} with {experts}. Prune "
            "again."
        )


def _check_files(parts: Parts, trust_remote_code: bool) -> None:
    """Raise CheckpointError or VerifyError unless the files fit together and make the model of their config."""
    checkpoint, folder = parts.checkpoint, parts.folder
    refuse_extra_weights(folder, checkpoint)
    stated = read_json(folder / INDEX_NAME).get("metadata")
    if not isinstance(stated, dict) or stated.get("total_size") != checkpoint.nbytes:
        raise VerifyError(f"{folder / INDEX_NAME} does not state the {checkpoint.nbytes:,} bytes of all tensors.")
    model = describe_model(folder, checkpoint.config, trust_remote_code)
    _check_counts(parts, model.counts)
    opened = open_moe(checkpoint, trust_remote_code, model=model)
    if has_per_layer_experts(model.counts):
        _check_code(parts, find_loading_facts(model.raw, model.config, opened.skeleton))


def _check_counts(parts: Parts, counts: Mapping[int, int]) -> None:
    kept = {layer.index: layer.kept for layer in parts.record.layers}
    check_kept(parts.folder, kept, tuple(counts), parts.record.experts)
    for layer, experts in kept.items():
        if len(experts) != counts[layer]:
            raise VerifyError(
                f"{parts.folder / REPORT_NAME} lists {len(experts)} experts for layer {layer}, but by its config.json "
                f"the model has {counts[layer]}. They do not belong together: prune again."
            )


def _check_code(parts: Parts, facts: LoadingFacts) -> None:
    """The code that gives layers different numbers of experts is run by everybody who loads the model: it has to be
    ours."""
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
