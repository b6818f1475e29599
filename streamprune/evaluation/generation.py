"""Generation health: whether a model's continuations end with EOS, in a loop, or not at all.

Heavily pruned models may get into endless loops, especially while thinking, even if their perplexity still looks fine.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers import __version__ as transformers_version

from streamprune.calibration.sequences import Calibration
from streamprune.calibration.tokens import load_tokenizer
from streamprune.config import EvalSettings
from streamprune.errors import CalibrationError, CheckpointError, NonFiniteError, ResourceError, SettingsError
from streamprune.evaluation.evaluate import with_model_date
from streamprune.evaluation.generation_figures import (
    GREEDY,
    LEAST_ROUNDS,
    LEAST_TOKENS,
    LONGEST_PERIOD,
    SAMPLED,
    Continuation,
    advice_of,
    endless_notes,
    examples_of,
    modes_of,
    verdict_of,
)
from streamprune.evaluation.prompts import Prompt, collect_prompts
from streamprune.hardware.device import free_after_failure, is_gpu, is_out_of_memory
from streamprune.models.full_model import FullModel, LoadedModel, find_full_model, load_full_model
from streamprune.progress import Progress
from streamprune.reporting.evaluations import RESULT_FORMAT
from streamprune.targets import check_least

#: Seconds between two progress lines.
LINE_SECONDS = 15.0
#: The settings of the sampling distribution; None disables one.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The settings of generation. Raises SettingsError for numbers that are too small.

    `prompts` is a JSONL file of the user's own; `prompts_per_source` and `prompt_tokens` are about held-out text;
    `max_new_tokens` is the most that is generated for a prompt, `batch` the most prompts at a time.
    """

    prompts: Path | None = None
    prompts_per_source: int = 4
    prompt_tokens: int = 64
    # Enough for three rounds of a loop as long as a paragraph.
    max_new_tokens: int = 512
    batch: int = 16

    def __post_init__(self) -> None:
        for name in ("prompts_per_source", "prompt_tokens", "max_new_tokens", "batch"):
            check_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)


def generation_health(
    settings: EvalSettings, generation: GenerationSettings, data: Calibration | None, progress: Progress
) -> dict[str, Any]:
    """Continue prompts greedily and sampled, and report how the continuations end: the object of `generation.json`.

    Prompts come from `data` and `generation.prompts` (see `collect_prompts`). The model is loaded completely, then the
    original, if memory allows. Raises SettingsError, CheckpointError, CalibrationError, ResourceError, NonFiniteError.
    """
    check_least("--seed", settings.seed or 0, 0)
    if data is None and generation.prompts is None:
        raise SettingsError("There is no text to continue: give --data or --prompts.")
    models = [find_full_model(settings.model, settings.revision, settings.trust_remote_code)]
    if settings.against is not None:
        models.append(find_full_model(settings.against, settings.against_revision, settings.trust_remote_code))
    tokenizer, notes = _tokenizer(settings, models[0], is_needed=generation.prompts is not None)
    prompts, switch, prompt_notes = collect_prompts(
        data, generation.prompts, generation.prompts_per_source, generation.prompt_tokens, tokenizer,
        with_model_date(settings).day,
    )  # fmt: skip
    longest, length_notes = _new_tokens(prompts, generation.max_new_tokens, models)
    notes += [*prompt_notes, *length_notes]
    for note in notes:
        progress.say(f"note: {note}")
    progress.say(f"generation: {len(prompts)} prompts, greedy and sampled, up to {longest:,} new tokens each")
    trial = _Trial(settings, generation, prompts, longest, tokenizer, notes, progress.say)
    mine, facts = trial.run(models[0]), trial.facts(switch)
    theirs = None
    try:
        theirs = trial.run(models[1]) if settings.against is not None else None
    except ResourceError as error:
        notes.append(f"The original was not compared: {error}")
        progress.say(f"note: {notes[-1]}")
    modes = modes_of(mine, theirs)
    notes += endless_notes(modes)
    return {
        "format": RESULT_FORMAT,
        "model": settings.model,
        "against": settings.against,
        "settings": facts,
        "modes": modes,
        "verdict": verdict_of(modes, longest),
        "advice": advice_of(modes, switch),
        "examples": examples_of(mine, tokenizer),
        "notes": notes,
    }


