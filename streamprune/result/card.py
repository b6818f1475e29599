"""The model card (README.md) that goes with a pruned model, with metadata as the Hub expects it.

It is made of the run's record alone, so that the same input and settings give the same card to the byte. What is
measured of the model later is added at its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from streamprune.choice.retention import Retention
from streamprune.fit.estimate import Estimate, Fit
from streamprune.machine import format_bytes
from streamprune.output.plan import PrunePlan
from streamprune.result.card_data import calibration_lines, experts_lines, retention_lines, scores_lines
from streamprune.result.card_use import reproduce_lines, untested_lines, use_lines
from streamprune.result.markdown import code, plain, table, words
from streamprune.source.checkpoint import Checkpoint

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_REAP = "[arXiv:2510.13999](https://arxiv.org/abs/2510.13999)"
_OUTPUT_NORMS = "[arXiv:2504.05586](https://arxiv.org/abs/2504.05586)"
#: What a method's score of an expert is, and where it was published; `scores.methods` has the formulas.
_METHODS = {
    "reap": "the mean, over the tokens routed to it, of its router weight times the norm of its output "
    f"(REAP, {_REAP})",
    "frequency": "the number of tokens routed to it",
    "weighted-frequency": "the sum of its router weights over the tokens routed to it",
    "ean": f"the sum of the norms of its outputs ({_OUTPUT_NORMS})",
    "ean-mean": "the mean norm of its outputs",
    "weighted-ean": "the sum, over the tokens routed to it, of its router weight times the norm of its output (the sum "
    f"of which REAP, {_REAP}, takes the mean)",
    "max-activation": "the largest value in any of its outputs "
    "(as in [arXiv:2507.23279](https://arxiv.org/abs/2507.23279))",
    "relative-energy": "the energy that its weighted output adds, relative to that of the residual stream "
    "(unpublished)",
    "composite": "how often it is used, times its mean router weight, times the mean cosine of its output with the "
    "layer's (unpublished)",
    "random": "a number drawn at random: the control that every method has to beat",
}


def model_card(
    plan: PrunePlan,
    report: Mapping[str, Any],
    source: Checkpoint,
    estimate: Estimate | None = None,
    retained: Sequence[Retention] = (),
) -> str:
    """The card's text, made of the run's report (`streamprune.json`) and the source's own card, if it has one.

    `estimate` is the memory that the written model takes, None where it cannot be told; `retained` what the choice
    keeps of each source of the calibration, empty without scores.
    """
    model = str(report["settings"]["model"])
    sections = [
        *_summary(plain(model).rpartition("/")[2], plan, report, source.nbytes),
        *experts_lines(plan),
        *calibration_lines(report),
        *retention_lines(retained),
        *(_memory(estimate) if estimate else []),
        *use_lines(plan, report),
        *scores_lines(report),
        *untested_lines(plan, report),
        *reproduce_lines(report),
    ]
    return f"---\n{_metadata(model, report, source.folder).to_yaml()}\n---\n\n" + "\n".join(sections)


def _metadata(model: str, report: Mapping[str, Any], source: Path) -> ModelCardData:
    """The card's metadata. (The Hub knows base_model_relation as adapter, merge, quantized or finetune; a pruned model
    is none of them.)"""
    inherited = _source_metadata(source)
    base = model if _HUB_ID.fullmatch(model) else _texts(inherited.get("base_model"), _HUB_ID)
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag=_text(inherited.get("pipeline_tag")) or "text-generation",
        license=_texts(inherited.get("license")),
        license_name=_text(inherited.get("license_name")),
        license_link=_text(inherited.get("license_link")),
        language=_texts(inherited.get("language")),
        tags=["mixture-of-experts", "moe", "pruning", "expert-pruning", "streamprune", *_method_tags(report)],
    )


def _method_tags(report: Mapping[str, Any]) -> list[str]:
    return ["reap"] if report["settings"]["method"] == "reap" else []


def _source_metadata(source: Path) -> dict[str, Any]:
    """The metadata of the source's own model card; empty if there is none that can be read."""
    try:
        return dict(ModelCard.load(source / "README.md", ignore_metadata_errors=True).data.to_dict())
    except Exception:
        # People write anything into their cards; a card that cannot be parsed says nothing.
        return {}


def _text(value: Any) -> str | None:
    """A stranger's text, on one line, if it is one. YAML reads `no` as False, which as a language is Norwegian."""
    if value is False:
        value = "no"
    return (plain(value) or None) if isinstance(value, str) else None


def _texts(value: Any, pattern: re.Pattern[str] | None = None) -> Any:
    """The same of a text or a list of them: those that are of the pattern. None where nothing is left."""
    found = [text for each in (value if isinstance(value, list) else [value]) if (text := _text(each)) is not None]
    found = [text for text in found if pattern is None or pattern.fullmatch(text)]
    if not found:
        return None
    return found if isinstance(value, list) else found[0]


def _summary(name: str, plan: PrunePlan, report: Mapping[str, Any], source_bytes: int) -> Iterator[str]:
    spec, counts = plan.layout.spec, list(plan.counts.values())
    least, most, all_of_them = min(counts), max(counts), spec.count * len(counts)
    per_block = str(most) if least == most else f"{least} to {most}"
    kept = f"{most} of {spec.count}" if least == most else f"{sum(counts):,} of {all_of_them:,}"
    yield from (f"# {words(name)}, {kept} experts", "")
    yield (
        f"Made from {_origin(report)} with streamprune "
        f"{plain(report['versions']['streamprune'])}: of the experts in its {len(counts)} Mixture-of-Experts blocks, "
        f"{all_of_them - sum(counts):,} were removed{_by_what(report)}. Every tensor that stays is identical to the "
        "source's, byte for byte; nothing was retrained."
    )
    yield ""
    if report["settings"]["method"] is not None:
        yield from (f"An expert's score is {_METHODS[report['settings']['method']]}.", "")
    rows = [
        ("experts per block", str(spec.count), per_block),
        ("experts in all", f"{all_of_them:,}", f"{sum(counts):,}"),
        ("experts used per token", str(spec.top_k), str(spec.top_k)),
        ("weights", format_bytes(source_bytes), format_bytes(plan.output_bytes)),
    ]
    yield from table(("", "source", "this model"), rows)


def _origin(report: Mapping[str, Any]) -> str:
    model, revision = report["settings"]["model"], report["settings"]["revision"]
    return code(model) + (f" (revision {code(revision)})" if revision is not None else "")


def _by_what(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    if settings["method"] is None:
        return ", chosen by hand"
    text = f": those with the lowest {settings['method']} score"
    text += " of all blocks together" if settings["schedule"] == "global" else " in each block"
    if settings["schedule"] not in ("global", "uniform"):
        text += f" (schedule {words(settings['schedule'])})"
    return text + (", super experts excepted" if settings["protect_super_experts"] else "")


def _memory(estimate: Estimate) -> Iterator[str]:
    use = estimate.use
    low, high = estimate.interval
    yield from ("## Memory", "")
    yield f"Predicted from the files of this model, for {use.batch} x {use.context:,} tokens on one card:"
    yield ""
    total = (f"**{format_bytes(estimate.total)}**", f"{format_bytes(low)} to {format_bytes(high)}")
    rows = [(term.name, format_bytes(term.bytes), term.kind) for term in estimate.terms]
    yield from table(("part", "size", ""), [*rows, ("**total**", *total)])
    if isinstance(estimate, Fit):
        yield from (f"Pruned for a budget of {format_bytes(estimate.budget)}.", "")
