"""The parts of tools/gpu_check. Each is a function of the check that it belongs to, and fails on its own."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from measuring.comparison import MIB, gpu_peaks
from measuring.disk import drop_from_page_cache
from measuring.extrapolation import HOW, UNCOUNTED, extrapolate
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

GIB, GB = 2**30, 10**9
#: What streamprune writes has this name, or begins with it.
OUTPUT = "output"
#: Seconds below which nothing is started any more.
LEAST_SECONDS = 0.5
#: What nvidia-smi is asked for.
QUESTIONS = (
    "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm", "clocks.mem",
    "clocks.max.mem", "power.limit", "temperature.gpu", "pcie.link.gen.max", "pcie.link.width.max",
)  # fmt: skip
LIBRARIES = ("torch", "transformers", "triton", "safetensors", "accelerate", "tokenizers", "pytest", "nvidia-ml-py")
#: The two tests that show most, as pytest names them.
SMOKE = (
    "tests/test_gpu.py::test_what_the_tools_measure_on_a_card",
    "tests/test_gpu.py::test_scores_on_the_gpu_equal_those_on_the_cpu[qwen3_moe]",
)


@dataclass(frozen=True)
class Check:
    """What is checked: a shape with so many layers, on a device, with a folder for what is built, until a deadline.

    `deadline` is of time.monotonic. The numbers of sequences are those of the parts: `samples` of score, the others of
    what they are named after.
    """

    shape: str
    layers: int
    samples: int
    run_samples: int
    bench_samples: int
    ram_samples: int
    fit_samples: int
    seq_len: int
    forward_batch: int
    device: str
    vram_gib: float | None
    states: str
    budget_gib: float | None
    context: int
    folder: Path
    deadline: float

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to look at; the CPU only tries the parts out."""
        return self.device != "cpu"

    @property
    def left(self) -> float:
        """Seconds until the deadline. Raises ProcessError when there are none."""
        seconds = self.deadline - time.monotonic()
        if seconds < LEAST_SECONDS:
            raise ProcessError("the time is over: raise --total-seconds, or give fewer --layers, --samples or --parts")
        return seconds

    def job(self, kind: str, samples: int | None = None) -> Job:
        """A job on the checkpoint, built unless it is there, with so many sequences (by default those of score)."""
        samples = samples or self.samples
        model = self.model()
        tokens = self.folder / f"tokens-{samples}x{self.seq_len}.jsonl"
        if not tokens.is_file():
            part = tokens.with_suffix(".part")
            write_tokens(part, samples, self.seq_len, config_of(self.shape)["vocab_size"])
            part.rename(tokens)
        # What a part that was cut off began would be gone on with, and so seem to take no time.
        self.clear()
        places = {"vram_gib": self.vram_gib, "states": self.states, "batch": self.forward_batch}
        return Job(kind, model, tokens, self.folder / OUTPUT, self.device, **places)  # type: ignore[arg-type]

    def model(self) -> Path:
        """The folder of the checkpoint, built unless it is there."""
        config, model = config_of(self.shape, self.layers), self.folder / "model"
        if is_built(model, config):
            return model
        begun = time.monotonic()
        shutil.rmtree(model, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("once-read-*.json"):
            path.unlink()
        given = self.folder / "config.json"
        given.write_text(json.dumps(config))
        work(Job("build", model, given, model, self.device), self.left)
        size = sum(path.stat().st_size for path in weight_files(model))
        built = {"seconds": round(time.monotonic() - begun, 1), "gib": round(size / GIB, 2)}
        (self.folder / "built.json").write_text(json.dumps(built))
        print(
            f"checkpoint: {self.layers} layers of {self.shape}, {built['gib']} GiB in {built['seconds']} s", flush=True
        )
        return model

    def built(self) -> dict[str, Any]:
        """What building the checkpoint took, by the name `checkpoint`; nothing where none was built."""
        path = self.folder / "built.json"
        return {"checkpoint": json.loads(path.read_text())} if path.is_file() else {}

    def once(self, job: Job, kind: str) -> dict[str, Any]:
        """The figures of a job that is measured once for all parts."""
        saved = self.folder / f"once-{kind}-{self.device.replace(':', '-')}.json"
        if saved.is_file():
            return dict(json.loads(saved.read_text()))
        found = work(replace(job, kind=kind), self.left)
        self.remember(kind, found)
        return found

    def remember(self, kind: str, found: dict[str, Any]) -> None:
        """Let `once` give these figures from now on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"once-{kind}-{self.device.replace(':', '-')}.json").write_text(json.dumps(found))

    def clear(self) -> None:
        """Remove what streamprune has written: outputs, their work folders and their logs."""
        for path in self.folder.glob(f"{OUTPUT}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@dataclass(frozen=True)
class Part:
    """How a part is measured; the seconds below which it is not begun on a GPU, and after which it is cut off."""

    measure: Callable[[Check], dict[str, Any]]
    least: float
    most: float
    needs_gpu: bool = False


def machine(check: Check) -> dict[str, Any]:
    """What machine this is, and how fast its GPU multiplies and copies."""
    nothing = check.folder / "none"
    found = work(Job("machine", nothing, nothing, nothing, check.device), check.left)
    check.remember("matrix", found["matrix"])
    disk = shutil.disk_usage(check.folder)
    rates = {name.removesuffix("_bytes_per_second"): value for name, value in found.items() if "_bytes_per_" in name}
    return {
        "nvidia_smi": _nvidia_smi(check) if check.on_gpu else None,
        "versions": {name: _version(name) for name in LIBRARIES} | {"python": sys.version.split()[0]},
        "matrix_rate_tflops": round(found["matrix"]["flop_per_second"] / 1e12, 4),
        "matrix_dtype": found["matrix"]["dtype"],
        "matrix_size": found["matrix"]["size"],
        **{f"{name}_gb_per_second": round(value / GB, 2) for name, value in rates.items()},
        **{name: found[name] for name in ("capability", "free_bytes") if name in found},
        "folder": str(check.folder),
        "free_disk_gib": round(disk.free / GIB, 1),
        "disk_gib": round(disk.total / GIB, 1),
        "free_ram_gib": round(psutil.virtual_memory().available / GIB, 1),
        "ram_gib": round(psutil.virtual_memory().total / GIB, 1),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_smi(check: Check) -> dict[str, str] | None:
    """What nvidia-smi says of the GPU; None where there is no such program, or it fails."""
    index = check.device.partition(":")[2] or "0"
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(QUESTIONS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=min(30.0, check.left), check=True)
        rows = list(csv.reader(done.stdout.splitlines(), skipinitialspace=True))
        return dict(zip(QUESTIONS, rows[0], strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def smoke(check: Check) -> dict[str, Any]:
    """The two tests that show most."""
    return {"result": _pytest(check, list(SMOKE), [])}


def tests(check: Check) -> dict[str, Any]:
    """The other tests with the marker `gpu`: of the files that have it, since others may need what is not here."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    names = [str(path.relative_to(ROOT)) for path in files]
    # A file that cannot be imported here must not keep the others from being tried.
    others = ["--continue-on-collection-errors", *(f"--deselect={test}" for test in SMOKE)]
    return {"result": _pytest(check, names, others), "files": names}


def _pytest(check: Check, what: list[str], options: list[str]) -> str:
    """The last line of pytest. Raises ProcessError, with what failed and the end of the output, for failures."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        *options,
        *what,
    ]
    # 1: some failed, which is an answer.
    lines = run_process(command, check.left, accepted=(0, 1)).strip().splitlines()
    failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    if failed or "failed" in lines[-1] or "error" in lines[-1]:
        details = [line for line in lines[:-1] if line.startswith("E  ")][-12:]
        raise ProcessError("\n".join([*details, *failed, lines[-1]]))
    return lines[-1]


def score(check: Check) -> dict[str, Any]:
    """The scoring pass, extrapolated to the whole model."""
    return _extrapolated(check, "score", check.samples)


def run(check: Check) -> dict[str, Any]:
    """The whole run with half of the experts kept, extrapolated to the whole model."""
    return _extrapolated(check, "run", check.run_samples)


def _extrapolated(check: Check, kind: str, samples: int) -> dict[str, Any]:
    job = check.job(kind, samples)
    rate, files = check.once(job, "matrix"), weight_files(job.model)
    # Of a real model nothing would lie in memory before it is read.
    cached = drop_from_page_cache(files)
    reading = check.once(job, "read")
    drop_from_page_cache(files)
    found = work(job, check.left)
    check.clear()
    layers, tokens = config_of(check.shape)["num_hidden_layers"], samples * check.seq_len
    figures = extrapolate([layer["seconds"] for layer in found["layers"]], found["seconds"], layers, kind == "run")
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
        **_watched(found),
        **_vram(check, found),
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


def _watched(found: dict[str, Any]) -> dict[str, Any]:
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


def _vram(check: Check, found: dict[str, Any]) -> dict[str, Any]:
    if not check.on_gpu:
        return {}
    allocated, reserved = gpu_peaks(found)
    return {"peak_vram_gib": round(allocated / GIB, 2), "peak_vram_reserved_gib": round(reserved / GIB, 2)}


def profile(check: Check) -> dict[str, Any]:
    """One micro-batch of one layer in detail."""
    # As many sequences as the largest micro-batch has.
    return work(check.job("profile", max(1, min(check.samples, 32768 // check.seq_len))), check.left)


def bench(check: Check) -> dict[str, Any]:
    """The scoring pass over a plain forward of the same tokens by transformers, both with nothing read before."""
    job = check.job("forward", check.bench_samples)
    files, found = weight_files(job.model), {}
    for kind in ("forward", "score"):
        drop_from_page_cache(files)
        found[kind] = work(replace(job, kind=kind), check.left)
    check.clear()
    forward, ours = found["forward"], found["score"]
    peaks = {
        f"{kind}_peak_vram_gib": _vram(check, each)["peak_vram_gib"] for kind, each in found.items() if check.on_gpu
    }
    return {
        "tokens": check.bench_samples * check.seq_len,
        "layers": check.layers,
        "forward_batch": check.forward_batch,
        "forward_seconds": round(forward["seconds"], 3),
        "forward_loading_seconds": round(forward["loading_seconds"], 3),
        "forward_computing_seconds": round(forward["computing_seconds"], 3),
        "score_seconds": round(ours["seconds"], 3),
        "score_over_forward": round(ours["seconds"] / forward["seconds"], 3),
        "score_over_forward_computing": round(ours["seconds"] / forward["computing_seconds"], 3),
        "seconds_of_layers": [round(layer["seconds"], 3) for layer in ours["layers"]],
        **peaks,
        "summary": ours["summary"],
    }


def ram(check: Check) -> dict[str, Any]:
    """The scoring pass with the hidden states in RAM, against the same with them on the GPU."""
    figures: dict[str, Any] = {"tokens": check.ram_samples * check.seq_len}
    for place in ("device", "ram"):
        found = work(replace(check.job("score", check.ram_samples), states=place), check.left)
        seconds = [layer["seconds"] for layer in found["layers"]]
        figures |= {
            f"{place}_seconds_per_layer": round(statistics.median(seconds[UNCOUNTED:] or seconds), 4),
            f"{place}_seconds_of_layers": [round(each, 3) for each in seconds],
            **{f"{place}_{name}": value for name, value in _vram(check, found).items()},
            f"{place}_summary": found["summary"],
            f"{place}_watched": _watched(found),
        }
    check.clear()
    figures["ram_over_device"] = round(figures["ram_seconds_per_layer"] / figures["device_seconds_per_layer"], 3)
    return figures


def fit(check: Check) -> dict[str, Any]:
    """A result pruned to a budget, loaded on the GPU with a prompt of the planned length: predicted and measured."""
    job = check.job("run", check.fit_samples)
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
        "--samples", str(check.fit_samples), "--device", check.device, "--quiet",
    )  # fmt: skip
    measure = ["--measure", "--device", check.device] if check.on_gpu else []
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


#: In order of value. On a GPU seconds are short: what is not worth beginning is left out, and nothing eats up all.
PARTS = {
    "machine": Part(machine, 15, 60),
    "smoke": Part(smoke, 20, 100, needs_gpu=True),
    "score": Part(score, 40, 180),
    "run": Part(run, 40, 100),
    "profile": Part(profile, 20, 120),
    "bench": Part(bench, 40, 150),
    "ram": Part(ram, 40, 120, needs_gpu=True),
    "tests": Part(tests, 30, 240, needs_gpu=True),
    "fit": Part(fit, 60, 240),
}