def _tokenizer(settings: EvalSettings, model: FullModel, is_needed: bool) -> tuple[Any, list[str]]:
    """The model's tokenizer, and no note; where it has none and `is_needed` is false, None and what that means."""
    try:
        return load_tokenizer(model.checkpoint.folder, settings.trust_remote_code), []
    except CalibrationError as error:
        if is_needed:
            raise
        return None, [f"Only token ids were continued, and no chats: {str(error).splitlines()[0]}"]


def _new_tokens(prompts: Sequence[Prompt], wanted: int, models: Sequence[FullModel]) -> tuple[int, list[str]]:
    """The most new tokens, within the models' positions, and notes on loops that so few tokens cannot show."""
    positions = min((each.positions for each in models if each.positions is not None), default=None)
    longest = max(len(prompt.ids) for prompt in prompts)
    room = wanted if positions is None else positions - longest
    if room < 1:
        raise SettingsError(
            f"A prompt has {longest:,} tokens, and the model has {positions:,} positions: none is left for new "
            "tokens. Use fewer --prompt-tokens, or shorter --prompts."
        )
    notes = [f"Only {room:,} new tokens: the model has {positions:,} positions."] if room < wanted else []
    number = min(room, wanted)
    if number < LEAST_TOKENS:
        remedy = "raise --max-new-tokens" if room >= wanted else "use fewer --prompt-tokens"
        notes.append(f"Loops cannot be seen in fewer than {LEAST_TOKENS} new tokens: {remedy}.")
    elif number // LEAST_ROUNDS < LONGEST_PERIOD:
        notes.append(f"In {number:,} new tokens only loops of at most {number // LEAST_ROUNDS} tokens can be seen.")
    return number, notes


