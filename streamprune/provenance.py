"""Where scores come from, as it is kept with them."""

from __future__ import annotations

from typing import Any

import torch

from streamprune.prepare import Prepared
from streamprune.result.record import public_name
from streamprune.settings import RunSettings
from streamprune.text.calibration import Calibration
from streamprune.work.resume import versions


def _held_back(held: Calibration | None) -> dict[str, Any]:
    if held is None:
        return {}
    told = {"sequences": len(held.sequences), "tokens": held.tokens, "fingerprint": held.fingerprint}
    return {"held_back": told}


def provenance_of(
    settings: RunSettings, prepared: Prepared, calibration: Calibration, device: torch.device, batch_tokens: int
) -> dict[str, Any]:
    """What decided the scores of a run, as JSON. Nothing in it is about which experts stay."""
    return {
        "model": public_name(settings.model),
        "revision": settings.revision,
        "source": {"fingerprint": prepared.checkpoint.fingerprint(), "bytes": prepared.checkpoint.nbytes},
        "settings": {
            "propagate": settings.propagate,
            "dtype": str(prepared.dtype).removeprefix("torch."),
            "device": device.type,
            "batch_tokens": batch_tokens,
        },
        "calibration": {
            "sources": [
                {"name": name, "tokens": tokens}
                for name, tokens in zip(calibration.sources, calibration.tokens_of, strict=True)
            ],
            "sequences": len(calibration.sequences),
            "tokens": calibration.tokens,
            "fingerprint": calibration.fingerprint,
            "recipe": dict(calibration.recipe),
            **_held_back(calibration.held),
        },
        "versions": versions(),
    }
