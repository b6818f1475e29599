"""From calibration text to token sequences and micro-batches. Nothing is ever padded, so no padding is ever counted."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from streamprune import corpus
from streamprune.errors import CalibrationError
from streamprune.settings import DEFAULT_SEQ_LEN

#: The calibration that needs no file: all domains of `corpus`, or some of them ("builtin:code,prose").
BUILTIN = "builtin"
#: Longer texts are cut at line ends into documents of about this many characters, so that a few large files do not
#: have to be tokenized whole for a small sample.
DOCUMENT_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Calibration:
    """Token sequences, each an int64 tensor (L,), in the order in which they are used.

    `fingerprint` is a SHA-256 over the tokens; `sources` is what the user named; `notes` are remarks for the user.
    """

    sequences: tuple[torch.Tensor, ...] = field(repr=False)
    sources: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    def micro_batches(self, max_tokens: int) -> list[torch.Tensor]:
        """Token ids (B, L), sequences of equal length together, at most `max_tokens` per batch (or one sequence)."""
        batches: list[torch.Tensor] = []
        by_length = sorted(range(len(self.sequences)), key=lambda index: len(self.sequences[index]))
        for length, group in itertools.groupby(by_length, key=lambda index: len(self.sequences[index])):
            members = [self.sequences[index] for index in group]
            size = max(1, max_tokens // length)
            batches.extend(torch.stack(members[start : start + size]) for start in range(0, len(members), size))
        return batches

    def micro_batches_of(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Token ids (B, L) in the order of `micro_batches`, with these numbers of sequences.

        Raises ValueError unless they are sizes into which that order can be divided.
        """
        ordered = sorted(self.sequences, key=len)
        if sum(sizes) != len(ordered) or min(sizes, default=0) < 1:
            raise ValueError(f"{len(sizes)} micro-batches with {sum(sizes)} sequences, not {len(ordered)}")
        remaining = iter(ordered)
        parts = [list(itertools.islice(remaining, size)) for size in sizes]
        if any(len(part[0]) != len(part[-1]) for part in parts):
            raise ValueError("a micro-batch of sequences of different lengths")
        return [torch.stack(part) for part in parts]


@dataclass
class _Record:
    """A document before tokenization: text, rendered chat, or ready token ids. `place` is for error messages."""

    place: str
    text: str | None = None
    messages: list[Any] | None = None
    input_ids: list[int] | None = None


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
    records = list(itertools.chain.from_iterable(_read_source(source, seed, samples * seq_len) for source in sources))
    if not records:
        raise CalibrationError(f"{', '.join(sources)}: there is no text in it. Give files that hold some.")
    ready = [record for record in records if record.input_ids is not None]
    texts = [record for record in records if record.input_ids is None]
    rng = random.Random(seed)
    if len(ready) > samples:
        ready = [ready[index] for index in sorted(rng.sample(range(len(ready)), samples))]
    rng.shuffle(texts)
    sequences = [_ready_sequence(record, vocab_size, max_positions) for record in ready]
    notes = []
    if texts and len(sequences) < samples:
        tokenizer = _load_tokenizer(model_folder, trust_remote_code)
        sequences += _pack(
            _tokenize(tokenizer, texts), _beginning_of_text(tokenizer), seq_len, samples - len(sequences)
        )
        _check_vocabulary(sequences, vocab_size, sources)
    if not sequences:
        raise CalibrationError(
            f"{', '.join(sources)}: the text is shorter than one sequence of {seq_len} tokens. "
            "Give more text or a smaller --seq-len."
        )
    if len(sequences) < samples:
        tokens = sum(len(sequence) for sequence in sequences)
        notes.append(f"The calibration data gave {len(sequences)} of {samples} sequences ({tokens:,} tokens).")
    return Calibration(tuple(sequences), tuple(sources), fingerprint_of(sequences), tuple(notes))


