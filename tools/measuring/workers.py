"""One measured process: `python -m measuring.workers JOB` does a job and prints its figures as JSON on its last line.

| kind | what it does |
|---|---|
| `build` | writes the checkpoint (the config lies at `tokens`) |
| `import` | nothing but importing torch and transformers |
| `forward` | the tokens through the model, by transformers alone |
| `quantize` | writes the model again, at `output`, with its matrices in FP8 |
| `score`, `run` | streamprune's scoring pass, or the whole run, with half of the experts kept |
| those of `VARIANTS` | the whole run, with something else in it |
| `device` | which device this is, and the versions of the libraries |
| `read`, `copy` | plain reading of all weights; plain copying of a finished output, flushed to the disk |
| `matrix` | a large matrix product, again and again |
| `machine` | that, copies on the device, and the versions of the libraries |
| `profile` | one micro-batch of one layer in detail (see `profiling`) |
| `pruning`, and those of `PAIRED` | several runs that are compared with one another (see `repeated`) |
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from measuring import disk
from measuring.processes import Job, log_of
from measuring.shapes import build, quantize, weight_files
from streamprune.errors import StreampruneError

if TYPE_CHECKING:
    from streamprune.config import RunSettings

#: Jobs that compare two kinds of runs.
PAIRED = ("saving", "evaluating", "recording", "narrowing", "refitting", "quantizing", "decoding")
#: Whole runs, and in what their settings differ from the usual ones.
VARIANTS: dict[str, dict[str, Any]] = {
    "run": {},
    "narrow": {"keep": None, "ratio": 0.5, "by": "channels"},
    "refit": {"refit": True, "anchor": "none"},
    "fp8": {"weights": "fp8-dynamic"},
    "w4a16": {"weights": "w4a16"},
}
STREAMED = ("score", *VARIANTS)
#: What of a run's summary the figures are made from, where it is there.
SUMMARY = ("seconds", "calibration_tokens", "batch_tokens", "states", "shrinks", "busy", "output_bytes")


def _import_libraries(limited: bool) -> None:
    """Import torch and transformers, and with `limited` bound what they take, as streamprune's command line does it."""
    if limited:
        from streamprune.hardware.memory import limit_library_memory

        # Works only before torch is imported.
        limit_library_memory()
    import torch  # noqa: F401
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _import(job: Job) -> dict[str, Any]:
    _import_libraries(limited=True)
    return {}


def _device(job: Job) -> dict[str, Any]:
    from importlib import metadata

    import torch

    # (Importing transformers would take seconds.)
    versions = {"torch": torch.__version__, "transformers": metadata.version("transformers")}
    if job.device == "cpu":
        return {"device": "cpu", **versions}
    index, count = torch.device(job.device).index or 0, torch.cuda.device_count()
    if index >= count:
        sys.exit(f"Error: torch {torch.__version__} sees {count} CUDA devices here, so that there is no {job.device}")
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": properties.name,
        "device_gib": round(properties.total_memory / 2**30, 1),
        **versions,
        "cuda": torch.version.cuda,
    }


def _build(job: Job) -> dict[str, Any]:
    build(json.loads(job.tokens.read_text()), job.model, job.device)
    return {}


def _quantize(job: Job) -> dict[str, Any]:
    quantize(job.model, job.output, job.device)
    return {}


def _forward(job: Job) -> dict[str, Any]:
    import torch
    import transformers

    from streamprune.hardware.half_precision import quicker_dtype

    # What a run computes in too, where nothing is chosen.
    dtype = quicker_dtype(transformers.AutoConfig.from_pretrained(job.model).dtype, torch.device(job.device))
    begun = time.perf_counter()
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        job.model, dtype=dtype, experts_implementation="grouped_mm"
    )
    # The decoder alone: the scoring pass needs no logits either.
    decoder = whole.eval().to(job.device).get_decoder()
    sequences = torch.tensor([json.loads(line)["input_ids"] for line in job.tokens.read_text().splitlines()])
    loaded = time.perf_counter()
    with torch.no_grad():
        for first in range(0, len(sequences), job.batch):
            decoder(input_ids=sequences[first : first + job.batch].to(job.device), use_cache=False)
    if job.device != "cpu":
        torch.cuda.synchronize(job.device)
    computing = time.perf_counter() - loaded
    return {
        "loading_seconds": loaded - begun,
        "computing_seconds": computing,
        "computed_in": str(dtype).removeprefix("torch."),
    }


def _score(job: Job) -> dict[str, Any]:
    scores = job.output.with_name(job.output.name + ".safetensors")
    return _watched(job, replace(job.settings(), output=scores, keep=None, only_score=True, overwrite=True))


