"""The parts of tools/gpu_check. Each is a function of the check that it belongs to, and fails on its own."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measuring.comparison import MIB, card_peaks
from measuring.disk import drop_from_page_cache
from measuring.extrapolation import HOW, extrapolate
from measuring.processes import Job, ProcessError, run_process, work
from measuring.shapes import (
    FLOP_FORMULA,
    ROOT,
    config_of,
    is_built,
    layer_bytes,
    weight_files,
    work_of,
    write_tokens,
)

#: What streamprune writes has this name, or begins with it.
OUTPUT = "output"
#: Seconds below which nothing is started any more.
LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class Check:
    """What is checked: a shape with so many blocks, on a device, with a folder for what is built, until a deadline.

    `deadline` is of time.monotonic; `bench_samples` are the sequences of the part `bench`, which runs the model whole.
    """

    shape: str
    layers: int
    samples: int
    seq_len: int
    bench_samples: int
    forward_batch: int
    rounds: int
    device: str
    vram_gib: float | None
    states: str
    budget_gib: float | None
    context: int
    folder: Path
    deadline: float

    @property
    def on_card(self) -> bool:
        """Whether there is a card to look at; the CPU only tries the parts out."""
        return self.device != "cpu"

    @property
    def left(self) -> float:
        """Seconds until the deadline. Raises ProcessError when there are none."""
        seconds = self.deadline - time.monotonic()
        if seconds < LEAST_SECONDS:
            raise ProcessError(
                "the time for one part is over: raise --part-seconds, or give fewer --layers or --samples"
            )
        return seconds

    def job(self, kind: str, samples: int | None = None) -> Job:
        """A job on the checkpoint, built unless it is there, with so many sequences."""
        samples = samples or self.samples
        config = config_of(self.shape, self.layers)
        model = self.folder / "model"
        if not is_built(model, config):
            shutil.rmtree(model, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            given = self.folder / "config.json"
            given.write_text(json.dumps(config))
            work(Job("build", model, given, model, self.device), self.left)
        tokens = self.folder / f"tokens-{samples}x{self.seq_len}.jsonl"
        if not tokens.is_file():
            part = tokens.with_suffix(".part")
            write_tokens(part, samples, self.seq_len, config["vocab_size"])
            part.rename(tokens)
        # What a part that was cut off began would be gone on with, and so seem to take no time.
        self.clear()
        output = self.folder / OUTPUT
        return Job(kind, model, tokens, output, self.device, vram_gib=self.vram_gib, states=self.states)

    def clear(self) -> None:
        """Remove what streamprune has written: outputs, their work folders and their logs."""
        for path in self.folder.glob(f"{OUTPUT}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def tests(check: Check) -> dict[str, Any]:
    """The tests with the marker `gpu`: of the files that have it, since others may need what is not installed here."""
    if not check.on_card:
        return {"skipped": "these tests need a card, and the device is cpu"}
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    # 1: some failed, which is an answer.
    lines = run_process(command, check.left, accepted=(0, 1)).strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if failed:
        raise ProcessError("\n".join([lines[-1], *failed]))
    return {"result": lines[-1], "files": [path.name for path in files]}


def score(check: Check) -> dict[str, Any]:
    """The scoring pass, extrapolated to the whole model."""
    return _extrapolated(check, "score")


def run(check: Check) -> dict[str, Any]:
    """The whole run with half of the experts kept, extrapolated to the whole model."""
    return _extrapolated(check, "run")


def _extrapolated(check: Check, kind: str) -> dict[str, Any]:
    job = check.job(kind)
    blocks = config_of(check.shape)["num_hidden_layers"]
    rate = work(replace(job, kind="matrix"), check.left)["flop_per_second"]
    files = weight_files(job.model)
    # Of a real model nothing would lie in memory before it is read.
    cached = drop_from_page_cache(files)
    reading = work(replace(job, kind="read"), check.left)
    drop_from_page_cache(files)
    found = work(job, check.left)
    check.clear()
    figures = extrapolate([block["seconds"] for block in found["blocks"]], found["seconds"], blocks, kind == "run")
    tokens = check.samples * check.seq_len
    arithmetic = work_of(config_of(check.shape), check.seq_len)
    achieved = tokens * arithmetic.counted / figures["seconds_per_block"]
    read_rate = reading["bytes"] / reading["seconds"]
    return {
        "tokens": tokens,
        **figures,
        "extrapolation": HOW,
        "tokens_per_second_for_the_model": round(tokens / figures["seconds_for_the_model"]),
        "flop_formula": FLOP_FORMULA,
        "matrix_rate_tflops": round(rate / 1e12, 3),
        "achieved_tflops": round(achieved / 1e12, 4),
        "achieved_share": round(achieved / rate, 4),
        "block_mib": round(layer_bytes(job.model) / MIB, 1),
        "read_mib_per_second": round(read_rate / MIB),
        "page_cache_left_after_dropping": cached,
        "reading_seconds_for_all_blocks": round(layer_bytes(job.model) * blocks / read_rate, 2),
        "peak_mib": round(found["peak_bytes"] / MIB),
        **_vram(check, found),
        "told": found["summary"],
    }


def _vram(check: Check, found: dict[str, Any]) -> dict[str, Any]:
    if not check.on_card:
        return {}
    allocated, reserved = card_peaks(found)
    return {"peak_vram_mib": round(allocated / MIB), "peak_vram_reserved_mib": round(reserved / MIB)}


def bench(check: Check) -> dict[str, Any]:
    """tools/bench on this shape: over a plain forward of the same tokens, and over the floor."""
    figures = check.folder / "bench.json"
    caps = ["--vram-gib", str(check.vram_gib)] if check.vram_gib is not None else []
    options = {
        "shape": check.shape, "layers": check.layers, "samples": check.bench_samples, "seq-len": check.seq_len,
        "rounds": check.rounds, "forward-batch": check.forward_batch, "device": check.device, "states": check.states,
        "output": figures,
    }  # fmt: skip
    named = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    check.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "tools" / "bench"), *named, *caps, "--busy", "--cold", "--depths"]
    run_process(command, check.left, more={"TMPDIR": str(check.folder)})
    answer: dict[str, Any] = json.loads(figures.read_text())
    return answer


def fit(check: Check) -> dict[str, Any]:
    """A result pruned to a budget, loaded on the card with a prompt of the planned length: predicted and measured."""
    job = check.job("run", check.bench_samples)
    use = ["--context", str(check.context)]
    budget = check.budget_gib
    if budget is None:
        half = config_of(check.shape)["num_experts"] // 2
        needed = _streamprune(check, "fit", str(job.model), *use, "--budget-gib", "1000", "--keep", str(half))
        budget = needed["total_bytes"] / 2**30
    goal = [*use, "--budget-gib", str(budget)]
    caps = ["--vram-gib", str(check.vram_gib)] if check.vram_gib is not None else []
    summary = _streamprune(
        check, "run", str(job.model), "-o", str(job.output), *goal, *caps, "--calibration", str(job.tokens),
        "--samples", str(check.bench_samples), "--device", check.device, "--quiet",
    )  # fmt: skip
    measure = ["--measure", "--device", check.device] if check.on_card else []
    answer = _streamprune(check, "fit", str(job.output), *goal, *measure)
    check.clear()
    return {
        "budget_gib": budget,
        "context": check.context,
        "experts_per_layer": summary["experts_per_layer"],
        "predicted": {key: answer[key] for key in ("total_bytes", "total_bytes_low", "total_bytes_high", "terms")},
        "measured": answer.get("measured"),
    }


def _streamprune(check: Check, *arguments: str) -> dict[str, Any]:
    # 3: it does not fit, which is an answer too.
    printed = run_process([sys.executable, "-m", "streamprune", *arguments, "--json"], check.left, accepted=(0, 3))
    answer: dict[str, Any] = json.loads(printed)
    return answer


PARTS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "tests": tests, "score": score, "run": run, "bench": bench, "fit": fit
}  # fmt: skip
