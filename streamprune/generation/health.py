"""Generation health: how a model's continuations end, by themselves, in a loop, or not at all.

Heavily pruned models may fall into endless loops, above all while they think, when their perplexity still looks fine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import __version__ as transformers_version

from streamprune.calibration.records import load_tokenizer
from streamprune.calibration.sequences import Calibration
from streamprune.config import check_least
from streamprune.errors import CalibrationError, ResourceError, SettingsError
from streamprune.generation.decoding import (
    LEAST_ROUNDS,
    LEAST_TOKENS,
    LONGEST_PERIOD,
    SAMPLED,
    Continuation,
    Decoding,
    continuations,
    decodings,
    ends_of,
)
from streamprune.generation.prompts import Opening, Prompt, Prompts, make_prompts, openings_of, read_openings
from streamprune.generation.summary import advice_of, endless_notes, examples_of, modes_of, verdict_of
from streamprune.models.whole_model import LoadedModel, WholeModel, find_whole, load_whole_model, release
from streamprune.progress import Progress
from streamprune.reporting.evaluations import RESULT_FORMAT

#: Enough for three rounds of a loop as long as a paragraph, and to be waited for.
DEFAULT_NEW_TOKENS = 512
DEFAULT_PROMPTS, DEFAULT_PROMPT_TOKENS, DEFAULT_BATCH = 4, 64, 16

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How generation is tried. Raises SettingsError for numbers that are too small.

    `prompts_per_source` and `prompt_tokens` are about held-out text; `max_new_tokens` is the most that is generated for
    a prompt, `batch` the most prompts at a time, `seed` that of the sampled continuations. `revision` and
    `against_revision` are for models from the Hub.
    """

    prompts_per_source: int = DEFAULT_PROMPTS
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    batch: int = DEFAULT_BATCH
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
    """Continue prompts greedily and sampled, and say how the continuations end: the object of `generation.json`.

    Prompts are the beginnings of the sequences of `calibration`, or the lines of the JSONL file `prompts`, or both:
    raw, and where the tokenizer has a chat template also as chats, with thinking on and off where it can be switched.
    The model is loaded whole; then, where memory is enough for it, the original `against` for the same prompts. Raises
    SettingsError, CheckpointError, CalibrationError, ResourceError and NonFiniteError.
    """
    whole = find_whole(model, settings.revision, settings.trust_remote_code)
    original = None if against is None else find_whole(against, settings.against_revision, settings.trust_remote_code)
    tokenizer, notes = _tokenizer_of(whole, calibration, prompts)
    made = _prompts(calibration, prompts, settings, tokenizer)
    longest, shortened = _new_tokens(made.prompts, settings, [each for each in (whole, original) if each])
    notes += [*made.notes, *shortened]
    for note in notes:
        progress.say(f"note: {note}")
    progress.say(f"generation: {len(made.prompts)} prompts, greedy and sampled, up to {longest:,} new tokens each")

    mine, ways, device = _pruned(whole, made.prompts, tokenizer, longest, settings, notes, progress.say)
    theirs = None if original is None else _original(original, made.prompts, ways, settings.device, notes, progress.say)
    modes = modes_of(mine, theirs)
    notes += endless_notes(modes)
    return {
        "format": RESULT_FORMAT,
        "model": model,
        "against": against,
        "settings": _told_settings(settings, longest, ways, made, device),
        "modes": modes,
        "verdict": verdict_of(modes, longest),
        "advice": advice_of(modes, made.switch),
        "examples": examples_of(mine, lambda ids: _text_of(ids, tokenizer)),
        "notes": notes,
    }


def _tokenizer_of(whole: WholeModel, calibration: Calibration | None, prompts: Path | None) -> tuple[Any, list[str]]:
    """The model's tokenizer; None, and a note, where it has none and ids alone will do."""
    if calibration is None and prompts is None:
        raise SettingsError("There is nothing to go on from: give --data or --prompts.")
    try:
        return load_tokenizer(whole.folder, whole.trust_remote_code), []
    except CalibrationError as error:
        if prompts is not None:
            raise
        return None, [f"Only token ids were continued, and no chats: {str(error).splitlines()[0]}"]