def _run(job: Job) -> dict[str, Any]:
    return _watched(job, job.settings(**VARIANTS[job.kind]))


def _watched(job: Job, settings: RunSettings) -> dict[str, Any]:
    from measuring.watching import Watch
    from streamprune.pipeline.run import run

    with Watch(job.device) as watch:
        summary = run(settings, quiet=True).summary
    return {**_summary(summary, log_of(settings.output)), "watched": watch.seen()}


def _summary(summary: Mapping[str, Any], log: list[Mapping[str, Any]]) -> dict[str, Any]:
    """What streamprune reports of the run, and of every layer."""
    layers = [{name: event[name] for name in ("seconds", "peak_bytes")} for event in log if event["event"] == "block"]
    return {"summary": {name: summary[name] for name in SUMMARY if name in summary}, "layers": layers}


def _profile(job: Job) -> dict[str, Any]:
    from measuring.profiling import profile_layer, settings_for_profile

    return profile_layer(job, settings_for_profile(job.settings()))


def _machine(job: Job) -> dict[str, Any]:
    import torch

    from measuring.rate import copy_rates

    found: dict[str, Any] = {"matrix": _matrix(job), **copy_rates(job.device)}
    if job.device != "cpu":
        major, minor = torch.cuda.get_device_capability(job.device)
        found |= {"capability": f"{major}.{minor}", "free_bytes": torch.cuda.mem_get_info(job.device)[0]}
    return found


def _read(job: Job) -> dict[str, Any]:
    return {"bytes": disk.read_all(weight_files(job.model))}


def _copy(job: Job) -> dict[str, Any]:
    return {"bytes": disk.copy_and_sync(job.output, job.output.with_name("copied"))}


def _matrix(job: Job) -> dict[str, Any]:
    from measuring.rate import matrix_rate

    return matrix_rate(job.device)


def _paired(job: Job) -> dict[str, Any]:
    from measuring.repeated import paired_seconds, rounding_shares

    found = paired_seconds(job)
    return {**found, "shares": rounding_shares(job)} if job.kind == "quantizing" else found


def _pruning(job: Job) -> dict[str, Any]:
    from measuring.repeated import pruning_seconds

    return pruning_seconds(job)


KINDS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "build": _build, "device": _device, "import": _import, "forward": _forward, "quantize": _quantize,
    "score": _score, **dict.fromkeys(VARIANTS, _run),
    "read": _read, "copy": _copy, "matrix": _matrix, "pruning": _pruning,
    "machine": _machine, "profile": _profile, **dict.fromkeys(PAIRED, _paired),
}  # fmt: skip


class GpuPeaks:
    """The most that torch has held on the GPU, though streamprune begins to count anew after every layer."""

    def __init__(self, device: str) -> None:
        import torch

        self._device, self._allocated, self._reserved = device, 0, 0
        self._torch = torch.accelerator
        self._reset = torch.accelerator.reset_peak_memory_stats
        torch.accelerator.reset_peak_memory_stats = self._note_and_reset

    def _note_and_reset(self, *given: Any, **named: Any) -> None:
        self._note()
        self._reset(*given, **named)

    def _note(self) -> None:
        self._allocated = max(self._allocated, int(self._torch.max_memory_allocated(self._device)))
        self._reserved = max(self._reserved, int(self._torch.max_memory_reserved(self._device)))

    def figures(self) -> dict[str, int]:
        """Bytes of tensors, and bytes that torch held on the GPU for them and in reserve, each at its peak."""
        self._note()
        return {"vram_allocated_bytes": self._allocated, "vram_reserved_bytes": self._reserved}


def do(job: Job) -> dict[str, Any]:
    """Do the job; its figures. Seconds count from after the imports that all kinds share, so that they dilute no ratio.

    Raises StreampruneError for what streamprune refuses.
    """
    if job.kind in ("forward", *STREAMED, *PAIRED):
        _import_libraries(limited=job.kind != "forward")
        # transformers imports a model's code when it is first asked for.
        import transformers.models.auto.modeling_auto
        import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
    if job.kind in (*STREAMED, *PAIRED):
        import streamprune.pipeline.run  # noqa: F401
    gpu = GpuPeaks(job.device) if job.device != "cpu" and job.kind in ("forward", *STREAMED) else None
    begun, begun_cpu = time.perf_counter(), time.process_time()
    figures = KINDS[job.kind](job)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - begun_cpu
    from streamprune.hardware.memory import peak_resident_bytes

    measured = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_resident_bytes()}
    return {**figures, **measured, **(gpu.figures() if gpu else {})}


def main() -> None:
    """Do the job of the command line and print its figures. Ends with one line for what streamprune refuses."""
    try:
        print(json.dumps(do(Job.parse(sys.argv[1]))))
    except StreampruneError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
