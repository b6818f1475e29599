"""Whether the programs that serve a model take a result, and numbers of experts that they take best. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from streamprune.errors import SettingsError
from streamprune.fit.engine_rules import GPUS, LLAMA_COUNTS, NAMES, RULES, VLLM_COUNTS, Rule, Served
from streamprune.hardware.memory import format_bytes
from streamprune.models.config_json import minimum_keep
from streamprune.quantize.schemes import SCHEMES
from streamprune.selection.widths import ALIGNED_BYTES
from streamprune.targets import ENGINES


@dataclass(frozen=True)
class Finding:
    """A rule that a result does not meet, and what that means, as a sentence without its full stop."""

    rule: Rule
    text: str


def findings(served: Served, engine: str | None = None) -> list[Finding]:
    """The rules of an engine (None: of all) that a result does not meet; those by which it is refused first."""
    unmet = [rule for rule in RULES if engine in (None, rule.engine) and not rule.takes(served)]
    return [
        Finding(rule, sentence(rule, served))
        for rule in sorted(unmet, key=lambda rule: (not rule.refuses, ENGINES.index(rule.engine)))
    ]


def sentence(rule: Rule, served: Served) -> str:
    """What not meeting a rule means for a result."""
    found = served.quantization
    stored = f"{found.method} ({found.values.get('format')})" if found.method == "compressed-tensors" else found.method
    dividing = [str(gpus) for gpus in GPUS if served.count % gpus == 0]
    return rule.says.format(
        name=NAMES[rule.engine],
        count=f"{served.count:,}",
        least=served.counts[0],
        groups=served.spec.groups,
        top_k=served.spec.top_k,
        width=served.width,
        hidden=served.hidden,
        aligned=ALIGNED_BYTES // served.itemsize,
        stored=stored,
        gpus=f"{' or '.join(dividing)}, not {GPUS[-1]}" if dividing else "not 2, 4 or 8",
        vllm_counts=", ".join(map(str, VLLM_COUNTS)),
        llama_counts=", ".join(map(str, LLAMA_COUNTS)),
    )


def refusal(served: Served, engine: str) -> str:
    """Why an engine cannot take a result at all, in sentences; empty if it can."""
    return " ".join(f"{each.text}." for each in _refusing(served, engine))


def _refusing(served: Served, engine: str) -> list[Finding]:
    return [each for each in findings(served, engine) if each.rule.refuses]


def check_served(served: Served, engine: str | None) -> None:
    """Raise SettingsError if the engine of --for (None: not given) cannot take the result at all."""
    refused = _refusing(served, engine) if engine is not None else []
    if engine is None or not refused:
        return
    good = good_count(served, engine) if any(each.rule.about == "count" for each in refused) else None
    instead = f" Keep {good} experts, or use --round-for {engine}." if good is not None else ""
    raise SettingsError(
        f"--for {engine}: {'. '.join(each.text for each in refused)}.{instead} (Read in {refused[0].rule.source} of "
        f"{NAMES[engine]}'s repository. Leave out --for to write it anyway.)"
    )


def good_count(served: Served, engine: str | None) -> int | None:
    """The most experts in every layer, not more than now, that an engine (None: any) takes best.

    A number that the model's router can work with; None if there is none.
    """
    spec = served.spec
    rules = [rule for rule in RULES if engine in (None, rule.engine) and rule.rounds]
    for count in range(served.count // spec.groups * spec.groups, minimum_keep(spec) - 1, -spec.groups):
        if all(rule.takes(served.with_count(count)) for rule in rules):
            return count
    return None


def rounded_count(served: Served, engine: str) -> int:
    """The number of experts in every layer, rounded down to one that an engine takes best; all experts stay all.

    Raises SettingsError if there is none.
    """
    if served.count == served.spec.count:
        return served.count
    good = good_count(served, engine)
    if good is None:
        raise SettingsError(
            f"--round-for {engine}: no number of experts from {minimum_keep(served.spec)}, which the router needs, to "
            f"{served.count} is good for {NAMES[engine]}. Omit it; --for {engine} says what it takes."
        )
    return good


def engine_notes(served: Served, engine: str | None, expert_bytes: float | None) -> Iterator[str]:
    """What an engine (None: any) does not take, or takes slowly, as notes; and a number of experts that is good.

    `expert_bytes` is the size of one expert in every layer; None if it is unknown. Without an engine, only what pruning
    changed is said, and what only costs speed in a few words.
    """
    found = findings(served, engine)
    if engine is None:
        found = [each for each in found if _is_of_pruning(each.rule, served)]
    slow = [each for each in found if engine is None and each.rule.about == "count" and not each.rule.refuses]
    yield from (each.text for each in found if each not in slow)
    rounding = [each.rule for each in found if each.rule.rounds]
    good = good_count(served, engine) if rounding else None
    if slow:
        names = ", ".join(dict.fromkeys(NAMES[each.rule.engine] for each in slow))
        yield f"{served.count} experts per layer run without the fastest kernels of {names} (--for ENGINE says why)"
    if good is not None:
        takers = "all engines" if engine is None else NAMES[engine]
        yield f"{good} experts are good for {takers}: {lost_text(served.count - good, expert_bytes)} (--round-for)"


def _is_of_pruning(rule: Rule, served: Served) -> bool:
    """Whether a rule is about what pruning changed. (What widths and unequal layers mean is said elsewhere.)"""
    if rule.rounds:
        return len(served.counts) == 1 and rule.takes(served.with_count(served.spec.count))
    return rule.about == "stored" and served.weights in SCHEMES


def rounded_text(engine: str, count: int, before: int, expert_bytes: float | None) -> str:
    """What rounding for an engine costs, as a note."""
    return (
        f"rounded for {NAMES[engine]}: {count} experts instead of {before}, {lost_text(before - count, expert_bytes)}"
    )


def lost_text(fewer: int, expert_bytes: float | None) -> str:
    """What so many experts fewer in every layer are: their number, and their bytes if known."""
    size = f", {format_bytes(round(fewer * expert_bytes))} in all" if expert_bytes is not None else ""
    return f"{fewer} fewer in every layer{size}"
