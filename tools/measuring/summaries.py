"""One line for people about each part of tools/gpu_check, from its figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

#: Characters of an error that are shown: its end says most.
ERROR_SHOWN = 1500

Figures = Mapping[str, Any]


def summary(name: str, figures: Figures) -> str:
    """The line of a part; of one that failed also the end of its error."""
    spent = f" [{figures.get('part_seconds', 0):.0f} s]"
    if "error" in figures:
        return f"{name}: FAILED{spent}: {str(figures['error'])[-ERROR_SHOWN:]}"
    if "skipped" in figures:
        return f"{name}: skipped: {figures['skipped']}"
    try:
        return f"{name}: {LINES[name](figures)}{spent}"
    # The figures are what counts: they are saved all the same.
    except Exception as error:
        return f"{name}: done{spent}, but its line cannot be made: {type(error).__name__}: {error}"


def _machine(found: Figures) -> str:
    gpu = found.get("nvidia_smi") or {}
    rates = [
        f"{found['matrix_rate_tflops']} TFLOP/s ({found['matrix_dtype']})",
        f"copy {found['copy_gb_per_second']} GB/s",
    ]
    if "to_gpu_gb_per_second" in found:
        rates.append(f"to GPU {found['to_gpu_gb_per_second']}, from GPU {found['from_gpu_gb_per_second']} GB/s")
    return (
        f"{gpu.get('name', 'no GPU')}, driver {gpu.get('driver_version', '-')}, {', '.join(rates)}, "
        f"{found['free_ram_gib']} GiB RAM and {found['free_disk_gib']} GiB disk free, "
        f"torch {found['versions'].get('torch')}, transformers {found['versions'].get('transformers')}"
    )


def _tests(found: Figures) -> str:
    return str(found["result"])


def _streamed(found: Figures) -> str:
    sync = found["sync_warnings"]["count"]
    gap = "unknown" if found["gap_seconds"] is None else f"{found['gap_seconds']} s"
    plan = f"plan {found['plan_gib']} GiB, " if found.get("plan_gib") is not None else ""
    peak = (
        f"peak {found['peak_vram_gib']} GiB allocated / {found['peak_vram_reserved_gib']} reserved"
        if "peak_vram_gib" in found
        else f"peak {found['peak_mib']} MiB resident"
    )
    return (
        f"{found['seconds_per_layer']} s/layer, gap {gap}, {found['own_read_gb_per_second']} GB/s read (plain "
        f"{found['read_gb_per_second']}), {found['achieved_share']:.0%} of the matrix rate, {plan}{peak}, "
        f"{sync} sync warnings; {found['layers_of_the_model']} layers: {found['seconds_for_the_model']} s"
    )


def _ms(way: Figures) -> str:
    return f"{way['ms']:.2f} ms" if "ms" in way else "FAILED"


def _profile(found: Figures) -> str:
    parts = []
    if "error" not in found["timing"]:
        timing = found["timing"]
        kinds = ("plain", "recording", "recording_by_torch")
        plain, recording, by_torch = (statistics.median(timing[f"{kind}_ms"]) for kind in kinds)
        parts.append(
            f"recording {recording:.1f} ms, plain {plain:.1f} ms (x{timing['recording_over_plain']}), submitted in "
            f"{timing['submitting_ms']:.1f} ms; by torch alone {by_torch:.1f} ms "
            f"(x{timing['recording_by_torch_over_plain']})"
        )
        for choice in timing["pair_kernel"]:
            parts.append(f"kernel {'used' if choice['kernel'] else 'NOT used'}: {choice['why']}")
    if "error" not in found["outputs"]:
        experts = found["outputs"]["experts"]
        parts.append(
            f"experts' output differs by {experts['max_difference_over_max']:.1e} max, "
            f"{experts['mean_difference_over_mean']:.1e} mean, twice the same: "
            f"{experts['recorded_twice_the_same_to_the_bit']}"
        )
    if "error" not in found["part_sizes"]:
        sizes = found["part_sizes"]["ms"]
        parts.append(
            "parts " + ", ".join(f"2^{int(size).bit_length() - 1} {ms:.1f}" for size, ms in sizes.items()) + " ms"
        )
    if "error" not in found["sync_warnings"]:
        parts.append(f"{found['sync_warnings']['count']} sync warnings")
    if "error" not in found["kernels"]:
        parts.append(
            "top " + ", ".join(f"{row[0][:40]} {row[1]:.1f} ms x{row[2]}" for row in found["kernels"]["top"][:4])
        )
    if "error" not in found["products"]:
        for dtype in ("bfloat16", "float16", "float32"):
            ways = found["products"].get(dtype, {})
            if ways:
                parts.append(f"product in {dtype}: " + ", ".join(f"{name} {_ms(way)}" for name, way in ways.items()))
    failed = [name for name, value in found.items() if isinstance(value, dict) and "error" in value]
    parts += [f"{name} FAILED: {found[name]['error'][-300:]}" for name in failed]
    return "; ".join(parts)


def _bench(found: Figures) -> str:
    return (
        f"score {found['score_seconds']} s over plain forward {found['forward_seconds']} s: "
        f"x{found['score_over_forward']}; x{found['score_over_forward_computing']} over its computing alone "
        f"({found['forward_computing_seconds']} s), {found['tokens']} tokens"
    )


def _ram(found: Figures) -> str:
    return (
        f"states in RAM {found['ram_seconds_per_layer']} s/layer, on the GPU {found['device_seconds_per_layer']} s: "
        f"x{found['ram_over_device']}, {found['ram_peak_vram_gib']} against {found['device_peak_vram_gib']} GiB"
    )


def _fit(found: Figures) -> str:
    measured = {item["name"]: item for item in found["measured"] or ()}
    errors = ", ".join(f"{name} {item['error']:+.1%}" for name, item in measured.items())
    return (
        f"{found['budget_gib']:.2f} GiB keep {found['experts_per_layer']} experts, predicted "
        f"{found['predicted']['total_bytes'] / 2**30:.2f} GiB; predicted over measured: {errors or 'needs a GPU'}"
    )


LINES = {
    "machine": _machine, "smoke": _tests, "score": _streamed, "run": _streamed, "profile": _profile, "bench": _bench,
    "ram": _ram, "tests": _tests, "fit": _fit,
    **dict.fromkeys(("narrow", "refit", "fp8", "w4a16", "from-fp8"), _streamed),
}  # fmt: skip
