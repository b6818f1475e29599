"""The demo's model: the trained one that comes with the package, and the training that makes such a model."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from streamprune.calibration import builtin_text as corpus
from streamprune.demo import data
from streamprune.errors import SettingsError
from streamprune.files.durable import writing
from streamprune.hardware.memory import check_disk

#: The trained model that comes with the package: bfloat16 weights, tokenizer, sequences, and how it was made.
#: `tools/train_demo` makes it.
SHIPPED = Path(__file__).resolve().parent / "trained"
#: In that folder, and in the folder of any trained model.
MODEL_NAME, SEQUENCES_NAME, RECIPE_NAME = "model", "sequences.npz", "recipe.json"

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
#: Disk space for the model and four pruned ones, with room to spare.
NEEDED_BYTES = 64 * 1024**2
#: Seconds between two progress lines.
LINE_SECONDS = 10.0

Echo = Callable[[str], None]


@dataclass(frozen=True)
class DemoModel:
    """A trained model on disk. `calibration` and `held_out` map a domain to token ids, int64 (N, SEQ_LEN)."""

    folder: Path
    calibration: Mapping[str, torch.Tensor] = field(repr=False)
    held_out: Mapping[str, torch.Tensor] = field(repr=False)


def shipped_model(folder: Path, echo: Echo = print) -> DemoModel:
    """Copy the trained model that comes with the package to `folder`, in float32, unless the copy exists.

    The package has its weights in bfloat16, in which CPUs without special instructions compute 60 times slower than in
    float32. Raises OutputError, ResourceError if `folder` cannot be written.
    """
    place = folder / f"shipped-{_short_hash((SHIPPED / RECIPE_NAME).read_bytes())}"
    if not place.is_dir():
        _check_writable(folder)
        model = Qwen3MoeForCausalLM.from_pretrained(SHIPPED / MODEL_NAME, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(SHIPPED / MODEL_NAME)
        with _new_folder(place) as staging:
            _save(staging, model, tokenizer)
            for name in (SEQUENCES_NAME, RECIPE_NAME):
                shutil.copy(SHIPPED / name, staging)
    echo(f"The trained model: {place / MODEL_NAME}")
    return _load(place)


def trained_model(
    folder: Path, steps: int = DEFAULT_STEPS, seed: int = 0, threads: int | None = None, echo: Echo = print
) -> DemoModel:
    """Train a model in `folder`, unless one was trained there with the same settings, libraries and code.

    700 steps take minutes on two cores. With one thread the same seed gives the same model bit for bit on machines of
    one kind. Raises SettingsError for impossible numbers, CalibrationError if Python's library has too little text,
    OutputError, ResourceError if `folder` cannot be written.
    """
    if steps < 1 or (threads is not None and threads < 1):
        raise SettingsError(f"{steps} training steps on {threads} threads: both must be at least 1.")
    recipe = _recipe(steps, seed, threads)
    sources = b"".join(Path(str(module)).read_bytes() for module in (corpus.__file__, data.__file__, __file__))
    place = folder / f"trained-{_short_hash(json.dumps(recipe).encode() + sources)}"
    if place.is_dir():
        echo(f"Found the model trained earlier: {place / MODEL_NAME}")
        return _load(place)
    _check_writable(folder)
    started = time.monotonic()
    with torch_threads(threads):
        echo("Reading text from Python's own library and training a tokenizer on it ...")
        tokenizer, domains = data.prepare_data(seed)
        model = _train(domains, steps, seed, tokenizer.eos_token_id, echo)
    recipe["training_seconds"] = round(time.monotonic() - started)
    with _new_folder(place) as staging:
        _save(staging, model, tokenizer)
        data.save_sequences(staging / SEQUENCES_NAME, domains)
        (staging / RECIPE_NAME).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return _load(place)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run torch on this many threads (None: as many as it would take), and restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def model_config(eos_token_id: int) -> Any:
    """The small Qwen3-MoE: about 1.9 million parameters, most of them in 4 layers of 32 experts."""
    return Qwen3MoeConfig(
        vocab_size=data.VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=data.SEQ_LEN,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        dtype="float32",
    )


def _recipe(steps: int, seed: int, threads: int | None) -> dict[str, Any]:
    """What a training depends on, besides the code."""
    return {
        "steps": steps,
        "seed": seed,
        "threads": threads,
        "text": "Python's own standard library and language reference (PSF License), and generated records",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder / MODEL_NAME)
    tokenizer.save_pretrained(folder / MODEL_NAME)


def _load(place: Path) -> DemoModel:
    return DemoModel(place / MODEL_NAME, **data.load_sequences(place / SEQUENCES_NAME))


@contextmanager
def _new_folder(place: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `place` at the end: a folder at `place` is complete at any time."""
    temporary = tempfile.TemporaryDirectory(prefix=".saving-", dir=place.parent)
    with writing(f"Saving the model in {place}", place.parent), temporary as name:
        staging = Path(name) / place.name
        staging.mkdir()
        yield staging
        if not place.is_dir():  # else another process has made the same model meanwhile
            staging.rename(place)


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written before the training, not after it."""
    check_disk(folder, NEEDED_BYTES)
    with writing(f"Writing to {folder}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder):
            pass


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _train(domains: Mapping[str, data.DomainData], steps: int, seed: int, eos_token_id: int, echo: Echo) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM._from_config(model_config(eos_token_id), experts_implementation="grouped_mm")
    echo(
        f"Training a Qwen3-MoE of {model.config.num_hidden_layers} layers with {model.config.num_experts} experts "
        f"each, {model.num_parameters():,} parameters, for {steps} steps (CPU threads: {torch.get_num_threads()}) ..."
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_share(step, steps))
    model.train()
    started = last_line = time.monotonic()
    for step, batch in data.training_batches(domains, steps, SEQUENCES_PER_DOMAIN, seed):
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
