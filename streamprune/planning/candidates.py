"""The candidates of a search: how many experts, how wide, stored how, refitted or not, that fit a budget. No torch.

All layers keep equally many experts: only such candidates are searched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from streamprune.errors import DoesNotFitError, SettingsError, UnsupportedModelError
from streamprune.fit.estimate import WEIGHTS as OF_WEIGHTS
from streamprune.fit.estimate import Fit
from streamprune.hardware.memory import format_bytes
from streamprune.models.config_json import ExpertSpec, WidthSpec, minimum_keep
from streamprune.planning.counts import ExpertCounts
from streamprune.selection.widths import allowed_widths, check_width
from streamprune.targets import WEIGHTS

#: The value of --candidates for those that are laid out from the budget.
AUTO = "auto"
#: Formats of about the same size.
EIGHT_BITS = ("fp8", "fp8-dynamic", "w8a16")
#: Between whole experts and full width, so many mixtures of both are laid out.
_MIXTURES = 2
_FORM = "Write for example keep=83,weights=fp8 or width=384,refit, with keep, width, weights and refit as for `run`."


@dataclass(frozen=True)
class Candidate:
    """One way to prune a model: `keep` experts in every layer, each with `width` channels (None: all).

    `weights` is how they are stored, as for --weights, and `refit` says whether their down projections are refitted.
    """

    keep: int
    width: int | None = None
    weights: str = "source"
    refit: bool = False

    @property
    def name(self) -> str:
        """A short name, by which tables and JSON call it: "83 experts x 384, fp8, refit"."""
        size = f"{self.keep} experts" + (f" x {self.width}" if self.width is not None else "")
        return ", ".join([size, *([self.weights] if self.weights != "source" else []), *["refit"] * self.refit])

    def options(self, experts: int) -> str:
        """The options of `run` that make it of a model with so many experts per layer."""
        parts = [f"--keep {self.keep}"] if self.keep < experts else []
        parts += [f"--width {self.width}"] if self.width is not None else []
        parts += [f"--weights {self.weights}"] if self.weights != "source" else []
        return " ".join([*parts, *["--refit"] * self.refit])

    @property
    def shape(self) -> tuple[int, int | None]:
        """Experts and channels."""
        return self.keep, self.width

    def counts(self, layers: Sequence[int], full_width: int) -> ExpertCounts:
        """How many experts stay in each of these layers."""
        per_layer = dict.fromkeys(layers, self.keep)
        total = self.keep * len(layers)
        return ExpertCounts(total, len(layers), True, per_layer, width=self.width, full_width=full_width)


@dataclass(frozen=True)
class Searchable:
    """What can be varied of a model.

    `fits` are the unpruned model in each way in which its weights can be stored, against the budget; `no_format` says
    why not in others. `fixed_width` says why the width cannot change, `no_refit` why experts cannot be refitted; empty
    if they can. `why_not_so` says why experts of a width cannot be stored in a format; empty if they can.
    """

    spec: ExpertSpec
    width: WidthSpec | None
    fits: Mapping[str, Fit] = field(repr=False)
    fixed_width: str = ""
    no_refit: str = ""
    no_format: Mapping[str, str] = field(default_factory=dict)
    why_not_so: Callable[[str, int], str] = field(default=lambda weights, width: "", repr=False)

    def fit_of(self, candidate: Candidate) -> Fit:
        """The memory of a candidate against the budget."""
        # All experts is no number to the planner: the model is unpruned then.
        keep = candidate.keep if candidate.keep < self.spec.count else None
        return self.fits[candidate.weights].changed(keep=keep, width=candidate.width)


@dataclass(frozen=True)
class Layout:
    """The candidates of a search, and what was left out, with reasons."""

    candidates: tuple[Candidate, ...]
    left_out: tuple[str, ...] = ()


def lay_out(model: Searchable, multiple: int | None = None) -> Layout:
    """The candidates that fit the budget: in each format of the weights the most experts of full width, the widest
    experts of which all stay, and mixtures of both; each with and without a refit.

    Formats of 8 bits take about as much as one another: mixtures and refits are laid out for one of them. Widths are
    multiples of `multiple` (None: the default). Raises SettingsError if the unpruned model fits as it is,
    DoesNotFitError if nothing fits.
    """
    fit = model.fits["source"]
    if fit.fits:
        raise SettingsError(
            f"The unpruned model takes {format_bytes(fit.total)} and already fits {format_bytes(fit.budget)}, so "
            "nothing has to be lost. Search for a smaller budget, a longer --context or a larger --batch."
        )
    shapes: list[Candidate] = []
    left_out = [f"weights {weights}: {reason}" for weights, reason in model.no_format.items()]
    _, *others = [weights for weights in EIGHT_BITS if weights in model.fits] or [""]
    if others:
        left_out.append(
            f"other shapes, and refits, with weights {' and '.join(others)}: they take about as much as in the other "
            "8-bit format. Name them with --candidates."
        )
    for weights in model.fits:
        found = list(_shapes(model, weights, multiple))
        shapes += found[:1] if weights in others else found
        if not found and model.fits[weights].most_experts is not None:
            left_out.append(f"weights {weights}: no number of experts that fits is good for the engine of --round-for.")
        elif not found:
            least = minimum_keep(model.spec)
            over = model.fit_of(Candidate(least, weights=weights))
            left_out.append(
                f"weights {weights}: even with {least} experts, the fewest that the router needs, the model takes "
                f"{format_bytes(over.total)}."
            )
    if not shapes:
        raise DoesNotFitError(f"Nothing fits {format_bytes(fit.budget)}. {' '.join(left_out)}")
    cut = [each for each in shapes if _is_cut(model, each) and each.weights not in others]
    refitted = [] if model.no_refit else [replace(each, refit=True) for each in cut]
    if model.no_refit:
        left_out.append(f"refitted ones: {model.no_refit}.")
    if model.fixed_width and any(each.keep < model.spec.count for each in shapes):
        left_out.append(f"narrower experts: {model.fixed_width}.")
    return Layout((*shapes, *refitted), tuple(left_out))


def _is_cut(model: Searchable, candidate: Candidate) -> bool:
    """Whether anything is removed that a refit could mend."""
    return candidate.keep < model.spec.count or candidate.width is not None


def _shapes(model: Searchable, weights: str, multiple: int | None) -> Iterator[Candidate]:
    """The candidates in one format, without a refit: from whole experts to narrower ones, of which more stay."""
    fit, full = model.fits[weights], model.spec.count
    widths: list[int | None] = [None]
    if model.width is not None and not model.fixed_width:
        widths += [
            width for width in reversed(allowed_widths(model.width, multiple)) if not model.why_not_so(weights, width)
        ]
    found: list[Candidate] = []
    for width in widths:
        keep = fit.changed(width=width).max_experts
        if keep is not None and (not found or keep > found[-1].keep):
            found.append(Candidate(keep, width, weights))
        if keep == full:
            break
    # Both ends, and some between them at equal distances.
    places = {round(number * (len(found) - 1) / (_MIXTURES + 1)) for number in range(_MIXTURES + 2)} if found else set()
    yield from (found[place] for place in sorted(places))


def read_candidates(given: Sequence[str], model: Searchable) -> Layout:
    """The candidates that the user names.

    Raises SettingsError for text in another form, numbers that the model cannot have, and two that are the same;
    UnsupportedModelError for what it does not allow; DoesNotFitError if one does not fit.
    """
    found: list[Candidate] = []
    for text in given:
        candidate = _checked(text, _parsed(text, model), model)
        if candidate in found:
            raise SettingsError(f"--candidates {text} is given twice.")
        found.append(candidate)
    return Layout(tuple(found))


def _parsed(text: str, model: Searchable) -> Candidate:
    values: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in ("keep", "width", "weights", "refit") or name in values or bool(equals) == (name == "refit"):
            raise SettingsError(f"--candidates {text}: {part.strip()!r} is not understood. {_FORM}")
        if name in ("keep", "width") and not re.fullmatch(r"[0-9]{1,9}", value):
            raise SettingsError(f"--candidates {text}: {value!r} is not a number. {_FORM}")
        values[name] = value
    keep = int(values.get("keep", model.spec.count))
    width = int(values["width"]) if "width" in values else None
    if width is not None and model.width is not None and width == model.width.width:
        width = None
    return Candidate(keep, width, values.get("weights", "source"), "refit" in values)


def _checked(text: str, candidate: Candidate, model: Searchable) -> Candidate:
    """A candidate that the model allows. Raises as `read_candidates`."""
    spec, least, said = model.spec, minimum_keep(model.spec), f"--candidates {text}"
    if candidate.weights in model.no_format:
        raise UnsupportedModelError(f"{said}: {model.no_format[candidate.weights]}")
    if candidate.weights not in model.fits:
        known = candidate.weights in WEIGHTS
        why = "the source does not have them quantized" if known else f"choose one of {', '.join(model.fits)}"
        raise SettingsError(f"{said}: weights={candidate.weights} is not possible here: {why}.")
    if not least <= candidate.keep <= spec.count or candidate.keep % spec.groups:
        step = f" in steps of {spec.groups}" if spec.groups > 1 else ""
        raise SettingsError(f"{said}: choose from {least} to {spec.count} experts{step}.")
    if not _is_cut(model, candidate) and (candidate.refit or candidate.weights == "source"):
        raise SettingsError(f"{said} removes nothing. Keep fewer experts, or make them narrower.")
    if candidate.width is not None:
        if model.width is None or model.fixed_width:
            raise UnsupportedModelError(f"{said}: the experts cannot be made narrower: {model.fixed_width}.")
        check_width(model.width, candidate.width)
        if problem := model.why_not_so(candidate.weights, candidate.width):
            raise SettingsError(f"{said}: {problem}")
    if candidate.refit and model.no_refit:
        raise UnsupportedModelError(f"{said}: {model.no_refit}.")
    fit = model.fit_of(candidate)
    if not fit.fits:
        raise DoesNotFitError(
            f"{said} takes {format_bytes(fit.total)}, {format_bytes(-fit.left)} more than {format_bytes(fit.budget)}. "
            "Only candidates that fit are searched; --candidates auto lays them out."
        )
    return candidate


def bytes_per_token(fit: Fit, spec: ExpertSpec) -> int:
    """Bytes of the weights that generating one token reads: without the experts that its router does not pick.

    Of embeddings one row is read, unless they are the head too. With one sequence at a time, tokens per second are
    about the GPU's memory bandwidth divided by this.
    """
    sizes = {term.name.removeprefix(OF_WEIGHTS): term.bytes for term in fit.terms if term.name.startswith(OF_WEIGHTS)}
    unread = ("vision", "MTP", *(["embeddings"] if "head" in sizes else []))
    kept = fit.use.keep or spec.count
    experts = sizes.pop("experts", 0) * spec.top_k // kept
    return experts + sum(size for name, size in sizes.items() if name not in unread)
