"""From measured processes to the figures of the bench: ratios within each round, and their medians over the rounds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from measuring.shapes import FLOP_FORMULA, Work

MIB = 1024**2
GIB = 1024**3
#: Resident memory is to stay below two layers, the hidden states, and this for Python, the libraries and a workspace.
BESIDE_BYTES = int(0.7 * GIB)
#: The measured processes of a round, in their order: `copy` needs the output of `run`.
KINDS = ("forward", "score", "run", "read", "copy", "matrix")
OURS = ("score", "run")

Round = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Model:
    """What the figures have to know of the model: layers, tokens, hidden size, bytes, work per token, bytes a value."""

    layers: int
    tokens: int
    hidden: int
    layer_bytes: int
    weights_bytes: int
    work: Work
    itemsize: int = 2

    @property
    def states_bytes(self) -> int:
        """Bytes of the hidden states of all tokens, once."""
        return self.tokens * self.hidden * self.itemsize

    @property
    def memory_bound(self) -> int:
        """Resident bytes that a run may need on the CPU."""
        return 2 * self.layer_bytes + self.states_bytes + BESIDE_BYTES

    @property
    def flop(self) -> int:
        """FLOP of all tokens through all layers."""
        return self.tokens * self.layers * self.work.counted


def floor_seconds(one: Round) -> tuple[str, float]:
    """What sets the floor of a round, and its seconds: whichever of forward, reading and writing takes longest."""
    seconds = {
        "forward": one["forward"]["seconds"],
        "read": one["read"]["seconds"],
        "write": one["copy"]["seconds"],
    }
    longest = max(seconds, key=lambda kind: seconds[kind])
    return longest, seconds[longest]


def compare(rounds: Sequence[Round], model: Model) -> dict[str, Any]:
    """All figures of rounds in which each of `KINDS` was measured."""
    return {
        **_over_forward(rounds),
        **_over_floor(rounds),
        **_memory(rounds, model),
        **_arithmetic(rounds, model),
        "seconds_each": {
            kind: [round(one[kind]["seconds"], 3) for one in rounds] for kind in KINDS if kind != "matrix"
        },
    }


def busy(rounds: Sequence[Round]) -> dict[str, dict[str, float]]:
    """The busy shares of each resource that our processes report: medians. Empty if they report none."""
    found: dict[str, dict[str, float]] = {}
    for kind in OURS:
        shares = [one[kind]["summary"]["busy"] for one in rounds if one[kind]["summary"].get("busy")]
        if shares:
            found[kind] = {name: round(statistics.median(each[name] for each in shares), 3) for name in shares[0]}
    return found


def gpu_figures(rounds: Sequence[Round], kinds: Sequence[str]) -> dict[str, Any]:
    """Peaks on the GPU: of what tensors held, and of what torch held for them."""
    peaks = {kind: [gpu_peaks(one[kind]) for one in rounds] for kind in kinds}
    return {
        "peak_vram_mib": {kind: round(max(peak[0] for peak in each) / MIB) for kind, each in peaks.items()},
        "peak_vram_reserved_mib": {kind: round(max(peak[1] for peak in each) / MIB) for kind, each in peaks.items()},
    }


def gpu_peaks(process: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of tensors on the GPU at a process's peak, and bytes that torch held there at most."""
    of_layers = [layer["peak_bytes"] for layer in process.get("layers", ())]
    return max(process["vram_allocated_bytes"], *of_layers, 0), process["vram_reserved_bytes"]


def _median(rounds: Sequence[Round], kind: str, what: str) -> float:
    return statistics.median(float(one[kind][what]) for one in rounds)


def _over_forward(rounds: Sequence[Round]) -> dict[str, Any]:
    def ratio(kind: str, what: str) -> float:
        ratios = (float(one[kind][what]) / float(one["forward"][what]) for one in rounds)
        return round(statistics.median(ratios), 3)

    computing = [one["forward"]["computing_seconds"] for one in rounds]
    return {
        "forward_seconds": round(_median(rounds, "forward", "seconds"), 2),
        "forward_computing_seconds": round(statistics.median(computing), 2),
        "score_over_forward": ratio("score", "seconds"),
        "run_over_forward": ratio("run", "seconds"),
        # Processor time says more than wall time when something else runs on the machine.
        "score_over_forward_cpu": ratio("score", "cpu_seconds"),
        "run_over_forward_cpu": ratio("run", "cpu_seconds"),
        # From the start of Python to its end, with the imports.
        "score_over_forward_process": ratio("score", "process_seconds"),
        "run_over_forward_process": ratio("run", "process_seconds"),
        # Stricter: nothing of ours is left out, but of the forward the loading of the model is.
        "score_over_forward_computing": round(
            statistics.median(one["score"]["seconds"] / each for one, each in zip(rounds, computing, strict=True)), 3
        ),
    }


def _over_floor(rounds: Sequence[Round]) -> dict[str, Any]:
    floors = [floor_seconds(one) for one in rounds]
    return {
        "read_seconds": round(_median(rounds, "read", "seconds"), 3),
        "copy_seconds": round(_median(rounds, "copy", "seconds"), 3),
        "output_mib": round(rounds[0]["copy"]["bytes"] / MIB),
        "floor_seconds": round(statistics.median(seconds for _, seconds in floors), 3),
        "floor_set_by": Counter(kind for kind, _ in floors).most_common(1)[0][0],
        **{
            f"{kind}_over_floor": round(
                statistics.median(one[kind]["seconds"] / floor for one, (_, floor) in zip(rounds, floors, strict=True)),
                3,
            )
            for kind in OURS
        },
    }


def _memory(rounds: Sequence[Round], model: Model) -> dict[str, Any]:
    kinds = ("forward", *OURS, "read")
    peaks = {kind: max(one[kind]["peak_bytes"] for one in rounds) for kind in kinds}
    bound = model.memory_bound
    return {
        "peak_mib": {kind: round(peak / MIB) for kind, peak in peaks.items()},
        "layer_mib": round(model.layer_bytes / MIB, 1),
        "states_mib": round(model.states_bytes / MIB, 1),
        "memory_bound_mib": round(bound / MIB),
        "peak_over_bound": {kind: round(peaks[kind] / bound, 3) for kind in OURS},
        "memory_bound_kept": all(peaks[kind] <= bound for kind in OURS),
    }


def _arithmetic(rounds: Sequence[Round], model: Model) -> dict[str, Any]:
    def share(kind: str, what: str) -> float:
        rates = (model.flop / float(one[kind][what]) / float(one["matrix"]["flop_per_second"]) for one in rounds)
        return statistics.median(rates)

    return {
        "tokens_per_second": {
            kind: round(model.tokens / _median(rounds, kind, "seconds")) for kind in ("forward", *OURS)
        },
        "flop_per_token_and_layer": {
            "matrices": model.work.matrices,
            "attention_causal_half": model.work.attention_causal,
            "attention_full": model.work.attention_full,
        },
        "flop_formula": FLOP_FORMULA,
        "matrix_rate_tflops": round(_median(rounds, "matrix", "flop_per_second") / 1e12, 4),
        "achieved_tflops": round(model.flop / _median(rounds, "score", "seconds") / 1e12, 4),
        "achieved_share": round(share("score", "seconds"), 4),
        # The same of the plain forward, its loading left out.
        "forward_achieved_share": round(share("forward", "computing_seconds"), 4),
    }
