"""What is decided before a weight is read, from config and headers alone, and opening the model.

`plan_pruning` decides whether a model can be pruned at all, and how many experts stay; `prepare` opens the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from streamprune.calibration.sequences import Calibration, load_calibration
from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import CONFIG_NAME, Checkpoint, open_checkpoint, read_json
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.common_settings import DTYPES
from streamprune.config import RunSettings, SearchSettings
from streamprune.errors import CheckpointError, SettingsError, UnsupportedModelError
from streamprune.fit.cache import served_itemsize
from streamprune.fit.estimate import Estimate, Footprint
from streamprune.fit.footprint import read_headers
from streamprune.fit.positions import max_positions
from streamprune.fit.structure import footprint_of_skeleton
from streamprune.formats.base import KeptExperts
from streamprune.formats.pick import refuse_quantized
from streamprune.hardware.device import choose_device
from streamprune.models.check_fit import check_pruned
from streamprune.models.config_json import drop_missing_code, minimum_keep, rewrite_config
from streamprune.models.open import (
    DescribedModel,
    OpenedMoE,
    config_from_dict,
    describe_model,
    open_moe,
)
from streamprune.models.per_layer_experts import (
    LoadingFacts,
    check_per_layer_experts,
    refuse_per_layer_experts,
)
from streamprune.models.per_layer_loading import find_loading_facts
from streamprune.models.skeleton import Skeleton, build_model
from streamprune.output.dequantized import refuse_plain
from streamprune.output.encoded import encode_tensors
from streamprune.output.plan import OutputSource
from streamprune.output.quantized import QuantizedSource
from streamprune.output.source import output_source
from streamprune.output.tensors import OutputTensor, output_tensors
from streamprune.output.writer import check_output
from streamprune.planning.counts import ExpertCounts, Prunable, plan_counts, refuse_new_values
from streamprune.planning.facts import ModelFacts
from streamprune.planning.imatrix import gguf_names
from streamprune.planning.refit import refit_demand, with_anchor
from streamprune.planning.rounding import rounding_demand
from streamprune.planning.written import written_footprint
from streamprune.quantize.schemes import require_library
from streamprune.saliency.hooks import recorded_width
from streamprune.saliency.scores_file import check_scores_file
from streamprune.selection.schedules import SCHEDULES
from streamprune.selection.settings import mix_weights

S = TypeVar("S", RunSettings, SearchSettings)


@dataclass(frozen=True)
class PruningPlan:
    """What is decided before a weight is read: the model as its config describes it, and how many experts stay.

    `folder` has the config, and maybe nothing else. `counts` is None if the run only scores. `footprint`, that of the
    unpruned model, is None if it is not known yet, or if the size of the model's cache is unknown.
    """

    folder: Path
    model: DescribedModel = field(repr=False)
    counts: ExpertCounts | None = None
    footprint: Footprint | None = None

    @property
    def skeleton(self) -> Skeleton:
        """The model on the meta device."""
        return self.model.skeleton

    @property
    def vocabulary(self) -> int:
        """The size of the model's vocabulary."""
        return int(self.skeleton.model.get_input_embeddings().weight.shape[0])

    def estimate(self, settings: RunSettings) -> Estimate | None:
        """The memory of the pruned model, compared with the budget if there is one; None if it is unknown."""
        if self.footprint is None or self.counts is None:
            return None
        return self.counts.estimate(settings, self.footprint)


