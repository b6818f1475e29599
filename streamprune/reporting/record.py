"""What a run leaves on record: where its scores come from, and `streamprune.json` with the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamprune import __version__
from streamprune.checkpoint.index import Checkpoint
from streamprune.config import ServingSpec
from streamprune.errors import ScoresError
from streamprune.output.plan import PrunePlan
from streamprune.planning.expert_counts import ExpertCounts
from streamprune.saliency.methods import METHODS
from streamprune.saliency.scores import Scores
from streamprune.selection.select import Selection
from streamprune.selection.settings import SelectionSettings

#: The format of streamprune.json.
REPORT_FORMAT = 2


def run_report(
    provenance: Mapping[str, Any],
    selection: Selection,
    plan: PrunePlan,
    counts: ExpertCounts,
    use: ServingSpec,
    shard_bytes: int,
    small_files: Sequence[str],
) -> dict[str, Any]:
    """The contents of `streamprune.json`: nothing in it varies between runs of the same input and settings.

    It is the same whether the scores were taken in the same run or before. (On the CPU the last digits of scores depend
    on the number of threads, as every matrix product does.) `use`
    is what the user planned for, `shard_bytes` the largest size of an output file, and `small_files` the names of those
    that lie beside the weights and were not made here.
    """
    # In one order, whether it comes from a run or was read from a file.
    provenance = json.loads(json.dumps(provenance, sort_keys=True))
    settings = {
        "model": provenance["model"],
        "revision": provenance["revision"],
        "keep": counts.keep,
        "total": counts.total,
        **_selection(selection.settings),
        "max_shard_bytes": shard_bytes,
    }
    return {
        "format": REPORT_FORMAT,
        # How the scores were taken, which cannot change how experts were chosen: a stranger's file may name that too.
        "settings": settings | {name: value for name, value in provenance["settings"].items() if name not in settings},
        "use": _use(use, counts),
        "versions": provenance["versions"],
        "source": {**provenance["source"], "experts": plan.layout.spec.count, "top_k": plan.layout.spec.top_k},
        "calibration": provenance["calibration"],
        # What else may come to lie in the folder is told from these when it is published.
        "files": sorted({*small_files, *plan.files}),
        "dropped": list(plan.layout.dropped),
        "protected": {str(block): list(experts) for block, experts in sorted(selection.protected.items())},
        "layers": [
            {
                "index": layer.index,
                "kept": list(layer.kept),
                "scores": list(layer.scores),
                "counts": list(layer.tokens),
            }
            for layer in selection.layers
        ],
    }


def _use(use: ServingSpec, counts: ExpertCounts) -> dict[str, Any]:
    return {
        "context": use.context,
        "batch": use.batch,
        "kv_dtype": use.kv_dtype,
        "budget_bytes": counts.budget.nbytes if counts.budget else None,
    }


def _selection(settings: SelectionSettings | None) -> dict[str, Any]:
    if settings is None:
        return dict.fromkeys(("method", "seed", "mix", "schedule", "spread", "floor", "protect_super_experts"))
    return {
        "method": settings.method,
        # Which seed another method was called with does not matter.
        "seed": (settings.seed or 0) if METHODS[settings.method].is_random else None,
        "mix": settings.shares,
        "schedule": public_name(settings.schedule) if settings.has_schedule_file else settings.schedule,
        "spread": settings.spread_used,
        "floor": settings.floor,
        "protect_super_experts": settings.protect_super_experts,
    }


def provenance_by_hand(model: str, revision: str | None, checkpoint: Checkpoint) -> dict[str, Any]:
    """The provenance of a choice that rests on no scores."""
    return {
        "model": public_name(model),
        "revision": revision,
        "source": {"fingerprint": checkpoint.fingerprint(), "bytes": checkpoint.nbytes},
        "settings": {},
        "calibration": None,
        "versions": {"streamprune": __version__},
    }


def check_provenance(scores: Scores) -> None:
    """Raise ScoresError unless the provenance of scores, which may come from a stranger, holds what the record and card
    tell.
    """
    provenance = scores.provenance
    try:
        source, calibration = provenance["source"], provenance["calibration"]
        texts = (provenance["model"], source["fingerprint"], provenance["versions"]["streamprune"])
        numbers = (source["bytes"], calibration["sequences"], calibration["tokens"])
        named = [(each["name"], each["tokens"]) for each in calibration["sources"]]
        revision = provenance["revision"]
        sound = (
            all(isinstance(text, str) for text in texts)
            and all(type(number) is int for number in numbers)
            and named == list(zip(scores.sources, scores.source_tokens, strict=True))
            and (revision is None or isinstance(revision, str))
            and isinstance(provenance["settings"].get("propagate"), str)
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ScoresError(
            "The scores do not tell where they come from. Score the model again with `streamprune score`."
        )


def public_name(name: str) -> str:
    """A Hub id or recipe as it is; of a local path only the last part.

    Names go without folders: the file is published with the model, and is the same wherever it is made.
    """
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name