def fingerprint_of(sequences: Sequence[torch.Tensor]) -> str:
    """SHA-256 over token sequences, in hex."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little") + sequence.numpy().tobytes())
    return digest.hexdigest()


def _read_source(source: str, seed: int, wanted_tokens: int) -> Iterator[_Record]:
    name, _, domains = source.partition(":")
    path = Path(source).expanduser()
    if name == BUILTIN and not path.exists():
        yield from _read_builtin(domains, seed, wanted_tokens)
    elif path.suffix.lower() in {".jsonl", ".ndjson"}:
        yield from _read_jsonl(path)
    else:
        for number, text in enumerate(_documents(_read_text(path)), start=1):
            yield _Record(f"{path} (part {number})", text=text)


def _read_builtin(domains: str, seed: int, wanted_tokens: int) -> Iterator[_Record]:
    names = domains.split(",") if domains else list(corpus.DOMAINS)
    unknown = [name for name in names if name not in corpus.DOMAINS]
    if unknown:
        raise CalibrationError(f"{BUILTIN}:{domains}: no domain {unknown[0]!r}. There are {', '.join(corpus.DOMAINS)}.")
    for name in names:
        # No tokenizer makes more than one token of a character; two endless domains must stop somewhere.
        budget = 6 * wanted_tokens // len(names) + corpus.DOCUMENT_CHARACTERS
        for number, text in enumerate(corpus.DOMAINS[name](seed)):
            if budget <= 0:
                break
            budget -= len(text)
            yield _Record(f"{BUILTIN}:{name} document {number}", text=text)


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise CalibrationError(f"{path} is a folder. Give text or JSONL files, each with a --calibration of its own.")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CalibrationError(
            f"There is no calibration file {path}. Give a text or JSONL file, or {BUILTIN} for built-in text."
        ) from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start:,}). Give plain text or JSONL.") from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}.") from None


def _documents(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + DOCUMENT_CHARACTERS)
        end = len(text) if end < 0 else end + 1
        if text[start:end].strip():
            yield text[start:end]
        start = end


def _read_jsonl(path: Path) -> Iterator[_Record]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CalibrationError(f"{place} is not valid JSON: {error}. Mend or remove the line.") from None
        if not isinstance(record, dict):
            raise CalibrationError(f"{place} holds a JSON {type(record).__name__}, not an object with 'text'.")
        if isinstance(record.get("input_ids"), list):
            yield _Record(place, input_ids=record["input_ids"])
        elif isinstance(record.get("messages"), list):
            yield _Record(place, messages=record["messages"])
        elif isinstance(record.get("text"), str):
            if record["text"].strip():
                yield _Record(place, text=record["text"])
        else:
            raise CalibrationError(
                f"{place} has no 'text' (a string), 'messages' (a chat) or 'input_ids' (token numbers); it has "
                f"{', '.join(map(repr, record)) or 'nothing'}."
            )


def _ready_sequence(record: _Record, vocab_size: int, max_positions: int | None) -> torch.Tensor:
    ids = record.input_ids or []
    bad = [item for item in ids if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < vocab_size]
    if bad or not ids:
        what = f"{bad[0]!r} in 'input_ids'" if bad else "an empty 'input_ids'"
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


def _tokenize(tokenizer: Any, records: Iterable[_Record]) -> Iterator[list[int]]:
    """Each record's tokens, with the end-of-text token behind plain text (a chat template writes its own)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for record in records:
        if record.messages is not None:
            yield tokenizer(_render_chat(tokenizer, record), add_special_tokens=False).input_ids
        else:
            yield tokenizer(record.text, add_special_tokens=False).input_ids + end


def _render_chat(tokenizer: Any, record: _Record) -> str:
    if not tokenizer.chat_template:
        raise CalibrationError(
            f"{record.place} holds a chat, but this model's tokenizer has no chat template. Give records with 'text'."
        )
    try:
        text: str = tokenizer.apply_chat_template(record.messages, tokenize=False)
    except Exception as error:
        # A chat template is a program: it may refuse roles, orders or contents in any way.
        raise CalibrationError(f"{record.place}: the model's chat template refuses this chat: {error}") from None
    return text


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
