"""From continuations to figures, a verdict, advice and lines for the terminal; and what a loop is. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import comb
from typing import TYPE_CHECKING, Any

from streamprune.tables import Table

if TYPE_CHECKING:
    from streamprune.evaluation.prompts import Prompt

#: Tokens that a repetition must last to be called a loop. Text has shorter ones of its own: a rule of dashes, the
#: columns of a table, a row of zeros; and models repeat something a few times without getting stuck.
LEAST_TOKENS = 64
#: Rounds of a loop that must be seen: what occurs twice, such as a refrain or a quoted question, may still end.
LEAST_ROUNDS = 3
#: The longest period, in tokens: a paragraph of about a hundred words.
LONGEST_PERIOD = 160
#: The n of "repeated 4-grams".
GRAM = 4

GREEDY, SAMPLED = "greedy", "sampled"
HEALTHY, LOOPS, UNKNOWN = "healthy", "loops", "unknown"
#: A model loops if more than this share of the continuations of some mode do: one in ten spoils any use.
LOOP_SHARE = 0.1
#: And at least so many (or all, if there are fewer): a single one may be chance.
LEAST_LOOPS = 2
#: Where the original is known, the model must also be worse beyond chance. Of the prompts on which only one of the two
#: loops it has so many that a fair coin would give it as many or more at most once in 16 times: four to none, eight to
#: two. (The exact sign test, one-sided.)
MOST_CHANCE = 1 / 16
#: Examples that are kept, and characters of each end of their texts.
MOST_EXAMPLES, EXAMPLE_CHARACTERS = 8, 240

#: How a mode's continuations were made: decoding, form of the prompt, thinking.
ModeKey = tuple[str, str, bool | None]
#: The figures of one mode, as they stand in `generation.json`.
Mode = Mapping[str, Any]


@dataclass(frozen=True)
class Continuation:
    """A model's continuation of a prompt: its tokens without the one that ended it, if one did."""

    prompt: Prompt
    decoding: str
    tokens: tuple[int, ...] = field(repr=False)
    ended: bool

    @cached_property
    def looped(self) -> bool:
        """Whether it was in a loop when it was cut off. One that ended by itself has not looped."""
        return not self.ended and loop_period(self.tokens) is not None

    @cached_property
    def repeated(self) -> float | None:
        """The share of its 4-grams that repeat others; None for fewer than four tokens."""
        return repeated_grams(self.tokens)

    @property
    def mode(self) -> ModeKey:
        """How it was made."""
        return self.decoding, self.prompt.form, self.prompt.thinking