def plan_pruning(settings: RunSettings) -> PruningPlan:
    """Read the config, and for a budget the headers, and decide how many experts stay.

    Nothing large is downloaded. Raises a StreampruneError if the run is impossible, such as DoesNotFitError if even the
    fewest experts exceed the budget, or SettingsError if nothing would be removed.
    """
    plan = read_config(settings, check_output_too=True)
    refuse_new_values(plan.model.raw, settings, settings.refit)
    first, skeleton = settings.from_layer, plan.skeleton
    if first is not None and first >= skeleton.layer_count:
        raise SettingsError(f"--from-layer {first}: the model's layers are 0 to {skeleton.layer_count - 1}.")
    if settings.only_score:
        return plan
    # Refuses more context than the model can have, also where no budget needs it.
    _ = settings.serving(max_positions(plan.model.config.to_dict()))
    if settings.weights == "bf16":
        refuse_plain(plan.model.raw, plan.folder)
    # (Before tens of GiB are downloaded.)
    require_library(settings.weights)

    @cache
    def read_footprint() -> Footprint:
        return written_footprint(settings, plan.model.raw, skeleton, read_headers(settings.model, plan.folder).tensors)

    itemsize, raw = served_itemsize(plan.model.raw) or torch.bfloat16.itemsize, plan.model.raw
    prunable = Prunable(skeleton.spec, tuple(skeleton.experts), skeleton.width, skeleton.fixed_width, itemsize, raw)
    counts = plan_counts(settings, prunable, read_footprint)
    if counts.width is not None and recorded_width(skeleton) is None:
        raise UnsupportedModelError(
            f"The experts of this {plan.model.config.model_type} model cannot be made narrower, because their channels "
            "cannot be scored: they do not run through transformers' grouped matrix product (whose rows must be a "
            "multiple of 16 bytes), or have a norm behind them. Remove experts instead: omit --width and --by."
        )
    if settings.needs_all_layers and settings.propagate == "pruned":
        cause = "--protect-super-experts" if settings.protect_super_experts else f"--schedule {settings.schedule}"
        raise SettingsError(
            f"--propagate pruned needs every layer's experts selected before the next is scored, but with {cause} they "
            "are selected once all layers are scored. Use --propagate original."
        )
    # Checked here, before anything large is downloaded.
    if settings.refit:
        refit_demand(skeleton, counts)
    if settings.needs_text:
        rounding_demand(skeleton, counts)
    if settings.imatrix is not None:
        gguf_names(skeleton)
    return replace(plan, counts=counts, footprint=read_footprint() if counts.budget is not None else None)


def read_config(settings: RunSettings, check_output_too: bool = False) -> PruningPlan:
    """The plan from the config alone; how many experts stay is not decided yet."""
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, config_only=True)
    if check_output_too:
        (check_scores_file if settings.only_score else check_output)(settings.output, folder, settings.overwrite)
    raw = read_json(folder / CONFIG_NAME)
    refuse_per_layer_experts(raw, settings.model)
    refuse_quantized(raw, folder)
    device = choose_device(settings.device)
    return PruningPlan(folder, describe_model(folder, raw, settings.trust_remote_code, settings.dtype, device))


def computed_in(plan: PruningPlan, settings: S, dtype: str) -> tuple[PruningPlan, S]:
    """Plan and settings for computing in the `dtype` of an earlier run, for the same digits, unless the user chose one.

    An unknown `dtype` changes nothing.
    """
    if settings.dtype != "auto" or dtype not in DTYPES or plan.model.dtype is getattr(torch, dtype):
        return plan, settings
    model = describe_model(plan.folder, plan.model.raw, settings.trust_remote_code, dtype)
    return replace(plan, model=model), replace(settings, dtype=dtype)


def with_footprint(
    plan: PruningPlan, settings: RunSettings, skeleton: Skeleton, tensors: Mapping[str, TensorEntry] | None
) -> PruningPlan:
    """The plan with the footprint of the unpruned model, in the format in which weights are written.

    `tensors` are its checkpoint's; None if they are known from its config alone.
    """
    try:
        footprint = written_footprint(settings, plan.model.raw, skeleton, tensors, plan.footprint)
    except UnsupportedModelError:
        # Only a budget needs it: without one, a model that can be pruned is pruned, and no estimate is printed.
        if plan.counts is not None and plan.counts.budget is not None:
            raise
        return plan
    return replace(plan, footprint=footprint)


