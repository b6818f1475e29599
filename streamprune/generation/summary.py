"""From continuations to figures, a verdict and advice. No torch.

Generation health for the terminal. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import comb
from typing import TYPE_CHECKING, Any

from streamprune.generation.decoding import LEAST_TOKENS

if TYPE_CHECKING:
    from streamprune.generation.decoding import Continuation


HEALTHY, LOOPS, UNKNOWN = "healthy", "loops", "unknown"
#: A model loops if more than this share of the continuations of some mode do: one in ten spoils any use.
LOOP_SHARE = 0.1
#: And at least so many (or all, if there are fewer): one alone may be chance.
LEAST_LOOPS = 2
#: Where the original is known, the model must also be worse beyond chance. Of the prompts on which only one of the two
#: loops it has so many that a fair coin would give it as many or more at most once in 16 times: four to none, eight to
#: two. (The exact sign test, one-sided.)
MOST_CHANCE = 1 / 16
#: Examples that are kept, and characters of each end of their texts.
MOST_EXAMPLES, EXAMPLE_CHARACTERS = 8, 240

Key = tuple[str, str, bool | None]
Mode = Mapping[str, Any]


def modes_of(made: Sequence[Continuation], original: Sequence[Continuation] | None) -> list[dict[str, Any]]:
    """The figures of every way of decoding and of putting the prompt; `original` has the same prompts in order."""
    modes = []
    for key in dict.fromkeys(_key(each) for each in made):
        mine = [each for each in made if _key(each) == key]
        theirs = None if original is None else [each for each in original if _key(each) == key]
        decoding, form, thinking = key
        mode = {"decoding": decoding, "form": form, "thinking": thinking, **_figures(mine)}
        mode["longest_ended"] = max((len(each.tokens) for each in mine if each.ended), default=None)
        if theirs is not None:
            mode["original"] = {**_shares(theirs), **_differences(mine, theirs)}
        mode["sources"] = [
            {"name": name, **_figures([each for each in mine if each.prompt.source == name])}
            for name in dict.fromkeys(each.prompt.source for each in mine)
        ]
        modes.append(mode)
    return modes


def verdict_of(modes: Sequence[Mode], longest: int) -> str:
    """`loops` or `healthy`, by `LOOP_SHARE` and `LEAST_LOOPS`; `unknown` where `longest` tokens show no loop at all."""
    if any(mode_loops(mode) for mode in modes):
        return LOOPS
    return HEALTHY if longest >= LEAST_TOKENS else UNKNOWN


def mode_loops(mode: Mode) -> bool:
    """Whether more continuations of a mode loop than may be, and clearly more than the original's, if it is known."""
    prompts, loops = int(mode["prompts"]), _count(mode)
    if loops < min(LEAST_LOOPS, prompts) or loops <= LOOP_SHARE * prompts:
        return False
    if "original" not in mode:
        return True
    return _clearly_more(mode["original"]["looped_only_here"], mode["original"]["looped_only_there"], prompts)


def endless_notes(modes: Sequence[Mode]) -> list[str]:
    """A remark where clearly fewer chats find an end than with the original. (Text to go on with need not end.)"""
    return [
        f"Fewer chats end by themselves than with the original, loops or not: {mode['ended']:.0%} instead of "
        f"{mode['original']['ended']:.0%} ({manner(mode)})."
        for mode in modes
        if mode["form"] == "chat"
        and "original" in mode
        and _clearly_more(mode["original"]["ended_only_there"], mode["original"]["ended_only_here"], mode["prompts"])
    ]


