"""What a run leaves on record: `streamprune.json` with the model, and the summary that is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from streamprune.machine import peak_resident_bytes
from streamprune.prepare import Prepared
from streamprune.settings import RunSettings
from streamprune.streaming.scoring import BlockScorer, LayerResult
from streamprune.text.calibration import Calibration
from streamprune.work.resume import versions


def run_report(
    settings: RunSettings,
    prepared: Prepared,
    calibration: Calibration,
    layers: Sequence[LayerResult],
    device: torch.device,
    batch_tokens: int,
) -> dict[str, Any]:
    """The contents of `streamprune.json`: nothing in it varies between runs of the same input and settings.

    (On the CPU the last digits of scores depend on the number of threads, as every matrix product does.)
    """
    plan = prepared.plan
    return {
        "format": 1,
        "settings": {
            # Names without folders: the file is published with the model, and is the same wherever it is made.
            "model": _public_name(settings.model),
            "revision": settings.revision,
            "keep": plan.keep,
            "method": settings.method,
            "propagate": settings.propagate,
            "samples": settings.samples,
            "seq_len": settings.seq_len,
            "seed": settings.seed,
            "dtype": str(prepared.dtype).removeprefix("torch."),
            "device": device.type,
            "batch_tokens": batch_tokens,
            "max_shard_bytes": settings.max_shard_bytes,
        },
        "versions": versions(),
        "source": {
            "fingerprint": prepared.checkpoint.fingerprint(),
            "bytes": prepared.checkpoint.nbytes,
            "experts": plan.spec.count,
            "top_k": plan.spec.top_k,
        },
        "calibration": {
            "sources": [_public_name(source) for source in calibration.sources],
            "sequences": len(calibration.sequences),
            "tokens": calibration.tokens,
            "fingerprint": calibration.fingerprint,
        },
        "dropped": list(plan.dropped),
        "layers": [
            {
                "index": layer.index,
                "kept": list(layer.kept),
                "scores": list(layer.scores),
                "counts": list(layer.counts),
            }
            for layer in layers
        ],
    }


def run_summary(
    settings: RunSettings,
    prepared: Prepared,
    calibration: Calibration,
    layers: Sequence[LayerResult],
    scorer: BlockScorer,
    seconds: float,
) -> dict[str, Any]:
    """The result for people and for `--json`, with what varies from run to run."""
    plan = prepared.plan
    never = [{"layer": layer.index, "experts": layer.counts.count(0)} for layer in layers if 0 in layer.counts]
    return {
        "output": str(settings.output),
        "model": settings.model,
        "experts_per_layer": plan.keep,
        "source_experts_per_layer": plan.spec.count,
        "moe_layers": len(layers),
        "source_bytes": prepared.checkpoint.nbytes,
        "output_bytes": plan.output_bytes,
        "calibration_tokens": calibration.tokens,
        "never_routed": never,
        "dropped_tensors": len(plan.dropped),
        "batch_tokens": scorer.batch_tokens,
        "states": scorer.states_place,
        "shrinks": [asdict(shrink) for shrink in scorer.shrinks],
        "seconds": round(seconds, 3),
        "peak_resident_bytes": peak_resident_bytes(),
    }


def _public_name(name: str) -> str:
    """A Hub id or recipe as it is; of a local path only the last part."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name
