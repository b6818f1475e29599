"""The demo's tokenizer and token sequences. Each domain has a part to train on, one to calibrate on, one held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from streamprune.calibration import builtin_text as corpus
from streamprune.errors import CalibrationError
from streamprune.files.durable import writing

#: Tokens per sequence, and the model's number of positions.
SEQ_LEN = 128
VOCAB_SIZE = 1024
END_OF_TEXT = "<|endoftext|>"
#: Text read per domain. Four fifths of it last for about 900 training steps; longer training repeats it.
CHARACTERS = 1_500_000
#: Training text per domain that the tokenizer is trained on; it hardly changes with more.
TOKENIZER_CHARACTERS = 400_000
#: Sequences per domain.
CALIBRATION_SEQUENCES = 256
HELD_OUT_SEQUENCES = 64
#: Two parts must not share a run of this many tokens. Python's library repeats itself, and one pydoc topic may contain
#: another; generated records share shorter runs by chance.
SHARED_TOKENS = 64

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class DomainData:
    """One domain's token sequences, each part int64 (N, SEQ_LEN).

    No document and no run of SHARED_TOKENS tokens is in two parts.
    """

    train: torch.Tensor = field(repr=False)
    calibration: torch.Tensor = field(repr=False)
    held_out: torch.Tensor = field(repr=False)


def prepare_data(seed: int) -> tuple[Any, dict[str, DomainData]]:
    """A tokenizer (PreTrainedTokenizerFast) trained on the training texts, and the sequences by domain.

    The same Python, libraries and seed give the same data. Raises CalibrationError if this Python installation has
    too little text for a domain.
    """
    texts = {name: _split(_first(documents(seed), CHARACTERS)) for name, documents in corpus.DOMAINS.items()}
    tokenizer = train_tokenizer([parts["train"] for parts in texts.values()])
    return tokenizer, {name: _tokenize(name, parts, tokenizer) for name, parts in texts.items()}


def train_tokenizer(texts: Sequence[Sequence[str]]) -> Any:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens with single digits, trained on as much text of each domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for domain in texts for text in _first(domain, TOKENIZER_CHARACTERS)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, model_max_length=SEQ_LEN)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def training_batches(
    data: Mapping[str, DomainData], steps: int, per_domain: int, seed: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield step number and token ids (domains × per_domain, SEQ_LEN). Each pass over a domain has a new order."""
    generator = torch.Generator().manual_seed(seed)
    orders = {name: _shuffled_forever(len(part.train), generator) for name, part in data.items()}
    for step in range(steps):
        rows = [part.train[[next(orders[name]) for _ in range(per_domain)]] for name, part in data.items()]
        yield step, torch.cat(rows)


def _shuffled_forever(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Texts until they hold this many characters."""
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _split(documents: Iterable[str]) -> dict[str, list[str]]:
    """Documents by part: a hash puts a tenth into `calibration`, a tenth into `held_out`. Duplicates count once."""
    parts: dict[str, list[str]] = {"train": [], "calibration": [], "held_out": []}
    for text in dict.fromkeys(documents):
        tenth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") % 10
        parts[{0: "held_out", 1: "calibration"}.get(tenth, "train")].append(text)
    return parts


def _tokenize(domain: str, texts: Mapping[str, Sequence[str]], tokenizer: Any) -> DomainData:
    held_out = _pack(texts["held_out"], tokenizer)
    calibration = _without_shared(_pack(texts["calibration"], tokenizer), held_out)
    train = _without_shared(_pack(texts["train"], tokenizer), torch.cat([calibration, held_out]))
    if len(train) == 0 or len(calibration) < CALIBRATION_SEQUENCES or len(held_out) < HELD_OUT_SEQUENCES:
        raise CalibrationError(
            f"This Python installation has too little text for the demo's domain {domain!r}: {len(calibration)} "
            f"sequences of {SEQ_LEN} tokens to calibrate on ({CALIBRATION_SEQUENCES} needed) and {len(held_out)} "
            f"held out ({HELD_OUT_SEQUENCES} needed). Use a Python with its full standard library."
        )
    return DomainData(train, _spread(calibration, CALIBRATION_SEQUENCES), _spread(held_out, HELD_OUT_SEQUENCES))


def _without_shared(sequences: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The sequences (N, SEQ_LEN) that share no run of SHARED_TOKENS tokens with any in `other`."""
    known = {run for row in _as_bytes(other) for run in _runs(row)}
    return sequences[[known.isdisjoint(_runs(row)) for row in _as_bytes(sequences)]]


def _as_bytes(sequences: torch.Tensor) -> Iterator[bytes]:
    return (row.tobytes() for row in sequences.to(torch.int16).numpy())


def _runs(row: bytes) -> Iterator[bytes]:
    size = torch.int16.itemsize
    return (row[start : start + SHARED_TOKENS * size] for start in range(0, len(row) - SHARED_TOKENS * size + 1, size))


def _spread(sequences: torch.Tensor, count: int) -> torch.Tensor:
    """`count` sequences at equal distances, so that they come from many documents and not only from the first few."""
    return sequences[torch.arange(count) * len(sequences) // count]


def _pack(texts: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """Full sequences, int64 (N, SEQ_LEN), of all documents one after the other, an end-of-text token after each."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    tokens = [token for encoding in encodings for token in (*encoding.ids, tokenizer.eos_token_id)]
    full = len(tokens) // SEQ_LEN * SEQ_LEN
    return torch.tensor(tokens[:full], dtype=torch.int64).view(-1, SEQ_LEN)


def save_sequences(path: Path, domains: Mapping[str, DomainData]) -> None:
    """Write the sequences to calibrate on and those held out to one compressed numpy file."""
    parts = {
        f"{part}/{name}": getattr(of_domain, part).to(torch.int16).numpy()
        for part in ("calibration", "held_out")
        for name, of_domain in domains.items()
    }
    np.savez_compressed(path, **parts)


def load_sequences(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """`calibration` and `held_out` as `save_sequences` wrote them: by domain, int64 (N, SEQ_LEN)."""
    with np.load(path, allow_pickle=False) as arrays:
        return {
            part: {name: torch.from_numpy(arrays[f"{part}/{name}"]).long() for name in corpus.DOMAINS}
            for part in ("calibration", "held_out")
        }


def write_recipe(folder: Path, name: str, domains: Mapping[str, torch.Tensor]) -> Path:
    """Write each domain's token ids (N, L) and a recipe with every domain as a source; returns the recipe's path.

    Raises OutputError, ResourceError.
    """
    recipe = folder / f"{name}.json"
    length = max(rows.shape[1] for rows in domains.values())
    sources = [
        {"name": domain, "path": f"{name}-{domain}.jsonl", "samples": len(rows)} for domain, rows in domains.items()
    ]
    with writing(f"Writing {recipe}", folder):
        folder.mkdir(exist_ok=True)
        for source, rows in zip(sources, domains.values(), strict=True):
            lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist())
            (folder / str(source["path"])).write_text(lines, encoding="utf-8")
        recipe.write_text(json.dumps({"name": name, "sequence_length": length, "sources": sources}), encoding="utf-8")
    return recipe
