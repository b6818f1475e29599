"""The token sequences of a calibration, by source, and the micro-batches in which they go through the model."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from streamprune.calibration.hub_data import check_library, commit_of
from streamprune.calibration.pack import TOLERANCE, SourceTarget, Supply, fill_up, goals_of, open_source
from streamprune.calibration.recipe import NamedSources, Recipe, Source, find_recipe, read_recipe
from streamprune.calibration.records import TokenMaker
from streamprune.calibration.sources import BUILTIN, builtin_domains, named_path
from streamprune.config import DEFAULT_SEQ_LEN
from streamprune.errors import CalibrationError


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through a block together: token ids (B, L), int64, all of one source (its index).

    `held_out` ones are only measured on.
    """

    ids: torch.Tensor = field(repr=False)
    source: int
    held_out: bool = False


@dataclass(frozen=True)
class Calibration:
    """Token sequences, each an int64 tensor (L,) of one source.

    `sources` are the unique names of the sources, and `source_of` each sequence's index into them. `fingerprint` is a
    SHA-256 over the tokens and their sources; `notes` are remarks for the user; `recipe` says as JSON how the tokens
    were made, with no local folder in it. `held_out` is the text to be measured on, of the same sources;
    nothing else here counts it.
    """

    sequences: tuple[torch.Tensor, ...] = field(repr=False)
    sources: tuple[str, ...]
    source_of: tuple[int, ...] = field(repr=False)
    fingerprint: str
    notes: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    held_out: Calibration | None = field(default=None, repr=False)

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
        """Sequences of equal length and source together, at most `max_tokens` per batch (or one sequence).

        They come by length, and for one length by source; those of what was held back come behind all others.
        """
        held_out = self.held_out._sizes(max_tokens) if self.held_out else []
        return self.micro_batches_of(self._sizes(max_tokens) + held_out)

    def _sizes(self, max_tokens: int) -> list[int]:
        sizes: list[int] = []
        for (length, _), group in itertools.groupby(self._ordered(), key=self._kind):
            count, size = len(list(group)), max(1, max_tokens // length)
            sizes += [min(size, count - start) for start in range(0, count, size)]
        return sizes

    def micro_batches_of(self, sizes: Sequence[int]) -> list[MicroBatch]:
        """Micro-batches in the order of `micro_batches`, with these numbers of sequences.

        Raises ValueError unless they are sizes into which that order can be divided.
        """
        if self.held_out is not None:
            reached = list(itertools.accumulate(sizes))
            first = reached.index(len(self.sequences)) + 1
            held = self.held_out.micro_batches_of(sizes[first:])
            own = replace(self, held_out=None).micro_batches_of(sizes[:first])
            return own + [replace(batch, held_out=True) for batch in held]
        ordered = self._ordered()
        if sum(sizes) != len(ordered) or min(sizes, default=0) < 1:
            raise ValueError(f"{len(sizes)} micro-batches with {sum(sizes)} sequences, not {len(ordered)}")
        remaining = iter(ordered)
        parts = [list(itertools.islice(remaining, size)) for size in sizes]
        if any(self._kind(part[0]) != self._kind(part[-1]) for part in parts):
            raise ValueError("a micro-batch of sequences of different lengths or sources")
        return [
            MicroBatch(torch.stack([self.sequences[index] for index in part]), self.source_of[part[0]])
            for part in parts
        ]

    def _ordered(self) -> list[int]:
        return sorted(range(len(self.sequences)), key=self._kind)

    def _kind(self, index: int) -> tuple[int, int]:
        return len(self.sequences[index]), self.source_of[index]


def load_calibration(
    sources: Sequence[str],
    model_folder: Path,
    *,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    vocab_size: int,
    max_positions: int | None,
    trust_remote_code: bool = False,
) -> Calibration:
    """The calibration that the user names: a recipe, or files, folders and built-in text in equal parts.

    `samples`, `seq_len` (tokens) and `seed` count instead of the recipe's own; without either 512 sequences of 2,048
    tokens, or of as many as the model has positions for. `model_folder` needs the tokenizer's files and no weights.
    Same sources, tokenizer and seed: same tokens. Raises CalibrationError for missing, malformed, empty or too short
    data, naming the source and line.
    """
    recipe = chosen_recipe(sources)
    length = _sequence_length(recipe, seq_len, max_positions)
    given = {"calibration": [_given(text) for text in sources], "samples": samples, "seq_len": seq_len, "seed": seed}
    seed = recipe.seed if seed is None else seed
    recipe, goals, notes = _without_idle(recipe, goals_of(recipe, samples, length))
    # All are asked for and opened before the first is read: what is missing shows at once.
    commits = _commits(recipe)
    opened = [open_source(source, seed, commits.get(source.name)) for source in recipe.sources]
    for source, each in zip(recipe.sources, opened, strict=True):
        if each.left_out:
            notes.append(f"{source.name}: {len(each.left_out)} files are no text, first {each.left_out[0]}.")
    with TokenMaker(model_folder, trust_remote_code, vocab_size, max_positions) as maker:
        supplies = [
            Supply(source, recipe, goal, each, maker, length)
            for source, goal, each in zip(recipe.sources, goals, opened, strict=True)
        ]
        _take(recipe, supplies)
    sequences = [sequence for supply in supplies for sequence in supply.sequences]
    source_of = [index for index, supply in enumerate(supplies) for _ in supply.sequences]
    return Calibration(
        tuple(sequences),
        tuple(source.name for source in recipe.sources),
        tuple(source_of),
        fingerprint_of(sequences, source_of),
        tuple(notes + _remarks(recipe, supplies)),
        {**_provenance(recipe, supplies, commits, length, seed), "given": given},
    )


def fingerprint_of(sequences: Sequence[torch.Tensor], source_of: Sequence[int]) -> str:
    """SHA-256 over token sequences and the sources that they are of, in hex."""
    digest = hashlib.sha256()
    for sequence, source in zip(sequences, source_of, strict=True):
        digest.update(source.to_bytes(8, "little") + len(sequence).to_bytes(8, "little") + sequence.numpy().tobytes())
    return digest.hexdigest()


def chosen_recipe(sources: Sequence[str]) -> Recipe:
    """The recipe that the user names, or one of equal parts of the files, folders and domains that are named."""
    found = [find_recipe(source) for source in sources]
    paths = [path for path in found if path is not None]
    if paths and len(sources) > 1:
        raise CalibrationError(f"{paths[0]} is a recipe: give it alone, and list what else there is as its sources.")
    if paths:
        return read_recipe(paths[0])
    named: list[tuple[str, Source]] = []
    for text in sources:
        path, exists = named_path(text)
        if text.partition(":")[0] == BUILTIN and not exists:
            named += [(domain, Source(builtin=domain)) for domain in builtin_domains(text)]
        else:
            named.append((path.name or path.resolve().name or text, Source(path=str(path))))
    unique: list[Source] = []
    for name, source in named:
        # Names are written as in `--mix code=0.5,prose=0.5`.
        base = re.sub(r"[=,:\s]+", "_", name)
        names = [each.name for each in unique]
        numbered = (base if number == 1 else f"{base}-{number}" for number in itertools.count(1))
        unique.append(msgspec.structs.replace(source, name=next(each for each in numbered if each not in names)))
    return NamedSources(name=", ".join(source.name for source in unique), sources=unique)


def _given(text: str) -> str:
    """What the user named, as others may read it: of a local path only the last part."""
    path, exists = named_path(text)
    if text.partition(":")[0] == BUILTIN and not exists:
        return text
    return path.resolve().name if exists else text


def _sequence_length(recipe: Recipe, seq_len: int | None, max_positions: int | None) -> int:
    length = seq_len if seq_len is not None else recipe.sequence_length
    if length is None:
        return min(DEFAULT_SEQ_LEN, max_positions or DEFAULT_SEQ_LEN)
    if max_positions is not None and length > max_positions:
        said = f"--seq-len {length}" if seq_len is not None else f"The sequence length {length} of {recipe.name!r}"
        raise CalibrationError(
            f"{said} is longer than the {max_positions} positions that the model knows. Use --seq-len {max_positions} "
            "or less."
        )
    return length


def _commits(recipe: Recipe) -> dict[str, str]:
    """The commits of the Hub data sets by the names of the sources; the first look at whether they may be read."""
    datasets = [source for source in recipe.sources if source.dataset is not None]
    for source in datasets:
        check_library(source)
    found = {source.name: commit_of(source) for source in datasets}
    return {name: commit for name, commit in found.items() if commit is not None}


def _without_idle(recipe: Recipe, goals: list[SourceTarget]) -> tuple[Recipe, list[SourceTarget], list[str]]:
    """The recipe without the sources of which nothing is wanted, for lack of sequences; and a note of that."""
    used = [index for index, goal in enumerate(goals) if goal.sequences != 0]
    if len(used) == len(goals):
        return recipe, goals, []
    recipe = msgspec.structs.replace(recipe, sources=[recipe.sources[index] for index in used])
    note = f"So few sequences are only of {', '.join(source.name for source in recipe.sources)}."
    return recipe, [goals[index] for index in used], [note]


def _take(recipe: Recipe, supplies: Sequence[Supply]) -> None:
    if not recipe.strict:
        fill_up([supply.goal.sequences or 0 for supply in supplies], lambda index, count: supplies[index].take(count))
    for supply in supplies:
        goal = supply.goal
        if recipe.strict and goal.tokens is not None:
            supply.take_tokens(goal.tokens)
        elif recipe.strict:
            supply.take_all()
        supply.check_not_empty()
        if recipe.strict:
            supply.check_goal()


def _remarks(recipe: Recipe, supplies: Sequence[Supply]) -> list[str]:
    """What the user should know of what was got: where it is less than, or other than, what was asked for."""
    notes = []
    tokens, count = sum(supply.tokens for supply in supplies), sum(len(supply.sequences) for supply in supplies)
    if not recipe.strict:
        goal = sum(supply.goal.sequences or 0 for supply in supplies)
        short = [supply for supply in supplies if len(supply.sequences) < (supply.goal.sequences or 0)]
        if len(supplies) > 1:
            notes += [
                f"{each.source.name} gave {len(each.sequences)} of the {each.goal.sequences} sequences of its share."
                for each in short
            ]
        if count < goal:
            notes.append(f"The calibration data gave {count} of {goal} sequences ({tokens:,} tokens).")
    for supply in supplies:
        share = supply.goal.share
        if share is not None and abs(supply.tokens / tokens - share) > TOLERANCE:
            notes.append(
                f"{supply.source.name} has {supply.tokens / tokens:.1%} of the tokens instead of {share:.1%}: with so "
                "few sequences it cannot be met more closely."
            )
    return notes


def _provenance(
    recipe: Recipe, supplies: Sequence[Supply], commits: Mapping[str, str], length: int, seed: int
) -> dict[str, Any]:
    """How the tokens were made, as JSON, with nothing in it that differs between machines."""
    sources = []
    for supply in supplies:
        made: dict[str, Any] = {"name": supply.source.name, **supply.source.public()}
        if supply.source.name in commits:
            made["commit"] = commits[supply.source.name]
        made |= {"share": supply.goal.share, "records": supply.records}
        sources.append(made | {"sequences": len(supply.sequences), "tokens": supply.tokens})
    stated = {"name": recipe.name, "description": recipe.description} if recipe.strict else {}
    return {**stated, "mode": recipe.mode, "sequence_length": length, "seed": seed, "sources": sources}
