"""What config and headers alone decide: whether the model can be pruned at all, and how many experts stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from streamprune.errors import DoesNotFitError, SettingsError, UnsupportedModelError
from streamprune.fit.budget import Budget, resolve_budget
from streamprune.fit.estimate import Estimate, Fit, Footprint
from streamprune.fit.footprint import read_headers
from streamprune.fit.options import nearest
from streamprune.fit.structure import footprint_of_skeleton, weights_of_checkpoint
from streamprune.machine import format_bytes
from streamprune.output.plan import minimum_keep, resolve_keep
from streamprune.output.writer import check_output
from streamprune.settings import RunSettings
from streamprune.source.architecture import declared_dtype, load_config
from streamprune.source.checkpoint import CONFIG_NAME, TensorEntry, read_json
from streamprune.source.hub import resolve_model
from streamprune.source.skeleton import Skeleton, build_skeleton


@dataclass(frozen=True)
class Decision:
    """A model understood from its config. `dtype` is None where neither user nor config names one.

    `footprint` is the whole model's; None where it is not known yet, or where its cache cannot be worked out.
    """

    raw: Mapping[str, Any] = field(repr=False)
    config: PreTrainedConfig = field(repr=False)
    dtype: torch.dtype | None
    skeleton: Skeleton = field(repr=False)
    keep: int
    budget: Budget | None
    footprint: Footprint | None

    def estimate(self, settings: RunSettings) -> Estimate | None:
        """What the pruned model will take, held against the budget if there is one."""
        if self.footprint is None:
            return None
        use = replace(settings.use, keep=self.keep)
        return Fit(self.footprint, use, self.budget.nbytes) if self.budget else Estimate(self.footprint, use)


def decide(settings: RunSettings) -> Decision:
    """Read the config, and for a budget the headers, and choose how many experts stay.

    Nothing large is downloaded. Raises a StreampruneError for what cannot work: DoesNotFitError for a budget that not
    even the fewest experts meet, SettingsError when nothing would be removed.
    """
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, config_only=True)
    check_output(settings.output, folder, settings.overwrite)
    raw = read_json(folder / CONFIG_NAME)
    _refuse_quantized(raw, folder)
    config = load_config(folder, settings.trust_remote_code)
    dtype = _chosen_dtype(settings.dtype, config)
    skeleton = build_skeleton(config, dtype or torch.bfloat16, settings.trust_remote_code)
    if settings.keep is not None or settings.ratio is not None:
        keep = resolve_keep(skeleton.spec, settings.keep, settings.ratio)
        return Decision(raw, config, dtype, skeleton, keep, None, None)
    budget = resolve_budget(settings.budget_gib, settings.gpu)
    footprint = footprint_of_skeleton(settings.model, raw, skeleton, read_headers(settings.model, folder))
    keep = _keep_that_fits(Fit(footprint, settings.use, budget.nbytes), budget)
    return Decision(raw, config, dtype, skeleton, keep, budget, footprint)


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
        if decision.budget is not None:
            raise
        return decision
    return replace(decision, skeleton=skeleton, footprint=footprint)


def _keep_that_fits(fit: Fit, budget: Budget) -> int:
    spec = fit.footprint.spec
    assert spec is not None  # build_skeleton refuses models without experts
    if fit.max_experts is None:
        least = minimum_keep(spec)
        smallest = Fit(fit.footprint, replace(fit.use, keep=least), fit.budget)
        options = "; ".join(f"{option.settings} ({option.meaning})" for option in nearest(smallest))
        raise DoesNotFitError(
            f"Even with the fewest experts with which the router works, {least} of {spec.count}, the model takes "
            f"{format_bytes(smallest.total)}, {format_bytes(-smallest.left)} more than {format_bytes(fit.budget)} "
            f"({budget.label}). Nearest settings that fit: {options}. `streamprune fit` shows every part."
        )
    if fit.max_experts == spec.count:
        raise SettingsError(
            f"The whole model takes {format_bytes(fit.total)} and fits {format_bytes(fit.budget)} ({budget.label}) as "
            "it is, so nothing would be removed. Plan for a longer --context or larger --batch, or choose with --keep."
        )
    return fit.max_experts


def estimate_of_written(
    settings: RunSettings, decision: Decision, planned_config: Mapping[str, Any], written: Mapping[str, TensorEntry]
) -> Estimate | None:
    """The estimate of the finished model, its weights counted in the files that were written."""
    if decision.footprint is None:
        return None
    weights = weights_of_checkpoint(planned_config, decision.skeleton, written, decision.keep)
    spec = replace(decision.skeleton.spec, count=decision.keep)
    footprint = replace(decision.footprint, model=str(settings.output), weights=weights, spec=spec)
    budget = decision.budget
    return Fit(footprint, settings.use, budget.nbytes) if budget else Estimate(footprint, settings.use)


def _refuse_quantized(config: Mapping[str, Any], folder: Path) -> None:
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
