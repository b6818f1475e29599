"""Generation health: how a model's continuations end, by themselves, in a loop, or not at all.

Heavily pruned models may fall into endless loops, above all while they think, when their perplexity still looks fine.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers import __version__ as transformers_version

from streamprune.calibration.records import load_tokenizer
from streamprune.calibration.sequences import Calibration
from streamprune.config import check_least
from streamprune.errors import CalibrationError, CheckpointError, NonFiniteError, ResourceError, SettingsError
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
from streamprune.models.full_model import FullModel, LoadedModel, find_full_model, load_full_model, release
from streamprune.progress import Progress
from streamprune.reporting.evaluations import RESULT_FORMAT

#: Seconds between two progress lines.
LINE_SECONDS = 15.0
#: The settings that shape the distribution that is sampled from; None leaves all tokens as they are.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

Say = Callable[[str], None]
#: How transformers decodes, by name: greedy and sampled.
Decodings = Mapping[str, GenerationConfig]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How generation is tried. Raises SettingsError for numbers that are too small.

    `prompts_per_source` and `prompt_tokens` are about held-out text; `max_new_tokens` is the most that is generated for
    a prompt, `batch` the most prompts at a time, `seed` that of the sampled continuations. `revision` and
    `against_revision` are for models from the Hub.
    """

    prompts_per_source: int = 4
    prompt_tokens: int = 64
    # Enough for three rounds of a loop as long as a paragraph.
    max_new_tokens: int = 512
    batch: int = 16
    seed: int = 0
    device: str = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    against_revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompts_per_source", "prompt_tokens", "max_new_tokens"):
            check_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        check_least("the batch", self.batch, 1)
        check_least("--seed", self.seed, 0)


def generation_health(
    model: str,
    against: str | None,
    calibration: Calibration | None,
    prompts: Path | None,
    settings: GenerationSettings,
    progress: Progress,
) -> dict[str, Any]:
    """Continue prompts greedily and sampled, and report how the continuations end: the object of `generation.json`.

    Prompts are the beginnings of the sequences of `calibration`, or the lines of the JSONL file `prompts`, or both: as
    plain text, and where the tokenizer has a chat template also as chats, with thinking on and off where it has a
    switch for that. The model is loaded into memory; then, where there is memory for it, the original `against` for the
    same prompts. Raises SettingsError, CheckpointError, CalibrationError, ResourceError and NonFiniteError.
    """
    whole = find_full_model(model, settings.revision, settings.trust_remote_code)
    original = (
        None if against is None else find_full_model(against, settings.against_revision, settings.trust_remote_code)
    )
    tokenizer, notes = _tokenizer_of(whole, calibration, prompts)
    made = collect_prompts(calibration, prompts, settings.prompts_per_source, settings.prompt_tokens, tokenizer)
    longest, length_notes = _new_tokens(made.prompts, settings, [each for each in (whole, original) if each])
    notes += [*made.notes, *length_notes]
    for note in notes:
        progress.say(f"note: {note}")
    progress.say(f"generation: {len(made.prompts)} prompts, greedy and sampled, up to {longest:,} new tokens each")

    mine, decodings, device = _load_and_continue(
        whole,
        made.prompts,
        lambda loaded: _decodings(loaded, tokenizer, longest, notes),
        settings,
        notes,
        progress.say,
    )
    theirs = None
    if original is not None:
        try:
            theirs = _load_and_continue(original, made.prompts, lambda _: decodings, settings, notes, progress.say)[0]
        except ResourceError as error:
            notes.append(f"The original was not compared: {error}")
            progress.say(f"note: {notes[-1]}")
    modes = modes_of(mine, theirs)
    notes += endless_notes(modes)
    return {
        "format": RESULT_FORMAT,
        "model": model,
        "against": against,
        "settings": _settings_object(settings, longest, decodings[SAMPLED], made.switch, device.type),
        "modes": modes,
        "verdict": verdict_of(modes, longest),
        "advice": advice_of(modes, made.switch),
        "examples": examples_of(mine, lambda ids: _text_of(ids, tokenizer)),
        "notes": notes,
    }