@dataclass(frozen=True)
class PreparedModel(OpenedMoE):
    """A Mixture-of-Experts model that is opened for pruning or scoring.

    `plan` is what was decided before it was opened, with the footprint of what is `written`.
    """

    plan: PruningPlan
    trust_remote_code: bool
    loading: LoadingFacts
    written: OutputSource
    _pruned: dict[tuple[int, int | None], PreTrainedModel] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def counts(self) -> Mapping[int, int] | None:
        """Experts that stay by layer; None if that is decided after all layers are scored, or nothing is pruned."""
        return self.plan.counts.per_layer if self.plan.counts is not None else None

    @cached_property
    def facts(self) -> ModelFacts:
        """The facts that are needed to write an output of the model, now or later."""
        return ModelFacts(self.layout, self.loading, self.plan.footprint)

    @property
    def new_format(self) -> str:
        """The format that weights are quantized to, for people; empty if none are."""
        encoding, plain = self.written.encoding, self._plain_tensors
        return encoding.scheme(plain).format.name if encoding is not None and plain else ""

    @property
    def recorded_width(self) -> int | None:
        """How many channels of each expert are scored; None if none are, since the experts keep their width."""
        return recorded_width(self.skeleton) if self.layout.width is not None else None

    @property
    def planned_bytes(self) -> int:
        """Bytes of the weights that will be written. (MoE layers have equal sizes, so only the total number counts.)"""
        return sum(tensor.nbytes for tensor in self.planned_tensors)

    @cached_property
    def planned_tensors(self) -> Sequence[OutputTensor]:
        """The tensors that will be written, with experts divided evenly among the layers if that is not decided yet.

        Nothing if the run only scores.
        """
        encoding, plain = self.written.encoding, self._plain_tensors
        return encode_tensors(plain, encoding, encoding.scheme(plain)) if encoding is not None and plain else plain

    @cached_property
    def _plain_tensors(self) -> list[OutputTensor]:
        """The planned tensors before anything is quantized."""
        planned, layers, spec = self.plan.counts, self.layout.expert_layers, self.layout.spec
        if planned is None:
            return []
        counts = planned.per_layer
        if counts is None:
            steps, more = divmod(planned.total // spec.groups, len(layers))
            counts = {index: (steps + (place < more)) * spec.groups for place, index in enumerate(layers)}
        written = self.written
        return output_tensors(written.layout, written.checkpoint.tensors, counts, planned.width)

    def pruned_model(self, count: int, width: int | None) -> PreTrainedModel:
        """The model with `count` experts in every layer, on meta, as the rewritten config describes it.

        Each expert has `width` channels; None for as many as in the source.
        """
        if (count, width) not in self._pruned:
            self._pruned.clear()
            layout = self.layout
            narrower = (layout.width, width) if width is not None and layout.width is not None else None
            rewritten = rewrite_config(self.checkpoint.config, layout.spec, layout.count_names, count, narrower)
            config = config_from_dict(self.config, drop_missing_code(rewritten, self.checkpoint.folder))
            self._pruned[count, width] = build_model(config, self.dtype, self.trust_remote_code)
        return self._pruned[count, width]

    def model_of(self, kept: KeptExperts) -> PreTrainedModel:
        """The model, on meta, whose layers keep as many experts and channels as `kept`; any, if that is nothing.

        (A layer without experts is the same in all of them.)
        """
        if not kept.experts:
            return next(iter(self._pruned.values()), None) or self.pruned_model(self.layout.spec.count, None)
        width = kept.channels.kept_width if kept.channels is not None else None
        return self.pruned_model(len(kept.experts), width)

    def pruned_layer(self, index: int, kept: KeptExperts) -> nn.Module:
        """Layer `index` of `model_of`, on meta."""
        layer: nn.Module = self.model_of(kept).get_submodule(f"{self.skeleton.layers_path}.{index}")
        return layer

    def for_counts(self, counts: ExpertCounts, written: OutputSource) -> PreparedModel:
        """The model prepared for other numbers of experts or channels, and to be written otherwise.

        Raises UnsupportedModelError if it cannot be pruned that way.
        """
        found = replace(self, plan=replace(self.plan, counts=counts), written=written)
        assert counts.keep is not None
        check_pruned(self.skeleton, found.pruned_model(counts.keep, counts.width), counts.keep, counts.width)
        return found


def prepare(settings: RunSettings, plan: PruningPlan) -> PreparedModel:
    """Open the model according to the plan. Raises a StreampruneError if it cannot be pruned that way."""
    checkpoint = open_checkpoint(resolve_model(settings.model, settings.revision, settings.trust_remote_code))
    if checkpoint.config != plan.model.raw:
        raise CheckpointError(
            f"The config of {settings.model} changed while it was being opened. Run the same command again."
        )
    opened = open_moe(checkpoint, settings.trust_remote_code, plan.model, choose_device(settings.device))
    if plan.counts is not None and plan.counts.width is not None and opened.layout.width is None:
        raise UnsupportedModelError(
            f"The experts of this checkpoint cannot be made narrower: {opened.layout.fixed_width}. Remove experts "
            "instead: omit --width and --by."
        )
    loading = find_loading_facts(checkpoint.config, opened.config, opened.skeleton)
    written = output_source(opened, loading, settings.storage, plan.counts.width if plan.counts is not None else None)
    if plan.counts is not None and settings.weights == "source":
        # Refuses what cannot be renumbered now: the plan of the output may be made hours later.
        QuantizedSource.of(checkpoint, written.layout)
    plan = with_footprint(plan, settings, opened.skeleton, checkpoint.tensors)
    prepared = PreparedModel(
        checkpoint, opened.skeleton, opened.targets, opened.dtype, opened.config, opened.layout, plan,
        settings.trust_remote_code, loading, written,
    )  # fmt: skip
    counts, least = prepared.counts, minimum_keep(opened.skeleton.spec)
    width = plan.counts.width if plan.counts is not None else None
    # Sizes are linear in the number of experts: what holds for the fewest and the most holds in between.
    for count in sorted({min(counts.values()), max(counts.values())} if counts else {least}):
        check_pruned(opened.skeleton, prepared.pruned_model(count, width), count, width)
    return prepared


def facts_of_checkpoint(model: str, checkpoint: Checkpoint, trust_remote_code: bool) -> ModelFacts:
    """What has to be known of a checkpoint to write an output of it, found by building its model."""
    refuse_quantized(checkpoint.config, checkpoint.folder)
    opened = open_moe(checkpoint, trust_remote_code)
    loading = find_loading_facts(checkpoint.config, opened.config, opened.skeleton)
    footprint = None
    # A model whose cache size is unknown can still be pruned.
    with suppress(UnsupportedModelError):
        footprint = footprint_of_skeleton(model, checkpoint.config, opened.skeleton, checkpoint.tensors)
    return ModelFacts(opened.layout, loading, footprint)


def check_schedule(settings: RunSettings, prepared: PreparedModel) -> None:
    """Raise UnsupportedModelError if layers may get different numbers, and no output could be loaded with them.

    Call before any weight is loaded.
    """
    spec, counts = prepared.layout.spec, prepared.counts
    # Always found here: they compare layers with those of the skeleton, whose dtypes change once weights are loaded.
    loading = prepared.facts.loading
    if counts is None and not settings.has_schedule_file and SCHEDULES[settings.schedule].needs_scores:
        # Unknown before all layers are scored, but most likely different.
        counts = {0: minimum_keep(spec), 1: spec.count}
    if counts is not None:
        check_per_layer_experts(loading, counts)


def calibrate(settings: RunSettings, plan: PruningPlan) -> Calibration:
    """Read the calibration data for a model; for one on the Hub only small files (the tokenizer) are fetched.

    Raises SettingsError for a mix of other sources, before tens of GiB are downloaded.
    """
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, tokenizer_only=True)
    text_config = plan.skeleton.model.config.get_text_config(decoder=True)
    calibration = load_calibration(
        settings.calibration,
        folder,
        settings,
        vocab_size=plan.vocabulary,
        max_positions=getattr(text_config, "max_position_embeddings", None),
        trust_remote_code=settings.trust_remote_code,
    )
    if settings.scores is None:
        mix_weights(settings.mix, calibration.sources, calibration.tokens_of)
    if settings.refit and plan.counts is not None:
        calibration = with_anchor(settings, calibration, plan.skeleton, plan.counts, folder)
    return calibration
