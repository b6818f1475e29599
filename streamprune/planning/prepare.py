"""A model opened for a run: checked, laid out, and ready to be streamed. No weight is read yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from streamprune.calibration.sequences import Calibration, load_calibration
from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import Checkpoint, open_checkpoint
from streamprune.config import RunSettings
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.fit.structure import footprint_of_skeleton
from streamprune.formats.pick import refuse_quantized
from streamprune.models.config import config_from_dict
from streamprune.models.config_json import drop_missing_code, minimum_keep, rewrite_config
from streamprune.models.open import OpenedMoE, check_pruned, open_moe
from streamprune.models.per_layer_experts import check_per_layer_experts
from streamprune.models.per_layer_loading import find_loading_facts
from streamprune.models.skeleton import Skeleton, build_model
from streamprune.output.tensors import output_tensors
from streamprune.planning.model_facts import ModelFacts
from streamprune.planning.pruning_plan import PruningPlan, with_footprint
from streamprune.selection.schedules import SCHEDULES
from streamprune.selection.select import Selector
from streamprune.selection.settings import mix_weights


@dataclass(frozen=True)
class PreparedModel(OpenedMoE):
    """A Mixture-of-Experts model that is opened to be pruned, or to be scored.

    `plan` is what was decided before it was opened, with the footprint of the checkpoint's own tensors.
    """

    plan: PruningPlan
    trust_remote_code: bool
    _pruned: dict[int, PreTrainedModel] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def counts(self) -> Mapping[int, int] | None:
        """Experts that stay by layer; None where that is decided once all are scored, or where nothing is pruned."""
        return self.plan.counts.per_layer if self.plan.counts is not None else None

    @cached_property
    def planned_bytes(self) -> int:
        """Bytes of the weights that will be written; layers are alike, so that it need not be known which keep most."""
        planned, layers, spec = self.plan.counts, self.layout.expert_layers, self.layout.spec
        if planned is None:
            return 0
        counts = planned.per_layer
        if counts is None:
            steps, more = divmod(planned.total // spec.groups, len(layers))
            counts = {index: (steps + (place < more)) * spec.groups for place, index in enumerate(layers)}
        return sum(tensor.nbytes for tensor in output_tensors(self.layout, self.checkpoint.tensors, counts))

    def pruned_model(self, count: int) -> PreTrainedModel:
        """The model with `count` experts in every layer, on meta, as the rewritten config describes it."""
        if count not in self._pruned:
            self._pruned.clear()
            rewritten = rewrite_config(self.checkpoint.config, self.layout.spec, self.layout.count_names, count)
            config = config_from_dict(self.config, drop_missing_code(rewritten, self.checkpoint.folder))
            self._pruned[count] = build_model(config, self.dtype, self.trust_remote_code)
        return self._pruned[count]

    def pruned_layer(self, index: int, count: int) -> nn.Module:
        """Layer `index` of the model with `count` experts in every layer, on meta."""
        layer: nn.Module = self.pruned_model(count).get_submodule(f"{self.skeleton.layers_path}.{index}")
        return layer


def prepare(settings: RunSettings, plan: PruningPlan) -> PreparedModel:
    """Open the model for what was decided; raises a StreampruneError for whatever cannot work."""
    checkpoint = open_checkpoint(resolve_model(settings.model, settings.revision, settings.trust_remote_code))
    if checkpoint.config != plan.model.raw:
        raise CheckpointError(
            f"The config of {settings.model} changed while it was opened. Run the same command again."
        )
    opened = open_moe(checkpoint, settings.trust_remote_code, model=plan.model)
    plan = with_footprint(plan, settings.model, opened.skeleton, checkpoint.tensors)
    prepared = PreparedModel(
        checkpoint, opened.skeleton, opened.targets, opened.dtype, opened.config, opened.layout, plan,
        settings.trust_remote_code,
    )  # fmt: skip
    counts, least = prepared.counts, minimum_keep(opened.skeleton.spec)
    # Sizes follow the number of experts in a straight line: what holds for the fewest and the most holds in between.
    for count in sorted({min(counts.values()), max(counts.values())} if counts else {least}):
        check_pruned(opened.skeleton, prepared.pruned_model(count), count)
    return prepared


def facts_of(prepared: PreparedModel) -> ModelFacts:
    """What has to be known of the model to write an output of it, now or later."""
    loading = find_loading_facts(prepared.checkpoint.config, prepared.config, prepared.skeleton)
    return ModelFacts(prepared.layout, loading, prepared.plan.footprint)


def facts_of_checkpoint(model: str, checkpoint: Checkpoint, trust_remote_code: bool) -> ModelFacts:
    """What has to be known of a checkpoint to write an output of it, found by building its model."""
    refuse_quantized(checkpoint.config, checkpoint.folder)
    opened = open_moe(checkpoint, trust_remote_code)
    loading = find_loading_facts(checkpoint.config, opened.config, opened.skeleton)
    try:
        footprint = footprint_of_skeleton(model, checkpoint.config, opened.skeleton, checkpoint.tensors)
    except UnsupportedModelError:
        return ModelFacts(opened.layout, loading, None)
    return ModelFacts(opened.layout, loading, footprint)


def selector_of(settings: RunSettings, prepared: PreparedModel, calibration: Calibration) -> Selector | None:
    """What selects the experts of a run; None where scoring is all that is asked for."""
    counts = prepared.plan.counts
    if counts is None:
        return None
    sources, tokens = calibration.sources, calibration.tokens_of
    return Selector(settings.selection, prepared.layout.spec, sources, tokens, counts.total, counts.per_layer)


def check_schedule(settings: RunSettings, facts: ModelFacts, counts: Mapping[int, int] | None) -> None:
    """Raise UnsupportedModelError where the layers may come to differ, and no output could say so."""
    spec = facts.layout.spec
    if counts is None and not settings.has_schedule_file and SCHEDULES[settings.schedule].needs_scores:
        # Not known before all are scored, but unequal for all that one can expect.
        counts = {0: minimum_keep(spec), 1: spec.count}
    if counts is not None:
        check_per_layer_experts(facts.loading, counts)


def vocabulary_of(skeleton: Skeleton) -> int:
    """How many tokens a model knows."""
    return int(skeleton.model.get_input_embeddings().weight.shape[0])


def calibrate(settings: RunSettings, plan: PruningPlan) -> Calibration:
    """Read the calibration data for a model; of one on the Hub only the small files, the tokenizer's, are fetched.

    Raises SettingsError for a mix of other sources, before tens of GiB are downloaded.
    """
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, tokenizer_only=True)
    text_config = plan.skeleton.model.config.get_text_config(decoder=True)
    calibration = load_calibration(
        settings.calibration,
        folder,
        samples=settings.samples,
        seq_len=settings.seq_len,
        seed=settings.seed,
        vocab_size=vocabulary_of(plan.skeleton),
        max_positions=getattr(text_config, "max_position_embeddings", None),
        trust_remote_code=settings.trust_remote_code,
    )
    mix_weights(settings.mix, calibration.sources, calibration.tokens_of)
    return calibration
