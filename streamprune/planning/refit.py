"""What a refit needs, decided before a weight is read: that it is possible, how much text, memory and arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from streamprune.calibration.builtin_text import BUILTIN
from streamprune.calibration.recipe import builtin_domains, named_path
from streamprune.calibration.refit_text import RefitDemand
from streamprune.calibration.sequences import Calibration, date_of, fingerprint_of, load_calibration
from streamprune.common_settings import Sampling
from streamprune.config import NO_ANCHOR, RunSettings
from streamprune.errors import CalibrationError, UnsupportedModelError
from streamprune.models.skeleton import Skeleton
from streamprune.planning.counts import ExpertCounts
from streamprune.refit.activations import down_sizes, why_not_linear
from streamprune.refit.sizes import RefitSizes

#: Fewest sequences of an anchor: some of each built-in domain, and one that judges.
_LEAST_SEQUENCES = 8


def refit_demand(skeleton: Skeleton, counts: ExpertCounts) -> RefitDemand:
    """What the refit of the layer that keeps most experts needs. Raises UnsupportedModelError if there can be none.

    Before that is known, a layer may keep all.
    """
    widths = []
    for layer, path in skeleton.experts.items():
        module = skeleton.layers[layer].get_submodule(path)
        problem = why_not_linear(module)
        if problem is not None:
            raise UnsupportedModelError(f"--refit cannot refit the experts of layer {layer}: {problem}.")
        widths.append(down_sizes(module)[0])
    most = max(counts.per_layer.values()) if counts.per_layer is not None else skeleton.spec.count
    return RefitDemand(most, counts.width or max(widths), skeleton.spec.top_k)


def refit_sizes(skeleton: Skeleton, counts: ExpertCounts, itemsize: int, tokens: int, judging: int) -> RefitSizes:
    """The sizes of the refit of the largest layer."""
    demand = refit_demand(skeleton, counts)
    index = max(skeleton.experts, key=lambda layer: sum(each.numel() for each in skeleton.layers[layer].parameters()))
    module = skeleton.layers[index].get_submodule(skeleton.experts[index])
    experts = sum(each.numel() for each in module.parameters())
    others = sum(each.numel() for each in skeleton.layers[index].parameters()) - experts
    # (Attention itself is left out: it is little compared with the products with weights, except for long sequences.)
    used = others + experts * skeleton.spec.top_k // skeleton.spec.count
    hidden = down_sizes(module)[1]
    return RefitSizes(demand.kept, demand.width, hidden, skeleton.spec.top_k, tokens, judging, 2 * used, itemsize)


def anchor_name(settings: RunSettings, calibration: Calibration) -> str | None:
    """The text that --refit fits to in addition to the calibration; None for no text."""
    if settings.anchor is not None:
        return None if settings.anchor == NO_ANCHOR else settings.anchor
    return BUILTIN if len(calibration.sources) == 1 else None


def with_anchor(
    settings: RunSettings, calibration: Calibration, skeleton: Skeleton, counts: ExpertCounts, folder: Path
) -> Calibration:
    """The calibration with its anchor, read with the tokenizer in `folder`. Raises CalibrationError.

    The anchor has nothing of the calibration: the same text must not be fitted to and also held out, or judge.
    """
    name = anchor_name(settings, calibration)
    if name is None:
        return calibration
    text = _other_text(name, calibration)
    longest = max(len(sequence) for sequence in calibration.sequences)
    tokens = refit_demand(skeleton, counts).anchor_tokens(calibration.tokens)
    text_config = skeleton.model.config.get_text_config(decoder=True)
    try:
        anchor = load_calibration(
            (text,),
            folder,
            Sampling(
                samples=max(_LEAST_SEQUENCES, math.ceil(tokens / longest)),
                seq_len=longest,
                date=settings.date or date_of(calibration.recipe),
                skip_bad=settings.skip_bad,
            ),
            vocab_size=int(skeleton.model.get_input_embeddings().weight.shape[0]),
            max_positions=getattr(text_config, "max_position_embeddings", None),
            trust_remote_code=settings.trust_remote_code,
        )
    except CalibrationError as error:
        raise CalibrationError(
            f"--refit also fits to general text, the anchor ({name}): {error} Name another text with --anchor, or none "
            "with --anchor none."
        ) from None
    if (date := date_of(anchor.recipe)) is not None:
        # (The calibration alone may have no chat.)
        given = {**calibration.recipe["given"], "date": date}
        calibration = replace(calibration, recipe={**calibration.recipe, "given": given})
    return replace(calibration, anchor=_without(anchor, calibration, name))


def _other_text(name: str, calibration: Calibration) -> str:
    """The anchor `name`; of built-in text only the domains that the calibration does not use. Raises CalibrationError.

    (Equal sequences are not all: other lengths or amounts divide the same documents otherwise.)
    """
    if name.partition(":")[0] != BUILTIN or named_path(name)[1]:
        return name
    stated = [source.get("builtin") or [] for source in calibration.recipe.get("sources", [])]
    used = {domain for each in stated for domain in ([each] if isinstance(each, str) else each)}
    others = [domain for domain in builtin_domains(name) if domain not in used]
    if not others:
        raise _nothing_new(name)
    return f"{BUILTIN}:{','.join(others)}"


def _without(anchor: Calibration, calibration: Calibration, name: str) -> Calibration:
    """The anchor without the sequences that the calibration has too. Raises CalibrationError if none is left."""
    known = {tuple(sequence.tolist()) for sequence in calibration.sequences}
    kept = [number for number, ids in enumerate(anchor.sequences) if tuple(ids.tolist()) not in known]
    if not kept:
        raise _nothing_new(name)
    if len(kept) == len(anchor.sequences):
        return anchor
    sequences = tuple(anchor.sequences[number] for number in kept)
    source_of = tuple(anchor.source_of[number] for number in kept)
    fingerprint = fingerprint_of(sequences, source_of)
    return replace(anchor, sequences=sequences, source_of=source_of, fingerprint=fingerprint)


def _nothing_new(name: str) -> CalibrationError:
    return CalibrationError(
        f"The anchor {name} has only text that the calibration has too. Name another text with --anchor, or none with "
        "--anchor none."
    )
