"""The token sequences of a calibration, by source, and the micro-batches in which they go through the model."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from streamprune.calibration.builtin_text import BUILTIN
from streamprune.calibration.chosen import chosen_recipe
from streamprune.calibration.pack import Supply, divided, targets_of
from streamprune.calibration.recipe import Recipe, named_path
from streamprune.calibration.sources import commits_of
from streamprune.calibration.tokens import TokenMaker
from streamprune.common_settings import DEFAULT_SEQ_LEN, Sampling
from streamprune.errors import CalibrationError

S = TypeVar("S", bound=Sampling)
#: What a sequence is for in a refit: weights are fitted to it, or the fit is judged by it.
FIT, JUDGE = "fit", "judge"


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through a layer together: token ids (B, L), int64, all of one source (its index).

    With `held_out` they are only used to measure the loss. `refit` is FIT or JUDGE if weights are refitted to them, or
    the refit is judged by them, else empty; `anchor`: they are used for nothing else. All others are scored.
    """

    ids: torch.Tensor = field(repr=False)
    source: int
    held_out: bool = False
    refit: str = ""
    anchor: bool = False

    @property
    def scored(self) -> bool:
        """Whether experts are scored on these sequences."""
        return not self.held_out and not self.anchor

    @property
    def two_sided(self) -> bool:
        """Whether these sequences go through the original and through the pruned model."""
        return self.held_out or bool(self.refit)


