"""What the report adds to the model card: what was measured, what helps if the model loops, and the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from streamprune.report.facts import Facts
from streamprune.report.measured_tables import card_table, generation_table, tasks_table
from streamprune.report.style import Picture
from streamprune.report.tables import markdown, table_markdown

#: Its figures differ from run to run, and are of no use to whoever loads the model.
_NOT_ON_THE_CARD = ("course",)


def card_sections(facts: Facts, pictures: Sequence[Picture], folder: str) -> dict[str, str]:
    """The bodies of the card's sections in Markdown; `folder` is where the pictures lie, seen from the card."""
    return {
        "evaluation": "\n".join(_evaluation(facts)),
        "generation": "\n".join(_generation(facts)),
        "pictures": "\n".join(_pictures(pictures, folder)),
    }


def _evaluation(facts: Facts) -> Iterator[str]:
    if facts.text is None and not facts.tasks:
        return
    yield from ("## Evaluation", "")
    if facts.text is not None:
        text, told = facts.text, "; loss and KL divergence in nats per token, with intervals of 95 %:"
        against = f", against {markdown(text.original_words)}" if text.compared else ""
        yield f"On {text.text_words}{against}{told}"
        yield ""
        yield from table_markdown(card_table(facts.text))
        yield ""
    if facts.tasks:
        yield from ("Tasks, measured by lm-evaluation-harness:", "")
        yield from table_markdown(tasks_table(facts.tasks))


def _generation(facts: Facts) -> Iterator[str]:
    generation = facts.generation
    if generation is None:
        return
    yield from ("## Generation", "")
    if generation.loops:
        yield "**This model runs into loops.** Of the continuations that were tried:"
    elif generation.verdict == "unknown":
        yield "Continuations that were tried, too short to show loops:"
    else:
        yield "Continuations that were tried loop seldom or never, or no more than the original's:"
    yield ""
    yield from table_markdown(generation_table(generation))
    if generation.advice:
        yield from ("", "What helps:" if generation.loops else "Remarks:", "")
        yield from (f"- {markdown(sentence)}" for sentence in generation.advice)
    if generation.notes:
        yield ""
        yield from (markdown(sentence) for sentence in generation.notes)


def _pictures(pictures: Sequence[Picture], folder: str) -> Iterator[str]:
    shown = [each for each in pictures if each.name not in _NOT_ON_THE_CARD]
    if not shown:
        return
    yield from ("## Pictures", "", "`report.html` has them with all their numbers.", "")
    for each in shown:
        yield from (f"![{markdown(each.alt)}]({folder}/{each.name}.png)", "")