def _prompts(
    calibration: Calibration | None, path: Path | None, settings: GenerationSettings, tokenizer: Any
) -> Prompts:
    openings: list[Opening] = [] if path is None else read_openings(path)
    if calibration is not None:
        openings += openings_of(calibration, settings.prompts_per_source, settings.prompt_tokens, tokenizer)
    made = make_prompts(openings, tokenizer)
    if not made.prompts:
        raise CalibrationError("There is no text to go on from. Give other --data, or --prompts FILE.")
    return made


def _new_tokens(
    prompts: Sequence[Prompt], settings: GenerationSettings, models: Sequence[WholeModel]
) -> tuple[int, list[str]]:
    """The most new tokens for all prompts, within the positions that the models know; and a note where that is less."""
    positions = min((each.positions for each in models if each.positions is not None), default=None)
    wanted, longest = settings.max_new_tokens, max(len(prompt.ids) for prompt in prompts)
    room = wanted if positions is None else positions - longest
    if room < 1:
        raise SettingsError(
            f"A prompt has {longest:,} tokens, and the model knows {positions:,} positions: nothing is left to go on "
            "with. Use fewer --prompt-tokens, or shorter --prompts."
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


def _continued(
    loaded: LoadedModel, prompts: Sequence[Prompt], ways: Sequence[Decoding], whole: WholeModel, say: Say
) -> list[Continuation]:
    say(f"generation: {whole.name} is loaded on {loaded.device}")
    return [each for way in ways for each in continuations(loaded, prompts, way, say)]


def _pruned(
    whole: WholeModel,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    longest: int,
    settings: GenerationSettings,
    notes: list[str],
    say: Say,
) -> tuple[list[Continuation], tuple[Decoding, ...], str]:
    """What the model itself makes of the prompts, how they were decoded, and on what kind of device."""
    loaded = load_whole_model(whole, settings.device)
    ways = decodings(loaded, tokenizer, longest, settings.batch, settings.seed)
    if not ends_of(loaded, tokenizer):
        notes.append("The model names no token that ends a text, so that nothing could end by itself.")
    made, device = _continued(loaded, prompts, ways, whole, say), loaded.device
    notes += loaded.notes
    del loaded
    release(device)
    return made, ways, device.type


def _original(
    whole: WholeModel, prompts: Sequence[Prompt], ways: Sequence[Decoding], device: str, notes: list[str], say: Say
) -> list[Continuation] | None:
    """What the original makes of the prompts, decoded as the pruned model was; None, and a note, if it does not fit."""
    try:
        loaded = load_whole_model(whole, device)
    except ResourceError as error:
        notes.append(f"Nothing is known of the original: {error}")
        say(f"note: {notes[-1]}")
        return None
    made = _continued(loaded, prompts, ways, whole, say)
    place = loaded.device
    notes += loaded.notes
    del loaded
    release(place)
    return made


def _told_settings(
    settings: GenerationSettings, longest: int, ways: Sequence[Decoding], made: Prompts, device: str
) -> dict[str, Any]:
    """What decides the figures, as JSON."""
    sampling: Mapping[str, Any] = next(way.sampling for way in ways if way.name == SAMPLED)
    return {
        "prompts_per_source": settings.prompts_per_source,
        "prompt_tokens": settings.prompt_tokens,
        "max_new_tokens": longest,
        "batch": settings.batch,
        "seed": settings.seed,
        "sampling": dict(sampling),
        "thinking_switch": made.switch,
        "device": device,
        "transformers": transformers_version,
    }


def _text_of(ids: Sequence[int], tokenizer: Any) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(ids))
