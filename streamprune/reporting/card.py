"""The model card (README.md) that goes with a pruned model, with metadata as the Hub expects it.

It is made of the run's record alone, so that the same input and settings give the same card to the byte. What is
measured of the model later is added at its end (`write`). The text is in `templates/card.md.j2`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from streamprune.checkpoint.index import Checkpoint
from streamprune.config import DEFAULT_CONTEXT, MOST_TOKENS
from streamprune.fit.estimate import Estimate, Fit
from streamprune.fit.footprint import max_positions
from streamprune.hardware.memory import format_bytes
from streamprune.models.per_layer_experts import engines_note, has_per_layer_experts
from streamprune.output.plan import PrunePlan
from streamprune.reporting.record import Calibration, RecipeSource, Record
from streamprune.reporting.reproduce import THIS_MODEL, can_score_again, reproduce_command
from streamprune.reporting.templates import render
from streamprune.saliency.methods import METHODS
from streamprune.selection.retention import Retention
from streamprune.tables import Code, Strong, Table, count, interval, percent, plain

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
#: How the calibration text was divided into sequences, by the recipe's mode; the length follows.
_MODES = {
    "packed": "Documents laid end to end and divided into sequences of",
    "documents": "Each document a sequence of its own, cut at",
    "bucketed": "Each document a sequence of its own, its length rounded down, cut at",
}
#: What a recipe may say of where a source is from, in the order in which the card shows it.
_PLACES = ("dataset", "subset", "split", "commit", "data_files", "data_dir", "path", "builtin")
#: How convert_hf_to_gguf.py calls the dtypes that models have.
_GGUF_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def model_card(
    plan: PrunePlan,
    record: Record,
    source: Checkpoint,
    estimate: Estimate | None = None,
    retained: Sequence[Retention] = (),
) -> str:
    """The card's text, made of the run's record and the source's own card, if it has one.

    `estimate` is the memory that the written model takes, None where it cannot be estimated; `retained` is what the
    choice keeps of each source of the calibration, empty without scores.
    """
    settings, calibration, use = record.settings, record.calibration, record.use
    per_layer = has_per_layer_experts(plan.counts)
    context = min(use.context if use else DEFAULT_CONTEXT, max_positions(plan.config) or MOST_TOKENS)
    return render(
        "card.md.j2",
        metadata=metadata(settings.model, settings.method, source.folder).to_yaml(),
        name=plain(settings.model).rpartition("/")[2],
        record=record,
        settings=settings,
        calibration=calibration,
        recipe=calibration.stated if calibration else None,
        counts=list(record.counts.values()),
        layers=ranges(sorted(record.counts)),
        dense_layers=plan.layout.layer_count - len(plan.counts),
        method=_score_meaning(settings.method) if settings.method else None,
        summary_table=_summary_table(record, source.nbytes, plan.output_bytes),
        experts_table=_experts_table(record),
        calibration_table=_calibration_table(calibration) if calibration else None,
        mode=_MODES.get(calibration.stated.mode or "") if calibration else None,
        layers_with_unseen=sum(0 in layer.counts for layer in record.layers),
        retention_table=_retention_table(retained) if retained else None,
        estimate=estimate,
        memory_table=_memory_table(estimate) if estimate else None,
        budget=estimate.budget if isinstance(estimate, Fit) else None,
        per_layer=per_layer,
        engines=engines_note(per_layer) if per_layer else None,
        context=context,
        gguf_type=_GGUF_TYPES.get(str(settings.dtype), "auto"),
        again=can_score_again(record),
        this_model=THIS_MODEL,
        command=reproduce_command(record),
        versions=", ".join(f"{plain(name)} {plain(version)}" for name, version in record.versions.items()),
    )


def _score_meaning(method: str) -> str:
    """What a method's score of an expert is, and where it was published, in Markdown."""
    entry = METHODS[method]
    linked = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", entry.publication)
    return f"{entry.meaning} ({linked})" if linked else entry.meaning


