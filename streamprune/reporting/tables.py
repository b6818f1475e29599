"""The numbers of the report as tables: the selection and the measurements. Each figure has a table with its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from streamprune.fit.estimate import Estimate
from streamprune.hardware.memory import format_bytes
from streamprune.reporting.evaluations import (
    NOT_THE_SOURCE,
    Continuations,
    GenerationResult,
    TasksResult,
    TextResult,
)
from streamprune.reporting.facts import GPU_SIZES, Course, Memory
from streamprune.reporting.record import Record
from streamprune.reporting.record_computed import RecordedRefit, RecordedRounding
from streamprune.reporting.record_text import Calibration
from streamprune.selection.retention import Retention
from streamprune.tables import Struck, Table, count, interval, number, percent


def layers_table(record: Record) -> Table:
    """How many experts each layer keeps, and the scores at the boundary."""
    rows = []
    for layer in record.layers:
        stay = set(layer.kept)
        kept = [layer.scores[expert] for expert in layer.kept] if layer.scores else []
        removed = [score for expert, score in enumerate(layer.scores) if expert not in stay]
        numbers = (len(stay), record.experts - len(stay))
        share = percent(1 - len(stay) / record.experts)
        scores = (number(min(kept, default=None)), number(max(removed, default=None)))
        protected = record.protected_layers.get(layer.index, [])
        rows.append((str(layer.index), *map(str, numbers), share, *scores, str(len(protected))))
    columns = "layer", "kept", "removed", "share removed", "lowest score kept", "highest score removed", "protected"
    return Table("Experts by layer", columns, rows)


def scores_table(record: Record) -> Table:
    """The score of every expert of every layer; removed ones are struck out."""
    rows = []
    for layer in record.layers:
        stay = set(layer.kept)
        texts = [number(score) for score in layer.scores] or ["·"] * record.experts
        cells = (text if expert in stay else Struck(text) for expert, text in enumerate(texts))
        rows.append((str(layer.index), *cells))
    columns = ("layer", *map(str, range(record.experts)))
    return Table("Scores by layer and expert; struck out: removed", columns, rows)


def tokens_table(record: Record) -> Table:
    """How the tokens of the calibration were divided among the experts of each layer."""
    rows = []
    for layer in record.layers:
        quartiles = [f"{value:,.10g}" for value in np.percentile(layer.counts, (0, 25, 50, 75, 100))]
        fewest = min(layer.counts[expert] for expert in layer.kept)
        rows.append((str(layer.index), *quartiles, count(fewest), str(layer.counts.count(0))))
    columns = "layer", "min", "Q1", "median", "Q3", "max", "min of kept experts", "never routed"
    return Table("Tokens per expert by layer", columns, rows)


def retention_tables(record: Record, retained: Sequence[Retention], what: str = "Saliency") -> Iterator[Table]:
    """The share of each source's saliency that is kept, in all layers and in each."""
    rows = [
        (each.source, percent(each.kept), percent(each.best), str(each.worst_layer), percent(each.worst))
        for each in retained
    ]
    yield Table(
        f"{what} kept by source",
        ("source", "kept", "kept if selected for it alone", "worst layer", "kept in worst layer"),
        rows,
    )
    by_layer = [
        (str(layer.index), *(percent(each.layers[position]) for each in retained))
        for position, layer in enumerate(record.layers)
    ]
    yield Table(f"{what} kept by layer and source", ("layer", *(each.source for each in retained)), by_layer)