def _tokenizer_of(whole: FullModel, calibration: Calibration | None, prompts: Path | None) -> tuple[Any, list[str]]:
    """The model's tokenizer; None and a note where it has none and token ids are enough."""
    if calibration is None and prompts is None:
        raise SettingsError("There is no text to continue: give --data or --prompts.")
    try:
        return load_tokenizer(whole.folder, whole.trust_remote_code), []
    except CalibrationError as error:
        if prompts is not None:
            raise
        return None, [f"Only token ids were continued, and no chats: {str(error).splitlines()[0]}"]


def _new_tokens(
    prompts: Sequence[Prompt], settings: GenerationSettings, models: Sequence[FullModel]
) -> tuple[int, list[str]]:
    """The most new tokens, within the positions that the models know, and notes about what so few cannot show."""
    positions = min((each.positions for each in models if each.positions is not None), default=None)
    wanted, longest = settings.max_new_tokens, max(len(prompt.ids) for prompt in prompts)
    room = wanted if positions is None else positions - longest
    if room < 1:
        raise SettingsError(
            f"A prompt has {longest:,} tokens, and the model knows {positions:,} positions: none is left for new "
            "tokens. Use fewer --prompt-tokens, or shorter --prompts."
        )
    notes = [f"Only {room:,} new tokens: the model knows {positions:,} positions."] if room < wanted else []
    longest = min(room, wanted)
    seen = longest // LEAST_ROUNDS
    if longest < LEAST_TOKENS:
        remedy = "raise --max-new-tokens" if room >= wanted else "use fewer --prompt-tokens"
        notes.append(f"Loops cannot be seen in fewer than {LEAST_TOKENS} new tokens: {remedy}.")
    elif seen < LONGEST_PERIOD:
        notes.append(f"In {longest:,} new tokens only loops of at most {seen} tokens can be seen.")
    return longest, notes


def _decodings(
    loaded: LoadedModel, tokenizer: Any, max_new_tokens: int, notes: list[str]
) -> dict[str, GenerationConfig]:
    """Greedy and sampled decoding by the model's own generation config; temperature 1 where it names none.

    Continuations end with the config's tokens, or else the tokenizer's; a note is added where there are none.
    """
    ends = getattr(loaded.model.generation_config, "eos_token_id", None)
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]
    if not ends:
        notes.append("The model names no token that ends a text, so that nothing could end by itself.")
    decodings = {}
    for name in (GREEDY, SAMPLED):
        config = copy.deepcopy(loaded.model.generation_config)
        config.update(
            do_sample=name == SAMPLED, max_new_tokens=max_new_tokens, max_length=None, min_length=None,
            min_new_tokens=None, num_beams=1, num_return_sequences=1, use_cache=True, return_dict_in_generate=False,
            max_time=None, stop_strings=None,
        )  # fmt: skip
        if name == GREEDY:
            config.update(**dict.fromkeys(_SAMPLING))
        else:
            # transformers' own default is to sample from the 50 likeliest tokens.
            config.update(temperature=config.temperature or 1.0, top_k=config.top_k or 0)
        config.eos_token_id, config.pad_token_id = ends or None, (ends or [0])[0]
        decodings[name] = config
    return decodings


def _load_and_continue(
    whole: FullModel,
    prompts: Sequence[Prompt],
    decodings_of: Callable[[LoadedModel], Decodings],
    settings: GenerationSettings,
    notes: list[str],
    say: Say,
) -> tuple[list[Continuation], Decodings, torch.device]:
    """Load a model, continue all prompts in each decoding, and free it; also returns the decodings and the device."""
    loaded = load_full_model(whole, settings.device)
    say(f"generation: {whole.name} is loaded on {loaded.device}")
    notes += loaded.notes
    decodings = decodings_of(loaded)
    made = []
    for name, config in decodings.items():
        made += continuations(loaded, prompts, name, config, settings, say)
    place = loaded.device
    del loaded
    release(place)
    return made, decodings, place


