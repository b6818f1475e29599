"""Results of tasks for the terminal. No torch, and no lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_STDERR = "_stderr"


def tasks_lines(result: Mapping[str, Any]) -> list[str]:
    """A line for each task and metric of what `run_tasks` gave: value ± standard error, as the harness names them."""
    rows = [("task", "metric", "value", "examples", "shots"), *_rows(result)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    versions = result["lm_eval_version"], result["transformers_version"]
    lines = [f"{result['model']}: lm-evaluation-harness {versions[0]}, transformers {versions[1]}"]
    for task, metric, value, examples, shots in rows:
        cells = (task.ljust(widths[0]), metric.ljust(widths[1]), value.rjust(widths[2]))
        lines.append("  " + "  ".join((*cells, examples.rjust(widths[3]), shots.rjust(widths[4]))))
    limit = result["config"].get("limit")
    if limit is not None:
        lines.append(f"note: --limit {limit:g}: only a part of each task, not to be compared with published figures.")
    return lines


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    for name, figures in result["results"].items():
        examples = str(result.get("n-samples", {}).get(name, {}).get("effective", ""))
        shots = str(result.get("n-shot", {}).get(name, ""))
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            # Numbers that are no metric, such as the sample count, have no filter behind their names.
            if not kind or metric.endswith(_STDERR) or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{metric}{_STDERR},{kind}")
            told = f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, (int, float)) else "")
            yield figures.get("alias", name), metric if kind == "none" else f"{metric} ({kind})", told, examples, shots