def channels_table(record: Record, energies: NDArray[np.float64]) -> Table:
    """How much of each layer's energy (layers, W) is in the best channels of its experts."""
    full, kept = energies.shape[1], record.settings.width or energies.shape[1]
    widths = [max(1, full * eighths // 8) for eighths in (1, 2, 4, 6)]
    rows = []
    for layer, ranks in zip(record.layers, energies, strict=True):
        total = float(ranks.sum())
        shares = [percent(float(ranks[:width].sum()) / total if total else None) for width in (*widths, kept)]
        rows.append((str(layer.index), *shares))
    columns = ("layer", *(f"best {width:,}" for width in widths), f"kept: {kept:,}")
    return Table(f"Share of the energy in the best of {full:,} channels of each expert", columns, rows)


def refit_table(refit: RecordedRefit) -> Table:
    """What a refit did, over all layers and experts."""
    shares, changes = ([value for layer in refit.layers for value in getattr(layer, name)] for name in _BY_EXPERT)
    kinds = (
        ("relative error of a layer's output before", [layer.before for layer in refit.layers], percent),
        ("relative error of a layer's output after", [layer.after for layer in refit.layers], percent),
        ("share taken of an expert's fitted change", shares, number),
        ("change of an expert's weights", changes, percent),
    )
    rows = [
        (label, *(show(float(of(values))) for of in (np.min, np.mean, np.max)))
        for label, values, show in kinds
        if values
    ]
    return Table("The refit in all layers", ("", "min", "mean", "max"), rows)


#: What a refit records of every expert that stays.
_BY_EXPERT = ("shares", "changes")


def refit_by_layer_table(refit: RecordedRefit) -> Table:
    """The errors of each layer's output before and after the refit, and what was taken of the fitted changes."""
    rows = [
        (
            str(layer.index), percent(layer.before), percent(layer.after),
            f"{len(layer.shares) - layer.shares.count(0)} of {len(layer.shares)}",
            *(number(float(of(layer.shares))) for of in (np.min, np.mean, np.max)),
            count(min(layer.tokens)), percent(float(np.mean(layer.changes))),
        )
        for layer in refit.layers
    ]  # fmt: skip
    columns = (
        "layer", "error before", "error after", "experts changed", "min share", "mean share", "max share",
        "fewest fitted tokens", "mean change of weights",
    )  # fmt: skip
    return Table("The refit by layer", columns, rows)


def rounding_table(rounding: RecordedRounding) -> Table:
    """The errors of each layer's matrices as GPTQ rounded them, and as rounding to nearest would have."""
    rows = [
        (str(layer.index), percent(layer.before), percent(layer.after), count(len(layer.nearest)))
        for layer in rounding.layers
    ]
    columns = "layer", "error if rounded to nearest", "error", "experts rounded to nearest"
    return Table("The rounding by layer", columns, rows)


def memory_table(memory: Memory, budget: int | None) -> Table:
    """Memory of source and pruned model by part, and the memory left free on common GPUs and in the budget."""
    both = [estimate for estimate in (memory.before, memory.after) if estimate is not None]
    names = dict.fromkeys(term.name for estimate in both for term in estimate.terms)
    rows = [(name, *(_term(estimate, name) for estimate in both)) for name in names]
    rows.append(("total", *(format_bytes(estimate.total) for estimate in both)))
    rows.append(("range", *(interval(estimate.interval, format_bytes) for estimate in both)))
    sizes = {f"on a {label} (CUDA can use {format_bytes(usable)})": usable for label, _, usable in GPU_SIZES}
    if budget is not None:
        sizes[f"in the budget of {format_bytes(budget)}"] = budget
    for label, nbytes in sizes.items():
        rows.append((f"free {label}", *(_left(nbytes - estimate.total) for estimate in both)))
    return Table("Memory on one GPU", ("part", *(["source"] if memory.before else []), "this model"), rows)


def _term(estimate: Estimate, name: str) -> str:
    return next((format_bytes(term.bytes) for term in estimate.terms if term.name == name), "–")


def _left(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes >= 0 else f"does not fit: {format_bytes(-nbytes)} over"


def calibration_table(calibration: Calibration, mix: dict[str, float] | None) -> Table:
    """The sources of the calibration: their shares in the recipe and of the tokens, and their weights by the mix."""
    recipe = {source.name: source for source in calibration.stated.sources}
    rows = []
    for each in calibration.sources:
        stated = recipe.get(each.name)
        share = f"{stated.share:g}" if stated and stated.share is not None else "–"
        of_all = percent(each.tokens / calibration.tokens if calibration.tokens else None)
        weight = percent(mix.get(each.name, 0.0)) if mix else "unweighted"
        rows.append((each.name, share, count(stated.records if stated else None), count(each.tokens), of_all, weight))
    columns = "source", "share in the recipe", "records", "tokens", "share of the tokens", "weight in the selection"
    return Table("Calibration text by source", columns, rows)


def loss_tables(text: TextResult) -> Iterator[Table]:
    """Loss and perplexity by source; and if the original was measured, its own, the divergence and the agreement."""
    columns = ["source", "tokens", "loss", "95 % interval", "perplexity", "95 % interval"]
    if text.compared:
        columns += ["original loss", "original perplexity", "loss increase", "95 % interval"]
    rows = []
    for each in text.rows:
        row = [each.name, count(each.tokens), number(each.loss), interval(each.loss_interval)]
        row += [number(each.perplexity), interval(each.perplexity_interval)]
        if text.compared:
            row += [number(each.original_loss), number(each.original_perplexity)]
            row += [number(each.loss_increase), interval(each.loss_increase_interval)]
        rows.append(row)
    yield Table("Loss, nats per token", columns, rows)
    if text.compared:
        divergence = [
            (each.name, number(each.kl), interval(each.kl_interval), number(each.kl_p99),
             percent(each.top1_agreement), interval(each.top1_agreement_interval, percent))
            for each in text.rows
        ]  # fmt: skip
        columns = ["source", "KL", "95 % interval", "99th percentile", "top-1 agreement", "95 % interval"]
        yield Table("Divergence from the original, nats per token", columns, divergence)


def other_loss_tables(text: TextResult) -> Iterator[Table]:
    """The same of a comparison with a model that this one was not made from, which the titles say."""
    for table in loss_tables(text):
        yield replace(table, title=f"{table.title}, against {text.original_words}, on {text.text_words}")


def depth_table(text: TextResult) -> Table:
    """The error of the hidden states after every layer, by source."""
    shown = [(each.name, each.hidden_error) for each in text.rows if each.hidden_error]
    rows = [
        (str(layer), *(number(errors[layer] if layer < len(errors) else None) for _, errors in shown))
        for layer in range(max(len(errors) for _, errors in shown))
    ]
    columns = ("layer", *(name for name, _ in shown))
    return Table("Relative error of the hidden states after each layer", columns, rows)


def generation_tables(generation: GenerationResult) -> Iterator[Table]:
    """How continuations ended, by mode, with the original's results if it was measured too; and by source."""
    rows, by_source = [], []
    for mode in generation.modes:
        rows.append(_continuations(mode.label, mode, mode.prompts))
        if mode.original is not None:
            rows.append(_continuations(f"{mode.label}, the original", mode.original, mode.prompts))
        by_source += [_continuations(f"{mode.label}, {each.name}", each, each.prompts) for each in mode.sources]
    columns = "prompts", "ended with EOS", "looped", "repeated 4-grams"
    yield Table("Continuations", ("decoding", *columns), rows)
    if by_source:
        yield Table("Continuations by source", ("decoding and source", *columns), by_source)


def _continuations(label: str, each: Continuations, prompts: int | None) -> tuple[str, ...]:
    return (label, count(prompts), *map(percent, (each.ended, each.looped, each.repeated_4grams)))


def tasks_table(tasks: TasksResult) -> Table:
    """The results of lm-evaluation-harness, with what was lost where the original was measured too."""
    rows = []
    for each in tasks.figures():
        stated = tasks.shots.get(each.task), tasks.samples.get(each.task, {}).get("effective")
        counts = (count(value if type(value) is int else None) for value in stated)
        row = [each.task, each.metric, *counts, number(each.value), number(each.error, 2)]
        if tasks.compared:
            row += [number(each.original), number(each.points_lost, 2), percent(each.recovery)]
        rows.append(row)
    columns = ["task", "metric", "shots", "examples", "value", "standard error"]
    compared = ["original", "points lost", "recovery"] if tasks.compared else []
    return Table("Tasks", (*columns, *compared), rows)


def other_tasks_table(tasks: TasksResult) -> Table:
    """The same of a comparison with a model that this one was not made from, which the title says."""
    table = tasks_table(tasks)
    return replace(table, title=f"{table.title}, against {tasks.against}, {NOT_THE_SOURCE}")


def course_table(course: Course) -> Table:
    """The time and memory of every layer of the run."""
    rows = [
        (str(each.layer), f"{each.at_seconds:.1f}", f"{each.seconds:.2f}", format_bytes(each.peak_bytes))
        for each in course.layers
    ]
    return Table("The run by layer", ("layer", "finished at (s)", "seconds", "peak memory so far"), rows)
