"""The training of the demo's model: text from Python's own library, a tokenizer, and a small Qwen3-MoE.

Each domain's text has a part to train on, one to calibrate on and one held out. Used by `tools/train_demo`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from streamprune.calibration import builtin_text as corpus
from streamprune.demo.demo import (
    CALIBRATION_SEQUENCES,
    MODEL_NAME,
    NEEDED_BYTES,
    RECIPE_NAME,
    SEQUENCES_NAME,
    DemoModel,
    Echo,
    load_model,
    one_thread,
    saving,
)
from streamprune.errors import CalibrationError, SettingsError
from streamprune.files.durable import writing
from streamprune.hardware.memory import check_disk

#: Tokens per sequence, and the model's number of positions.
SEQ_LEN = 128
VOCAB_SIZE = 1024
END_OF_TEXT = "<|endoftext|>"
#: Text read per domain. Four fifths of it last for about 900 training steps; longer training repeats it.
CHARACTERS = 1_500_000
#: Training text per domain that the tokenizer is trained on; it hardly changes with more.
TOKENIZER_CHARACTERS = 400_000
#: Held-out sequences per domain.
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


DEFAULT_STEPS = 700
SEQUENCES_PER_DOMAIN = 4
LEARNING_RATE = 4e-3
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
WARM_UP_STEPS = 60
GRADIENT_NORM = 1.0
#: Weight of the load-balancing loss, taken per layer: its sum over layers, which transformers offers, allows single
#: layers to be unbalanced. With 0.01 to 0.04 the calibration text made little difference to the pruned models of some
#: seeds; with 0.1 it did for each of the six seeds tried.
BALANCE_COEFFICIENT = 0.1
#: Seconds between two progress lines.
LINE_SECONDS = 10.0


def trained_model(
    folder: Path, steps: int = DEFAULT_STEPS, seed: int = 0, echo: Echo = print, layers: int = 4, experts: int = 32
) -> DemoModel:
    """Train a model in `folder`, unless one was trained there with the same settings, libraries and code.

    It has `layers` decoder layers with `experts` experts each.

    700 steps take minutes. One thread trains, so that the same seed gives the same model bit for bit on machines of one
    kind. Raises SettingsError without a step, CalibrationError if Python's library has too little text, OutputError,
    ResourceError if `folder` cannot be written.
    """
    if steps < 1:
        raise SettingsError(f"--steps {steps} is too small: at least 1.")
    config = model_config(layers, experts)
    recipe = _recipe(steps, seed, config)
    sources = b"".join(Path(str(module)).read_bytes() for module in (corpus.__file__, __file__))
    place = folder / f"trained-{hashlib.sha256(json.dumps(recipe).encode() + sources).hexdigest()[:12]}"
    if place.is_dir():
        echo(f"Found the model trained earlier: {place / MODEL_NAME}")
        return load_model(place)
    # A folder that cannot be written is refused before the training, not after it.
    check_disk(folder, NEEDED_BYTES)
    with writing(f"Writing to {folder}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=".saving-", dir=folder).cleanup()
    started = time.monotonic()
    with one_thread():
        echo("Reading text from Python's own library and training a tokenizer on it ...")
        tokenizer, domains = prepare_data(seed)
        config.eos_token_id = tokenizer.eos_token_id
        model = _train(domains, steps, seed, config, echo)
    recipe["training_seconds"] = round(time.monotonic() - started)
    with saving(place, model, tokenizer) as staging:
        save_sequences(staging / SEQUENCES_NAME, domains)
        (staging / RECIPE_NAME).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return load_model(place)


def model_config(layers: int = 4, experts: int = 32) -> Any:
    """The small Qwen3-MoE: with 4 layers of 32 experts about 1.9 million parameters, most of them in the experts."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=experts,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=SEQ_LEN,
        bos_token_id=None,
        dtype="float32",
    )


def _recipe(steps: int, seed: int, config: Any) -> dict[str, Any]:
    """What a training depends on, besides the code."""
    return {
        "layers": config.num_hidden_layers,
        "experts": config.num_experts,
        "steps": steps,
        "seed": seed,
        "threads": 1,
        "text": "Python's own standard library and language reference (PSF License), and generated records",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _train(domains: Mapping[str, DomainData], steps: int, seed: int, config: Any, echo: Echo) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm")
    echo(
        f"Training a Qwen3-MoE of {model.config.num_hidden_layers} layers with {model.config.num_experts} experts "
        f"each, {model.num_parameters():,} parameters, for {steps} steps ..."
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_share(step, steps))
    model.train()
    started = last_line = time.monotonic()
    for step, batch in training_batches(domains, steps, SEQUENCES_PER_DOMAIN, seed):
        text_loss, balance_loss = _losses(model, batch)
        torch.autograd.backward(text_loss + BALANCE_COEFFICIENT * balance_loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        done, now = step + 1, time.monotonic()
        if done == steps or now - last_line >= LINE_SECONDS:
            last_line = now
            left = (now - started) / done * (steps - done)
            echo(f"  step {done}/{steps}: loss {float(text_loss.detach()):.2f}, {left:.0f} s left")
    return model.eval()


def _learning_rate_share(step: int, steps: int) -> float:
    """Warm-up, then linear to zero."""
    return min((step + 1) / WARM_UP_STEPS, (steps - step) / max(1, steps - WARM_UP_STEPS))


def _losses(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean next-token loss of token ids (B, L) in nats, and the load-balancing loss summed over the layers."""
    output = model(input_ids=batch, output_router_logits=True, use_cache=False)
    text_loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    config = model.config
    per_layer = [
        load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
        for logits in output.router_logits
    ]
    return text_loss, torch.stack(per_layer).sum()
