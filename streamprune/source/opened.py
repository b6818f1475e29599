"""A checkpoint and the model that it is of, on meta: opened and understood, nothing of its weights read yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from streamprune.source.checkpoint import Checkpoint
from streamprune.source.decoder import Decoder
from streamprune.source.skeleton import Target


@dataclass(frozen=True)
class Opened:
    """A checkpoint, its model on meta, which tensor feeds which parameter, and the dtype in which it is computed."""

    checkpoint: Checkpoint
    skeleton: Decoder
    targets: Mapping[str, Target | None] = field(repr=False)
    dtype: torch.dtype
