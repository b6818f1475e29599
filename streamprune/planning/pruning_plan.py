"""What config and headers alone decide: whether the model can be pruned at all, and how many experts stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import CONFIG_NAME, read_json
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.config import RunSettings
from streamprune.errors import SettingsError, UnsupportedModelError
from streamprune.fit.estimate import Estimate, Footprint
from streamprune.fit.footprint import read_headers
from streamprune.fit.structure import footprint_of_skeleton, weights_of_checkpoint
from streamprune.formats.pick import refuse_quantized
from streamprune.models.open import DescribedModel, describe_model
from streamprune.models.per_layer_experts import refuse_per_layer_experts
from streamprune.models.skeleton import Skeleton
from streamprune.output.writer import check_output
from streamprune.planning.expert_counts import ExpertCounts, plan_counts
from streamprune.saliency.scores_file import check_scores_file


@dataclass(frozen=True)
class PruningPlan:
    """What is decided before a weight is read: a model understood from its config, and how many experts stay.

    `folder` holds the config, and may hold no more. `counts` is None where scoring is all that is asked for.
    `footprint`, the whole model's, is None where it is not known yet, or where the model's cache cannot be worked out.
    """

    folder: Path
    model: DescribedModel = field(repr=False)
    counts: ExpertCounts | None = None
    footprint: Footprint | None = None

    @property
    def skeleton(self) -> Skeleton:
        """The model on the meta device."""
        return self.model.skeleton

    def estimate(self, settings: RunSettings) -> Estimate | None:
        """What the pruned model will take, compared with the budget if there is one; None where it is not known."""
        if self.footprint is None or self.counts is None:
            return None
        return self.counts.estimate(settings, self.footprint)


def plan_pruning(settings: RunSettings) -> PruningPlan:
    """Read the config, and for a budget the headers, and decide how many experts stay.

    Nothing large is downloaded. Raises a StreampruneError for what cannot work: DoesNotFitError for a budget that not
    even the fewest experts meet, SettingsError when nothing would be removed.
    """
    plan = _read_config(settings, check_output_too=True)
    first, skeleton = settings.from_layer, plan.skeleton
    if first is not None and first >= skeleton.layer_count:
        raise SettingsError(f"--from-layer {first}: the model's layers are 0 to {skeleton.layer_count - 1}.")
    if settings.only_score:
        return plan
    footprints: list[Footprint] = []

    def read_footprint() -> Footprint:
        headers = read_headers(settings.model, plan.folder)
        footprints.append(footprint_of_skeleton(settings.model, plan.model.raw, skeleton, headers))
        return footprints[0]

    counts = plan_counts(settings, skeleton.spec, tuple(skeleton.experts), read_footprint)
    if settings.needs_all_layers and settings.propagate == "pruned":
        cause = "--protect-super-experts" if settings.protect_super_experts else f"--schedule {settings.schedule}"
        raise SettingsError(
            f"--propagate pruned needs every layer's experts selected before the next is scored, but with {cause} they "
            "are selected once all layers are scored. Use --propagate original."
        )
    return replace(plan, counts=counts, footprint=next(iter(footprints), None))


def plan_with_counts(settings: RunSettings, counts: ExpertCounts | None) -> PruningPlan:
    """The plan with counts that another process has decided for the same model, which is opened here too."""
    return replace(_read_config(settings), counts=counts)


def _read_config(settings: RunSettings, check_output_too: bool = False) -> PruningPlan:
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, config_only=True)
    if check_output_too:
        (check_scores_file if settings.only_score else check_output)(settings.output, folder, settings.overwrite)
    raw = read_json(folder / CONFIG_NAME)
    refuse_per_layer_experts(raw, settings.model)
    refuse_quantized(raw, folder)
    return PruningPlan(folder, describe_model(folder, raw, settings.trust_remote_code, settings.dtype))


def with_footprint(
    plan: PruningPlan, model: str, skeleton: Skeleton, tensors: Mapping[str, TensorEntry] | None
) -> PruningPlan:
    """The plan with the footprint of `model`, whose tensors are known (None: as its config describes them)."""
    known = plan.footprint
    if known is not None and tensors is not None and plan.model.dtype is not None:
        # Only the weights may differ from what was known before; tracing the cache again would take a second.
        weights = weights_of_checkpoint(plan.model.raw, skeleton, tensors)
        return replace(plan, footprint=replace(known, weights=weights))
    try:
        footprint = footprint_of_skeleton(model, plan.model.raw, skeleton, tensors)
    except UnsupportedModelError:
        # Only a budget needs it: without one, a model that can be pruned is pruned, and no estimate is printed.
        if plan.counts is not None and plan.counts.budget is not None:
            raise
        return plan
    return replace(plan, footprint=footprint)
