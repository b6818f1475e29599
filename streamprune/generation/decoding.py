"""What can be seen of a continuation's tokens alone: whether it ends in a loop, and how much it repeats. No torch.

Continuations of prompts through transformers' own `generate`, in batches that shrink when memory runs out.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from streamprune.errors import CheckpointError, NonFiniteError, ResourceError
from streamprune.generation.prompts import Prompt
from streamprune.hardware.device import free_after_failure, is_gpu, is_out_of_memory
from streamprune.models.whole_model import LoadedModel

#: Tokens that a repetition must last to be called a loop. Text has shorter ones of its own: a rule of dashes, the
#: columns of a table, a row of zeros; and models say something a few times without being caught in it.
LEAST_TOKENS = 64
#: A loop is seen three times over: what is said twice, such as a refrain or a quoted question, may still go on.
LEAST_ROUNDS = 3
#: The longest period, in tokens: a paragraph of about a hundred words.
LONGEST_PERIOD = 160
#: The n of "repeated 4-grams".
GRAM = 4


def loop_period(tokens: Sequence[int]) -> int | None:
    """The shortest period p of the loop in which the tokens end; None if they end in none.

    They end in a loop of period p, of at most LONGEST_PERIOD tokens, if the last n = max(LEAST_TOKENS, LEAST_ROUNDS p)
    of them repeat with it: each of the last n - p equals the one p places before. They have to be equal exactly, so
    that a numbered list, or code with similar lines, is none. Fewer than n tokens never make a loop of period p.
    """
    length = len(tokens)
    for period in range(1, min(LONGEST_PERIOD, length // LEAST_ROUNDS) + 1):
        start = length - max(LEAST_TOKENS, LEAST_ROUNDS * period)
        if start >= 0 and tokens[start + period :] == tokens[start : length - period]:
            return period
    return None


def repeated_grams(tokens: Sequence[int], size: int = GRAM) -> float | None:
    """seq-rep-n of Welleck et al. 2019 (arXiv:1908.04319, section 5): 1 - distinct n-grams / all n-grams, 0 to 1.

    None for fewer than n tokens, which have no n-gram.
    """
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


GREEDY, SAMPLED = "greedy", "sampled"
#: Seconds between two lines about how far it is.
TELL_EVERY = 15.0
#: What shapes the distribution that is sampled from; None leaves all tokens as they are.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class Continuation:
    """What a model made of a prompt: its tokens without the one that ended it, if one did."""

    prompt: Prompt
    decoding: str
    tokens: tuple[int, ...] = field(repr=False)
    ended: bool

    @cached_property
    def looped(self) -> bool:
        """Whether it was still in a loop when it was cut off. One that found its own end is none."""
        return not self.ended and loop_period(self.tokens) is not None

    @cached_property
    def repeated(self) -> float | None:
        """The share of its 4-grams that repeat others; None for fewer than four tokens."""
        return repeated_grams(self.tokens)


@dataclass(frozen=True)
class Decoding:
    """How to decode: `config` for transformers, greedy or sampled, at most `batch` prompts at a time."""

    name: str
    config: GenerationConfig = field(repr=False)
    batch: int
    seed: int

    @property
    def sampling(self) -> dict[str, Any]:
        """What shapes the distribution, as JSON."""
        return {name: value for name in _SAMPLING if (value := getattr(self.config, name, None)) is not None}


def decodings(loaded: LoadedModel, tokenizer: Any, max_new_tokens: int, batch: int, seed: int) -> tuple[Decoding, ...]:
    """Greedy and sampled decoding by the model's own generation config.

    Without a temperature of its own the distribution is sampled as it is. Ends are the config's tokens, or else the
    tokenizer's.
    """
    made = []
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
            # transformers itself would take the 50 likeliest tokens where nothing is said.
            config.update(temperature=config.temperature or 1.0, top_k=config.top_k or 0)
        config.eos_token_id = ends_of(loaded, tokenizer) or None
        config.pad_token_id = (config.eos_token_id or [0])[0]
        made.append(Decoding(name, config, batch, seed))
    return tuple(made)


def ends_of(loaded: LoadedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a continuation: the generation config's, or else the tokenizer's."""
    ends = getattr(loaded.model.generation_config, "eos_token_id", None)
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [int(ends)]


def continuations(
    loaded: LoadedModel, prompts: Sequence[Prompt], decoding: Decoding, say: Callable[[str], None]
) -> list[Continuation]:
    """The continuation of every prompt, in their order.

    Prompts of equal length go together, so that no model has to take padding. When memory runs out, fewer do. For the
    same seed, batch and machine sampled ones are the same again. Raises ResourceError where even one does not find the
    memory, NonFiniteError for a model that gives no numbers, and CheckpointError for tokens it does not know.
    """
    _check_tokens(loaded, prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    groups = [list(group) for _, group in itertools.groupby(order, key=lambda index: len(prompts[index].ids))]
    found: dict[int, Continuation] = {}
    size, told = decoding.batch, time.monotonic()
    while groups:
        part = groups[0][:size]
        made = _batch(loaded, [prompts[index] for index in part], decoding, decoding.seed + part[0])
        if made is None:
            free_after_failure(loaded.device)
            if len(part) == 1:
                raise ResourceError(
                    f"Memory runs out with a single continuation of {len(prompts[part[0]].ids)} tokens on "
                    f"{loaded.device}. Free memory, or lower --max-new-tokens."
                )
            size = len(part) // 2
            say(f"note: memory ran out; {size} continuations at a time from now on.")
            continue
        found |= zip(part, made, strict=True)
        groups[0] = groups[0][len(part) :]
        groups = groups if groups[0] else groups[1:]
        if groups and time.monotonic() - told >= TELL_EVERY:
            told = time.monotonic()
            say(f"generation: {decoding.name}, {len(found)} of {len(prompts)} continuations")
    return [found[index] for index in range(len(prompts))]


def _check_tokens(loaded: LoadedModel, prompts: Sequence[Prompt]) -> None:
    largest = max(max(prompt.ids) for prompt in prompts)
    if largest >= loaded.vocabulary:
        raise CheckpointError(
            f"The prompts have token {largest}, but the model knows only {loaded.vocabulary}. Tokenizer and model do "
            "not belong together."
        )


def _batch(loaded: LoadedModel, prompts: Sequence[Prompt], decoding: Decoding, seed: int) -> list[Continuation] | None:
    """The continuations of prompts of one length; None if memory ran out."""
    ids = torch.tensor([prompt.ids for prompt in prompts], device=loaded.device)
    gpus = [loaded.device] if is_gpu(loaded.device) else []
    try:
        # The draws are of this batch alone, and leave those of others as they were.
        with torch.random.fork_rng(devices=gpus, device_type=loaded.device.type), torch.inference_mode():
            torch.manual_seed(seed)
            made = loaded.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=decoding.config,
                logits_processor=LogitsProcessorList([_Finite()]),
            )  # fmt: skip
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    rows = made[:, ids.shape[1] :].tolist()
    return [_continuation(prompt, row, decoding) for prompt, row in zip(prompts, rows, strict=True)]


def _continuation(prompt: Prompt, row: list[int], decoding: Decoding) -> Continuation:
    ends = set(decoding.config.eos_token_id or [])
    end = next((place for place, token in enumerate(row) if token in ends), None)
    return Continuation(prompt, decoding.name, tuple(row[:end]), end is not None)


class _Finite(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing. Stops a model that gives NaN or infinity, of which greedy decoding would make a loop."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Minus infinity is how other processors forbid a token.
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise NonFiniteError(
                "The model gives NaN or infinity for the next token: nothing can be generated with it."
            )
        return scores
