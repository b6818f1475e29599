"""From continuations to statistics, a verdict and advice; and the definition of a loop. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import comb
from typing import TYPE_CHECKING, Any

from streamprune.reporting.evaluations import mode_name

if TYPE_CHECKING:
    from streamprune.evaluation.prompts import Prompt

#: The least tokens of a repetition that counts as a loop. Normal text has shorter ones: a rule of dashes, the columns
#: of a table, a row of zeros; and models repeat something a few times without getting stuck.
LEAST_TOKENS = 64
#: The least rounds of a loop: something that occurs twice, such as a refrain or a quoted question, may still end.
LEAST_ROUNDS = 3
#: The longest period, in tokens: a paragraph of about a hundred words.
LONGEST_PERIOD = 160
#: The n of "repeated 4-grams".
GRAM = 4

GREEDY, SAMPLED = "greedy", "sampled"
HEALTHY, LOOPS, UNKNOWN = "healthy", "loops", "unknown"
#: A model loops if more than this share of the continuations of some mode do: one in ten makes it unusable.
LOOP_SHARE = 0.1
#: And at least this many (or all, if there are fewer): a single one may be chance.
LEAST_LOOPS = 2
#: If the original was measured too, the model must also loop significantly more often: by the one-sided exact sign test
#: over the prompts on which only one of the two loops, with this p-value at most (four to none, or eight to two).
MOST_CHANCE = 1 / 16
#: Examples that are kept, and characters of each end of their texts.
MOST_EXAMPLES, EXAMPLE_CHARACTERS = 8, 240

#: How a mode's continuations were made: decoding, form of the prompt, thinking; and the names of these.
ModeKey = tuple[str, str, bool | None]
_MODE = ("decoding", "form", "thinking")
#: The statistics of one mode, as in `generation.json`.
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
        """Whether it was in a loop when it was cut off. One that ended with EOS has not looped."""
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
    """The shortest period p of the loop in which the tokens end; None if they do not end in a loop.

    They end in a loop of period p, of at most LONGEST_PERIOD tokens, if the last n = max(LEAST_TOKENS, LEAST_ROUNDS p)
    of them repeat with it: each of the last n - p equals the one p places before. The tokens must be equal, so that a
    numbered list, or code with similar lines, is not a loop. Fewer than n tokens are never a loop of period p.
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
        mode = {**dict(zip(_MODE, key, strict=True)), "prompts": len(mine), **_shares(mine)}
        mode["longest_ended"] = max((len(each.tokens) for each in mine if each.ended), default=None)
        if original is not None:
            theirs = [each for each in original if each.mode == key]
            mode["original"] = {**_shares(theirs), **_differences(mine, theirs)}
        mode["sources"] = []
        for name in dict.fromkeys(each.prompt.source for each in mine):
            part = [each for each in mine if each.prompt.source == name]
            mode["sources"].append({"name": name, "prompts": len(part), **_shares(part)})
        modes.append(mode)
    return modes


def _shares(made: Sequence[Continuation]) -> dict[str, Any]:
    repeated = [each.repeated for each in made if each.repeated is not None]
    return {
        "ended": sum(each.ended for each in made) / len(made),
        "looped": sum(each.looped for each in made) / len(made),
        "repeated_4grams": sum(repeated) / len(repeated) if repeated else None,
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


def verdict_of(modes: Sequence[Mode], longest: int) -> str:
    """`loops` or `healthy`, by `LOOP_SHARE` and `LEAST_LOOPS`; `unknown` if `longest` tokens are too few to tell."""
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
        f"{mode['original']['ended']:.0%} ({_name(mode)})."
        for mode in modes
        if mode["form"] == "chat"
        and "original" in mode
        and _is_more(mode["original"]["ended_only_there"], mode["original"]["ended_only_here"], mode["prompts"])
    ]