def metadata(model: str, method: str | None, source: Path) -> ModelCardData:
    """The card's metadata. (The Hub knows base_model_relation as adapter, merge, quantized or finetune; a pruned model
    is none of them.)"""
    inherited = _source_metadata(source)
    base = model if _HUB_ID.fullmatch(model) else _texts(inherited.get("base_model"), _HUB_ID)
    tags = ["mixture-of-experts", "moe", "pruning", "expert-pruning", "streamprune"]
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag=_text(inherited.get("pipeline_tag")) or "text-generation",
        license=_texts(inherited.get("license")),
        license_name=_text(inherited.get("license_name")),
        license_link=_text(inherited.get("license_link")),
        language=_texts(inherited.get("language")),
        tags=[*tags, *(["reap"] if method == "reap" else [])],
    )


def _source_metadata(source: Path) -> dict[str, Any]:
    """The metadata of the source's own model card; empty if there is none that can be read."""
    try:
        return dict(ModelCard.load(source / "README.md", ignore_metadata_errors=True).data.to_dict())
    except Exception:
        # People write anything into their cards; a card that cannot be parsed gives no metadata.
        return {}


def _text(value: Any) -> str | None:
    """A stranger's text, on one line, if it is one. YAML reads `no` as False, which as a language is Norwegian."""
    if value is False:
        value = "no"
    return (plain(value) or None) if isinstance(value, str) else None


def _texts(value: Any, pattern: re.Pattern[str] | None = None) -> Any:
    """The same of a text or a list of them: those that match the pattern. None where nothing is left."""
    found = [text for each in (value if isinstance(value, list) else [value]) if (text := _text(each)) is not None]
    found = [text for text in found if pattern is None or pattern.fullmatch(text)]
    if not found:
        return None
    return found if isinstance(value, list) else found[0]


def _summary_table(record: Record, source_bytes: int, output_bytes: int) -> Table:
    counts = list(record.counts.values())
    least, most = min(counts), max(counts)
    rows = [
        ("experts per layer", str(record.experts), str(most) if least == most else f"{least} to {most}"),
        ("experts in all", count(record.all_experts), count(sum(counts))),
        ("experts used per token", str(record.source.top_k), str(record.source.top_k)),
        ("weights", format_bytes(source_bytes), format_bytes(output_bytes)),
    ]
    return Table("", ("", "source", "this model"), rows)


def _experts_table(record: Record) -> Table:
    """How many experts each layer keeps, equal neighbours taken together."""
    counts = record.counts
    rows = []
    for number, layers in itertools.groupby(sorted(counts), key=lambda layer: counts[layer]):
        rows.append((ranges(list(layers)), str(number), f"{number / record.experts:.0%}"))
    return Table("", ("layers", "experts", "of the source's"), rows)


def _calibration_table(calibration: Calibration) -> Table:
    stated = {source.name: source for source in calibration.stated.sources}
    rows = []
    for source in calibration.sources:
        facts = stated.get(source.name, RecipeSource(source.name))
        share = source.tokens / calibration.tokens if calibration.tokens else 0.0
        sizes = map(count, (facts.records, facts.sequences, source.tokens))
        rows.append((Code(source.name), _place(facts), *sizes, percent(share)))
    return Table("", ("source", "from", "records", "sequences", "tokens", "share"), rows, align="ll")


def _place(source: RecipeSource) -> str:
    """Where a source is from: "org/name, split train"."""
    found = []
    for key in _PLACES:
        value = getattr(source, key)
        text = ", ".join(value) if isinstance(value, list) else value
        if text:
            found.append(text if key in ("dataset", "path") else f"{key} {text}")
    return Code(", ".join(found)) if found else "–"


def _retention_table(retained: Sequence[Retention]) -> Table:
    rows = [
        (Code(each.source), percent(each.kept), percent(each.best), f"{each.worst:.1%} (layer {each.worst_layer})")
        for each in retained
    ]
    return Table("", ("source", "kept", "at best", "least in a layer"), rows)


def _memory_table(estimate: Estimate) -> Table:
    rows = [(term.name, format_bytes(term.bytes), term.kind) for term in estimate.terms]
    bounds = interval(estimate.interval, lambda nbytes: format_bytes(int(nbytes)))
    return Table("", ("part", "size", ""), [*rows, (Strong("total"), Strong(format_bytes(estimate.total)), bounds)])


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, those that follow one another as a range: 0, 3–7."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(parts)
