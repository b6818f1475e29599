"""Trains the demo's model, and keeps it: a second call with the same recipe finds it on disk."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
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
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from streamprune.calibration import builtin_text as corpus
from streamprune.demo import data
from streamprune.errors import OutputError, SettingsError
from streamprune.hardware.memory import check_disk

SEQUENCES_PER_DOMAIN = 4
LEARNING_RATE = 4e-3
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
WARM_UP_STEPS = 60
GRADIENT_NORM = 1.0
#: Of the load-balancing loss of one layer. Taken per layer: the sum over layers that transformers offers is content
#: with layers that are each unbalanced. With 0.01 to 0.04 the calibration made little difference to the models of
#: some seeds; with 0.1 it did with each of the six that were tried.
BALANCE_COEFFICIENT = 0.1
#: Disk space for the model and four pruned ones, with room to spare.
NEEDED_BYTES = 64 * 1024**2
#: Seconds between two lines of progress where there is no terminal for a bar.
LINE_SECONDS = 10.0

MODEL_NAME = "model"
CALIBRATION_NAME = "calibration.safetensors"
HELD_OUT_NAME = "held-out.safetensors"


@dataclass(frozen=True)
class TrainedModel:
    """A trained model on disk. `calibration` and `held_out` map a domain to token ids, int64 (N, SEQ_LEN).

    `seconds` is what making it took, None if it was found ready.
    """

    folder: Path
    calibration: Mapping[str, torch.Tensor] = field(repr=False)
    held_out: Mapping[str, torch.Tensor] = field(repr=False)
    seconds: float | None


def trained_model(
    folder: Path,
    steps: int = 700,
    seed: int = 0,
    threads: int | None = None,
    echo: Callable[[str], None] = print,
) -> TrainedModel:
    """The demo's model under `folder`, trained if it is not there yet; 700 steps take minutes on two cores.

    With one thread the same seed gives the same model bit for bit. Raises SettingsError for impossible numbers,
    CalibrationError if Python's library holds too little text, OutputError if `folder` cannot be written.
    """
    if steps < 1 or (threads is not None and threads < 1):
        raise SettingsError(f"{steps} training steps on {threads} threads: at least one of each is needed.")
    place = folder / f"trained-{_recipe_hash(steps, seed, threads)}"
    seconds = None
    if place.is_dir():
        echo(f"Found the model trained earlier: {place / MODEL_NAME}")
    else:
        started = time.monotonic()
        with torch_threads(threads):
            _make(place, steps, seed, echo)
        seconds = time.monotonic() - started
    return TrainedModel(
        place / MODEL_NAME, _load_domains(place / CALIBRATION_NAME), _load_domains(place / HELD_OUT_NAME), seconds
    )


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
    """The small Qwen3-MoE: about 1.9 million parameters, most of them in 4 × 32 experts."""
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


def _load_domains(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(path)
    return {name: tensors[name] for name in corpus.DOMAINS}  # the file has them in alphabetical order


def _recipe_hash(steps: int, seed: int, threads: int | None) -> str:
    """Changes with everything that the model depends on: numbers, code that makes it, libraries, Python's own text."""
    sources = b"".join(Path(str(module)).read_bytes() for module in (corpus.__file__, data.__file__, __file__))
    recipe = {
        "steps": steps,
        "seed": seed,
        "threads": threads,
        "source": hashlib.sha256(sources).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
    }
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def _make(place: Path, steps: int, seed: int, echo: Callable[[str], None]) -> None:
    """Train and save. `place` appears in one rename, so that what is there is whole whenever the work is killed."""
    _check_writable(place.parent)
    echo("Reading text from Python's own library and training a tokenizer on it ...")
    tokenizer, domains = data.prepare_data(seed)
    model = _train(domains, steps, seed, tokenizer.eos_token_id, echo)
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=place.parent) as name:
            staging = Path(name) / place.name
            staging.mkdir()
            save_file({name: part.calibration for name, part in domains.items()}, staging / CALIBRATION_NAME)
            save_file({name: part.held_out for name, part in domains.items()}, staging / HELD_OUT_NAME)
            model.save_pretrained(staging / MODEL_NAME)
            tokenizer.save_pretrained(staging / MODEL_NAME)
            staging.rename(place)
    except OSError as error:
        if not place.is_dir():  # else another process has made the same model meanwhile
            raise OutputError(f"The demo's model cannot be kept in {place.parent}: {error}.") from error


def _check_writable(folder: Path) -> None:
    """Find out before the training, not after it."""
    check_disk(folder, NEEDED_BYTES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}. Choose another place with -o.") from error


def _train(
    domains: Mapping[str, data.DomainData], steps: int, seed: int, eos_token_id: int, echo: Callable[[str], None]
) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM._from_config(model_config(eos_token_id), experts_implementation="grouped_mm")
    echo(
        f"Training a Qwen3-MoE of {model.config.num_hidden_layers} blocks with {model.config.num_experts} experts "
        f"each, {model.num_parameters():,} parameters, for {steps} steps (CPU threads: {torch.get_num_threads()}) ..."
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_share(step, steps))
    model.train()
    with _TrainingProgress(steps, echo) as progress:
        for step, batch in data.training_batches(domains, steps, SEQUENCES_PER_DOMAIN, seed):
            text_loss, balance_loss = _losses(model, batch)
            torch.autograd.backward(text_loss + BALANCE_COEFFICIENT * balance_loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.step(step + 1, float(text_loss.detach()))
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


class _TrainingProgress:
    """A bar on a terminal; elsewhere a line now and then, so that no log has an unexplained gap."""

    def __init__(self, steps: int, echo: Callable[[str], None]) -> None:
        self._steps, self._echo = steps, echo
        self._started = self._told = time.monotonic()
        self._bar = tqdm(total=steps, desc="training", unit="step", leave=False) if sys.stderr.isatty() else None

    def __enter__(self) -> _TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, done: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
            self._bar.update()
        now = time.monotonic()
        if done == self._steps or (self._bar is None and now - self._told >= LINE_SECONDS):
            if self._bar is not None:
                self._bar.close()  # the last line is for the terminal, too
            self._told = now
            left = (now - self._started) / done * (self._steps - done)
            self._echo(f"  step {done}/{self._steps}: loss {loss:.2f}, {left:.0f} s left")
