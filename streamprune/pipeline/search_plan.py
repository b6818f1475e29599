"""What a search decides before a weight is read: the candidates, and the model prepared for each of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from streamprune.calibration.sequences import Calibration
from streamprune.config import RunSettings, SearchSettings
from streamprune.errors import SettingsError, UnsupportedModelError
from streamprune.fit.answer import Budget
from streamprune.fit.engine_rules import Served
from streamprune.fit.engines import check_served
from streamprune.fit.estimate import Fit, Footprint
from streamprune.fit.footprint import read_headers
from streamprune.formats.quantization import Quantization
from streamprune.hardware.device import CPU
from streamprune.output.plan import OutputSource
from streamprune.output.source import output_source
from streamprune.pipeline.search_layers import Side
from streamprune.pipeline.search_text import SearchText
from streamprune.planning.candidates import AUTO, Candidate, Layout, Searchable, lay_out, read_candidates
from streamprune.planning.prepare import PreparedModel, PruningPlan
from streamprune.planning.refit import refit_demand
from streamprune.planning.rounding import rounding_demand
from streamprune.planning.written import written_footprint
from streamprune.quantize.schemes import SCHEMES, require_library
from streamprune.saliency.hooks import recorded_width
from streamprune.streaming.down_tensors import down_tensors
from streamprune.streaming.written_tensors import written_tensors


def candidates_for(settings: SearchSettings, plan: PruningPlan, budget: Budget) -> tuple[Searchable, Layout]:
    """What can be varied of the model, and the candidates: the user's, or those that are laid out for the budget.

    Raises a StreampruneError if there are none.
    """
    skeleton, footprint = plan.skeleton, _footprint(settings, plan)
    fits, no_format, serving = {}, {}, settings.serving(footprint.max_positions)
    for weights in ("source", *(("bf16",) if footprint.quantization else ()), *SCHEMES):
        reason = _why_not_written(footprint, weights)
        if reason is None:
            use = replace(serving, weights=weights, round_for=settings.round_for)
            fits[weights] = Fit(footprint, use, budget.nbytes)
        else:
            no_format[weights] = reason
    fixed_width, no_refit = _impossible(settings, plan)

    def why_not_so(weights: str, width: int) -> str:
        return footprint.why_not(weights, width) or ""

    model = Searchable(skeleton.spec, skeleton.width, fits, fixed_width, no_refit, no_format, why_not_so)
    if settings.candidates == (AUTO,):
        return model, lay_out(model)
    return model, read_candidates(settings.candidates, model)


def run_of(settings: SearchSettings, candidate: Candidate, experts: int) -> RunSettings:
    """The settings of a run of a candidate's own; a layer has `experts` experts."""
    keep = candidate.keep if candidate.keep < experts else None
    return settings.run_of(keep, candidate.width, candidate.weights, candidate.refit)


def sides_of(settings: SearchSettings, prepared: PreparedModel, layout: Layout) -> tuple[list[Side], list[str]]:
    """The model prepared for each candidate; and which of those that were laid out cannot be made, with reasons.

    Raises UnsupportedModelError or SettingsError for what the checkpoint, unlike the config, does not allow.
    """
    sides: list[Side] = []
    left_out: list[str] = []
    problem: Exception | None = None
    sources: dict[str, OutputSource] = {}
    for candidate in layout.candidates:
        try:
            sides.append(_side(settings, prepared, candidate, sources))
        except (SettingsError, UnsupportedModelError) as error:
            if settings.candidates != (AUTO,):
                raise
            left_out.append(f"{candidate.name}: {error}")
            problem = error
    if problem is not None and not sides:
        raise problem
    return sides, left_out


