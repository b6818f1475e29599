"""What the model card tells of the choice: the experts of each block, the calibration, what is kept, the scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamprune.choice.retention import Retention
from streamprune.output.plan import PrunePlan
from streamprune.result.markdown import code, plain, table, words

#: What a recipe may say of where a source is from, in the order in which it is told.
_PLACES = ("dataset", "subset", "split", "commit", "data_files", "data_dir", "path", "builtin")


def experts_lines(plan: PrunePlan) -> Iterator[str]:
    """How many experts each block keeps, equal neighbours taken together."""
    spec, counts, layout = plan.layout.spec, plan.counts, plan.layout
    yield from ("## Experts per block", "")
    dense = layout.block_count - len(counts)
    others = f" The other {dense} blocks have no experts to choose from." if dense else ""
    if len(set(counts.values())) == 1:
        which = "Every block" if not dense else f"Each of the blocks {_ranges(sorted(counts))}"
        yield f"{which} keeps {next(iter(counts.values()))} of {spec.count} experts.{others}"
        yield ""
        return
    yield f"Blocks, counted from 0, keep different numbers of their {spec.count} experts.{others}"
    yield ""
    rows = []
    for count, group in itertools.groupby(sorted(counts), key=lambda block: counts[block]):
        rows.append((_ranges(list(group)), str(count), f"{count / spec.count:.0%}"))
    yield from table(("blocks", "experts", "of the source's"), rows)


def calibration_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The text that the experts were scored on: by source its origin, its size and its share."""
    calibration, mix = report["calibration"], report["settings"]["mix"]
    if calibration is None:
        return
    recipe = _mapping(calibration.get("recipe"))
    yield from ("## Calibration", "")
    named = f" Recipe {code(recipe['name'])}: {_sentence(recipe)}" if isinstance(recipe.get("name"), str) else ""
    yield f"{calibration['sequences']:,} sequences, {calibration['tokens']:,} tokens.{named}{_form(recipe)}"
    yield ""
    made = {
        each.get("name"): each for each in recipe.get("sources", []) if isinstance(each, dict)
    } if isinstance(recipe.get("sources"), list) else {}  # fmt: skip
    rows = []
    for source in calibration["sources"]:
        facts = _mapping(made.get(source["name"]))
        share = source["tokens"] / calibration["tokens"] if calibration["tokens"] else 0.0
        sizes = [_number(facts.get("records")), _number(facts.get("sequences")), _number(source["tokens"])]
        rows.append((code(source["name"]), _place(facts), *sizes, f"{share:.1%}"))
    yield from table(("source", "from", "records", "sequences", "tokens", "share"), rows)
    if mix:
        shares = ", ".join(f"{code(name)} {share:.1%}" for name, share in mix.items())
        yield from (f"For the choice the sources were weighed anew, by tokens: {shares}.", "")
    yield (
        "What the calibration text does not contain, the model may have lost: compare it with the source on your own "
        "tasks before you rely on it."
    )
    unseen = [layer for layer in report["layers"] if not all(layer["counts"])]
    if unseen:
        yield ""
        yield f"In {len(unseen)} blocks the calibration text never used some experts; they count as the least useful."
    yield ""


def retention_lines(retained: Sequence[Retention]) -> Iterator[str]:
    """What the choice keeps of each source's saliency."""
    if not retained:
        return
    yield from ("## Domain retention", "")
    yield (
        "The share of its saliency (the sum of router weight times output norm over a source's own tokens, all blocks "
        "together) that each source keeps, and the most that as many experts chosen for it alone would keep. It tells "
        "what the choice favours; it is no measurement of the pruned model."
    )
    yield ""
    rows = [
        (code(each.source), f"{each.kept:.1%}", f"{each.best:.1%}", f"{each.worst:.1%} (block {each.worst_block})")
        for each in retained
    ]
    yield from table(("source", "kept", "at best", "least in a block"), rows)


def scores_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """What the files beside the weights hold, and what can be done with them."""
    yield from ("## Scores", "")
    text = "`streamprune.json` lists, for each block, the experts kept (by their number in the source)"
    if report["calibration"] is None:
        yield from (f"{text}. They were chosen by hand, without scores.", "")
        return
    yield (
        f"{text}, and the score and token count of every expert. `scores/` holds what all scores are computed from, "
        "apart for each source of the calibration. With it, other sizes, mixes, methods and schedules take the time of "
        "a file copy and no GPU: look at them with `streamprune inspect`, and write them from the source model with "
        "`streamprune prune SOURCE --scores THIS_MODEL`."
    )
    yield ""


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, those that follow one another as a range: 0, 3–7."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(parts)


def _sentence(recipe: Mapping[str, Any]) -> str:
    text = plain(recipe.get("description") or "").rstrip(".")
    return f"{words(text)}." if text else "without a description."


def _form(recipe: Mapping[str, Any]) -> str:
    mode, length = recipe.get("mode"), recipe.get("sequence_length")
    forms = {
        "packed": "Documents laid end to end and divided into sequences of",
        "documents": "Each document a sequence of its own, cut at",
        "bucketed": "Each document a sequence of its own, its length rounded down, cut at",
    }
    form = forms.get(mode) if isinstance(mode, str) else None
    return f" {form} {length:,} tokens." if form and type(length) is int else ""


def _place(facts: Mapping[str, Any]) -> str:
    told = []
    for key in _PLACES:
        value = facts.get(key)
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if isinstance(value, str) and value:
            told.append(code(value) if key in ("dataset", "path") else f"{key} {code(value)}")
    return ", ".join(told) or "–"


def _number(value: Any) -> str:
    return f"{value:,}" if type(value) is int else "–"


def _mapping(value: Any) -> Mapping[str, Any]:
    """What a stranger's scores tell, if it is of that kind."""
    return value if isinstance(value, dict) else {}
