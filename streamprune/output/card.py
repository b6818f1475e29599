"""The model card (README.md) that goes with a pruned model, with metadata as the Hub expects it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from streamprune.fit.estimate import Estimate, Fit
from streamprune.machine import format_bytes
from streamprune.output.plan import PrunePlan
from streamprune.source.checkpoint import Checkpoint

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def model_card(plan: PrunePlan, report: Mapping[str, Any], source: Checkpoint, estimate: Estimate | None = None) -> str:
    """The card's text, made of the run's report (`streamprune.json`) and the source's own card, if it has one.

    `estimate` is the memory that the written model takes; None where it cannot be told.
    """
    inherited = _source_metadata(source.folder)
    model = str(report["settings"]["model"])
    base = model if _HUB_ID.match(model) else inherited.get("base_model")
    name = model.rpartition("/")[2]
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag=inherited.get("pipeline_tag", "text-generation"),
        license=inherited.get("license"),
        license_name=inherited.get("license_name"),
        license_link=inherited.get("license_link"),
        language=inherited.get("language"),
        tags=["mixture-of-experts", "moe", "pruning", "expert-pruning", "reap", "streamprune"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(name, plan, report, source.nbytes, estimate)}"


def _memory(estimate: Estimate) -> list[str]:
    use = estimate.use
    low, high = estimate.interval
    lines = [
        "## Memory",
        "",
        f"Predicted from the files of this model, for {use.batch} x {use.context:,} tokens on one card:",
        "",
        "| part | size | |",
        "|---|---|---|",
        *(f"| {term.name} | {format_bytes(term.bytes)} | {term.kind} |" for term in estimate.terms),
        f"| **total** | **{format_bytes(estimate.total)}** | {format_bytes(low)} to {format_bytes(high)} |",
        "",
    ]
    if isinstance(estimate, Fit):
        lines += [f"Pruned for a budget of {format_bytes(estimate.budget)}.", ""]
    return lines


def _body(name: str, plan: PrunePlan, report: Mapping[str, Any], source_bytes: int, estimate: Estimate | None) -> str:
    spec, settings, calibration = plan.spec, report["settings"], report["calibration"]
    unseen = [layer for layer in report["layers"] if not all(layer["counts"])]
    lines = [
        f"# {name}, {plan.keep} of {spec.count} experts",
        "",
        f"Made from `{settings['model']}` with [streamprune](https://pypi.org/project/streamprune/) "
        f"{report['versions']['streamprune']}: in each of {len(plan.moe_blocks)} Mixture-of-Experts blocks the "
        f"{spec.count - plan.keep} experts with the lowest {settings['method'].upper()} score were removed. "
        "Every tensor that stays is identical to the source's, byte for byte; nothing was retrained.",
        "",
        "| | source | this model |",
        "|---|---|---|",
        f"| experts per block | {spec.count} | {plan.keep} |",
        f"| experts used per token | {spec.top_k} | {spec.top_k} |",
        f"| weights | {format_bytes(source_bytes)} | {format_bytes(plan.output_bytes)} |",
        "",
        *(_memory(estimate) if estimate else []),
        "## Calibration",
        "",
        f"{calibration['sequences']} sequences, {calibration['tokens']:,} tokens, from "
        f"{', '.join(f'`{source}`' for source in calibration['sources'])}. What the calibration text does not contain, "
        "the model may have lost: compare it with the source on your own tasks before you rely on it.",
    ]
    if unseen:
        lines += [
            "",
            f"In {len(unseen)} blocks the calibration text never used some experts; they count as the least useful.",
        ]
    if plan.dropped:
        lines += ["", f"The source's {len(plan.dropped)} multi-token-prediction tensors were left out."]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto", device_map="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "`streamprune.json` lists, for each block, the experts kept (by their number in the source), and the score and "
        "token count of every expert.",
        "",
    ]
    return "\n".join(lines)


def _source_metadata(source: Path) -> dict[str, Any]:
    """The metadata of the source's own model card; empty if there is none that can be read."""
    try:
        return dict(ModelCard.load(source / "README.md").data.to_dict())
    except Exception:
        # People write anything into their cards; a card that cannot be parsed says nothing.
        return {}
