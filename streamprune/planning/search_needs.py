"""The memory that a search needs: one layer with one version of it at a time, and the states of all candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from streamprune.calibration.refit_text import fitted_tokens
from streamprune.calibration.sequences import JUDGE, Calibration
from streamprune.config import SearchSettings
from streamprune.hardware.memory_plan import Needs, RefitNeeds
from streamprune.planning.candidates import Candidate
from streamprune.planning.memory_needs import channel_sums, needs_of, states_bytes, sums_per_token
from streamprune.planning.prepare import PreparedModel
from streamprune.planning.refit import refit_sizes
from streamprune.refit.sizes import RefitSizes


def search_needs(
    settings: SearchSettings,
    prepared: PreparedModel,
    calibration: Calibration,
    candidates: Sequence[Candidate],
    refitted: Mapping[Candidate, Calibration],
) -> Needs:
    """The needs of a search on a calibration with its held-out text; `refitted` is the text of each refit."""
    spec, layers, held = prepared.skeleton.spec, prepared.skeleton.layer_count, calibration.held_out
    assert held is not None
    most = max(candidate.keep for candidate in candidates) / spec.count
    needs = needs_of(prepared, calibration, layers, dict.fromkeys(prepared.skeleton.experts, most), spec)
    needs = channel_sums(needs, settings, prepared, calibration)
    sides = 1 + len(candidates)
    measured = needs_of(prepared, held, 0)
    states = needs.states + sides * measured.states + held.tokens * sums_per_token(len(candidates))
    tokens, sequences = needs.tokens + held.tokens, needs.sequences + len(held.sequences)
    sizes = [_refit_sizes(prepared, candidate, text) for candidate, text in refitted.items()]
    for text in refitted.values():
        parts = [part for part in (text, text.anchor) if part is not None]
        used = [ids for part in parts for ids, use in zip(part.sequences, part.refit, strict=True) if use]
        states += states_bytes(prepared, used)
    if refitted:
        # What the original experts gave, which some models need; and the original's states of the anchor.
        whole = [ids for ids, use in zip(calibration.sequences, calibration.refit, strict=True) if use]
        states += states_bytes(prepared, whole)
    if calibration.anchor is not None:
        states += 2 * states_bytes(prepared, calibration.anchor.sequences)
        tokens += calibration.anchor.tokens
        sequences += len(calibration.anchor.sequences)
    needs = replace(needs, states=states, tokens=tokens, sequences=sequences, sides=sides + bool(refitted))
    return _with_refits(needs, sizes) if sizes else needs


def _refit_sizes(prepared: PreparedModel, candidate: Candidate, text: Calibration) -> RefitSizes:
    counts = candidate.counts(prepared.layout.expert_layers, 0)
    fitted, judging = fitted_tokens(text), fitted_tokens(text, JUDGE)
    return refit_sizes(prepared.skeleton, counts, prepared.dtype.itemsize, fitted + judging, judging)


def _with_refits(needs: Needs, sizes: Sequence[RefitSizes]) -> Needs:
    """The needs with those of the largest refit: they are made one after the other."""
    usual, collecting = needs.workspace, max(20 * each.hidden for each in sizes)
    largest = {part.name: max(getattr(each.needs, part.name) for each in sizes) for part in fields(RefitNeeds)}
    return replace(needs, workspace=lambda tokens: usual(tokens) + tokens * collecting, refit=RefitNeeds(**largest))