def advice_of(modes: Sequence[Mode], switch: str | None) -> list[str]:
    """Sentences about what helps, from the measurements; none for a healthy model.

    `switch` is the chat template's variable that turns thinking on and off.
    """
    bad = sorted((mode for mode in modes if mode_loops(mode)), key=lambda mode: -mode["looped"])
    if not bad:
        return []
    worst = bad[0]
    compared = "original" in worst
    original = f"; of the original's {_count(worst['original'], worst['prompts'])}" if compared else ""
    advice = [f"{_loops_words(worst)} loop{original}."]
    off, sampled = _better(bad, modes, "thinking", True, False), _better(bad, modes, "decoding", GREEDY, SAMPLED)
    if off is not None:
        advice.append(f"Switch thinking off, by {switch}=False for the chat template: {_loops_words(off)} loop then.")
    if sampled is not None:
        advice.append(
            "Sample instead of decoding greedily, with temperature 0.6 to 1.0 and top_p 0.95: "
            f"{_loops_words(sampled)} loop then."
        )
    longest = max((mode["longest_ended"] for mode in modes if mode["longest_ended"] is not None), default=None)
    ended = f"those that ended by themselves had at most {longest:,} tokens" if longest is not None else ""
    advice += [
        f"Set max_new_tokens, so that a loop ends some time: {ended or 'no continuation ended by itself'}.",
        "As a last resort, repetition_penalty=1.05 to 1.1; it also harms what has to repeat, such as code.",
        _calibration_advice(bad),
    ]
    return advice if compared else [*advice, "Use --against to see whether the unpruned model loops too."]


def _better(bad: Sequence[Mode], modes: Sequence[Mode], name: str, now: Any, instead: Any) -> Mode | None:
    """The first mode with `instead` for `name` of which fewer continuations loop than with `now`, all else equal."""
    for mode in bad:
        wanted = {key: mode[key] for key in _MODE} | {name: instead}
        other = next((each for each in modes if all(each[key] == value for key, value in wanted.items())), None)
        if mode[name] == now and other is not None and other["looped"] < mode["looped"]:
            return other
    return None


def _calibration_advice(bad: Sequence[Mode]) -> str:
    """Which text to calibrate on: the sources with the most loops."""
    loops, prompts = Counter[str](), Counter[str]()
    for source in (source for mode in bad for source in mode["sources"]):
        loops[source["name"]] += _count(source)
        prompts[source["name"]] += source["prompts"]
    shares = {name: loops[name] / prompts[name] for name in prompts}
    names = [name for name, share in shares.items() if share == max(shares.values())]
    text = "such text" if len(names) == len(shares) else f"more text like {', '.join(names)}, where most loop"
    return f"Prune it less, or calibrate on {text}."


def _count(figures: Mode, prompts: int | None = None) -> int:
    """How many continuations loop."""
    return round(float(figures["looped"]) * int(figures["prompts"] if prompts is None else prompts))


def _name(mode: Mode) -> str:
    return mode_name(mode["decoding"], mode["form"], mode["thinking"])


def _loops_words(mode: Mode) -> str:
    return f"{_count(mode)} of {mode['prompts']} continuations ({_name(mode)})"


def examples_of(made: Sequence[Continuation], tokenizer: Any) -> list[dict[str, Any]]:
    """A few continuations to look at, those that loop first, of as many modes and sources as possible.

    Without a tokenizer their texts are token ids.
    """
    first: dict[tuple[bool, ModeKey, str], Continuation] = {}
    for each in made:
        first.setdefault((each.looped, each.mode, each.prompt.source), each)
    chosen = sorted(first.values(), key=lambda each: not each.looped)[:MOST_EXAMPLES]
    return [
        {
            "source": each.prompt.source,
            **dict(zip(_MODE, each.mode, strict=True)),
            "prompt": _shortened(each.prompt.text),
            "continuation": _shortened(
                " ".join(map(str, each.tokens)) if tokenizer is None else str(tokenizer.decode(each.tokens))
            ),
            "looped": each.looped,
            "ended": each.ended,
        }
        for each in chosen
    ]


def _shortened(text: str) -> str:
    """Both ends of a long text."""
    most = EXAMPLE_CHARACTERS
    return text if len(text) <= 2 * most + 3 else f"{text[:most]} … {text[-most:]}"
