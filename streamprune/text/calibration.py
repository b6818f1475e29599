"""From calibration text to token sequences and micro-batches. Nothing is ever padded, so no padding is ever counted."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from streamprune.errors import CalibrationError
from streamprune.settings import DEFAULT_SEQ_LEN
from streamprune.source.shard import show
from streamprune.text.chat import Chat, render_chats
from streamprune.text.files import Record, read_source


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through a block together: token ids (B, L), int64, all of one source (its index)."""

    ids: torch.Tensor = field(repr=False)
    source: int


@dataclass(frozen=True)
class Calibration:
    """Token sequences, each an int64 tensor (L,) of one source.

    `sources` are the unique names of the sources, and `source_of` each sequence's index into them. `fingerprint` is a
    SHA-256 over the tokens and their sources; `notes` are remarks for the user; `recipe` says as JSON how the tokens
    were made, with no local folder in it.
    """

    sequences: tuple[torch.Tensor, ...] = field(repr=False)
    sources: tuple[str, ...]
    source_of: tuple[int, ...] = field(repr=False)
    fingerprint: str
    notes: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)

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

        They come by length, and for one length by source.
        """
        sizes: list[int] = []
        for (length, _), group in itertools.groupby(self._ordered(), key=self._kind):
            count, size = len(list(group)), max(1, max_tokens // length)
            sizes += [min(size, count - start) for start in range(0, count, size)]
        return self.micro_batches_of(sizes)

    def micro_batches_of(self, sizes: Sequence[int]) -> list[MicroBatch]:
        """Micro-batches in the order of `micro_batches`, with these numbers of sequences.

        Raises ValueError unless they are sizes into which that order can be divided.
        """
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
    samples: int,
    seq_len: int | None,
    seed: int,
    vocab_size: int,
    max_positions: int | None,
    trust_remote_code: bool = False,
) -> Calibration:
    """Read the sources and make at most `samples` sequences of them.

    Text and chats are tokenized, joined by the end-of-text token and packed into full sequences of `seq_len` (None:
    2,048, or as many as the model has positions for); records with `input_ids` are sequences as they are. Same
    sources, tokenizer and seed: same tokens. Raises CalibrationError for missing, malformed, empty or too short data,
    naming the source and line.
    """
    if seq_len is None:
        seq_len = min(DEFAULT_SEQ_LEN, max_positions or DEFAULT_SEQ_LEN)
    elif max_positions is not None and seq_len > max_positions:
        raise CalibrationError(
            f"--seq-len {seq_len} is longer than the {max_positions} positions that the model knows. "
            f"Use --seq-len {max_positions} or less."
        )
    names = _unique_names(sources)
    found = [
        _sequences_of(source, model_folder, samples, seq_len, seed, vocab_size, max_positions, trust_remote_code)
        for source in sources
    ]
    if not any(found):
        raise CalibrationError(
            f"{', '.join(sources)}: the text is shorter than one sequence of {seq_len} tokens. "
            "Give more text or a smaller --seq-len."
        )
    counts = _divided(samples, [len(each) for each in found])
    sequences = [sequence for each, count in zip(found, counts, strict=True) for sequence in each[:count]]
    source_of = [source for source, count in enumerate(counts) for _ in range(count)]
    notes = []
    if len(sequences) < samples:
        tokens = sum(len(sequence) for sequence in sequences)
        notes.append(f"The calibration data gave {len(sequences)} of {samples} sequences ({tokens:,} tokens).")
    return Calibration(tuple(sequences), names, tuple(source_of), fingerprint_of(sequences, source_of), tuple(notes))


def fingerprint_of(sequences: Sequence[torch.Tensor], source_of: Sequence[int]) -> str:
    """SHA-256 over token sequences and the sources that they are of, in hex."""
    digest = hashlib.sha256()
    for sequence, source in zip(sequences, source_of, strict=True):
        digest.update(source.to_bytes(8, "little") + len(sequence).to_bytes(8, "little") + sequence.numpy().tobytes())
    return digest.hexdigest()


def _unique_names(sources: Sequence[str]) -> tuple[str, ...]:
    names: list[str] = []
    for source in sources:
        stem = Path(source).name or source
        name, number = stem, 2
        while name in names:
            name, number = f"{stem} ({number})", number + 1
        names.append(name)
    return tuple(names)


def _divided(wanted: int, available: Sequence[int]) -> list[int]:
    """Equal parts of `wanted`; where one has fewer, the others fill up."""
    counts = [0] * len(available)
    for place, index in enumerate(sorted(range(len(available)), key=lambda index: available[index])):
        counts[index] = min(available[index], (wanted - sum(counts)) // (len(available) - place))
    return counts


def _sequences_of(
    source: str,
    model_folder: Path,
    samples: int,
    seq_len: int,
    seed: int,
    vocab_size: int,
    max_positions: int | None,
    trust_remote_code: bool,
) -> list[torch.Tensor]:
    records = list(read_source(source, seed, samples * seq_len))
    if not records:
        raise CalibrationError(f"{source}: there is no text in it. Give files that hold some.")
    ready = [record for record in records if record.input_ids is not None]
    texts = [record for record in records if record.input_ids is None]
    rng = random.Random(seed)
    if len(ready) > samples:
        ready = [ready[index] for index in sorted(rng.sample(range(len(ready)), samples))]
    rng.shuffle(texts)
    sequences = [_ready_sequence(record, vocab_size, max_positions) for record in ready]
    if texts and len(sequences) < samples:
        tokenizer = _load_tokenizer(model_folder, trust_remote_code)
        sequences += _pack(
            _tokenize(tokenizer, texts), _beginning_of_text(tokenizer), seq_len, samples - len(sequences)
        )
        _check_vocabulary(sequences, vocab_size, [source])
    return sequences


def _ready_sequence(record: Record, vocab_size: int, max_positions: int | None) -> torch.Tensor:
    ids = record.input_ids or []
    bad = [item for item in ids if type(item) is not int or not 0 <= item < vocab_size]
    if bad or not ids:
        what = f"{show(bad[0])} in 'input_ids'" if bad else "an empty 'input_ids'"
        raise CalibrationError(f"{record.place} has {what}; the model's tokens are the numbers 0 to {vocab_size - 1}.")
    if max_positions is not None and len(ids) > max_positions:
        raise CalibrationError(
            f"{record.place} has {len(ids):,} tokens, but the model knows only {max_positions:,} positions. "
            "Sequences of token ids are never cut; shorten it."
        )
    return torch.tensor(ids, dtype=torch.int64)


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    advice = "Add the tokenizer's files, or calibrate on JSONL records with 'input_ids'."
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        works = bool(tokenizer("The answer is 42.").input_ids)
    except Exception as error:
        # Tokenizers of every kind and age fail in their own ways; the user needs one sentence.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CalibrationError(f"The tokenizer in {folder} cannot be loaded: {reason}\n{advice}") from error
    if not works:
        # Without its files, transformers makes up a tokenizer with an empty vocabulary for some models.
        raise CalibrationError(f"{folder} holds no tokenizer. {advice}")
    return tokenizer


def _beginning_of_text(tokenizer: Any) -> list[int]:
    """The token that the model expects before every text, if its tokenizer adds one."""
    ids = tokenizer("a").input_ids
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id is not None else []


def _tokenize(tokenizer: Any, records: Sequence[Record]) -> Iterator[list[int]]:
    """Each record's tokens, with the end-of-text token behind plain text (a chat template writes its own)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    chats = [Chat(record.place, record.messages) for record in records if record.messages is not None]
    if chats and not tokenizer.chat_template:
        raise CalibrationError(
            f"{chats[0].place} holds a chat, but this model's tokenizer has no chat template. Give records with 'text'."
        )
    with closing(render_chats(tokenizer, chats)) as rendered:
        for record in records:
            text = record.text if record.text is not None else next(rendered)
            try:
                ids = tokenizer(text, add_special_tokens=False).input_ids
            except Exception as error:
                # Tokenizers are programs too, and come with the model.
                raise CalibrationError(f"{record.place}: the model's tokenizer fails on this text: {error}") from None
            yield ids if record.text is None else ids + end


def _pack(documents: Iterable[list[int]], prefix: list[int], seq_len: int, wanted: int) -> list[torch.Tensor]:
    """Full sequences of `seq_len` from documents laid end to end, each sequence beginning with `prefix`."""
    sequences: list[torch.Tensor] = []
    buffer: list[int] = []
    body = seq_len - len(prefix)
    for document in documents:
        buffer += document
        while len(buffer) >= body and len(sequences) < wanted:
            sequences.append(torch.tensor(prefix + buffer[:body], dtype=torch.int64))
            buffer = buffer[body:]
        if len(sequences) == wanted:
            break
    return sequences


def _check_vocabulary(sequences: Sequence[torch.Tensor], vocab_size: int, sources: Sequence[str]) -> None:
    largest = max((int(sequence.max()) for sequence in sequences), default=0)
    if largest >= vocab_size:
        raise CalibrationError(
            f"{', '.join(sources)}: the tokenizer gave token {largest}, but the model knows only {vocab_size}. "
            "Tokenizer and model do not belong together."
        )
