"""The memory that a search needs: one layer with one version of it at a time, and the states of all candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from streamprune.calibration.refit_text import fitted_tokens
from streamprune.calibration.sequences import JUDGE, Calibration
from streamprune.config import RunSettings, SearchSettings
from streamprune.hardware.memory_plan import Needs, RefitNeeds, RoundingNeeds
from streamprune.planning.memory_needs import (
    channel_sums,
    needs_of,
    rounding_of,
    states_bytes,
    sums_per_token,
    with_mtp_layer,
)
from streamprune.planning.prepare import PreparedModel
from streamprune.planning.refit import refit_sizes
from streamprune.refit.sizes import RefitSizes

#: Weights that are rounded to nearest need no text.
_NO_TEXT = Calibration((), (), (), "")
Part = TypeVar("Part", RefitNeeds, RoundingNeeds)


@dataclass(frozen=True)
class OwnNeeds:
    """What decides the needs of a candidate: the settings of a run of its own, the model prepared for it, and the text
    that its weights are computed from, if they are."""

    settings: RunSettings
    prepared: PreparedModel
    text: Calibration | None


def search_needs(
    settings: SearchSettings, prepared: PreparedModel, calibration: Calibration, candidates: Sequence[OwnNeeds]
) -> Needs:
    """The needs of a search on a calibration with its held-out text."""
    spec, layers, held = prepared.skeleton.spec, prepared.skeleton.layer_count, calibration.held_out
    assert held is not None
    kept = [max(own.prepared.counts.values()) for own in candidates if own.prepared.counts]
    copies = dict.fromkeys(prepared.skeleton.experts, max(kept) / spec.count)
    needs = channel_sums(needs_of(prepared, calibration, layers, copies, spec), settings, prepared, calibration)
    needs = with_mtp_layer(needs, prepared)
    measured, compared = needs_of(prepared, held, 0), len(candidates)
    states = needs.states + (1 + compared) * measured.states + held.tokens * sums_per_token(compared)
    tokens, sequences = needs.tokens + held.tokens, needs.sequences + len(held.sequences)
    for own in candidates:
        states += _computing_states(own)
    if any(own.settings.refit for own in candidates):
        # What the original experts gave, which some models need.
        used = [ids for ids, use in zip(calibration.sequences, calibration.refit, strict=True) if use]
        states += states_bytes(prepared, used)
    if calibration.anchor is not None:
        # The same; and the original's own.
        states += 2 * states_bytes(prepared, calibration.anchor.sequences)
        tokens += calibration.anchor.tokens
        sequences += len(calibration.anchor.sequences)
    needs = replace(needs, states=states, tokens=tokens, sequences=sequences, sides=2 + compared)
    return _with_computing(needs, candidates)


def _computing_states(own: OwnNeeds) -> int:
    """Bytes of a candidate's states of the text that its weights are computed from."""
    parts = [part for part in (own.text, own.text.anchor if own.text is not None else None) if part is not None]
    used = [ids for part in parts for ids, use in zip(part.sequences, part.refit, strict=True) if use]
    return states_bytes(own.prepared, used)


def _with_computing(needs: Needs, candidates: Sequence[OwnNeeds]) -> Needs:
    """The needs with those of the largest refit and the largest rounding: they are made one after the other."""
    sizes = [_refit_sizes(own, own.text) for own in candidates if own.settings.refit and own.text is not None]
    rounded = [
        # (Of a copy, which does not keep the list of tensors.)
        rounding_of(own.settings, replace(own.prepared), own.text or _NO_TEXT)
        for own in candidates
        if own.settings.is_quantizing
    ]
    usual, collecting = needs.workspace, max((20 * each.hidden for each in sizes), default=0)
    return replace(
        needs,
        workspace=lambda tokens: usual(tokens) + tokens * collecting,
        refit=_largest([each.needs for each in sizes], RefitNeeds()),
        rounding=_largest(rounded, RoundingNeeds()),
    )


def _refit_sizes(own: OwnNeeds, text: Calibration) -> RefitSizes:
    prepared, counts = own.prepared, own.prepared.plan.counts
    assert counts is not None
    fitted, judging = fitted_tokens(text), fitted_tokens(text, JUDGE)
    return refit_sizes(prepared.skeleton, counts, prepared.dtype.itemsize, fitted + judging, judging)


def _largest(needs: Sequence[Part], least: Part) -> Part:
    """The largest of each number."""
    values = {part.name: max(getattr(each, part.name) for each in (least, *needs)) for part in fields(least)}
    return replace(least, **values)
