"""Figures of a streamed run, from the process that ran it: seconds per layer, gaps, reading, memory."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from measuring.check import GIB, Check
from measuring.comparison import MIB, gpu_peaks
from measuring.disk import drop_from_page_cache
from measuring.extrapolation import HOW, UNCOUNTED, extrapolate
from measuring.processes import Job, work
from measuring.shapes import FLOP_FORMULA, config_of, layer_bytes, weight_files, work_of

GB = 10**9


def extrapolated(check: Check, kind: str, samples: int, model: Path | None = None) -> dict[str, Any]:
    """The figures of a streamed run of this kind (see `workers`), extrapolated to the whole model.

    The arithmetic that is counted is one forward of the source, also where more text goes through the pruned layers.
    """
    job = check.job(kind, samples, model)
    rate, files = check.once(job, "matrix"), weight_files(job.model)
    # Of a real model nothing would lie in memory before it is read.
    cached = drop_from_page_cache(files)
    reading = check.once(job, "read")
    drop_from_page_cache(files)
    found = work(job, check.left)
    check.clear()
    layers, tokens = config_of(check.shape)["num_hidden_layers"], samples * check.seq_len
    figures = extrapolate([layer["seconds"] for layer in found["layers"]], found["seconds"], layers, kind != "score")
    achieved = tokens * work_of(config_of(check.shape), check.seq_len).counted / figures["seconds_per_layer"]
    return {
        "tokens": tokens,
        **figures,
        "extrapolation": HOW,
        "tokens_per_second_for_the_model": round(tokens / figures["seconds_for_the_model"]),
        "flop_formula": FLOP_FORMULA,
        "matrix_rate_tflops": round(rate["flop_per_second"] / 1e12, 4),
        "matrix_dtype": rate["dtype"],
        "achieved_tflops": round(achieved / 1e12, 6),
        "achieved_share": round(achieved / rate["flop_per_second"], 4),
        "page_cache_left_after_dropping": cached,
        **_reading(job, reading, found, layers),
        "peak_mib": round(found["peak_bytes"] / MIB),
        **watched_figures(found),
        **vram_figures(check, found),
        "summary": found["summary"],
    }


def _reading(job: Job, reading: dict[str, Any], found: dict[str, Any], layers: int) -> dict[str, Any]:
    """How fast the weights are read, plainly and by streamprune while it reads."""
    plain, busy = reading["bytes"] / reading["seconds"], found["summary"]["busy"]
    own = reading["bytes"] / (busy["read"] * busy["seconds"]) if busy["read"] else 0.0
    return {
        "layer_mib": round(layer_bytes(job.model) / MIB, 1),
        "read_gb_per_second": round(plain / GB, 3),
        "own_read_gb_per_second": round(own / GB, 3),
        "reading_seconds_for_all_layers": round(layer_bytes(job.model) * layers / plain, 2),
        "computing_seconds_per_layer": round(busy["compute"] * busy["seconds"] / len(found["layers"]), 4),
    }


def watched_figures(found: dict[str, Any]) -> dict[str, Any]:
    """What was seen from within: the gaps between layers (the median of those that count), and the plan."""
    watched = found["watched"]
    # Of the same layers as the seconds: each gap is before the layer that follows.
    counted = watched["gaps"][UNCOUNTED - 1 :]
    planned = watched.get("plan_bytes")
    return {
        "gap_seconds": round(statistics.median(counted), 4) if counted else None,
        "gaps": watched["gaps"],
        "plan_gib": None if planned is None else round(planned / GIB, 2),
        "plan": watched.get("plan"),
        "sync_warnings": watched["sync_warnings"],
    }


def vram_figures(check: Check, found: dict[str, Any]) -> dict[str, Any]:
    if not check.on_gpu:
        return {}
    allocated, reserved = gpu_peaks(found)
    return {"peak_vram_gib": round(allocated / GIB, 2), "peak_vram_reserved_gib": round(reserved / GIB, 2)}
