"""The parts of tools/gpu_check. Each is a function of the check that it belongs to, and fails on its own."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import psutil

from measuring.check import GIB, Check
from measuring.disk import drop_from_page_cache
from measuring.extrapolation import UNCOUNTED
from measuring.processes import Job, ProcessError, run_forked, work
from measuring.shapes import ROOT, config_of, weight_files
from measuring.streamed import GB, extrapolated, vram_figures, watched_figures

#: What nvidia-smi is asked for.
QUESTIONS = (
    "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm", "clocks.mem",
    "clocks.max.mem", "power.limit", "temperature.gpu", "pcie.link.gen.max", "pcie.link.width.max",
)  # fmt: skip
LIBRARIES = ("torch", "transformers", "triton", "safetensors", "accelerate", "tokenizers", "pytest", "nvidia-ml-py",
             "compressed-tensors")  # fmt: skip
#: Packs the weights of quantized results.
PACKING = "compressed_tensors"
GPU_MARK = "pytest.mark.gpu"
#: The two tests that show most, as pytest names them.
SMOKE = (
    "tests/test_gpu.py::test_what_the_tools_measure_on_a_gpu",
    "tests/test_gpu.py::test_scores_on_the_gpu_equal_those_on_the_cpu[qwen3_moe]",
)


@dataclass(frozen=True)
class Part:
    """How a part is measured; the seconds below which it is not begun on a GPU, and after which it is cut off.

    `needs` is a library that streamprune itself does without.
    """

    measure: Callable[[Check], dict[str, Any]]
    least: float
    most: float
    needs_gpu: bool = False
    needs: str | None = None


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
    names = gpu_files()
    # A file that cannot be imported here must not keep the others from being tried.
    others = ["--continue-on-collection-errors", *(f"--deselect={test}" for test in SMOKE)]
    return {"result": _pytest(check, names, others), "files": names}


def gpu_files() -> list[str]:
    """The test files with the marker `gpu`, from the root of the repository."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if GPU_MARK in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in files]


def _pytest(check: Check, what: list[str], options: list[str]) -> str:
    """The last line of pytest. Raises ProcessError, with what failed and the end of the output, for failures."""
    fixed = ["-m", "pytest", "-q", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider"]
    # 1: some failed, which is an answer.
    lines = run_forked([*fixed, *options, *what], check.left, accepted=(0, 1)).strip().splitlines()
    failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    if failed or "failed" in lines[-1] or "error" in lines[-1]:
        details = [line for line in lines[:-1] if line.startswith("E  ")][-12:]
        raise ProcessError("\n".join([*details, *failed, lines[-1]]))
    return lines[-1]


def score(check: Check) -> dict[str, Any]:
    """The scoring pass, extrapolated to the whole model."""
    return extrapolated(check, "score", check.samples)


def run(check: Check) -> dict[str, Any]:
    """The whole run with half of the experts kept, extrapolated to the whole model."""
    return extrapolated(check, "run", check.run_samples)


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
        f"{kind}_peak_vram_gib": vram_figures(check, each)["peak_vram_gib"]
        for kind, each in found.items()
        if check.on_gpu
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
            **{f"{place}_{name}": value for name, value in vram_figures(check, found).items()},
            f"{place}_summary": found["summary"],
            f"{place}_watched": watched_figures(found),
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


def variant(kind: str) -> Callable[[Check], dict[str, Any]]:
    """A part with a run of another kind, on a few layers."""

    def measure(check: Check) -> dict[str, Any]:
        return extrapolated(check, kind, check.more_samples, check.few_layers())

    return measure


def from_fp8(check: Check) -> dict[str, Any]:
    """The scoring pass of a source with its matrices in FP8, on a few layers."""
    with check.in_fp8() as model:
        return extrapolated(check, "score", check.more_samples, model)


def _streamprune(check: Check, *arguments: str) -> dict[str, Any]:
    # 3: it does not fit, which is an answer too.
    printed = run_forked(["-m", "streamprune", *arguments, "--json"], check.left, accepted=(0, 3))
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
    "narrow": Part(variant("narrow"), 25, 90),
    "refit": Part(variant("refit"), 25, 90),
    "fp8": Part(variant("fp8"), 25, 90, needs=PACKING),
    "w4a16": Part(variant("w4a16"), 25, 120, needs=PACKING),
    "from-fp8": Part(from_fp8, 30, 90),
}
