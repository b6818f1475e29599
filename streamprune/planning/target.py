"""What config and headers alone decide: whether the model can be pruned at all, and how many experts stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import CONFIG_NAME, read_json
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.config import RunSettings
from streamprune.errors import SettingsError, UnsupportedModelError
from streamprune.fit.estimate import Estimate, Footprint
from streamprune.fit.footprint import read_headers
from streamprune.fit.structure import footprint_of_skeleton, weights_of_checkpoint
from streamprune.models.config import declared_dtype, load_config
from streamprune.models.per_layer_config import refuse_per_layer_experts
from streamprune.models.skeleton import Skeleton, build_skeleton
from streamprune.output.writer import check_output
from streamprune.planning.quota import Quota, find_quota
from streamprune.saliency.scores_file import check_scores_file
from streamprune.selection.select import selection_of


@dataclass(frozen=True)
class Decision:
    """A model understood from its config. `dtype` is None where neither user nor config names one.

    `quota` says how many experts stay; None where scoring is all that is asked for. `counts` are those that stay by
    block; None where that is decided once all are scored. `footprint`, the whole model's, is None where it is not known
    yet, or where the model's cache cannot be worked out. `folder` holds the config, and may hold no more.
    """

    folder: Path
    raw: Mapping[str, Any] = field(repr=False)
    config: PreTrainedConfig = field(repr=False)
    dtype: torch.dtype | None
    skeleton: Skeleton = field(repr=False)
    quota: Quota | None
    counts: Mapping[int, int] | None
    footprint: Footprint | None

    def estimate(self, settings: RunSettings) -> Estimate | None:
        """What the pruned model will take, held against the budget if there is one; None where it cannot be told."""
        if self.footprint is None or self.quota is None:
            return None
        return self.quota.estimate(settings, self.footprint)


def decide(settings: RunSettings) -> Decision:
    """Read the config, and for a budget the headers, and choose how many experts stay.

    Nothing large is downloaded. Raises a StreampruneError for what cannot work: DoesNotFitError for a budget that not
    even the fewest experts meet, SettingsError when nothing would be removed.
    """
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, config_only=True)
    (check_scores_file if settings.only_score else check_output)(settings.output, folder, settings.overwrite)
    raw = read_json(folder / CONFIG_NAME)
    refuse_per_layer_experts(raw, settings.model)
    refuse_quantized(raw, folder)
    config = load_config(folder, settings.trust_remote_code)
    dtype = _chosen_dtype(settings.dtype, config)
    skeleton = build_skeleton(config, dtype or torch.bfloat16, settings.trust_remote_code)
    first = settings.from_layer
    if first is not None and first >= skeleton.layer_count:
        raise SettingsError(f"--from-layer {first}: the model's blocks are 0 to {skeleton.layer_count - 1}.")
    footprint: Footprint | None = None

    def read_footprint() -> Footprint:
        nonlocal footprint
        footprint = footprint_of_skeleton(settings.model, raw, skeleton, read_headers(settings.model, folder))
        return footprint

    if settings.only_score:
        return Decision(folder, raw, config, dtype, skeleton, None, None, None)
    quota, counts = find_quota(settings, skeleton.spec, tuple(skeleton.experts), read_footprint)
    if selection_of(settings).needs_all_layers and settings.propagate == "pruned":
        raise SettingsError(
            f"--propagate pruned needs every block's experts chosen before the next is scored, but with "
            f"{'--schedule global' if settings.schedule == 'global' else '--protect-super-experts'} they are chosen "
            "once all blocks are scored. Use --propagate original."
        )
    return Decision(folder, raw, config, dtype, skeleton, quota, counts, footprint)


def decide_as(settings: RunSettings, quota: Quota | None, counts: Mapping[int, int] | None) -> Decision:
    """The decision that another process has taken about the same model, which is opened here too."""
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, config_only=True)
    raw = read_json(folder / CONFIG_NAME)
    refuse_quantized(raw, folder)
    config = load_config(folder, settings.trust_remote_code)
    dtype = _chosen_dtype(settings.dtype, config)
    skeleton = build_skeleton(config, dtype or torch.bfloat16, settings.trust_remote_code)
    return Decision(folder, raw, config, dtype, skeleton, quota, counts, None)


def with_footprint(
    settings: RunSettings, decision: Decision, skeleton: Skeleton, tensors: Mapping[str, TensorEntry] | None
) -> Decision:
    """The decision with the footprint of a model whose tensors are known (None: as its config describes them)."""
    known = decision.footprint
    if known is not None and tensors is not None and decision.dtype is not None:
        # Only the weights may differ from what was known before; tracing the cache again would take a second.
        weights = weights_of_checkpoint(decision.raw, skeleton, tensors)
        return replace(decision, skeleton=skeleton, footprint=replace(known, weights=weights))
    try:
        footprint = footprint_of_skeleton(settings.model, decision.raw, skeleton, tensors)
    except UnsupportedModelError:
        # Only a budget needs it: without one, a model that can be pruned is pruned, and no estimate is told.
        if decision.quota is not None and decision.quota.budget is not None:
            raise
        return replace(decision, skeleton=skeleton)
    return replace(decision, skeleton=skeleton, footprint=footprint)


def refuse_quantized(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UnsupportedModelError for a checkpoint whose config says that its weights are quantized."""
    for part in (config, config.get("text_config")):
        stated = part if isinstance(part, Mapping) else {}
        quantization = stated.get("quantization_config") or stated.get("compression_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
            raise UnsupportedModelError(
                f"The model in {folder} is quantized ({method}). Quantized weights cannot be streamed yet: prune the "
                "bfloat16 or float16 original and quantize the result."
            )


def _chosen_dtype(name: str, config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype to compute in: what the user chose, else the config's; None if neither names one."""
    if name != "auto":
        chosen = getattr(torch, name)
        assert isinstance(chosen, torch.dtype)
        return chosen
    return declared_dtype(config)
