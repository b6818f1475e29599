"""Results of evaluations as lines for the terminal. No torch, and no lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from streamprune.evaluation.generation_figures import HEALTHY, LOOPS, UNKNOWN
from streamprune.reporting.evaluations import GENERATION_NAME, TASKS_NAME, TEXT_NAME, TasksResult, mode_name
from streamprune.tables import Table, count, percent


def result_lines(name: str, result: Mapping[str, Any]) -> list[str]:
    """The lines for a result that is saved in the file `name`."""
    return {TEXT_NAME: text_lines, GENERATION_NAME: generation_lines, TASKS_NAME: tasks_lines}[name](result)


def text_lines(result: Mapping[str, Any]) -> list[str]:
    """A row for each source of the text, and for all of them if there are several."""
    columns = ["source", "tokens", "loss", "perplexity"]
    rows = []
    for each in (*result["sources"], *([result["all"]] if len(result["sources"]) > 1 else ())):
        row = [each["name"], count(each["tokens"]), f"{each['loss']:.3f}{_span(each, 'loss', 3)}"]
        row.append(f"{each['perplexity']:,.2f}")
        if result["against"] is not None:
            row += [f"{each['original_loss']:.3f}", f"{each['kl']:.4f}{_span(each, 'kl', 4)}"]
            row += [f"{each['kl_p99']:.3f}", percent(each["top1_agreement"])]
        rows.append(row)
    if result["against"] is not None:
        columns += ["original's", "KL", "99 %", "same top token"]
    return Table("", columns, rows).text()


def _span(each: Mapping[str, Any], name: str, digits: int) -> str:
    span = each[f"{name}_interval"]
    return f" ({span[0]:.{digits}f} to {span[1]:.{digits}f})" if span is not None else ""


def generation_lines(result: Mapping[str, Any]) -> list[str]:
    """A row for each way to generate, of its sources too where any continuation loops; verdict, advice and notes."""
    modes = result["modes"]
    rows = []
    for mode in modes:
        original = _continuations(mode["original"])[1:] if "original" in mode else []
        rows.append([mode_name(mode["decoding"], mode["form"], mode["thinking"]), *_continuations(mode), *original])
        if mode["looped"] and len(mode["sources"]) > 1:
            rows += [[f"  {source['name']}", *_continuations(source)] for source in mode["sources"]]
    columns = ["", "prompts", "ended", "looped", "repeated 4-grams"]
    compared = any("original" in mode for mode in modes)
    if compared:
        columns += ["original: ended", "looped", "repeated 4-grams"]
    title = (
        f"Generation health of {result['model']}, up to {result['settings']['max_new_tokens']:,} new tokens (ended: by "
        "itself, before that)"
    )
    as_original = compared and any(mode["looped"] for mode in modes)
    healthy = "It does not loop significantly more than the original." if as_original else "Few loops, or none."
    verdict = {LOOPS: "It loops.", HEALTHY: healthy, UNKNOWN: "Too short to show loops."}[result["verdict"]]
    lines = [*Table(title, columns, rows).text(), verdict, *(f"- {sentence}" for sentence in result["advice"])]
    return lines + [f"note: {note}" for note in result["notes"]]


def _continuations(figures: Mapping[str, Any]) -> list[str]:
    repeated = "–" if figures["repeated_4grams"] is None else f"{figures['repeated_4grams']:.3f}"
    return [str(figures.get("prompts", "")), percent(figures["ended"]), percent(figures["looped"]), repeated]


def tasks_lines(result: Mapping[str, Any]) -> list[str]:
    """A row for each task and metric: value ± standard error, by lm-evaluation-harness's names, and what was lost."""
    checked = msgspec.convert(result, TasksResult)
    served = f" (served as {checked.served_model})" if checked.served_model else ""
    title = (
        f"{result['model']}{served}: lm-evaluation-harness {result['lm_eval_version']}, transformers "
        f"{result['transformers_version']}"
    )
    columns = ["task", "metric", "value", "examples", "shots"]
    columns += ["original's", "points lost", "recovery"] if checked.compared else []
    lines = Table(title, columns, list(_metrics(checked)), align="ll").text()
    limit = result["config"].get("limit")
    if limit is not None:
        lines.append(f"note: --limit {limit:g}: only a part of each task, not to be compared with published figures.")
    return lines


def _metrics(result: TasksResult) -> Iterator[list[str]]:
    for each in result.figures():
        examples = str(result.samples.get(each.task, {}).get("effective", ""))
        shots = str(result.shots.get(each.task, ""))
        shown = f"{each.value:.4f}" + (f" ± {each.error:.4f}" if each.error is not None else "")
        row = [result.results[each.task].get("alias", each.task), each.metric, shown, examples, shots]
        if result.compared:
            row.append("" if each.original is None else f"{each.original:.4f}")
            row.append("" if each.points_lost is None else f"{each.points_lost:+.2f}")
            row.append("" if each.recovery is None else percent(each.recovery))
        yield row
