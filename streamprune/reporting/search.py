"""The result of a search: which candidates are on the Pareto front, its table, its chart and its page.

`search.json` has, next to the head of an evaluation (`reporting.evaluations`), the budget and `candidates`, best first.
Each has its settings, `weights_bytes`, `total_bytes` (memory for the planned use), `max_context` (tokens that fit the
budget), `bytes_per_token`, and the figures of an evaluation, `sources` and `all`; or `given_up` instead of these, if it
was hopeless. `on_front`: no other candidate takes as little memory and loses as little.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamprune import __version__
from streamprune.files.durable import write_atomically, writing
from streamprune.hardware.memory import GIB, format_bytes
from streamprune.output.search_folder import SEARCH_NAME
from streamprune.reporting import charts
from streamprune.reporting.templates import render
from streamprune.tables import Table, count, plain

#: The page with table and chart, in the folder of a search.
PAGE_NAME = "report.html"
#: What the speed column is.
SPEED = (
    "read per token: bytes of weights that generating one token reads; with one sequence at a time, tokens per second "
    "are about the GPU's memory bandwidth divided by it"
)
UNIFORM = "All layers keep equally many experts: schedules that give layers different numbers are not searched."


def marked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`candidates`, sorted by their damage, with `on_front`, and the name of the `best`."""
    measured = sorted((row for row in rows if "all" in row), key=_damage)
    given_up = sorted((row for row in rows if "all" not in row), key=lambda row: row["given_up"]["kl"])
    front, least = set(), float("inf")
    for row in measured:
        # Each of those before it loses less, or as little with less memory.
        if row["total_bytes"] < least:
            front.add(row["name"])
            least = row["total_bytes"]
    listed = [{**row, "on_front": row["name"] in front} for row in (*measured, *given_up)]
    return {"best": measured[0]["name"], "candidates": listed}


def _damage(row: Mapping[str, Any]) -> tuple[float, int]:
    return row["all"]["kl"], row["total_bytes"]


def search_lines(result: Mapping[str, Any]) -> list[str]:
    """The tables for a terminal, and what the best candidate is made with."""
    lines = [line for table in search_tables(result) for line in table.text()]
    best = _best(result)
    return [*lines, f"best: {best['name']} ({best['options']}), KL divergence {best['all']['kl']:.4f} nats per token"]


def search_tables(result: Mapping[str, Any]) -> list[Table]:
    """All candidates; then their damage by source, if there are several."""
    candidates = result["candidates"]
    use = result["use"]
    sequences = "" if use["batch"] == 1 else f"{use['batch']} sequences of "
    title = (
        f"Candidates for {format_bytes(result['budget_bytes'])} with {sequences}{use['context']:,} tokens, by KL "
        "divergence from the original on held-out text (nats per token, 95 % interval)"
    )
    columns = ["candidate", "KL", "interval", "weights", "memory", "longest context", "read per token", "front"]
    notes = ["front: no other takes as little memory and loses as little", SPEED, UNIFORM]
    tables = [Table(title, columns, [_row(each) for each in candidates], notes)]
    measured = [each for each in candidates if "all" in each]
    names = [source["name"] for source in measured[0]["sources"]]
    if len(names) > 1:
        rows = [[each["name"], *(f"{source['kl']:.4f}" for source in each["sources"])] for each in measured]
        tables.append(Table("KL divergence by source", ["candidate", *map(plain, names)], rows))
    return tables


def _row(each: Mapping[str, Any]) -> list[str]:
    sizes = [
        format_bytes(each["weights_bytes"]), format_bytes(each["total_bytes"]), count(each["max_context"]),
        format_bytes(each["bytes_per_token"]),
    ]  # fmt: skip
    if "all" not in each:
        gone = each["given_up"]
        return [each["name"], "–", f"given up after layer {gone['layer']}", *sizes, ""]
    span = each["all"]["kl_interval"]
    shown = f"{span[0]:.4f} to {span[1]:.4f}" if span is not None else "–"
    return [each["name"], f"{each['all']['kl']:.4f}", shown, *sizes, "*" if each["on_front"] else ""]


def _best(result: Mapping[str, Any]) -> Mapping[str, Any]:
    best: Mapping[str, Any] = next(each for each in result["candidates"] if each["name"] == result["best"])
    return best


def draw_search(result: Mapping[str, Any]) -> charts.Drawing:
    """Damage over memory, with intervals, and the Pareto front as a line."""
    measured = [each for each in result["candidates"] if "all" in each]
    figure, axes = charts.new_figure(4.2)
    kinds = sorted({(each["weights"], each["refit"]) for each in measured})
    for number, (weights, refit) in enumerate(kinds):
        colour, _, marker = charts.LINES[number % len(charts.LINES)]
        rows = [each for each in measured if (each["weights"], each["refit"]) == (weights, refit)]
        label = f"weights {weights}{', refitted' if refit else ''}"
        for row in rows:
            x, (low, high) = row["total_bytes"] / GIB, row["all"]["kl_interval"] or [row["all"]["kl"]] * 2
            axes.plot([x, x], [low, high], color=colour, linewidth=1.0)
            text = f"{row['keep']} x {row['width'] or result['width'] or 'full'}"
            axes.annotate(text, (x, row["all"]["kl"]), (4, 3), textcoords="offset points", fontsize=7)
        axes.plot(
            [row["total_bytes"] / GIB for row in rows], [row["all"]["kl"] for row in rows], marker, color=colour,
            label=label,
        )  # fmt: skip
    front = sorted((each["total_bytes"] / GIB, each["all"]["kl"]) for each in measured if each["on_front"])
    axes.plot(*zip(*front, strict=True), color=charts.GREY, linestyle=":", linewidth=1.2, label="Pareto front")
    axes.set(xlabel="memory, GiB", ylabel="KL divergence, nats per token")
    if all(each["all"]["kl"] > 0 for each in measured):
        axes.set_yscale("log")
    charts.legend(figure, 3)
    best = _best(result)
    return figure, (
        f"{len(measured)} candidates by memory and KL divergence; the best, {best['name']}, loses "
        f"{best['all']['kl']:.4f} nats per token."
    )


def write_search_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `search.json` and the page in a folder. Raises OutputError, ResourceError."""
    picture = charts.draw_picture("search", lambda: draw_search(result))
    page = render(
        "search.html.j2", result=result, best=_best(result), tables=search_tables(result), picture=picture,
        version=__version__,
    )  # fmt: skip
    with writing(f"Writing the result to {folder}", folder):
        for name, text in _files(result, page):
            write_atomically(folder / name, text.encode())


def _files(result: Mapping[str, Any], page: str) -> Iterator[tuple[str, str]]:
    yield SEARCH_NAME, json.dumps(result, indent=2) + "\n"
    yield PAGE_NAME, page
