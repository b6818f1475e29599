"""Comparisons that a worker makes itself, round by round: what saving and evaluating cost, and pruning over copying."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from typing import Any

from measuring.disk import copy_and_sync, read_all, remove
from measuring.processes import Job
from measuring.shapes import quantize, weight_files

#: Runs a command of streamprune, which ends by printing the most memory it had resident.
SCRIPT = (
    "import atexit; from streamprune.cli import main; from streamprune.hardware.memory import peak_resident_bytes\n"
    "atexit.register(lambda: print(peak_resident_bytes()))\n"
    "main()"
)


#: Stands for half of the channels that an expert of the measured model has.
HALF_WIDTH = -1
#: Stands for the measured model with its matrices in FP8.
FP8_MODEL = "FP8"
#: Settings for scoring alone.
SCORING = {"only_score": True, "keep": None}
#: What two kinds of runs differ in, the usual kind first.
PAIRS: dict[str, dict[str, dict[str, Any]]] = {
    "saving": {"never": {"checkpoint_every": 1e9}, "every layer": {"checkpoint_every": 0.0}},
    "evaluating": {"plain": {}, "evaluated": {"evaluate": True}},
    "recording": {"without channels": {"channels": False}, "with channels": {}},
    "narrowing": {"fewer experts": {}, "narrower experts": {"keep": None, "width": HALF_WIDTH}},
    "refitting": {"plain": {}, "refitted": {"refit": True, "anchor": "none"}},
    "quantizing": {"plain": {}, "quantized": {"weights": "w4a16"}},
    "decoding": {"plain": SCORING, "FP8": {**SCORING, "model": FP8_MODEL}},
}


def paired_seconds(job: Job) -> dict[str, Any]:
    """Seconds of runs of the two kinds that the job names, in one process, each kind first in turn."""
    from streamprune.pipeline.run import run

    kinds = PAIRS[job.kind]
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(-1, job.rounds):
        for kind in sorted(seconds, reverse=bool(number % 2)):
            begun = time.perf_counter()
            run(job.settings(**_sized(job, kinds[kind])), quiet=True)
            # The first round warms the caches of kernels and files.
            if number >= 0:
                seconds[kind].append(time.perf_counter() - begun)
            remove(job.output)
    return {"rounds": seconds}


def rounding_shares(job: Job) -> dict[str, float]:
    """What shares of a run that rounds by GPTQ its parts take. (Waiting for each makes the run a little slower.)"""
    from measuring.rounding import shares, timed_parts
    from streamprune.pipeline.run import run

    with timed_parts(job.device) as seconds:
        begun = time.perf_counter()
        run(job.settings(**PAIRS["quantizing"]["quantized"]), quiet=True)
        whole = time.perf_counter() - begun
    remove(job.output)
    return shares(seconds, whole)


def _sized(job: Job, changes: dict[str, Any]) -> dict[str, Any]:
    if changes.get("model") == FP8_MODEL:
        quantized = job.model.with_name("model-fp8")
        if not quantized.exists():
            quantize(job.model, quantized)
        return {**changes, "model": str(quantized)}
    if changes.get("width") != HALF_WIDTH:
        return changes
    width = json.loads((job.model / "config.json").read_text())["moe_intermediate_size"]
    return {**changes, "width": width // 2}


def pruning_seconds(job: Job) -> dict[str, Any]:
    """Seconds of pruning from scores and of copying the same bytes, both flushed to the disk; and the pruning's peak.

    The processes are counted too: a whole `streamprune prune`, and `cp` followed by `sync` of the copied files.
    """
    scores, copied = job.output.with_name("scores.safetensors"), job.output.with_name("copied")
    experts = json.loads((job.model / "config.json").read_text())["num_experts"]
    # The scores themselves do not matter here, so that a few tokens will do.
    few = job.tokens.with_name("few.jsonl")
    few.write_text("".join(job.tokens.read_text().splitlines(keepends=True)[:2]))
    model = str(job.model)
    score = ["score", model, "-o", str(scores), "--calibration", str(few), "--device", "cpu", "--quiet"]
    subprocess.run([sys.executable, "-c", SCRIPT, *score], check=True, capture_output=True)
    prune = ["prune", model, "-o", str(job.output), "--scores", str(scores), "--keep", str(experts // 2), "--quiet",
             "--no-report"]  # fmt: skip
    found: dict[str, Any] = {"prune": [], "copy": [], "prune_peak_bytes": 0}
    for _ in range(job.rounds):
        # Both read from the system's cache: what we write is put out of it, so that the copy would have to wait for
        # the disk, and the pruning not.
        read_all(weight_files(job.model))
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", SCRIPT, *prune], check=True, capture_output=True, text=True)
        pruned = time.perf_counter() - begun
        read_all(weight_files(job.output))
        begun = time.perf_counter()
        found["output_bytes"] = copy_and_sync(job.output, copied)
        copying = time.perf_counter() - begun
        found["prune"].append(pruned)
        found["copy"].append(copying)
        found["prune_peak_bytes"] = max(found["prune_peak_bytes"], int(done.stdout.split()[-1]))
        shutil.rmtree(job.output)
        shutil.rmtree(copied)
    return found