def continuations(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    name: str,
    config: GenerationConfig,
    settings: GenerationSettings,
    say: Say,
) -> list[Continuation]:
    """The continuation of every prompt, in order, decoded as `config` says (`name` in short).

    Prompts of equal length are batched, so that no padding is needed; batches are halved when memory runs out. The
    same seed, batch and machine give the same samples. Raises ResourceError where a single prompt runs out of memory,
    NonFiniteError for a model whose logits are no numbers, and CheckpointError for tokens that it does not know.
    """
    _check_tokens(loaded, prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    groups = [list(group) for _, group in itertools.groupby(order, key=lambda index: len(prompts[index].ids))]
    found: dict[int, Continuation] = {}
    size, last_line = settings.batch, time.monotonic()
    while groups:
        part = groups[0][:size]
        made = _batch(loaded, [prompts[index] for index in part], config, settings.seed + part[0])
        if made is None:
            free_after_failure(loaded.device)
            if len(part) == 1:
                raise ResourceError(
                    f"Memory ran out with a single continuation of {len(prompts[part[0]].ids)} tokens on "
                    f"{loaded.device}. Free memory, or lower --max-new-tokens."
                )
            size = len(part) // 2
            say(f"note: memory ran out; {size} continuations at a time from now on.")
            continue
        ends = set(config.eos_token_id or [])
        found |= {index: _continuation(prompts[index], row, name, ends) for index, row in zip(part, made, strict=True)}
        groups[0] = groups[0][len(part) :]
        groups = groups if groups[0] else groups[1:]
        if groups and time.monotonic() - last_line >= LINE_SECONDS:
            last_line = time.monotonic()
            say(f"generation: {name}, {len(found)} of {len(prompts)} continuations")
    return [found[index] for index in range(len(prompts))]


def _check_tokens(loaded: LoadedModel, prompts: Sequence[Prompt]) -> None:
    largest = max(max(prompt.ids) for prompt in prompts)
    if largest >= loaded.vocabulary:
        raise CheckpointError(
            f"The prompts have token {largest}, but the model knows only {loaded.vocabulary}. Tokenizer and model do "
            "not belong together."
        )


def _batch(
    loaded: LoadedModel, prompts: Sequence[Prompt], config: GenerationConfig, seed: int
) -> list[list[int]] | None:
    """The new tokens of prompts of one length, padded at their ends; None if memory ran out."""
    ids = torch.tensor([prompt.ids for prompt in prompts], device=loaded.device)
    gpus = [loaded.device] if is_gpu(loaded.device) else []
    try:
        # This batch's random numbers depend on its seed alone, and the global generators stay as they were.
        with torch.random.fork_rng(devices=gpus, device_type=loaded.device.type), torch.inference_mode():
            torch.manual_seed(seed)
            made = loaded.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
                logits_processor=LogitsProcessorList([_CheckFinite()]),
            )  # fmt: skip
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    rows: list[list[int]] = made[:, ids.shape[1] :].tolist()
    return rows


def _continuation(prompt: Prompt, row: list[int], decoding: str, ends: set[int]) -> Continuation:
    end = next((place for place, token in enumerate(row) if token in ends), None)
    return Continuation(prompt, decoding, tuple(row[:end]), end is not None)


class _CheckFinite(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing. Refuses NaN and infinity, which greedy decoding would turn into a loop."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Minus infinity is how other processors forbid a token.
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise NonFiniteError(
                "The model gives NaN or infinity for the next token: nothing can be generated with it."
            )
        return scores


def _settings_object(
    settings: GenerationSettings, longest: int, sampled: GenerationConfig, switch: str | None, device: str
) -> dict[str, Any]:
    """What the figures depend on, as JSON."""
    return {
        "prompts_per_source": settings.prompts_per_source,
        "prompt_tokens": settings.prompt_tokens,
        "max_new_tokens": longest,
        "batch": settings.batch,
        "seed": settings.seed,
        "sampling": {name: value for name in _SAMPLING if (value := getattr(sampled, name, None)) is not None},
        "thinking_switch": switch,
        "device": device,
        "transformers": transformers_version,
    }


def _text_of(ids: Sequence[int], tokenizer: Any) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(ids))
