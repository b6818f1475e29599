"""What a program answers for a model, and how far two of them are apart. Needs neither torch nor a client."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

#: Layers of the tiny models: a further one is for multi-token prediction.
LAYERS = 4
#: Tokens of the tiny models, the lengths of the prompts, and how many tokens are generated behind each.
VOCABULARY = 320
LENGTHS = (17, 48, 40)
GENERATED = 12
#: Tokens that the tokenizer has a word for: some programs add words of their own.
WORDS = VOCABULARY - 8


@dataclass(frozen=True)
class Answer:
    """To each prompt: log-probabilities of all tokens behind each of its own (None: not asked), and greedy tokens.

    `drafts` is the number of tokens that were drafted for them (speculative decoding).
    """

    log_probabilities: list[list[list[float] | None]]
    greedy: list[list[int]]
    drafts: int = 0


@dataclass(frozen=True)
class Failure:
    """Why there is no answer; `no_kernel` where the client understood the model and has no kernel for this machine."""

    reason: str
    no_kernel: bool = False


def prompts() -> list[list[int]]:
    """The token ids that every program is asked with."""
    draw = random.Random(5)
    return [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS]


def is_mtp(name: str) -> bool:
    """Whether a tensor belongs to a layer for multi-token prediction."""
    return name.startswith(("mtp.", f"model.layers.{LAYERS}."))


def save(result: Answer | Failure, path: Path) -> None:
    """Write a result, which `load` reads."""
    path.write_text(json.dumps({"kind": type(result).__name__, **asdict(result)}), encoding="utf-8")


def load(path: Path) -> Answer | Failure:
    """The result that `save` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return Answer(**values) if values.pop("kind") == "Answer" else Failure(**values)


def difference(one: Answer, other: Answer) -> float:
    """The largest difference of a log-probability that both have; infinite where there is none, and for NaN."""
    largest = None
    for first, second in zip(one.log_probabilities, other.log_probabilities, strict=True):
        # One may lack the rows behind a prompt's last tokens.
        for row, against in zip(first, second, strict=False):
            for a, b in zip(row, against, strict=True) if row is not None and against is not None else ():
                largest = max(abs(a - b), largest or 0.0)
                # Comparisons with NaN are false.
                if not largest < float("inf"):
                    return float("inf")
    return float("inf") if largest is None else largest


def same_tokens(got: Answer, want: Answer, end: int = 2) -> bool:
    """Whether the greedy tokens are the wanted ones, up to the first that llama.cpp never takes: `end`, or no word."""
    return all(
        list(first[:count]) == list(second[:count])
        for first, second in zip(got.greedy, want.greedy, strict=True)
        for count in [[token == end or token >= WORDS for token in [*second, end]].index(True)]
    )
