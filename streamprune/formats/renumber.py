"""Experts that the JSON beside quantized weights names, renumbered for an output. No torch.

Lists of modules that are not quantized, settings by module and the like may name single experts:

    "modules_to_not_convert": ["lm_head", "model.layers.3.mlp.experts.7.down_proj"]

In the name of a module, an expert's number changes as in the names of its tensors, and the entry leaves with its
expert. A pattern stands for several modules, so that nothing in it can change: one that takes all experts of a layer
alike stays right, and any other is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property
from typing import Any

from streamprune.errors import UnsupportedModelError
from streamprune.files.json_text import MOST_LEVELS, show

#: Files beside a config.json that repeat its quantization section, or extend it.
BESIDE = ("quantize_config.json", "quantization_config.json", "quant_config.json", "hf_quant_config.json")

#: What the engines put before the list of layers, or leave out.
_WRAPPERS = frozenset({"model", "language_model", "text_model", "decoder", "module", "llm", "thinker"})
#: What patterns begin with in compressed-tensors ("re:"), and in GPTQ's `dynamic`.
_PATTERN_MARKS = ("re:", "+:", "-:")
_PATTERN_SIGNS = frozenset("*+?^$()[]{}|\\")
_DOTTED = re.compile(r"[\w.-]+")
#: Letters that are no escape such as \d: values without any ("[0.5, 2]") are no patterns of names.
_LETTER = re.compile(r"(?<!\\)[A-Za-z]")
#: An expert's number in a name, or several ("0-63"). `shared_experts.0` is none.
_NUMBER = re.compile(r"(?<!\w)experts[.-]\d")
#: The same in a pattern, where the dot may be escaped, and alternatives or a class may begin.
_LITERAL = re.compile(r"(?<!_)experts(\\?[.]|\[\\?[.]\])[(?:|^\[]*\d")
_MOST_DIGITS = 9
#: Keys of lists of modules that are not quantized.
_PLAIN_LISTS = frozenset({"ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules"})


@dataclass(frozen=True)
class ExpertNames:
    """How a checkpoint names the modules of its routed experts.

    `count` is how many every layer has. `lists` are the paths of the layers (`model.layers`). `projections` are, for
    each layer with experts, what is before and behind an expert's number in the name of each module, such as
    `("model.layers.3.mlp.experts", "up_proj")`; none where a layer's experts are in one tensor. `mtp` are the same of
    layers for multi-token prediction, whose experts are counted to the layer `mtp_layer`. `others` are
    the names, up to their number, of experts that are not pruned.
    """

    count: int
    lists: frozenset[str]
    projections: Mapping[int, Sequence[tuple[str, str]]] = field(repr=False)
    others: frozenset[str] = field(default=frozenset(), repr=False)
    mtp: Sequence[tuple[str, str]] = field(default=(), repr=False)
    mtp_layer: int = 0

    def layer_and_place(self, segments: Sequence[str]) -> tuple[int, int] | None:
        """The layer of the expert that a dotted name contains, and the place of its number among the segments."""
        numbers = [place for place, segment in enumerate(segments) if _is_number(segment)]
        for place in numbers:
            if _essence(segments[:place]) in self._mtp:
                return self.mtp_layer, place
        for place in numbers:
            for at in numbers:
                if at < place - 1 and _essence(segments[:at]) in self._lists:
                    inner = tuple(segments[at + 1 : place])
                    if inner[-1] == "experts" or inner in self._inner:
                        return int(segments[at]), place
        return None

    def is_other(self, segments: Sequence[str]) -> bool:
        """Whether a dotted name is of an expert that is not pruned."""
        beginnings = (".".join(segments[: place + 1]) for place, each in enumerate(segments) if _is_number(each))
        return bool({"mtp", "nextn"} & set(segments)) or any(each in self.others for each in beginnings)

    def modules(self) -> Iterator[tuple[int, list[str]]]:
        """For each layer and projection the names of all experts' modules, as the checkpoint and as engines have them.

        (Those of a multimodal model's text part are `model.layers...` for an engine that builds this part alone.)
        """
        for layer, projections in self.projections.items():
            for before, behind in projections:
                path, _, inner = before.partition(f".{layer}.")
                short = ".".join(("model", *_essence(path.split("."))))
                for beginning in dict.fromkeys((path, short)):
                    names = (f"{beginning}.{layer}.{inner}.{expert}.{behind}" for expert in range(self.count))
                    yield layer, [name.rstrip(".") for name in names]
        for before, behind in self.mtp:
            yield self.mtp_layer, [f"{before}.{expert}.{behind}".rstrip(".") for expert in range(self.count)]

    @cached_property
    def _lists(self) -> set[tuple[str, ...]]:
        return {_essence(path.split(".")) for path in self.lists}

    @cached_property
    def _mtp(self) -> set[tuple[str, ...]]:
        return {_essence(before.split(".")) for before, _ in self.mtp}

    def is_mtp(self, segments: Sequence[str]) -> bool:
        """Whether a dotted name is of an expert of a layer for multi-token prediction."""
        return any(_essence(segments[:place]) in self._mtp for place in range(1, len(segments)))

    @cached_property
    def _inner(self) -> set[tuple[str, ...]]:
        """The paths from a layer to its list of experts."""
        return {
            tuple(before.partition(f".{layer}.")[2].split("."))
            for layer, projections in self.projections.items()
            for before, _ in projections
        }


def _is_number(segment: str) -> bool:
    return segment.isascii() and segment.isdecimal() and len(segment) <= _MOST_DIGITS


def _essence(path: Sequence[str]) -> tuple[str, ...]:
    """A path without the names that some engines put before it and others do not."""
    return tuple(segment for segment in path if segment not in _WRAPPERS)


def renumber(value: Any, names: ExpertNames, kept: Mapping[int, Sequence[int]], where: str) -> Any:
    """JSON that `where` has, for an output with the experts `kept`: ascending numbers of the source, by layer.

    List entries and keys of objects that name experts are renumbered, and left out with the experts that leave; all
    else, and its order, stays. Raises UnsupportedModelError, whatever is kept, for names without a layer, and for
    patterns that do not take all experts of a layer alike.
    """
    return _Renumbering(names, kept, where).of(value)


def check_names(value: Any, names: ExpertNames, where: str) -> bool:
    """Whether JSON names single experts. Raises like `renumber`, before it is known which of them stay."""
    none_stay: dict[int, Sequence[int]] = dict.fromkeys(names.projections, ())
    return bool(renumber(value, names, none_stay, where) != value)


#: Stands for an entry that leaves with its expert.
_GONE = object()


class _Renumbering:
    def __init__(self, names: ExpertNames, kept: Mapping[int, Sequence[int]], where: str) -> None:
        self._names, self._where = names, where
        self._new = {layer: {old: new for new, old in enumerate(experts)} for layer, experts in kept.items()}

    def of(self, value: Any, depth: int = 0) -> Any:
        if depth > MOST_LEVELS:
            raise UnsupportedModelError(f"{self._where} is nested more than {MOST_LEVELS} deep. Download it again.")
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list):
            return [new for each in value if (new := self.of(each, depth + 1)) is not _GONE]
        if isinstance(value, dict):
            pairs = ((self._text(key), self.of(each, depth + 1)) for key, each in value.items())
            return {key: each for key, each in pairs if key is not _GONE and each is not _GONE}
        return value

    def _text(self, text: str) -> Any:
        signs = not _PATTERN_SIGNS.isdisjoint(text) and _LETTER.search(text)
        if text.startswith(_PATTERN_MARKS) or signs:
            _check_pattern(text, self._names, self._where)
            return text
        if not any(map(str.isdecimal, text)):
            return text
        changed = [self._name(match.group()) for match in _DOTTED.finditer(text)]
        if _GONE in changed and len(changed) > 1:
            raise UnsupportedModelError(
                f"{self._where} names several experts in one text, and some of them leave: {show(text)}. Make it a "
                "list."
            )
        if _GONE in changed:
            return _GONE
        rest = iter(changed)
        return _DOTTED.sub(lambda _: str(next(rest)), text)

    def _name(self, name: str) -> Any:
        segments = name.split(".")
        found = self._names.layer_and_place(segments)
        if found is None:
            if _NUMBER.search(name) and not self._names.is_other(segments):
                raise UnsupportedModelError(
                    f"{self._where} names {show(name)}, but not in which layer, and every layer keeps other experts. "
                    "Write the full names there, as the checkpoint has them; or remove the entry if what reads the "
                    "model can do without."
                )
            return name
        layer, place = found
        new = self._new.get(layer)
        if new is None:
            return name
        number = new.get(int(segments[place]))
        return _GONE if number is None else ".".join((*segments[:place], str(number), *segments[place + 1 :]))


def _check_pattern(text: str, names: ExpertNames, where: str) -> None:
    """Raise UnsupportedModelError unless a pattern takes all experts of each layer alike, however it is matched."""
    pattern = text[2:] if text.startswith(("+:", "-:")) else text.removeprefix("re:")
    advice = (
        "A pattern cannot be renumbered. Replace it by the full names of the modules that it stands for; or, if it is "
        r"meant for all experts, write \d+ for the number."
    )
    if _LITERAL.search(pattern.replace("[0-9]", r"\d")):
        raise UnsupportedModelError(f"{where} has a pattern with the number of an expert: {show(text)}. {advice}")
    compiled = _compiled(pattern)
    # compressed-tensors and GPTQModel match from the beginning (re.match), AutoRound anywhere (re.search).
    matchers: tuple[Callable[[str], Any], ...] = (compiled.match, compiled.search)
    for layer, modules in names.modules():
        for matches in matchers:
            hits = [name for name in modules if matches(name)]
            if hits and len(hits) < len(modules):
                raise UnsupportedModelError(
                    f"{where} has a pattern for only {len(hits)} of {len(modules)} experts of layer {layer}, such as "
                    f"{hits[0]}: {show(text)}. {advice}"
                )


def _compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression; what is none is read as a shell pattern (`*.experts.*`)."""
    with warnings.catch_warnings():
        # Of sets that a later version of Python may read in another way.
        warnings.simplefilter("ignore")
        try:
            return re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            return re.compile(translate(pattern))


def partly_plain(section: Any, names: ExpertNames, counts: Mapping[int, int]) -> list[int]:
    """The layers of which a quantization section calls some experts not quantized, but not all of their `counts`."""
    found: dict[int, set[int]] = {}
    for name in _plain_names(section):
        segments = name.split(".")
        place = names.layer_and_place(segments)
        if place is not None and not names.is_mtp(segments):
            found.setdefault(place[0], set()).add(int(segments[place[1]]))
    return sorted(layer for layer, experts in found.items() if layer in counts and len(experts) < counts[layer])


def _plain_names(section: Any) -> Iterator[str]:
    """The names of modules that a section calls not quantized, in a list or (AutoRound) by 16 bits or more."""
    if not isinstance(section, Mapping):
        return
    for key, value in section.items():
        if key in _PLAIN_LISTS and isinstance(value, list):
            yield from (each for each in value if isinstance(each, str))
        elif isinstance(value, Mapping):
            bits = value.get("bits")
            if isinstance(bits, int) and bits >= 16:
                yield key
            yield from _plain_names(value)
