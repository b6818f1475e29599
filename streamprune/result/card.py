"""The model card (README.md) that goes with a pruned model, with metadata as the Hub expects it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from streamprune.fit.estimate import Estimate, Fit
from streamprune.machine import format_bytes
from streamprune.output.plan import PrunePlan
from streamprune.output.uneven import engines_note, is_uneven
from streamprune.source.checkpoint import Checkpoint

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def model_card(plan: PrunePlan, report: Mapping[str, Any], source: Checkpoint, estimate: Estimate | None = None) -> str:
    """The card's text, made of the run's report (`streamprune.json`) and the source's own card, if it has one.

    `estimate` is the memory that the written model takes; None where it cannot be told.
    """
    inherited = _source_metadata(source.folder)
    model = str(report["settings"]["model"])
    base = model if _HUB_ID.match(model) else inherited.get("base_model")
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag=inherited.get("pipeline_tag", "text-generation"),
        license=inherited.get("license"),
        license_name=inherited.get("license_name"),
        license_link=inherited.get("license_link"),
        language=inherited.get("language"),
        tags=["mixture-of-experts", "moe", "pruning", "expert-pruning", "streamprune", *_method_tags(report)],
    )
    sections = [
        *_summary(model.rpartition("/")[2], plan, report, source.nbytes),
        *(_memory(estimate) if estimate else []),
        *_calibration(report),
        *_use(plan, report),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(sections)


def _method_tags(report: Mapping[str, Any]) -> list[str]:
    return ["reap"] if report["settings"]["method"] == "reap" else []


def _memory(estimate: Estimate) -> Iterator[str]:
    use = estimate.use
    low, high = estimate.interval
    yield from ("## Memory", "")
    yield f"Predicted from the files of this model, for {use.batch} x {use.context:,} tokens on one card:"
    yield from ("", "| part | size | |", "|---|---|---|")
    for term in estimate.terms:
        yield f"| {term.name} | {format_bytes(term.bytes)} | {term.kind} |"
    yield f"| **total** | **{format_bytes(estimate.total)}** | {format_bytes(low)} to {format_bytes(high)} |"
    yield ""
    if isinstance(estimate, Fit):
        yield from (f"Pruned for a budget of {format_bytes(estimate.budget)}.", "")


def _summary(name: str, plan: PrunePlan, report: Mapping[str, Any], source_bytes: int) -> Iterator[str]:
    spec, counts = plan.layout.spec, list(plan.counts.values())
    least, most, all_of_them = min(counts), max(counts), spec.count * len(counts)
    per_block = str(most) if least == most else f"{least} to {most}"
    kept = f"{most} of {spec.count}" if least == most else f"{sum(counts):,} of {all_of_them:,}"
    yield from (f"# {name}, {kept} experts", "")
    yield (
        f"Made from `{report['settings']['model']}` with [streamprune](https://pypi.org/project/streamprune/) "
        f"{report['versions']['streamprune']}: of the experts in its {len(counts)} Mixture-of-Experts blocks, "
        f"{all_of_them - sum(counts):,} were removed{_by_what(report)}. Every tensor that stays is identical to the "
        "source's, byte for byte; nothing was retrained."
    )
    yield from ("", "| | source | this model |", "|---|---|---|")
    yield f"| experts per block | {spec.count} | {per_block} |"
    yield f"| experts in all | {all_of_them:,} | {sum(counts):,} |"
    yield f"| experts used per token | {spec.top_k} | {spec.top_k} |"
    yield f"| weights | {format_bytes(source_bytes)} | {format_bytes(plan.output_bytes)} |"
    yield ""


def _by_what(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    if settings["method"] is None:
        return ", chosen by hand"
    text = f": those with the lowest {settings['method']} score"
    text += " of all blocks together" if settings["schedule"] == "global" else " in each block"
    if settings["schedule"] not in ("global", "uniform"):
        text += f" (schedule {settings['schedule']})"
    return text + (", super experts excepted" if settings["protect_super_experts"] else "")


def _calibration(report: Mapping[str, Any]) -> Iterator[str]:
    calibration, mix = report["calibration"], report["settings"]["mix"]
    if calibration is None:
        return
    yield from ("## Calibration", "")
    sources = ", ".join(f"`{source['name']}` ({source['tokens']:,})" for source in calibration["sources"])
    yield (
        f"{calibration['sequences']:,} sequences, {calibration['tokens']:,} tokens, from {sources}. What the "
        "calibration text does not contain, the model may have lost: compare it with the source on your own tasks "
        "before you rely on it."
    )
    if mix:
        shares = ", ".join(f"`{name}` {share:.3g}" for name, share in mix.items())
        yield from ("", f"For the choice the sources were weighed: {shares}.")
    unseen = [layer for layer in report["layers"] if not all(layer["counts"])]
    if unseen:
        yield ""
        yield f"In {len(unseen)} blocks the calibration text never used some experts; they count as the least useful."
    yield ""


def _use(plan: PrunePlan, report: Mapping[str, Any]) -> Iterator[str]:
    uneven = is_uneven(plan.counts)
    if plan.layout.dropped:
        yield from (f"The source's {len(plan.layout.dropped)} multi-token-prediction tensors were left out.", "")
    yield from ("## Use", "")
    if uneven:
        yield from (engines_note(uneven), "")
    trust = ", trust_remote_code=True" if uneven else ""
    yield from (
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto", device_map="auto"{trust})',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
    )
    text = "`streamprune.json` lists, for each block, the experts kept (by their number in the source)"
    if report["settings"]["method"] is not None:
        text += (
            ", and the score and token count of every expert. `scores/` holds what all scores are computed "
            "from: with it, other sizes, mixes and methods take a file copy (`streamprune prune --scores`)"
        )
    yield from (text + ".", "")


def _source_metadata(source: Path) -> dict[str, Any]:
    """The metadata of the source's own model card; empty if there is none that can be read."""
    try:
        return dict(ModelCard.load(source / "README.md").data.to_dict())
    except Exception:
        # People write anything into their cards; a card that cannot be parsed says nothing.
        return {}
