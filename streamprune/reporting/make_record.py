"""The record of an output, made of what was decided; and where its scores come from. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET

from streamprune import __version__
from streamprune.checkpoint.index import Checkpoint
from streamprune.config import PruneSettings, RunSettings
from streamprune.errors import ScoresError
from streamprune.files.json_text import show
from streamprune.models.config_json import stated_experts
from streamprune.models.expert_layout import Layout
from streamprune.output.plan import PrunePlan
from streamprune.planning.counts import ExpertCounts
from streamprune.reporting.record import Provenance, Record, ScoringSettings, public_name
from streamprune.saliency.methods import METHODS
from streamprune.saliency.scores import Scores
from streamprune.selection.select import LayerSelection, Selection
from streamprune.selection.settings import SelectionSettings
from streamprune.targets import ServingSpec


def make_record(
    provenance: Mapping[str, Any],
    selection: Selection,
    plan: PrunePlan,
    counts: ExpertCounts,
    settings: RunSettings | PruneSettings,
    use: ServingSpec,
) -> Record:
    """The record of an output that is planned for `use`; it is the same for every run with the same input and settings.

    It does not matter whether the scores were computed in the same run or before. (On the CPU the last digits of scores
    depend on the number of threads, as in every matrix product.)
    """
    # In a fixed order, for provenance from a run or from a file.
    origin = json.loads(json.dumps(provenance, sort_keys=True))
    spec, formats = plan.layout.spec, {"formats": plan.formats} if plan.formats else {}
    sizes = {"experts": spec.count, "top_k": spec.top_k, "width": counts.full_width or None}
    found = {
        "settings": _settings(origin, selection, counts, settings),
        "use": {
            **asdict(use),
            "budget_bytes": counts.budget.nbytes if counts.budget else None,
            **({"gguf": settings.gguf} if settings.gguf is not None else {}),
        },
        "versions": origin["versions"],
        "source": {**origin["source"], **sizes, **formats},
        "calibration": origin["calibration"],
        **_quantized(plan),
        # `push` skips files that are not listed.
        "files": sorted({*(path.as_posix() for path in plan.copied), *plan.files}),
        "dropped": (*plan.layout.dropped, *plan.layout.ignored),
        **_mtp(plan.layout, selection),
        "protected": {str(layer): experts for layer, experts in sorted(selection.protected.items())},
        "layers": [_layer(each) for each in selection.layers],
    }
    return msgspec.convert(found, Record)


def _settings(
    origin: Mapping[str, Any], selection: Selection, counts: ExpertCounts, settings: RunSettings | PruneSettings
) -> dict[str, Any]:
    """The settings that decide the output: those of the scores, by their provenance, and those of the command."""
    return {
        "model": origin["model"],
        "revision": origin["revision"],
        **msgspec.to_builtins(msgspec.convert(origin["settings"], ScoringSettings)),
        **(_selection_settings(selection.settings) if selection.settings else {}),
        "keep": counts.keep,
        "total": counts.total,
        "width": counts.width,
        **({"rounded_for": settings.round_for, "rounded_from": counts.unrounded} if counts.unrounded else {}),
        "max_shard_bytes": settings.max_shard_bytes,
        **settings.storage.as_json(),
    }


def _layer(each: LayerSelection) -> dict[str, Any]:
    return {
        "index": each.index,
        "kept": each.kept,
        "scores": each.scores,
        "counts": each.tokens,
        "channels": each.channels.as_text() if each.channels is not None else None,
    }


def _mtp(layout: Layout, selection: Selection) -> dict[str, Any]:
    """Which layers for multi-token prediction the output has, and how their experts were selected; or nothing."""
    if not layout.mtp:
        return {}
    if layout.mtp_layer is not None and selection.mtp is not None:
        return {"mtp": {"tensors": len(layout.mtp), "layer": _layer(selection.mtp)}}
    return {"mtp": {"tensors": len(layout.mtp), "experts_of": layout.mtp_source if layout.mtp_experts else None}}


def _quantized(plan: PrunePlan) -> dict[str, Any]:
    """What was quantized on the way to the output; nothing if nothing was."""
    if plan.scheme is None:
        return {}
    found = {"format": plan.scheme.format.name, "matrices": plan.quantized_matrices, "plain": plan.left_plain}
    return {"quantized": found}


def _selection_settings(settings: SelectionSettings) -> dict[str, Any]:
    return {
        **asdict(settings),
        # Other methods do not use the seed.
        "seed": (settings.seed or 0) if METHODS[settings.method].is_random else None,
        "mix": settings.shares,
        "schedule": public_name(settings.schedule) if settings.has_schedule_file else settings.schedule,
        "spread": settings.spread_used,
    }


def provenance_by_hand(model: str, revision: str | None, checkpoint: Checkpoint) -> dict[str, Any]:
    """The provenance of a selection without scores."""
    return {
        "model": public_name(model),
        "revision": revision,
        "source": {"fingerprint": checkpoint.fingerprint(), "bytes": checkpoint.nbytes},
        "settings": {},
        "calibration": None,
        "versions": {"streamprune": __version__},
    }


def check_provenance(scores: Scores) -> None:
    """Raise ScoresError unless the provenance of scores has all that the record and the model card need."""
    fault = ""
    try:
        found = msgspec.convert(scores.provenance, Provenance)
    except msgspec.ValidationError as error:
        fault = str(error)
    else:
        sources = found.calibration.sources if found.calibration else []
        stated = [(source.name, source.tokens) for source in sources]
        if stated != list(zip(scores.sources, scores.source_tokens, strict=True)):
            fault = "its sources are not those of the scores"
        elif not isinstance(found.versions.get("streamprune"), str) or not isinstance(found.source.fingerprint, str):
            fault = "no version of streamprune, or no fingerprint of the source"
        elif found.settings.propagate is UNSET:
            fault = "no `propagate` in its settings"
    if fault:
        raise ScoresError(
            f"The scores do not say where they come from (provenance: {fault}). Score the model again with "
            "`streamprune score`."
        )


def check_scores_of(path: Path, checkpoint: Checkpoint, scores: Scores) -> None:
    """Raise ScoresError unless the scores in `path` are of this checkpoint, by their fingerprint."""
    scored, here = scores.provenance["source"]["fingerprint"], checkpoint.fingerprint()
    if scored != here:
        raise ScoresError(
            f"{path} has the scores of {show(scores.provenance['model'])} with the fingerprint "
            f"{scored[:12]}…, but {checkpoint.folder} has {here[:12]}…. Give the model that was scored, or score this "
            "one."
        )
    stated = stated_experts(checkpoint.config)
    if stated is not None and (stated.count, stated.top_k) != (scores.spec.count, scores.spec.top_k):
        raise ScoresError(
            f"{path} has scores of {scores.spec.count} experts (top-{scores.spec.top_k}), but according to "
            f"its config.json the model has {stated.count} (top-{stated.top_k}). Score the model again."
        )