@dataclass(frozen=True)
class Calibration:
    """Token sequences, each an int64 tensor (L,) of one source.

    `sources` are the unique names of the sources, and `source_of` each sequence's index into them. `fingerprint` is a
    SHA-256 over the tokens and their sources; `notes` are remarks for the user; `recipe` states as JSON how the tokens
    were made, without local folders. `held_out` is text of the same sources for measuring the loss, and `anchor` text
    of other sources that takes part in a refit; the other fields do not include them. `refit` says what each sequence
    is for in a refit (FIT, JUDGE, or empty); it is empty if nothing is refitted.
    """

    sequences: tuple[torch.Tensor, ...] = field(repr=False)
    sources: tuple[str, ...]
    source_of: tuple[int, ...] = field(repr=False)
    fingerprint: str
    notes: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    held_out: Calibration | None = field(default=None, repr=False)
    anchor: Calibration | None = field(default=None, repr=False)
    refit: tuple[str, ...] = field(default=(), repr=False)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def tokens_of(self) -> tuple[int, ...]:
        """Tokens of each source."""
        counts = [0] * len(self.sources)
        for sequence, source in zip(self.sequences, self.source_of, strict=True):
            counts[source] += len(sequence)
        return tuple(counts)

    def micro_batches(self, max_tokens: int) -> list[MicroBatch]:
        """Micro-batches of sequences of equal length, source and use, at most `max_tokens` each (or one sequence).

        They are sorted by length, then by source; then comes the anchor, and held-out ones come last.
        """
        return self.micro_batches_of([size for part, _ in self._parts() for size in part._sizes(max_tokens)])

    def micro_batches_of(self, sizes: Sequence[int]) -> list[MicroBatch]:
        """Micro-batches in the order of `micro_batches`, with these numbers of sequences.

        Raises ValueError if these sizes do not fit that order.
        """
        total = sum(len(part.sequences) for part, _ in self._parts())
        if sum(sizes) != total or min(sizes, default=0) < 1:
            raise ValueError(f"{len(sizes)} micro-batches with {sum(sizes)} sequences, not {total}")
        batches, begin, ends = [], 0, list(itertools.accumulate(sizes))
        for part, use in self._parts():
            until = (ends[begin - 1] if begin else 0) + len(part.sequences)
            end = ends.index(until) + 1
            batches += [replace(batch, **use) for batch in part._own_batches(sizes[begin:end])]
            begin = end
        return batches

    def _parts(self) -> list[tuple[Calibration, dict[str, Any]]]:
        """The calibration, its anchor and its held-out text, with the use of their micro-batches."""
        others: tuple[tuple[Calibration | None, dict[str, Any]], ...]
        others = ((self.anchor, {"anchor": True}), (self.held_out, {"held_out": True}))
        return [(self, {}), *((part, use) for part, use in others if part is not None)]

    def _own_batches(self, sizes: Sequence[int]) -> list[MicroBatch]:
        remaining = iter(self._ordered())
        parts = [list(itertools.islice(remaining, size)) for size in sizes]
        if any(self._kind(part[0]) != self._kind(part[-1]) for part in parts):
            raise ValueError("a micro-batch of sequences of different lengths or sources")
        return [
            MicroBatch(
                torch.stack([self.sequences[index] for index in part]),
                self.source_of[part[0]],
                refit=self.refit[part[0]] if self.refit else "",
            )
            for part in parts
        ]

    def _sizes(self, max_tokens: int) -> list[int]:
        sizes: list[int] = []
        for (length, *_), group in itertools.groupby(self._ordered(), key=self._kind):
            count, size = len(list(group)), max(1, max_tokens // length)
            sizes += [min(size, count - start) for start in range(0, count, size)]
        return sizes

    def _ordered(self) -> list[int]:
        """The sequences by length, source, and what they are for; then in their own order.

        A search notes several uses of a sequence. Those of each use have the order then that they have alone, in which
        they are summed up: where one fits in one refit and judges in another, no order by use does, but their own.
        """
        mixed = {of for of, use in zip(self.source_of, self.refit, strict=False) if FIT in use and JUDGE in use}

        def place(index: int) -> tuple[int, int, str]:
            length, source, refit = self._kind(index)
            use = JUDGE if JUDGE in refit and source not in mixed else FIT
            return length, source, use if refit else ""

        return sorted(range(len(self.sequences)), key=place)

    def _kind(self, index: int) -> tuple[int, int, str]:
        return len(self.sequences[index]), self.source_of[index], self.refit[index] if self.refit else ""


#: A larger difference between the requested and the actual share of a source is noted.
TOLERANCE = 0.01


def load_calibration(
    sources: Sequence[str],
    model_folder: Path,
    sampling: Sampling = Sampling(),  # noqa: B008 (It is frozen.)
    *,
    vocab_size: int,
    max_positions: int | None,
    trust_remote_code: bool = False,
) -> Calibration:
    """The calibration that the user names: a recipe, or files, folders and built-in text in equal parts.

    `sampling` replaces the recipe's own numbers; if neither states them, 512 sequences of 2,048 tokens are used, or
    fewer tokens if the model has fewer positions. `model_folder` needs the tokenizer's files, not the weights. The same
    sources, tokenizer, seed and date give the same tokens. Raises CalibrationError for missing, malformed, empty or too
    short data, naming the source and line.
    """
    recipe = _with_numbers(chosen_recipe(sources), sampling, max_positions)
    targets = zip(recipe.sources, targets_of(recipe, sampling.samples), strict=True)
    used = [(source, target) for source, target in targets if target.sequences != 0]
    # All sources are looked up and opened before the first is read, so that a missing one is reported at once.
    commits = commits_of(source for source, _ in used)
    day, skip_bad = sampling.day, sampling.skip_bad
    with TokenMaker(model_folder, trust_remote_code, vocab_size, max_positions, day) as maker:
        supplies = [
            Supply(source, target, recipe, maker, commits.get(source.name), skip_bad) for source, target in used
        ]
        if not recipe.strict:
            _fill_up(supplies)
        for supply in supplies:
            if recipe.strict:
                supply.take_target()
            supply.check()
        date = str(day) if maker.wrote_date else None
    notes = _remarks(recipe, supplies)
    if date is not None and sampling.date is None:
        notes.append(f"The chat template writes the date, {date} here; --date {date} gives the same tokens later.")
    sequences = [sequence for supply in supplies for sequence in supply.sequences]
    source_of = [index for index, supply in enumerate(supplies) for _ in supply.sequences]
    return Calibration(
        tuple(sequences),
        tuple(supply.source.name for supply in supplies),
        tuple(source_of),
        fingerprint_of(sequences, source_of),
        tuple(notes),
        {**_provenance(recipe, supplies), "given": _given(sources, sampling, date)},
    )


def fingerprint_of(sequences: Sequence[torch.Tensor], source_of: Sequence[int]) -> str:
    """SHA-256 over token sequences and their sources, in hex."""
    digest = hashlib.sha256()
    for sequence, source in zip(sequences, source_of, strict=True):
        digest.update(source.to_bytes(8, "little") + len(sequence).to_bytes(8, "little") + sequence.numpy().tobytes())
    return digest.hexdigest()


def _given(sources: Sequence[str], sampling: Sampling, date: str | None) -> dict[str, Any]:
    """The options that give the same text, as JSON; `date` is what the chat template wrote, if it did."""
    given = {name: getattr(sampling, name) for name in ("samples", "seq_len", "seed")}
    return {
        "calibration": [_public(text) for text in sources],
        **given,
        **({"date": date} if date is not None else {}),
        **({"skip_bad": sampling.skip_bad} if sampling.skip_bad else {}),
    }


def date_of(recipe: Any) -> str | None:
    """The date that the chat template wrote into a calibration, by its `recipe`; None if it wrote none."""
    given = recipe.get("given") if isinstance(recipe, Mapping) else None
    date = given.get("date") if isinstance(given, Mapping) else None
    return date if isinstance(date, str) else None


def with_date(sampling: S, *recipes: Any) -> S:
    """Settings with the date in the first text that has one, by its `recipe`, unless they state a date themselves.

    So the same command gives the same text on another day.
    """
    found = next((date for date in map(date_of, recipes) if date is not None), None)
    return sampling if sampling.date is not None or found is None else replace(sampling, date=found)


def with_day(sampling: S) -> S:
    """Settings with today's date, unless they state one: the same for all texts of a command, also after midnight."""
    return replace(sampling, date=str(sampling.day))


def _public(text: str) -> str:
    """What the user named, as it may be published: a local path only by its last part."""
    path, exists = named_path(text)
    if text.partition(":")[0] == BUILTIN and not exists:
        return text
    return path.resolve().name if exists else text


def _with_numbers(recipe: Recipe, sampling: Sampling, max_positions: int | None) -> Recipe:
    """The recipe with the numbers of `sampling` where that has any."""
    return msgspec.structs.replace(
        recipe,
        sequence_length=_sequence_length(recipe, sampling.seq_len, max_positions),
        seed=recipe.seed if sampling.seed is None else sampling.seed,
    )


def _sequence_length(recipe: Recipe, seq_len: int | None, max_positions: int | None) -> int:
    length = seq_len if seq_len is not None else recipe.sequence_length
    if length is None:
        return min(DEFAULT_SEQ_LEN, max_positions or DEFAULT_SEQ_LEN)
    if max_positions is not None and length > max_positions:
        said = f"--seq-len {length}" if seq_len is not None else f"The sequence length {length} of {recipe.name!r}"
        raise CalibrationError(
            f"{said} is longer than the {max_positions} positions that the model has. Use --seq-len {max_positions} "
            "or less."
        )
    return length


def _fill_up(supplies: Sequence[Supply]) -> None:
    """Take the total number of sequences; what some sources lack is taken from the others, in equal parts."""
    wanted = [(supply, supply.target.sequences or 0) for supply in supplies]
    missing = sum(count for _, count in wanted)
    while missing and wanted:
        left = []
        for supply, count in wanted:
            got = supply.take(count)
            missing -= got
            if got == count:
                left.append(supply)
        wanted = list(zip(left, divided(missing, [1.0] * len(left)), strict=True)) if left else []


def _remarks(recipe: Recipe, supplies: Sequence[Supply]) -> list[str]:
    """Notes for the user where the tokens are fewer, or divided otherwise, than requested."""
    notes = []
    if len(supplies) < len(recipe.sources):
        used = ", ".join(supply.source.name for supply in supplies)
        notes.append(f"With so few sequences, only these sources are used: {used}.")
    for supply in supplies:
        notes += [f"{supply.source.name}: {note}" for note in supply.notes()]
    tokens = sum(supply.tokens for supply in supplies)
    if not recipe.strict:
        counts = [(supply, len(supply.sequences), supply.target.sequences or 0) for supply in supplies]
        if len(supplies) > 1:
            notes += [
                f"{supply.source.name} gave {got} of the {wanted} sequences of its share ({supply.tokens:,} tokens)."
                for supply, got, wanted in counts
                if got < wanted
            ]
        got, wanted = sum(got for _, got, _ in counts), sum(wanted for _, _, wanted in counts)
        if got < wanted:
            notes.append(f"The text gave {got:,} of {wanted:,} sequences ({tokens:,} tokens).")
    for supply in supplies:
        share = supply.target.share
        if share is not None and abs(supply.tokens / tokens - share) > TOLERANCE:
            notes.append(
                f"{supply.source.name} has {supply.tokens / tokens:.1%} of the tokens instead of {share:.1%}: with so "
                "few sequences it cannot be met more closely."
            )
    return notes


def _provenance(recipe: Recipe, supplies: Sequence[Supply]) -> dict[str, Any]:
    """How the tokens were made, as JSON that is the same on every machine."""
    sources = [
        {"name": supply.source.name, **supply.source.public()}
        | ({} if supply.commit is None else {"commit": supply.commit})
        | {"share": supply.target.share, "records": supply.records}
        | ({"bad_records": supply.left_out.bad} if supply.left_out.bad else {})
        | {"sequences": len(supply.sequences), "tokens": supply.tokens}
        for supply in supplies
    ]
    stated = {"name": recipe.name, "description": recipe.description} if recipe.strict else {}
    made_as = {"mode": recipe.mode, "sequence_length": recipe.sequence_length, "seed": recipe.seed}
    return {**stated, **made_as, "sources": sources}