def advice_of(modes: Sequence[Mode], switch: str | None) -> list[str]:
    """Sentences about what helps, from what was measured; none for a healthy model.

    `switch` is the name that the chat template has for thinking.
    """
    bad = sorted((mode for mode in modes if mode_loops(mode)), key=lambda mode: -mode["looped"])
    if not bad:
        return []
    worst = bad[0]
    original = f"; of the original's {_count(worst['original'], worst['prompts'])}" if "original" in worst else ""
    said = [
        f"{_told(worst)} loop{original}.",
        *_thinking_advice(bad, modes, switch),
        *_sampling_advice(bad, modes),
        *_length_advice(modes),
    ]
    said.append("As a last resort, repetition_penalty=1.05 to 1.1; it also harms what has to repeat, such as code.")
    said.append(_keep_advice(bad))
    if "original" not in worst:
        said.append("Whether the unpruned model does so too shows with --against.")
    return said


def examples_of(made: Sequence[Continuation], decode: Callable[[Sequence[int]], str]) -> list[dict[str, Any]]:
    """A few continuations to look at, those that loop first, of as many modes and sources as possible."""
    first: dict[tuple[bool, Key, str], Continuation] = {}
    for each in made:
        first.setdefault((each.looped, _key(each), each.prompt.source), each)
    chosen = sorted(first.values(), key=lambda each: not each.looped)
    kept = [each for each in chosen if each.looped][:MOST_EXAMPLES] + [each for each in chosen if not each.looped]
    return [
        {
            "source": each.prompt.source,
            "decoding": each.decoding,
            "form": each.prompt.form,
            "thinking": each.prompt.thinking,
            "prompt": shortened(each.prompt.text),
            "continuation": shortened(decode(each.tokens)),
            "looped": each.looped,
            "ended": each.ended,
        }
        for each in kept[:MOST_EXAMPLES]
    ]


def shortened(text: str) -> str:
    """Both ends of a text."""
    most = EXAMPLE_CHARACTERS
    return text if len(text) <= 2 * most + 3 else f"{text[:most]} … {text[-most:]}"


def manner(mode: Mode) -> str:
    """A mode in words: "greedy, chat, thinking on"."""
    thinking = {None: "", True: ", thinking on", False: ", thinking off"}[mode["thinking"]]
    return f"{mode['decoding']}, {mode['form']}{thinking}"


def _key(each: Continuation) -> Key:
    return each.decoding, each.prompt.form, each.prompt.thinking


def _figures(made: Sequence[Continuation]) -> dict[str, Any]:
    return {"prompts": len(made), **_shares(made)}


def _shares(made: Sequence[Continuation]) -> dict[str, Any]:
    return {
        "ended": _mean(float(each.ended) for each in made),
        "looped": _mean(float(each.looped) for each in made),
        "repeated_4grams": _mean(each.repeated for each in made if each.repeated is not None),
    }


def _differences(mine: Sequence[Continuation], theirs: Sequence[Continuation]) -> dict[str, int]:
    """On how many prompts only this model, or only the original, loops or ends."""
    pairs = list(zip(mine, theirs, strict=True))
    return {
        "looped_only_here": sum(here.looped and not there.looped for here, there in pairs),
        "looped_only_there": sum(there.looped and not here.looped for here, there in pairs),
        "ended_only_here": sum(here.ended and not there.ended for here, there in pairs),
        "ended_only_there": sum(there.ended and not here.ended for here, there in pairs),
    }


def _clearly_more(these: int, those: int, prompts: int) -> bool:
    """Whether `these` are more than `those` beyond chance; fewer than four prompts must be all on one side."""
    if these == prompts:
        return True
    both = these + those
    return both > 0 and sum(comb(both, count) for count in range(these, both + 1)) <= MOST_CHANCE * 2**both


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None


def _count(figures: Mode, prompts: int | None = None) -> int:
    return round(float(figures["looped"]) * int(figures["prompts"] if prompts is None else prompts))


def _told(mode: Mode) -> str:
    return f"{_count(mode)} of {mode['prompts']} continuations ({manner(mode)})"


def _thinking_advice(bad: Sequence[Mode], modes: Sequence[Mode], switch: str | None) -> list[str]:
    for mode in bad:
        off = _like(mode, modes, thinking=False)
        if mode["thinking"] is True and off is not None and off["looped"] < mode["looped"]:
            return [f"Switch thinking off, by {switch}=False for the chat template: {_told(off)} loop then."]
    return []