@dataclass
class _Trial:
    """The same prompts, continued by one model after the other as the generation config of the first one says.

    `longest` is the most new tokens. `decodings`, greedy and sampled by name, are those of the first model; `device` is
    that of the last. Notes for the user are added to `notes`.
    """

    settings: EvalSettings
    generation: GenerationSettings
    prompts: Sequence[Prompt]
    longest: int
    tokenizer: Any
    notes: list[str]
    say: Callable[[str], None]
    decodings: dict[str, GenerationConfig] = field(default_factory=dict)
    device: str = ""

    def run(self, full: FullModel) -> list[Continuation]:
        """Load a model, continue all prompts in each decoding, and free it. Raises as `generation_health` does."""
        loaded = load_full_model(full, self.settings.device)
        self.say(f"generation: {full.name} is loaded on {loaded.device}")
        self.notes += loaded.notes
        self.device = loaded.device.type
        self.decodings = self.decodings or self._decodings(loaded.model.generation_config)
        largest = max(max(prompt.ids) for prompt in self.prompts)
        vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
        if largest >= vocabulary:
            raise CheckpointError(
                f"The prompts have token {largest}, but the model has only {vocabulary} tokens. The tokenizer does not "
                "belong to this model."
            )
        made = [each for name in self.decodings for each in self._continuations(loaded, name)]
        device = loaded.device
        del loaded
        # Nothing refers to the model any more.
        free_after_failure(device)
        return made

    def facts(self, switch: str | None) -> dict[str, Any]:
        """The settings on which the results depend, as JSON; `switch` is the template's variable for thinking."""
        sampled = self.decodings[SAMPLED]
        return {
            "prompts_per_source": self.generation.prompts_per_source,
            "prompt_tokens": self.generation.prompt_tokens,
            "max_new_tokens": self.longest,
            "batch": self.generation.batch,
            "seed": self.settings.seed or 0,
            "sampling": {name: value for name in _SAMPLING if (value := getattr(sampled, name, None)) is not None},
            "thinking_switch": switch,
            "device": self.device,
            "transformers": transformers_version,
        }

    def _decodings(self, stated: GenerationConfig) -> dict[str, GenerationConfig]:
        """Greedy and sampled decoding by a model's own generation config; temperature 1 if it has none.

        Continuations end with the config's end tokens, or else the tokenizer's; a note is added if there are none.
        """
        ends = getattr(stated, "eos_token_id", None)
        if ends is None and self.tokenizer is not None:
            ends = self.tokenizer.eos_token_id
        ends = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]
        if not ends:
            self.notes.append("The model has no end-of-text token, so no continuation could end by itself.")
        decodings = {}
        for name in (GREEDY, SAMPLED):
            config = decodings[name] = copy.deepcopy(stated)
            config.update(
                do_sample=name == SAMPLED, max_new_tokens=self.longest, max_length=None, min_length=None,
                min_new_tokens=None, num_beams=1, num_return_sequences=1, use_cache=True, return_dict_in_generate=False,
                max_time=None, stop_strings=None,
            )  # fmt: skip
            if name == GREEDY:
                config.update(**dict.fromkeys(_SAMPLING))
            else:
                # transformers' own default is to sample from the 50 likeliest tokens.
                config.update(temperature=config.temperature or 1.0, top_k=config.top_k or 0)
            config.eos_token_id, config.pad_token_id = ends or None, (ends or [0])[0]
        return decodings

    def _continuations(self, loaded: LoadedModel, name: str) -> list[Continuation]:
        """The continuation of every prompt, in order, in the decoding `name`.

        Prompts of equal length are batched, so that no padding is needed; batches are halved when memory runs out. The
        same seed, batch and machine give the same samples.
        """
        config, lengths = self.decodings[name], [len(prompt.ids) for prompt in self.prompts]
        pending = sorted(range(len(lengths)), key=lambda index: lengths[index])
        found: dict[int, Continuation] = {}
        size, paced = self.generation.batch, _Paced(self.say)
        while pending:
            part = [index for index in pending[:size] if lengths[index] == lengths[pending[0]]]
            prompts = [self.prompts[index] for index in part]
            so_far = f"generation, {name}: {len(found)} of {len(lengths)} continuations done, {len(part)} in progress"
            watch = _EachToken(paced.say, so_far, self.longest)
            rows = _batch(loaded, prompts, config, (self.settings.seed or 0) + part[0], watch)
            if rows is None:
                free_after_failure(loaded.device)
                if len(part) == 1:
                    raise ResourceError(
                        f"Memory ran out with a single continuation of {lengths[part[0]]} tokens on {loaded.device}. "
                        "Free memory, or lower --max-new-tokens."
                    )
                size = len(part) // 2
                self.say(f"note: memory ran out; {size} continuations at a time from now on.")
                continue
            ends = set(config.eos_token_id or [])
            for index, prompt, row in zip(part, prompts, rows, strict=True):
                end = next((place for place, token in enumerate(row) if token in ends), None)
                found[index] = Continuation(prompt, name, tuple(row[:end]), end is not None)
            pending = pending[len(part) :]
        return [found[index] for index in range(len(lengths))]


def _batch(
    loaded: LoadedModel, prompts: Sequence[Prompt], config: GenerationConfig, seed: int, watch: _EachToken
) -> list[list[int]] | None:
    """The new tokens of prompts of one length, padded at their ends; None if memory ran out.

    `watch` sees every token. Raises NonFiniteError for logits with NaN or infinity.
    """
    ids = torch.tensor([prompt.ids for prompt in prompts], device=loaded.device)
    gpus = [loaded.device] if is_gpu(loaded.device) else []
    try:
        # This batch's random numbers only depend on its seed, and the global generators are restored.
        with torch.random.fork_rng(devices=gpus, device_type=loaded.device.type), torch.inference_mode():
            torch.manual_seed(seed)
            made = loaded.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
                logits_processor=LogitsProcessorList([watch]),
            )  # fmt: skip
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    rows: list[list[int]] = made[:, ids.shape[1] :].tolist()
    return rows


class _Paced:
    """Prints lines, none sooner than LINE_SECONDS after the one before."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._last = say, time.monotonic()

    def say(self, line: str) -> None:
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            self._say(line)


class _EachToken(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing: calls `say` with `text` and the number of each new token, of `most`.

    Raises NonFiniteError for NaN and infinity, which greedy decoding would turn into a loop.
    """

    def __init__(self, say: Callable[[str], None], text: str, most: int) -> None:
        self._say, self._text, self._most, self._number = say, text, most, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Other processors exclude a token with minus infinity.
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise NonFiniteError("The model's logits for the next token have NaN or infinity: it cannot generate.")
        self._number += 1
        self._say(f"{self._text} (token {self._number:,} of at most {self._most:,})")
        return scores
