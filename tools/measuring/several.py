"""Scoring with one process and with several that share the tokens: the time, and whether the scores are equal."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measuring.processes import log_of, run_process

#: One thread for each process: with more, several processes would only take the cores from each other.
THREADS = {"OMP_NUM_THREADS": "1"}


def launch(processes: int) -> list[str]:
    """The command that starts `streamprune` in so many processes on this machine.

    (`accelerate launch --cpu --num_processes 2` starts one process only, as of accelerate 1.15: on CPUs it leaves the
    starting to MPI. It takes the processes' number and rank from what torchrun puts into the environment as well.)
    """
    if processes == 1:
        return [sys.executable, "-m", "streamprune"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *torchrun, "-m", "streamprune"]


def compare_processes(model: Path, tokens: Path, work: Path, processes: int, rounds: int) -> dict[str, Any]:
    """Seconds of a scoring on the CPU by several processes over those of one, in turn, one thread for each process."""
    ratios, whole = [], []
    scores = {count: work / f"scores-{count}.safetensors" for count in (1, processes)}
    for _ in range(rounds):
        seconds, whole_seconds = {}, {}
        for count, path in scores.items():
            command = ["score", str(model), "-o", str(path), "--calibration", str(tokens), "--samples", str(10**9)]
            begun = time.perf_counter()
            run_process([*launch(count), *command, "--device", "cpu", "--overwrite", "--quiet"], more=THREADS)
            whole_seconds[count] = time.perf_counter() - begun
            seconds[count] = next(event for event in log_of(path) if event["event"] == "summary")["seconds"]
        ratios.append(seconds[processes] / seconds[1])
        whole.append(whole_seconds[processes] / whole_seconds[1])
    return {
        "n_processes": processes,
        "n_processes_threads_each": int(THREADS["OMP_NUM_THREADS"]),
        "n_processes_over_one": round(statistics.median(ratios), 3),
        "n_processes_over_one_each": [round(ratio, 3) for ratio in ratios],
        "n_processes_over_one_with_start": round(statistics.median(whole), 3),
        "n_processes_scores_differ_by": difference(*scores.values()),
    }


def difference(first: Path, second: Path) -> float:
    """The largest relative difference of any statistic in two files of scores; infinite if they are of other things."""
    from safetensors.numpy import load_file

    one, other = load_file(first), load_file(second)
    if {name: value.shape for name, value in one.items()} != {name: value.shape for name, value in other.items()}:
        return float("inf")
    largest = 0.0
    for name, value in one.items():
        a, b = value.astype("float64"), other[name].astype("float64")
        scale = abs(a).clip(min=abs(b))
        relative = abs(a - b)[scale > 0] / scale[scale > 0]
        largest = max(largest, float(relative.max(initial=0.0)))
    return largest