def _sampling_advice(bad: Sequence[Mode], modes: Sequence[Mode]) -> list[str]:
    for mode in bad:
        sampled = _like(mode, modes, decoding="sampled")
        if mode["decoding"] == "greedy" and sampled is not None and sampled["looped"] < mode["looped"]:
            return [
                "Sample instead of decoding greedily, with temperature 0.6 to 1.0 and top_p 0.95: "
                f"{_told(sampled)} loop then."
            ]
    return []


def _like(mode: Mode, modes: Sequence[Mode], **other: Any) -> Mode | None:
    """The mode that is as this one but for what is said of it."""
    wanted = {key: mode[key] for key in ("decoding", "form", "thinking")} | other
    return next((each for each in modes if all(each[key] == value for key, value in wanted.items())), None)


def _length_advice(modes: Sequence[Mode]) -> list[str]:
    longest = max((mode["longest_ended"] for mode in modes if mode["longest_ended"] is not None), default=None)
    if longest is None:
        return ["Set max_new_tokens, so that a loop ends some time: no continuation ended by itself."]
    return [
        f"Set max_new_tokens, so that a loop ends some time: those that ended by themselves had at most {longest:,} "
        "tokens."
    ]


def _keep_advice(bad: Sequence[Mode]) -> str:
    """Which text to calibrate on, by how much of it loops."""
    counts: dict[str, list[int]] = {}
    for mode in bad:
        for source in mode["sources"]:
            pair = counts.setdefault(source["name"], [0, 0])
            pair[0] += _count(source)
            pair[1] += source["prompts"]
    shares = {name: loops / prompts for name, (loops, prompts) in counts.items()}
    most = max(shares.values())
    names = [name for name, share in shares.items() if share == most]
    text = "such text" if len(names) == len(shares) else f"more text like {', '.join(names)}, where most loop"
    return f"Prune it less, or calibrate on {text}."


def generation_lines(result: Mapping[str, Any]) -> list[str]:
    """The table of a `generation.json`: a row for each mode, below it its sources where any loop; verdict, advice."""
    known = any("original" in mode for mode in result["modes"])
    rows = [["", "prompts", "ended", "looped", "repeated 4-grams"]]
    if known:
        rows[0] += ["original: ended", "looped", "repeated 4-grams"]
    for mode in result["modes"]:
        rows.append([manner(mode), *_cells(mode), *(_shares_lines(mode["original"]) if "original" in mode else ())])
        if mode["looped"] and len(mode["sources"]) > 1:
            rows += [[f"  {source['name']}", *_cells(source)] for source in mode["sources"]]
    longest = result["settings"]["max_new_tokens"]
    title = f"Generation health of {result['model']}, up to {longest:,} new tokens (ended: by itself, before that)"
    as_before = known and any(mode["looped"] for mode in result["modes"])
    healthy = "It does not loop clearly more than the original." if as_before else "Few loops, or none."
    verdict = {LOOPS: "It loops.", HEALTHY: healthy, UNKNOWN: "Too short to show loops."}[result["verdict"]]
    notes = [f"note: {note}" for note in result["notes"]]
    return [title, *_table(rows), verdict, *(f"- {sentence}" for sentence in result["advice"]), *notes]


def _cells(figures: Mapping[str, Any]) -> list[str]:
    return [str(figures["prompts"]), *_shares_lines(figures)]


def _shares_lines(figures: Mapping[str, Any]) -> list[str]:
    repeated = figures["repeated_4grams"]
    return [f"{figures['ended']:.1%}", f"{figures['looped']:.1%}", "-" if repeated is None else f"{repeated:.3f}"]


def _table(rows: list[list[str]]) -> list[str]:
    count = max(map(len, rows))
    full = [[*row, *[""] * (count - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in full) for column in range(count)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip() for row in full
    ]
