"""What the user asked for, checked once when it is made and never changed afterwards."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from streamprune.errors import SettingsError

METHODS = ("reap",)
PROPAGATE = ("original", "pruned")
DTYPES = ("auto", "bfloat16", "float16", "float32")
#: Enough for a first result; the published REAP runs use 512 to 1,024 sequences of 2,048 tokens.
DEFAULT_SAMPLES = 512
DEFAULT_SEQ_LEN = 2048
#: Tokens that go through a block at a time, by kind of device. Enough to keep the matrix products large. On a CPU more
#: would be slower: the experts' inputs and outputs (tokens × top-k × hidden size) should stay near the caches. Of 512,
#: 1,024, 2,048 and 4,096, a block of tools/bench's `mid` shape was fastest per token with 1,024.
DEFAULT_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
#: Hugging Face's own default before it grew: every tool reads such shards comfortably.
DEFAULT_SHARD_BYTES = 5 * 10**9

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)?\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class RunSettings:
    """The settings of `streamprune run`. Exactly one of `keep` (experts per block) and `ratio` (share removed) is set.

    Raises SettingsError when a value is impossible whatever the model.
    """

    model: str
    output: Path
    keep: int | None = None
    ratio: float | None = None
    calibration: tuple[str, ...] = ("builtin",)
    samples: int = DEFAULT_SAMPLES
    seq_len: int | None = None
    seed: int = 0
    method: str = "reap"
    propagate: str = "original"
    device: str = "auto"
    dtype: str = "auto"
    batch_tokens: int | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False

    def batch_tokens_on(self, device_type: str) -> int:
        """Tokens per micro-batch on this kind of device ("cpu" or "cuda")."""
        return self.batch_tokens or DEFAULT_BATCH_TOKENS[device_type]

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.ratio is None):
            raise SettingsError("Give either --keep N (experts to keep per block) or --ratio R (share to remove).")
        if self.keep is not None and self.keep < 1:
            raise SettingsError(f"--keep {self.keep}: at least one expert per block must stay.")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise SettingsError(
                f"--ratio {self.ratio:g} is not between 0 and 1. It is the share of experts to remove; 0.5 is half."
            )
        for name, value, least in (
            ("--samples", self.samples, 1),
            ("--seq-len", DEFAULT_SEQ_LEN if self.seq_len is None else self.seq_len, 2),
            ("--batch-tokens", 1 if self.batch_tokens is None else self.batch_tokens, 1),
            ("--max-shard-size", self.max_shard_bytes, 1),
        ):
            if value < least:
                raise SettingsError(f"{name} {value} is too small: at least {least}.")
        for name, choice, choices in (
            ("--method", self.method, METHODS),
            ("--propagate", self.propagate, PROPAGATE),
            ("--dtype", self.dtype, DTYPES),
        ):
            if choice not in choices:
                raise SettingsError(f"{name} {choice!r} is unknown. Choose one of: {', '.join(choices)}.")


def parse_size(text: str) -> int:
    """Bytes in a size such as "5GB" (10⁹) or "4GiB" (2³⁰); a bare number is bytes. SettingsError otherwise."""
    match = _SIZE.match(text)
    if match is None:
        raise SettingsError(f"{text!r} is not a size. Write for example 5GB or 4GiB.")
    unit = (match.group(2) or "B").upper()
    base = 1024 if "I" in unit else 1000
    return int(float(match.group(1)) * base ** "BKMGT".index(unit[0]))