def _side(
    settings: SearchSettings, prepared: PreparedModel, candidate: Candidate, sources: dict[str, OutputSource]
) -> Side:
    model_layout = prepared.layout
    if candidate.width is not None and model_layout.width is None:
        raise UnsupportedModelError(
            f"The experts of this checkpoint cannot be made narrower: {model_layout.fixed_width}. Name candidates "
            "without a width: --candidates keep=N."
        )
    own = run_of(settings, candidate, model_layout.spec.count)
    if candidate.weights not in sources:
        # (Finding what of it is quantized takes a while.)
        sources[candidate.weights] = output_source(prepared, prepared.loading, own.storage, own.width)
    full = model_layout.width.width if model_layout.width is not None else 0
    served = Served(
        model_layout.spec, (candidate.keep,), candidate.weights, candidate.width or full or None,
        prepared.dtype.itemsize, prepared.checkpoint.config,
    )  # fmt: skip
    check_served(served, settings.serving_engine)
    counts = candidate.counts(model_layout.expert_layers, full)
    found = prepared.for_counts(counts, sources[candidate.weights])
    if own.needs_text:
        rounding_demand(prepared.skeleton, counts)
    if own.refit:
        down_tensors(found, written_tensors(found, CPU))
    # Refuses what cannot be stored so. (Of a copy, which does not keep the list: one of each candidate is much.)
    nbytes = replace(found).planned_bytes
    return Side(candidate, own, found, nbytes)


def _footprint(settings: SearchSettings, plan: PruningPlan) -> Footprint:
    """The unpruned model, with what it takes in every format. Raises UnsupportedModelError if its cache is unknown."""
    return written_footprint(settings, plan.model.raw, plan.skeleton, read_headers(settings.model, plan.folder).tensors)


def _why_not_written(footprint: Footprint, weights: str) -> str | None:
    """Why weights cannot be written in a format here; None if they can."""
    try:
        if weights in SCHEMES:
            require_library(weights)
    except SettingsError as error:
        return str(error)
    return footprint.why_not(weights)


def _impossible(settings: SearchSettings, plan: PruningPlan) -> tuple[str, str]:
    """Why experts cannot be made narrower, and why they cannot be refitted; empty if they can."""
    skeleton, method = plan.skeleton, Quantization.of(plan.model.raw).method
    if method:
        why = f"the source's weights are quantized ({method})"
        return why, why
    fixed_width = skeleton.fixed_width
    if not fixed_width and not settings.channels:
        fixed_width = "--no-channels leaves out what their channels are chosen by"
    elif not fixed_width and recorded_width(skeleton) is None:
        fixed_width = "their channels cannot be scored"
    try:
        refit_demand(skeleton, Candidate(skeleton.spec.count).counts(tuple(skeleton.experts), 0))
    except UnsupportedModelError as error:
        return fixed_width, str(error).rstrip(".")
    return fixed_width, ""


@dataclass(frozen=True)
class SearchCost:
    """The forwards of a search, in tokens.

    All text goes through once, the held-out text again for each of `candidates`, and for each of them whose weights are
    computed from text so many `computed` tokens, in all their passes.
    """

    calibration: int
    held_out: int
    candidates: int
    computed: tuple[int, ...]

    @classmethod
    def of(cls, text: SearchText, sides: list[Side]) -> SearchCost:
        """The cost of measuring these candidates."""
        calibration, computed = text.calibration, []
        assert calibration.held_out is not None
        for side in sides:
            part = text.part_of(side.candidate)
            if part is not None:
                # To fit, to round, and to go on.
                computed.append((side.settings.refit + side.settings.needs_text + 1) * tokens_used(part))
        return cls(calibration.tokens, calibration.held_out.tokens, len(sides), tuple(computed))

    @property
    def forwards(self) -> float:
        """In forwards of the whole text through the unpruned model."""
        total = self.calibration + self.held_out
        return 1 + (self.candidates * self.held_out + sum(self.computed)) / total

    def text(self) -> str:
        """In words."""
        total = self.calibration + self.held_out
        computed = ""
        if self.computed:
            share = sum(self.computed) / total
            computed = f", + {share:.1f} for {len(self.computed)} candidates that are refitted or rounded by text"
        return (
            f"cost: about {self.forwards:.1f} forwards of the text: 1 + {self.candidates} candidates x "
            f"{self.held_out / total:.1%} held out{computed}"
        )

    def as_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "forwards": round(self.forwards, 3),
            "calibration_tokens": self.calibration,
            "held_out_tokens": self.held_out,
            "computed_tokens": list(self.computed),
        }


def tokens_used(text: Calibration) -> int:
    """Tokens of a calibration and its anchor that weights are computed from."""
    parts = [part for part in (text, text.anchor) if part is not None]
    return sum(len(ids) for part in parts for ids, use in zip(part.sequences, part.refit, strict=True) if use)