def loop_period(tokens: Sequence[int]) -> int | None:
    """The shortest period p of the loop in which the tokens end; None if they end in none.

    They end in a loop of period p, of at most LONGEST_PERIOD tokens, if the last n = max(LEAST_TOKENS, LEAST_ROUNDS p)
    of them repeat with it: each of the last n - p equals the one p places before. The tokens must be equal, so that a
    numbered list, or code with similar lines, is no loop. Fewer than n tokens never make a loop of period p.
    """
    length = len(tokens)
    for period in range(1, min(LONGEST_PERIOD, length // LEAST_ROUNDS) + 1):
        start = length - max(LEAST_TOKENS, LEAST_ROUNDS * period)
        if start >= 0 and tokens[start + period :] == tokens[start : length - period]:
            return period
    return None


def repeated_grams(tokens: Sequence[int], size: int = GRAM) -> float | None:
    """seq-rep-n of Welleck et al. 2019 (arXiv:1908.04319, section 5): 1 - distinct n-grams / all n-grams, 0 to 1.

    None for fewer than n tokens, which have no n-gram.
    """
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def modes_of(made: Sequence[Continuation], original: Sequence[Continuation] | None) -> list[dict[str, Any]]:
    """The figures of each decoding and form of prompt; `original` continued the same prompts, in the same order."""
    modes = []
    for key in dict.fromkeys(each.mode for each in made):
        mine = [each for each in made if each.mode == key]
        decoding, form, thinking = key
        mode = {"decoding": decoding, "form": form, "thinking": thinking, **_figures(mine)}
        mode["longest_ended"] = max((len(each.tokens) for each in mine if each.ended), default=None)
        if original is not None:
            theirs = [each for each in original if each.mode == key]
            mode["original"] = {**_shares(theirs), **_differences(mine, theirs)}
        mode["sources"] = [
            {"name": name, **_figures([each for each in mine if each.prompt.source == name])}
            for name in dict.fromkeys(each.prompt.source for each in mine)
        ]
        modes.append(mode)
    return modes


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


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None


def verdict_of(modes: Sequence[Mode], longest: int) -> str:
    """`loops` or `healthy`, by `LOOP_SHARE` and `LEAST_LOOPS`; `unknown` where `longest` tokens are too few to tell."""
    if any(mode_loops(mode) for mode in modes):
        return LOOPS
    return HEALTHY if longest >= LEAST_TOKENS else UNKNOWN


def mode_loops(mode: Mode) -> bool:
    """Whether too many continuations of a mode loop, and significantly more than the original's, if it is known."""
    prompts, loops = int(mode["prompts"]), _count(mode)
    if loops < min(LEAST_LOOPS, prompts) or loops <= LOOP_SHARE * prompts:
        return False
    original = mode.get("original")
    return original is None or _is_more(original["looped_only_here"], original["looped_only_there"], prompts)


def _is_more(these: int, those: int, prompts: int) -> bool:
    """Whether `these` are more than `those` beyond chance; fewer than four prompts must be all on one side."""
    if these == prompts:
        return True
    both = these + those
    return both > 0 and sum(comb(both, count) for count in range(these, both + 1)) <= MOST_CHANCE * 2**both


def endless_notes(modes: Sequence[Mode]) -> list[str]:
    """A note where significantly fewer chats end than with the original. (Plain text need not end.)"""
    return [
        f"Fewer chats end by themselves than with the original, loops or not: {mode['ended']:.0%} instead of "
        f"{mode['original']['ended']:.0%} ({_mode_name(mode)})."
        for mode in modes
        if mode["form"] == "chat"
        and "original" in mode
        and _is_more(mode["original"]["ended_only_there"], mode["original"]["ended_only_here"], mode["prompts"])
    ]


def advice_of(modes: Sequence[Mode], switch: str | None) -> list[str]:
    """Sentences about what helps, from what was measured; none for a healthy model.

    `switch` is the chat template's variable that turns thinking on and off.
    """
    bad = sorted((mode for mode in modes if mode_loops(mode)), key=lambda mode: -mode["looped"])
    if not bad:
        return []
    worst = bad[0]
    original = f"; of the original's {_count(worst['original'], worst['prompts'])}" if "original" in worst else ""
    advice = [f"{_loops_words(worst)} loop{original}."]
    for mode in bad:
        off = _similar(mode, modes, thinking=False)
        if mode["thinking"] is True and off is not None and off["looped"] < mode["looped"]:
            advice.append(
                f"Switch thinking off, by {switch}=False for the chat template: {_loops_words(off)} loop then."
            )
            break
    for mode in bad:
        sampled = _similar(mode, modes, decoding=SAMPLED)
        if mode["decoding"] == GREEDY and sampled is not None and sampled["looped"] < mode["looped"]:
            advice.append(
                "Sample instead of decoding greedily, with temperature 0.6 to 1.0 and top_p 0.95: "
                f"{_loops_words(sampled)} loop then."
            )
            break
    longest = max((mode["longest_ended"] for mode in modes if mode["longest_ended"] is not None), default=None)
    ends = (
        "no continuation ended by itself."
        if longest is None
        else f"those that ended by themselves had at most {longest:,} tokens."
    )
    advice += [
        f"Set max_new_tokens, so that a loop ends some time: {ends}",
        "As a last resort, repetition_penalty=1.05 to 1.1; it also harms what has to repeat, such as code.",
        _calibration_advice(bad),
    ]
    if "original" not in worst:
        advice.append("Whether the unpruned model does so too shows with --against.")
    return advice


def _calibration_advice(bad: Sequence[Mode]) -> str:
    """Which text to calibrate on: that of which most loops."""
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


def _count(figures: Mode, prompts: int | None = None) -> int:
    """How many continuations loop."""
    return round(float(figures["looped"]) * int(figures["prompts"] if prompts is None else prompts))


def _loops_words(mode: Mode) -> str:
    return f"{_count(mode)} of {mode['prompts']} continuations ({_mode_name(mode)})"


def _similar(mode: Mode, modes: Sequence[Mode], **other: Any) -> Mode | None:
    """The mode that differs from this one only in `other`; None if there is none."""
    wanted = {key: mode[key] for key in ("decoding", "form", "thinking")} | other
    return next((each for each in modes if all(each[key] == value for key, value in wanted.items())), None)


def _mode_name(mode: Mode) -> str:
    """A mode in words: "greedy, chat, thinking on"."""
    thinking = {None: "", True: ", thinking on", False: ", thinking off"}[mode["thinking"]]
    return f"{mode['decoding']}, {mode['form']}{thinking}"


def examples_of(made: Sequence[Continuation], decode: Callable[[Sequence[int]], str]) -> list[dict[str, Any]]:
    """A few continuations to look at, those that loop first, of as many modes and sources as possible."""
    first: dict[tuple[bool, ModeKey, str], Continuation] = {}
    for each in made:
        first.setdefault((each.looped, each.mode, each.prompt.source), each)
    chosen = sorted(first.values(), key=lambda each: not each.looped)
    return [
        {
            "source": each.prompt.source,
            "decoding": each.decoding,
            "form": each.prompt.form,
            "thinking": each.prompt.thinking,
            "prompt": _shortened(each.prompt.text),
            "continuation": _shortened(decode(each.tokens)),
            "looped": each.looped,
            "ended": each.ended,
        }
        for each in chosen[:MOST_EXAMPLES]
    ]


def _shortened(text: str) -> str:
    """Both ends of a long text."""
    most = EXAMPLE_CHARACTERS
    return text if len(text) <= 2 * most + 3 else f"{text[:most]} … {text[-most:]}"


def generation_lines(result: Mapping[str, Any]) -> list[str]:
    """A `generation.json` for the terminal: a row for each mode, its sources where any loop; verdict, advice, notes."""
    original = any("original" in mode for mode in result["modes"])
    rows = []
    for mode in result["modes"]:
        rows.append([_mode_name(mode), *_cells(mode), *(_cells(mode["original"])[1:] if "original" in mode else ())])
        if mode["looped"] and len(mode["sources"]) > 1:
            rows += [[f"  {source['name']}", *_cells(source)] for source in mode["sources"]]
    title = (
        f"Generation health of {result['model']}, up to {result['settings']['max_new_tokens']:,} new tokens (ended: by "
        "itself, before that)"
    )
    shares = ["ended", "looped", "repeated 4-grams"]
    columns = ["", "prompts", *shares, *(["original: ended", *shares[1:]] if original else ())]
    as_before = original and any(mode["looped"] for mode in result["modes"])
    healthy = "It does not loop significantly more than the original." if as_before else "Few loops, or none."
    verdict = {LOOPS: "It loops.", HEALTHY: healthy, UNKNOWN: "Too short to show loops."}[result["verdict"]]
    lines = Table(title, columns, rows).text()
    lines += [verdict, *(f"- {sentence}" for sentence in result["advice"])]
    return lines + [f"note: {note}" for note in result["notes"]]


def _cells(figures: Mapping[str, Any]) -> list[str]:
    repeated = figures["repeated_4grams"]
    shares = [f"{figures['ended']:.1%}", f"{figures['looped']:.1%}", "-" if repeated is None else f"{repeated:.3f}"]
    return [str(figures.get("prompts", "")), *shares]
